"""Compressed folders served by SGLang's engine on a CPU: greedy tokens equal to transformers', in float32.

Needs an environment of its own, with SGLang 0.5.23 beside a torch for CPUs: `pip install --no-deps sglang==0.5.23`, and
what it imports. Of its compiled kernels none.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryFile
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import moefactor
from moefactor.errors import UserError
from moefactor.experts import ExpertLayer
from moefactor.forms import Dense
from moefactor.plan import LayerPlan
from served import Answers, lose, make, transformers_says

if find_spec("sglang") is None:
    pytest.skip("SGLang has an environment of its own", allow_module_level=True)

from sglang_says import PROGRAM  # before SGLang, which it sets up

# isort: split
from moefactor.runtime import engine, sglang
from moefactor.runtime.parallel import Share

FORMS = ("svd", "rfid", "d2moe", "mobe", "channels", "fast", "tight")
# SGLang's engine for CPUs lacks what others have beside their experts: DeepSeek's unscaled rotary embedding, gpt-oss's
# attention, Qwen2-MoE's shared expert.
ARCHITECTURES = {"mixtral": {}, "olmoe": {"num_key_value_heads": 4}, "granitemoe": {}, "glm4_moe": {}}


@pytest.fixture(scope="session")
def made(reference_moe: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`made("fast")`: the reference model in that form, its embeddings stored twice: SGLang's Qwen3-MoE ties none."""
    root = tmp_path_factory.mktemp("sglang")
    source = root / "source"
    source.mkdir()
    for path in reference_moe.glob("*.json"):
        (source / path.name).write_bytes(path.read_bytes())
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    tensors = load_file(reference_moe / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    return cache(lambda name: make(name, source, text_file, root / name))


def sglang_says(folder: Path, ranks: int = 1) -> Answers:
    """AssertionError, with what it printed, where SGLang stops."""
    command = [sys.executable, str(PROGRAM), str(folder), str(ranks)]
    with TemporaryFile("w+") as printed:  # a pipe would wait for what an engine leaves behind
        done = subprocess.run(command, stdout=printed, stderr=subprocess.STDOUT, check=False, timeout=300)
        printed.seek(0)
        lines = printed.read().splitlines()
    assert done.returncode == 0, "\n".join(lines)
    return json.loads(next(line for line in reversed(lines) if line.startswith("[[")))


def assert_same(folder: Path, ranks: int = 1) -> None:
    for (tokens, theirs), (ours, said) in zip(transformers_says(folder), sglang_says(folder, ranks), strict=True):
        assert ours == tokens
        assert said == pytest.approx(theirs, abs=1e-3)


@pytest.mark.parametrize("name", FORMS)
def test_every_form(made: Callable[[str], Path], name: str) -> None:
    assert_same(made(name))


@pytest.mark.parametrize("name", ["fast", "tight"])
def test_two_ranks(made: Callable[[str], Path], name: str) -> None:
    assert_same(made(name), ranks=2)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_architecture(tiny_model: Callable[..., Path], text_file: Path, tmp_path: Path, kind: str) -> None:
    source = tiny_model(kind, **ARCHITECTURES[kind])
    out = moefactor.compress(
        str(source), "biaxial", 0.4, tmp_path / "out", calibration=str(text_file), samples=4, seqlen=16, refine_steps=1,
        own_text=0.0,
    )  # fmt: skip
    assert_same(out)


@pytest.mark.parametrize("tensor", ["mlp.experts.gate_up_basis", "self_attn.o_proj.weight"])
def test_a_lost_tensor_is_named(made: Callable[[str], Path], copied: Callable[[Path], Path], tensor: str) -> None:
    folder, tensor = copied(made("fast")), f"model.layers.1.{tensor}"
    lose(folder, tensor)
    with pytest.raises(AssertionError, match=rf"UserError: .*{re.escape(tensor)}"):
        sglang_says(folder)


PLAN = LayerPlan(
    ExpertLayer("model.layers.0.mlp.experts", "model.layers.0", 4, 6, 8),
    {"gate_up": Dense(4, 12, 8), "down": Dense(4, 6, 8)},
)


def layer(shared: int = 0, **changes: object) -> SimpleNamespace:
    """What the plug-in looks at of SGLang's layer."""
    config = {
        "activation": "silu", "is_gated": True, "gemm1_alpha": None, "gemm1_clamp_limit": None, "swiglu_limit": None,
        "apply_router_weight_on_input": False, "no_combine": False, "routed_scaling_factor": None,
    }  # fmt: skip
    return SimpleNamespace(
        moe_runner_config=SimpleNamespace(**config | changes), with_bias=False, num_fused_shared_experts=shared
    )


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"shared": 1}, "--disable-shared-experts-fusion"),
        ({"apply_router_weight_on_input": True}, "weigh the experts' inputs"),
        ({"activation": "situ"}, "activation situ is not served"),
        ({"gemm1_clamp_limit": 7.0}, "activation silu is not served"),  # clamped behind SiLU: nobody has asked
    ],
)
def test_what_it_was_not_written_for(changes: dict, says: str) -> None:
    with pytest.raises(UserError, match=rf"model\.layers\.0\.mlp\.experts: .*{says}"):
        sglang.FactorisedMoEMethod(layer(**changes), PLAN)


