"""Compressed folders served by vLLM on a CPU: greedy tokens equal to transformers', in float32. `make test-vllm`.

bfloat16 would not do: it flips routers, and the untouched model too differs after some tokens.
"""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import moefactor
from moefactor.errors import UserError
from served import FORMS, PROMPTS, TOKENS, Answers, lose, make, transformers_says

if find_spec("vllm") is None:
    pytest.skip("vLLM has an environment of its own: make test-vllm", allow_module_level=True)

# Before vLLM is imported. Its engine stays in this process, so that models need not pay for its start one by one.
os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR",
}  # fmt: skip
import vllm

# Attention as small as vLLM's kernels for CPUs take it.
WIDE = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
MLA = {**WIDE, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128, "kv_lora_rank": 512, "head_dim": 64}
# Which vLLM, unlike transformers, does not know by itself.
ROUTER = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}
ARCHITECTURES = {
    "qwen3_moe": {**WIDE, "head_dim": 32},
    "qwen2_moe": {**WIDE, "head_dim": 32},
    "mixtral": WIDE,
    "olmoe": WIDE,
    "granitemoe": WIDE,
    "glm4_moe": {**WIDE, "head_dim": 32},
    "gpt_oss": {**WIDE, "head_dim": 32},
    "deepseek_v2": MLA,
    "deepseek_v3": MLA | ROUTER,
}


@pytest.fixture(scope="session")
def made(reference_moe: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`made("fast")`: the reference model in that form."""
    root = tmp_path_factory.mktemp("served")
    return cache(lambda name: make(name, reference_moe, text_file, root / name))


def vllm_says(folder: Path, look: Callable | None = None, **engine: object) -> Answers:
    """The same of vLLM. look: is given vLLM's model."""
    engine = {"enforce_eager": True, **engine}
    model = vllm.LLM(str(folder), dtype="float32", max_model_len=64, max_num_seqs=4, **engine)
    try:
        if look:
            look(model.llm_engine.model_executor.driver_worker.get_model())
        sampling = vllm.SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, logprobs=1)
        prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
        answers = []
        for request in model.generate(prompts, sampling, use_tqdm=False):
            said = request.outputs[0]
            tokens = list(said.token_ids)
            answers.append((tokens, [p[t].logprob for p, t in zip(said.logprobs, tokens, strict=True)]))
        return answers
    finally:
        model.llm_engine.engine_core.shutdown()
        del model
        gc.collect()


def assert_same(folder: Path, tolerance: float = 1e-3, **engine: object) -> None:
    """Equal tokens, and their log-probabilities to within `tolerance` nats. A wider one allows for a tie that falls the
    other way, after half of the tokens, and looks no further."""
    for (tokens, theirs), (ours, said) in zip(transformers_says(folder), vllm_says(folder, **engine), strict=True):
        same = next((n for n, (a, b) in enumerate(zip(tokens, ours, strict=True)) if a != b), TOKENS)
        assert said[:same] == pytest.approx(theirs[:same], abs=tolerance)
        if tolerance > 1e-3 and TOKENS // 2 <= same < TOKENS:
            assert said[same] == pytest.approx(theirs[same], abs=tolerance)
        else:
            assert ours == tokens


@pytest.mark.parametrize("name", FORMS)
def test_every_form(made: Callable[[str], Path], name: str) -> None:
    folder = made(name)
    assert_same(folder)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_architecture(
    tiny_model: Callable[..., Path], text_file: Path, tmp_path: Path, kind: str
) -> None:  # fmt: skip
    """Uneven experts in a latent space: what the models' own loaders would not know where to put."""
    source = tiny_model(kind, **ARCHITECTURES[kind])
    out = moefactor.compress(
        str(source), "biaxial", 0.4, tmp_path / "out", calibration=str(text_file), samples=4, seqlen=16, refine_steps=1,
        own_text=0.0,
    )  # fmt: skip
    # vLLM's latent attention for CPUs is 4e-3 nats away for the untouched model, enough to turn a router round.
    assert_same(out, 0.05 if "kv_lora_rank" in ARCHITECTURES[kind] else 1e-3)


@pytest.mark.parametrize("name", ["fast", "tight", "channels", "rfid", "mobe", "d2moe", "few_bits"])
def test_two_ranks(made: Callable[[str], Path], name: str) -> None:
    folder = made(name)
    assert_same(folder, tensor_parallel_size=2)


@pytest.mark.parametrize("bits", [8, 4])
def test_the_rest_in_few_bits(reference_moe: Path, tmp_path: Path, bits: int) -> None:
    """Numbers again as they are loaded; a tied embedding among them."""
    assert_same(moefactor.compress(str(reference_moe), "svd", 0.4, tmp_path / "out", rest_bits=bits))


@pytest.mark.parametrize("name", ["tight", "few_bits"])
def test_compiled(made: Callable[[str], Path], name: str) -> None:
    folder = made(name)
    assert_same(folder, enforce_eager=False)


@pytest.mark.parametrize(("name", "dtypes"), [("fast", {torch.float32}), ("few_bits", {torch.float32, torch.int32})])
def test_what_is_resident(made: Callable[[str], Path], name: str, dtypes: set[torch.dtype]) -> None:
    """The plan's numbers, in the dtype served or as codes, and nothing beside them."""
    folder = made(name)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    stored = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            stored += sum(
                file.get_tensor(name).numel() for name in file.keys() if ".experts." in name  # noqa: SIM118
            )  # fmt: skip

    def look(model: torch.nn.Module) -> None:
        held = {id(p): p for name, p in model.named_parameters() if ".experts." in name}
        assert sum(p.numel() for p in held.values()) == stored
        assert {p.dtype for p in held.values()} == dtypes

    vllm_says(folder, look)
    assert len(config["layers"]) == 4


@pytest.mark.parametrize("tensor", ["mlp.experts.gate_up_basis", "self_attn.o_proj.weight"])
def test_a_lost_tensor_is_named(
    made: Callable[[str], Path], copied: Callable[[Path], Path], tensor: str
) -> None:  # fmt: skip
    folder, tensor = copied(made("fast")), f"model.layers.1.{tensor}"
    lose(folder, tensor)
    with pytest.raises((UserError, ValueError), match=tensor.replace(".", r"\.")):
        vllm_says(folder)
