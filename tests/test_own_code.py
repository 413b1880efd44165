"""Models and tokenizers with code of their own: never asked about, refused or run, and then everything works."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import moefactor
from models import on_disk
from moefactor import UserError
from moefactor.evaluation import evaluate
from moefactor.export import export_dense
from moefactor.generate import generate
from moefactor.healing import heal
from moefactor.inspection import inspect
from moefactor.text import load_tokenizer

TOKENIZER = '''
import builtins
from transformers import PreTrainedTokenizer

builtins.code_ran.append("tokenizer")

class MyTokenizer(PreTrainedTokenizer):
    """One token a byte, in Python, as Kimi's and Qwen's first tokenizers were."""

    vocab_files_names = {}
    vocab_size = 256

    def get_vocab(self):
        return {chr(i): i for i in range(256)} | self.added_tokens_encoder

    def _tokenize(self, text, **how):
        return [chr(byte) for byte in text.encode()]

    def _convert_token_to_id(self, token):
        return ord(token) if len(token) == 1 else None

    def _convert_id_to_token(self, index):
        return chr(index)

    def convert_tokens_to_string(self, tokens):
        return bytes(ord(t) % 256 for t in tokens).decode(errors="replace")

    def save_vocabulary(self, *args, **how):
        return ()
'''
CONFIG = """
import builtins
from transformers import Qwen3MoeConfig

builtins.code_ran.append("config")

class MyConfig(Qwen3MoeConfig):
    model_type = "my_moe"
"""
MODEL = """
import builtins
from transformers import Qwen3MoeForCausalLM
from .configuration_my import MyConfig

builtins.code_ran.append("model")

class MyMoe(Qwen3MoeForCausalLM):
    config_class = MyConfig
"""


@pytest.fixture
def code_ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What of a repository's code ran; a question on the terminal fails the test."""
    ran: list[str] = []
    monkeypatch.setattr("builtins.code_ran", ran, raising=False)
    monkeypatch.setattr("builtins.input", lambda *a: pytest.fail("asked on the terminal"))
    return ran


def change(folder: Path, file: str, **changes: object) -> None:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def with_own_tokenizer(folder: Path) -> Path:
    for path in folder.glob("tokenizer*"):
        path.unlink()
    (folder / "tokenization_my.py").write_text(TOKENIZER)
    (folder / "tokenizer_config.json").write_text("{}")
    change(
        folder, "tokenizer_config.json", tokenizer_class="MyTokenizer", eos_token="<eos>",
        auto_map={"AutoTokenizer": ["tokenization_my.MyTokenizer", None]},
    )  # fmt: skip
    return folder


@pytest.fixture
def kimi(tiny_model: Callable[..., Path], tmp_path: Path) -> Path:
    """An architecture that transformers has, with code for it and for the tokenizer in the repository."""
    folder = Path(shutil.copytree(tiny_model("kimi_k2"), tmp_path / "kimi"))
    change(
        folder, "config.json", model_type="kimi_k2",
        auto_map={"AutoConfig": "configuration_gone.C", "AutoModelForCausalLM": "modeling_gone.M"},
    )  # fmt: skip
    return with_own_tokenizer(folder)