def test_a_model_that_builds_experts_of_its_own_is_refused() -> None:
    model = torch.nn.Module()
    model.quant_config = sglang.MoefactorConfig({"layers": []})
    with pytest.raises(UserError, match="Module builds experts of its own"):
        sglang.load_weights(pytest.fail, model, (), torch.device("cpu"))


def test_the_activation_of_gpt_oss_is_sglangs() -> None:
    from sglang.srt.layers.moe.moe_runner.triton_utils import fused_moe

    first = 5 * torch.randn(7, 12, generator=torch.Generator().manual_seed(0))
    theirs = fused_moe.swiglu_no_interleaved_with_alpha_and_limit._torchdynamo_orig_callable(first, 1.702, 7.0)
    method = sglang.FactorisedMoEMethod(layer(gemm1_alpha=1.702, gemm1_clamp_limit=7.0), PLAN)
    torch.testing.assert_close(method.activation(first), theirs)


@pytest.mark.parametrize("cuda", [False, True])
def test_who_multiplies_by_the_routers_factor(monkeypatch: pytest.MonkeyPatch, cuda: bool) -> None:
    """SGLang's runners on a GPU, its models elsewhere."""
    from sglang.srt.layers.moe.token_dispatcher.standard import StandardDispatchOutput
    from sglang.srt.layers.moe.topk import StandardTopKOutput

    monkeypatch.setattr(sglang, "is_cuda", lambda: cuda)
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(spec.shape, generator=generator) for name, spec in PLAN.tensors().items()}
    x, weights = torch.randn(3, 8, generator=generator), torch.rand(3, 2, generator=generator)
    ids = torch.tensor([[0, 3], [2, -1], [-1, -1]], dtype=torch.int32)
    own = layer(routed_scaling_factor=2.5)
    method = sglang.FactorisedMoEMethod(own, PLAN)
    experts = engine.EngineExperts.holding(
        PLAN, tensors, Share.of_channels(PLAN, 0, 1), torch.float32, "cpu", method.activation
    )
    method.key = engine.announce("layer", experts)
    output = method.apply(own, StandardDispatchOutput(x, None, StandardTopKOutput(weights, ids, x)))
    expected = torch.zeros_like(x)
    for token, place in [(0, 0), (0, 1), (1, 0)]:
        e = ids[token, place]
        gate, up = (tensors["gate_up_weight"][e] @ x[token]).chunk(2)
        expected[token] += weights[token, place] * (torch.nn.functional.silu(gate) * up) @ tensors["down_weight"][e]
    torch.testing.assert_close(output.hidden_states, expected * (2.5 if cuda else 1))
