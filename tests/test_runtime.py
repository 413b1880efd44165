"""A compressed folder in plain transformers: memory, dtypes, generation, saving, and readers without the package."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import moefactor
from models import load, logits, on_disk, read_plan
from moefactor.checkpoint import INDEX
from moefactor.errors import UserError
from moefactor.runtime.module import FactorisedExperts
from tiny import TINY, build


def experts_of(model: torch.nn.Module) -> list[FactorisedExperts]:
    return [m for m in model.modules() if isinstance(m, FactorisedExperts)]


@pytest.fixture(scope="module")
def folder(compressed: Callable[..., Path]) -> Path:
    return compressed("qwen3_moe", "rfid", dtype=torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_resident_expert_bytes_are_the_plans(folder: Path, dtype: torch.dtype, tiny_model: Callable) -> None:
    model = load(folder, dtype=dtype)
    plan = read_plan(folder, load(tiny_model("qwen3_moe", torch.bfloat16)))
    resident = sum(p.untyped_storage().nbytes() for m in experts_of(model) for p in m.parameters())
    assert resident == plan.parameter_count() * dtype.itemsize
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert logits(model).dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("kind", ["mixtral", "minimax_m2", "deepseek_v3"])
def test_every_other_tensor_has_the_dtype_that_the_dense_model_gives_it(
    kind: str, dtype: torch.dtype, compressed: Callable[..., Path], tiny_model: Callable[..., Path]
) -> None:
    """Also where its name on disk is another one, or the architecture keeps it in float32."""
    dense = load(tiny_model(kind, torch.bfloat16), dtype=dtype).state_dict()
    found = load(compressed(kind, dtype=torch.bfloat16), dtype=dtype).state_dict()
    same = dense.keys() & found.keys()
    assert len(same) > 10
    assert {name: found[name].dtype for name in same} == {name: dense[name].dtype for name in same}


def test_the_experts_have_no_rule_of_parallelism(folder: Path, tiny_model: Callable[..., Path]) -> None:
    """Or tensor parallelism would all-reduce their output twice."""
    dense, model = load(tiny_model("qwen3_moe", torch.bfloat16)), load(folder)
    assert any(".experts" in name for name in dense._tp_plan)
    assert any(".experts" in name for name in dense._ep_plan)
    assert model._tp_plan
    assert not [name for name in {**model._tp_plan, **model._ep_plan} if ".experts" in name]


def test_the_checkpoints_dtype_is_the_default(folder: Path) -> None:
    assert {t.dtype for t in on_disk(folder).values()} == {torch.bfloat16}
    assert load(folder).dtype == torch.bfloat16


def test_bfloat16_is_near_float32(folder: Path) -> None:
    exact, rounded = logits(load(folder, dtype=torch.float32)), logits(load(folder)).float()
    assert float((exact - rounded).norm() / exact.norm()) < 0.1


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_one_token_at_a_time_is_all_at_once(kind: str, compressed: Callable[..., Path]) -> None:
    """Decoding with a cache: single tokens leave most experts, and whole ranks, without rows."""
    model = load(compressed(kind, "rfid", projections=("gate", "up", "down")))
    prompt = torch.arange(8)[None] * 3
    out = model.generate(prompt, max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert out.shape == (1, 14)
    assert torch.equal(logits(model, out)[0, 7:-1].argmax(-1), out[0, 8:])


def test_device_map_auto(folder: Path) -> None:
    assert torch.equal(logits(load(folder, device_map="auto").cpu()), logits(load(folder)))


def test_layers_put_off_to_disk(compressed: Callable[..., Path], tmp_path: Path) -> None:
    """accelerate leaves such a layer's parameters on the meta device, where they look like missing ones."""
    folder = compressed("qwen3_moe", "svd")
    places = dict.fromkeys(("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    model = load(folder, device_map={**places, "model.layers.1": "disk"}, offload_folder=tmp_path)
    assert torch.equal(logits(model), logits(load(folder)))


def test_gradients_reach_the_factors(compressed: Callable[..., Path]) -> None:
    model = load(compressed("qwen3_moe", "rfid"))
    model(input_ids=torch.arange(30)[None], labels=torch.arange(30)[None]).loss.backward()
    named = [(n, p) for n, p in model.named_parameters() if ".experts." in n]
    assert named
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for _, p in named)


def test_a_saved_copy_is_guarded_too(folder: Path, tmp_path: Path) -> None:
    load(folder).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["experts_implementation"] == "moefactor"
    assert config["quantization_config"]["quant_method"] == "moefactor"
    assert "auto_map" not in config  # its file is not there
    assert torch.equal(logits(load(tmp_path)), logits(load(folder)))


def test_tokens_for_no_expert(compressed: Callable[..., Path]) -> None:
    """Expert parallelism marks other ranks' pairs by ids >= E."""
    experts = experts_of(load(compressed("gpt_oss", "svd")))[0]  # with biases
    x, weights = torch.randn(5, 32), torch.rand(5, 2)
    ids = torch.tensor([[0, 8], [8, 8], [3, 5], [8, 2], [7, 8]])
    with torch.no_grad():
        out = experts(x, ids, weights)
        assert torch.equal(out[1], torch.zeros(32))
        for slot in ((0, 0), (3, 1), (4, 0)):
            alone = experts(x[slot[0], None], ids[slot][None, None], weights[slot][None, None])
            torch.testing.assert_close(out[slot[0]], alone[0])
        assert experts(x[:0], ids[:0], weights[:0]).shape == (0, 32)


# -- what must not go unnoticed ------------------------------------------------------------------------------------


def rewritten(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """The folder with its tensors changed, in one file."""
    tensors = on_disk(folder)
    change(tensors)
    for path in [*folder.glob("*.safetensors"), folder / INDEX]:
        path.unlink()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_a_missing_expert_tensor_is_named(kind: str, compressed: Callable[..., Path], copied: Callable) -> None:
    folder = copied(compressed(kind, "svd"))
    gone = next(name for name in sorted(on_disk(folder)) if ".experts.down_private" in name)
    with pytest.raises(UserError, match=f"{gone}: missing from the checkpoint"):
        load(rewritten(folder, lambda tensors: tensors.pop(gone)))


def test_an_expert_tensor_of_another_shape(compressed: Callable[..., Path], copied: Callable) -> None:
    def shorten(tensors: dict[str, torch.Tensor]) -> None:
        name = next(name for name in sorted(tensors) if ".experts.down_private" in name)
        tensors[name] = tensors[name][:, :, :-1].contiguous()

    with pytest.raises((RuntimeError, ValueError), match=r"size|shape"):
        load(rewritten(copied(compressed("qwen3_moe", "svd")), shorten))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q: q.update(format_version=99), "format_version 99.*Install a version that reads it"),
        (lambda q: q["layers"].pop(), "does not describe these experts"),
        (lambda q: q["layers"][0].update(hidden=999), "hidden = 999"),
    ],
)
def test_a_quantization_config_that_does_not_fit(
    change: Callable, message: str, compressed: Callable[..., Path], copied: Callable
) -> None:
    folder = copied(compressed("qwen3_moe", "svd"))
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        load(folder)