@pytest.fixture
def own_model(tiny_model: Callable[..., Path], tmp_path: Path) -> Path:
    """An architecture that only the repository knows, stored as its class has it."""
    folder = Path(shutil.copytree(tiny_model("qwen3_moe"), tmp_path / "own"))
    state = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    for path in folder.glob("model*"):
        path.unlink()
    save_file(
        {name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    (folder / "configuration_my.py").write_text(CONFIG)
    (folder / "modeling_my.py").write_text(MODEL)
    change(
        folder, "config.json", model_type="my_moe",
        auto_map={"AutoConfig": "configuration_my.MyConfig", "AutoModelForCausalLM": "modeling_my.MyMoe"},
    )  # fmt: skip
    return folder


def test_own_tokenizers_are_refused(
    kimi: Path, text_file: Path, tmp_path: Path, code_ran: list[str], command: Callable[..., tuple[int, str, str]]
) -> None:
    """By every command that opens one; the model's own code is not needed, since transformers has the architecture."""
    inspect(str(kimi))
    short = ("--calibration", text_file, "--samples", 2, "--seqlen", 16)
    for line in (
        ("compress", kimi, "-o", tmp_path / "out", "-m", "whitened_svd", *short),
        ("compress", kimi, "-o", tmp_path / "out"),
        ("calibrate", kimi, "--run", tmp_path / "run", "-m", "whitened_svd", *short),
        ("compare", kimi, "-o", tmp_path / "compare", "--methods", "svd", "--text", text_file, *short),
        ("evaluate", kimi, "--text", text_file),
        ("generate", kimi, "x"),
    ):
        code, _, said = command(*line)
        assert code == 2
        assert "code of its own" in said
        assert "--trust-remote-code" in said
    assert code_ran == []
    assert not (tmp_path / "out").exists()


def test_own_tokenizers_work_where_they_are_trusted(
    kimi: Path, text_file: Path, tmp_path: Path, code_ran: list[str], command: Callable[..., tuple[int, str, str]]
) -> None:
    out, trust = tmp_path / "out", {"trust_remote_code": True}
    how = {"calibration": f"{text_file},self", "samples": 4, "seqlen": 16}
    moefactor.compress(str(kimi), "whitened_svd", 0.4, out, **how, **trust)
    assert set(code_ran) == {"tokenizer"}
    for folder in (kimi, out):
        found = evaluate(str(folder), [str(text_file)], max_windows=2, **trust)
        assert found.mean_perplexity > 1
        assert generate(str(folder), "abc", tokens=3, **trust).startswith("abc")
    dense = export_dense(str(out), tmp_path / "dense", **trust)
    assert evaluate(str(dense), [str(text_file)], max_windows=2, **trust).mean_perplexity > 1
    heal(out, str(kimi), tmp_path / "healed", steps=1, text=str(text_file), seqlen=16, **trust)
    run, flag = tmp_path / "run", "--trust-remote-code"
    short = ("--calibration", text_file, "--samples", 2, "--seqlen", 16)
    for line in (
        ("inspect", kimi, flag),
        ("calibrate", kimi, "--run", run, "-m", "whitened_svd", *short, flag),
        ("plan", kimi, "--run", run, "-m", "whitened_svd", flag),
        ("factorise", kimi, "--run", run, "-o", tmp_path / "out2", *short, flag),
        ("evaluate", out, "--against", kimi, "--text", text_file, "--max-windows", 1, flag),
        ("heal", out, "--teacher", kimi, "-o", tmp_path / "h", "--steps", 1, "--calibration", text_file, flag),
        ("compare", kimi, "-o", tmp_path / "c", "--methods", "svd", "--ratios", 0.4, "--text", text_file, flag),
        ("export", out, "--dense", "-o", tmp_path / "dense2", flag),
        ("generate", out, "x", "--tokens", 2, flag),
    ):
        assert command(*line)[0] == 0, line


def test_own_architectures_are_refused(own_model: Path, code_ran: list[str], command: Callable) -> None:
    for line in (("inspect", own_model), ("generate", own_model, "x"), ("evaluate", own_model)):
        code, _, said = command(*line)
        assert code == 2
        assert "my_moe" in said
        assert "--trust-remote-code" in said
    assert code_ran == []


def test_own_architectures_work_where_they_are_trusted(own_model: Path, tmp_path: Path, code_ran: list[str]) -> None:
    """Also what is made of them, in plain transformers."""
    trust = {"trust_remote_code": True}
    for method in ("svd", "reap"):
        out = tmp_path / method
        text = {"samples": 2, "seqlen": 16} if method == "reap" else {}
        moefactor.compress(str(own_model), method, 0.5, out, **text, **trust)
        loaded = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
        assert type(loaded).__name__ == "MyMoe"
        with pytest.raises(UserError, match=r"my_moe.*--trust-remote-code"):
            generate(str(out), "abc")
        assert generate(str(out), "abc", tokens=2, **trust).startswith("abc")
    export_dense(str(tmp_path / "svd"), tmp_path / "dense", **trust)
    assert on_disk(tmp_path / "dense").keys() == on_disk(own_model).keys()
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "dense", trust_remote_code=True)).__name__ == "MyMoe"


def test_own_code_that_fails_says_so(own_model: Path, code_ran: list[str]) -> None:
    (own_model / "configuration_my.py").write_text("raise RuntimeError('of no use')\n")
    with pytest.raises(UserError, match=r"own: the code in its repository fails \(RuntimeError\): of no use"):
        inspect(str(own_model), trust_remote_code=True)


def test_our_own_stub_needs_no_trust(compressed: Callable[..., Path], code_ran: list[str]) -> None:
    assert generate(str(compressed("mixtral")), "abc", tokens=2).startswith("abc")


def test_a_whole_tokenizer_beside_own_code(
    tiny_model: Callable[..., Path], copied: Callable, code_ran: list[str]
) -> None:
    """tokenizer.json needs no code, whatever class it would be wrapped in."""
    folder = copied(tiny_model("qwen3_moe"))
    (folder / "tokenization_my.py").write_text(TOKENIZER)
    change(
        folder, "tokenizer_config.json", tokenizer_class="MyTokenizer",
        auto_map={"AutoTokenizer": ["tokenization_my.MyTokenizer", None]},
    )  # fmt: skip
    expected = load_tokenizer(tiny_model("qwen3_moe"))("ab")["input_ids"]
    assert load_tokenizer(folder)("ab")["input_ids"] == expected
    assert code_ran == []
    load_tokenizer(folder, trust_remote_code=True)
    assert code_ran == ["tokenizer"]
