"""Compressed folders in a few bits: loaded, saved, exported, measured, looked into."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from few_bits import folder_in_bits, in_bits, mixed
from models import IDS, load, logits, on_disk, read_plan, rebuilt
from moefactor.evaluation import evaluate
from moefactor.export import export_dense
from moefactor.forms import Quantised
from moefactor.inspection import inspect, kernels_of
from moefactor.runtime.module import FactorisedExperts

# What is compressed, and how it is rounded: rows of one precision or several, alone, in a latent space, of a mixture.
KINDS = {
    "channels": ("qwen3_moe", "channels", {}, mixed),
    "fast": ("qwen3_moe", "biaxial", {"refine_steps": 1}, mixed),
    "fast, one precision": ("gpt_oss", "biaxial", {"refine_steps": 1}, lambda form: in_bits(form, 4)),
    "tight": ("qwen3_moe", "biaxial", {"form": "tight", "steps": 5, "refine_steps": 1}, mixed),
    "svd": ("mixtral", "svd", {}, lambda form: in_bits(form, 5)),
}


@pytest.fixture(scope="session")
def in_few_bits(compressed: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    made: dict = {}

    def make(kind: str, dtype: torch.dtype = torch.float32) -> Path:
        if (kind, dtype) not in made:
            architecture, method, options, wrap = KINDS[kind]
            source = compressed(architecture, method, dtype=dtype, **options)
            made[kind, dtype] = folder_in_bits(source, tmp_path_factory.mktemp("bits") / "model", wrap)
        return made[kind, dtype]

    return make


def experts_of(model: torch.nn.Module) -> list[FactorisedExperts]:
    return [m for m in model.modules() if isinstance(m, FactorisedExperts)]


@pytest.mark.parametrize("kind", KINDS)
def test_it_runs_as_the_numbers_that_it_stands_for(
    kind: str, in_few_bits: Callable[..., Path], tiny_model: Callable[..., Path]
) -> None:
    folder, dense = in_few_bits(kind), load(tiny_model(KINDS[kind][0]))
    model = load(folder)
    assert all(isinstance(form, Quantised) for module in experts_of(model) for form in module.forms.values())
    expected = logits(rebuilt(dense, folder))
    assert float((logits(model) - expected).norm() / expected.norm()) < 1e-4
    one = logits(model, IDS[:1, :1])  # what decoding calls
    torch.testing.assert_close(one, logits(model)[:1, :1], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_resident_bytes_are_the_bits(
    dtype: torch.dtype, in_few_bits: Callable[..., Path], tiny_model: Callable[..., Path]
) -> None:
    """Codes keep their type whatever the model is loaded in; nothing unpacked stays behind."""
    folder = in_few_bits("fast", torch.bfloat16)
    model = load(folder, dtype=dtype)
    logits(model)
    plan = read_plan(folder, load(tiny_model("qwen3_moe", torch.bfloat16)))
    held = [t for module in experts_of(model) for t in (*module.parameters(), *module.buffers())]
    assert 8 * sum(t.untyped_storage().nbytes() for t in held) == plan.bits(8 * dtype.itemsize)
    assert {t.dtype for t in held} == {dtype, torch.int32}
    assert sum(module.parameter_count() for module in experts_of(model)) == plan.parameter_count()


def test_bfloat16_is_near_float32(in_few_bits: Callable[..., Path]) -> None:
    folder = in_few_bits("fast", torch.bfloat16)
    exact, near = logits(load(folder, dtype=torch.float32)), logits(load(folder)).float()
    assert float((exact - near).norm() / exact.norm()) < 0.1


@pytest.mark.parametrize("kind", ["channels", "tight"])
def test_saving_gives_the_same_tensors(kind: str, in_few_bits: Callable[..., Path], tmp_path: Path) -> None:
    folder = in_few_bits(kind)
    model = load(folder)
    said = logits(model)
    model.save_pretrained(tmp_path)
    before, after = on_disk(folder), on_disk(tmp_path)
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert torch.equal(logits(load(tmp_path)), said)


def test_scales_are_trained_and_codes_are_not(in_few_bits: Callable[..., Path]) -> None:
    model = load(in_few_bits("tight"))
    model(input_ids=IDS, labels=IDS).loss.backward()
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            assert parameter.requires_grad == (parameter.grad is not None) == ("_codes" not in name)


@pytest.mark.parametrize("kind", ["fast", "tight", "fast, one precision"])
def test_exported_it_is_an_ordinary_model(kind: str, in_few_bits: Callable[..., Path], tmp_path: Path) -> None:
    folder = in_few_bits(kind)
    out = export_dense(str(folder), tmp_path / "dense")
    expected = logits(load(folder))
    assert float((logits(load(out)) - expected).norm() / expected.norm()) < 1e-4


def test_what_is_measured(in_few_bits: Callable[..., Path], text_file: Path, tiny_model: Callable[..., Path]) -> None:
    folder = in_few_bits("channels", torch.bfloat16)
    found = evaluate(str(folder), [str(text_file)], window=32, max_windows=2)
    dense = evaluate(str(tiny_model("qwen3_moe", torch.bfloat16)), [str(text_file)], window=32, max_windows=2)
    plan = json.loads((folder / "plan.json").read_text())
    assert found.expert_parameters == plan["expert_parameters"]["after"]
    assert dense.expert_parameters == plan["expert_parameters"]["before"]
    assert dense.parameters - found.parameters == dense.expert_parameters - found.expert_parameters
    assert dense.expert_bits == 16
    assert found.expert_bits == 8 * found.expert_bytes / dense.expert_parameters
    assert 2 < found.expert_bits < 6


def test_what_it_is_and_how_it_is_run(in_few_bits: Callable[..., Path], command: Callable) -> None:
    folder = in_few_bits("fast", torch.bfloat16)
    assert inspect(str(folder)).layers[0].experts == 8
    assert {choice.kernel for choice in kernels_of(str(folder))} == {"dequantised expert by expert"}
    code, out, _ = command("methods", "--kernels", folder)
    assert code == 0
    assert "dequantised expert by expert" in out
    code, out, _ = command("inspect", folder)
    assert code == 0