def python(code: str) -> subprocess.CompletedProcess:
    start = "from transformers import AutoModelForCausalLM as A\n"
    return subprocess.run([sys.executable, "-c", start + code], capture_output=True, text=True, check=False)


def test_without_the_package_loading_fails(folder: Path, tmp_path: Path) -> None:
    """Rather than a model with random experts, which would still generate. A copy by save_pretrained fails too."""
    load(folder).save_pretrained(tmp_path)
    done = python(
        f"""
for folder in ({str(folder)!r}, {str(tmp_path)!r}):
    try:
        A.from_pretrained(folder)
    except Exception as error:
        print("moefactor" in str(error))
    else:
        print("loaded")
"""
    )
    assert done.stdout.split() == ["True", "True"], done.stderr


def test_trust_remote_code_brings_the_package_in(folder: Path) -> None:
    done = python(
        f"m = A.from_pretrained({str(folder)!r}, trust_remote_code=True)\n"
        "print(sum(type(x).__name__ == 'FactorisedExperts' for x in m.modules()))"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["2"]


HIDDEN = """
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "moefactor":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Hide())
"""


def test_trust_remote_code_says_what_to_install(folder: Path) -> None:
    done = python(f"{HIDDEN}\nA.from_pretrained({str(folder)!r}, trust_remote_code=True)")
    assert done.returncode != 0
    assert "pip install moefactor" in done.stderr


def test_prefixes_of_wrappers_do_not_matter(tmp_path: Path) -> None:
    """Names match by their ends: a vision-language model has `model.language_model.layers` for `model.layers`."""
    from moefactor.discover import find_experts
    from moefactor.runtime.format import layer_plans

    assert "mixtral" in TINY
    source = build("mixtral", tmp_path / "m")
    out = moefactor.compress(str(source), "svd", 0.4, tmp_path / "out")
    layers = find_experts(load(source), "m")
    data = json.loads((out / "config.json").read_text())["quantization_config"]
    for entry in data["layers"]:
        entry["name"] = entry["name"].replace("model.", "model.language_model.", 1)
    assert [plan.layer for plan in layer_plans(data, layers)] == layers
    for entry in data["layers"]:
        entry["name"] = entry["name"].replace("layers.1", "layers.7")
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.experts.*does not describe"):
        layer_plans(data, layers)
