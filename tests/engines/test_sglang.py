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

import pytest
from safetensors.torch import load_file, save_file

import moefactor
from served import Answers, lose, make, transformers_says

if find_spec("sglang") is None:
    pytest.skip("SGLang has an environment of its own", allow_module_level=True)

PROGRAM = Path(__file__).parent / "sglang_says.py"
FORMS = ("svd", "rfid", "d2moe", "mobe", "channels", "fast", "tight")
# Latent attention takes SGLang's compiled kernels.
ARCHITECTURES = {"qwen2_moe": {}, "mixtral": {}, "olmoe": {}, "granitemoe": {}, "glm4_moe": {}}


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
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=PROGRAM.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(next(line for line in reversed(done.stdout.splitlines()) if line.startswith("[[")))


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
