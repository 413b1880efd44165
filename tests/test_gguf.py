"""GGUF: what llama.cpp's programs are asked, and what becomes of what they answer. They are stand-ins but in the last
test, which LLAMA_CPP turns on."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from models import on_disk
from moefactor.errors import UserError
from moefactor.export import export_dense, export_gguf
from moefactor.llama_cpp import CONVERTER, QUANTISER, instead_of

# As llama.cpp's is: a class that names the pre-tokenizer, and main. It writes what it was asked and what it found.
STAND_IN = """
import json, sys
from pathlib import Path

class TextModel:
    def get_vocab_base_pre(self, tokenizer):
        if not {known!r}:
            raise NotImplementedError("BPE pre-tokenizer was not recognized - update get_vocab_base_pre()")
        names = '''res = "qwen2"  res = "gpt-2"'''
        return {known!r}

def main():
    model, *options = sys.argv[1:]
    options = dict(zip(options[::2], options[1::2]))
    config = json.loads((Path(model) / "config.json").read_text())
    {before}
    said = dict(options=options, config=config, pre=TextModel().get_vocab_base_pre(None), files=sorted(
        p.name for p in Path(model).iterdir()))
    Path(options["--outfile"]).write_bytes(b"GGUF" + json.dumps(said).encode())

if __name__ == "__main__":
    main()
"""
QUANTISE = """#!{python}
import sys
source, target, kind = sys.argv[1:]
open(target, "wb").write(open(source, "rb").read() + kind.encode())
"""


@pytest.fixture
def llama_cpp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """A folder of stand-ins for llama.cpp's programs."""
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    monkeypatch.setenv("PATH", "")

    def make(before: str = "", known: str | None = "gpt-2", quantiser: bool = True) -> Path:
        folder = tmp_path / "llama.cpp"
        (folder / "build" / "bin").mkdir(parents=True)
        (folder / CONVERTER).write_text(STAND_IN.format(before=before, known=known))
        if quantiser:
            (folder / "build" / "bin" / QUANTISER).write_text(QUANTISE.format(python=sys.executable))
            (folder / "build" / "bin" / QUANTISER).chmod(0o755)
        return folder

    return make


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "results" / "model.gguf"


def said(file: Path) -> dict:
    return json.loads(file.read_bytes().removeprefix(b"GGUF"))


def test_an_ordinary_checkpoint_is_converted_as_it_is(tiny_model: Callable, llama_cpp: Callable, out: Path) -> None:
    source = tiny_model("qwen3_moe")
    assert export_gguf(str(source), out, llama_cpp=llama_cpp()) == out
    asked = said(out)
    assert asked["options"].keys() == {"--outfile", "--outtype", "--model-name"}
    assert asked["options"]["--outtype"] == "f32"  # what the weights have
    assert asked["options"]["--model-name"] == source.name
    assert asked["files"] == sorted(p.name for p in source.iterdir())
    assert os.listdir(out.parent) == [out.name]


def test_a_compressed_one_is_rebuilt_first(
    compressed: Callable, llama_cpp: Callable, out: Path, tmp_path: Path
) -> None:
    folder, kept = compressed("qwen3_moe", "svd"), tmp_path / "kept"
    copy = f"import shutil; shutil.copytree(model, {str(kept)!r})"
    export_gguf(str(folder), out, llama_cpp=llama_cpp(copy))
    assert "quantization_config" not in said(out)["config"]
    assert said(out)["options"]["--model-name"] == folder.name
    rebuilt, dense = on_disk(kept), on_disk(export_dense(str(folder), tmp_path / "dense"))
    assert rebuilt.keys() == dense.keys()
    assert all(torch.equal(tensor, dense[name]) for name, tensor in rebuilt.items())
    assert os.listdir(out.parent) == [out.name]


def test_the_default_is_what_the_weights_have(tiny_model: Callable, llama_cpp: Callable, out: Path) -> None:
    export_gguf(str(tiny_model("mixtral", torch.bfloat16)), out, llama_cpp=llama_cpp())
    assert said(out)["options"]["--outtype"] == "bf16"


@pytest.mark.parametrize(
    ("before", "expected"),
    [
        ("raise KeyError('no such tensor')", r"convert_hf_to_gguf.py: KeyError: 'no such tensor'"),
        ("Path(options['--outfile']).write_text('half'); sys.exit(3)", "ended with code 3"),
        ("import os; print('fine', flush=True); os.kill(os.getpid(), 9)", "was ended by signal 9; out of memory"),
        ("sys.exit()", "wrote no GGUF"),
        ("Path(options['--outfile']).write_text('half'); sys.exit()", "wrote no GGUF"),
        ("raise OSError(28, 'No space left on device')", "the disk is full. Make room"),
    ],
)
def test_a_converter_that_fails_leaves_nothing(
    before: str, expected: str, tiny_model: Callable, llama_cpp: Callable, out: Path
) -> None:
    with pytest.raises(UserError, match=expected):
        export_gguf(str(tiny_model("qwen3_moe")), out, llama_cpp=llama_cpp(before))
    assert not os.listdir(out.parent)


@pytest.mark.filterwarnings("ignore:.*weights of a row")
def test_other_types_are_quantised_in_a_second_step(tiny_model: Callable, llama_cpp: Callable, out: Path) -> None:
    export_gguf(str(tiny_model("qwen3_moe", torch.bfloat16)), out, quant="Q4_K_M", llama_cpp=llama_cpp())
    assert out.read_bytes().endswith(b"Q4_K_M")
    assert b'"--outtype": "bf16"' in out.read_bytes()  # nothing is lost in between
    assert os.listdir(out.parent) == [out.name]


def test_what_is_missing_is_said_before_anything_is_done(tiny_model: Callable, llama_cpp: Callable, out: Path) -> None:
    source = str(tiny_model("qwen3_moe"))
    with pytest.raises(UserError, match=r"convert_hf_to_gguf.py is not on the PATH.*--llama-cpp or LLAMA_CPP"):
        export_gguf(source, out)
    with pytest.raises(UserError, match="nowhere: no such folder"):
        export_gguf(source, out, llama_cpp="nowhere")
    folder = llama_cpp("raise AssertionError", quantiser=False)
    with pytest.raises(UserError, match=f"llama-quantize is neither in {folder} nor on the PATH"):
        export_gguf(source, out, quant="q4_k_m", llama_cpp=folder)
    with pytest.raises(UserError, match="Unknown GGUF type 'q9_0'"):
        export_gguf(source, out, quant="q9_0", llama_cpp=folder)
    out.parent.mkdir()
    out.write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        export_gguf(source, out, llama_cpp=folder)
    assert out.read_text() == "mine"


def test_llama_cpp_is_found(
    tiny_model: Callable, llama_cpp: Callable, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMA_CPP", str(llama_cpp()))
    export_gguf(str(tiny_model("qwen3_moe")), out)
    monkeypatch.setenv("PATH", os.environ["LLAMA_CPP"])
    (Path(os.environ["LLAMA_CPP"]) / CONVERTER).chmod(0o755)
    monkeypatch.delenv("LLAMA_CPP")
    export_gguf(str(tiny_model("qwen3_moe")), out.with_name("second.gguf"))
    assert said(out)["config"] == said(out.with_name("second.gguf"))["config"]


def test_a_tokenizer_that_llama_cpp_does_not_know(tiny_model: Callable, llama_cpp: Callable, out: Path) -> None:
    source, folder = str(tiny_model("qwen3_moe")), llama_cpp(known=None)
    with pytest.raises(UserError, match=r"how its tokenizer splits text.*--pre-tokenizer qwen2"):
        export_gguf(source, out, llama_cpp=folder)
    with pytest.raises(UserError, match=r"No pre-tokenizer 'qwen3'\. Available: gpt-2, qwen2\."):
        export_gguf(source, out, llama_cpp=folder, pre_tokenizer="qwen3")
    export_gguf(source, out, llama_cpp=folder, pre_tokenizer="qwen2")
    assert said(out)["pre"] == "qwen2"


def test_what_llama_cpp_knows_itself_it_is_not_told(tiny_model: Callable, llama_cpp: Callable, out: Path) -> None:
    export_gguf(str(tiny_model("qwen3_moe")), out, llama_cpp=llama_cpp(), pre_tokenizer="qwen2")
    assert said(out)["pre"] == "gpt-2"


def test_a_repositorys_own_code_runs_only_where_it_is_trusted(
    tiny_model: Callable, copied: Callable, llama_cpp: Callable, out: Path
) -> None:
    """llama.cpp's converter asks transformers for it, whatever transformers has itself."""
    source, folder = copied(tiny_model("qwen3_moe")), llama_cpp()
    settings = json.loads((source / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": [None, "tokenization_theirs.Theirs"]}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="--trust-remote-code"):
        export_gguf(str(source), out, llama_cpp=folder)
    export_gguf(str(source), out, llama_cpp=folder, trust_remote_code=True)


def test_code_that_config_json_names_is_not_shown_to_the_converter(
    tiny_model: Callable, copied: Callable, llama_cpp: Callable, out: Path
) -> None:
    """For some models it opens the configuration with trust, though transformers has the class itself."""
    source = copied(tiny_model("qwen3_moe"))
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoConfig": "evil.Config"}}))
    (source / "evil.py").write_text("raise SystemExit('ran')\n")
    export_gguf(str(source), out, llama_cpp=llama_cpp())
    assert said(out)["config"] == config
    assert said(out)["files"] == sorted(p.name for p in source.iterdir() if p.name != "evil.py")
    assert (source / "evil.py").exists()


def test_what_a_killed_run_left_is_cleared_away(tiny_model: Callable, llama_cpp: Callable, out: Path) -> None:
    left = out.with_name(f".{out.name}.parts")
    left.mkdir(parents=True)
    (left / "converted.gguf").write_text("half")
    export_gguf(str(tiny_model("qwen3_moe")), out, llama_cpp=llama_cpp())
    assert os.listdir(out.parent) == [out.name]


@pytest.mark.parametrize(
    ("kind", "row", "instead"),
    [
        ("q4_k_m", 768, None), ("q4_k_m", 640, "q5_0, q5_1 or q8_0"), ("q4_k_m", 48, "f16"), ("q8_0", 96, None),
        ("q8_0", 48, "f16"), ("f16", 47, None),
    ],
)  # fmt: skip
def test_rows_that_blocks_do_not_divide(kind: str, row: int, instead: str | None) -> None:
    assert instead_of(kind, row) == instead


@pytest.mark.filterwarnings("ignore:.*rows of 24")
def test_they_are_told_beforehand(tiny_model: Callable, llama_cpp: Callable, out: Path) -> None:
    """The tiny model's experts are 24 wide, everything else has rows of 32."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", UserWarning)
        export_gguf(str(tiny_model("qwen3_moe")), out, quant="q8_0", llama_cpp=llama_cpp())
    (warning,) = told
    assert "rows of 24" in str(warning.message)
    assert "the experts' down projections" in str(warning.message)
    assert "become f16. Experts 32 wide keep it." in str(warning.message)
    down, others = 2 * 8 * 24 * 32, 2 * (2 * 8 * 24 * 32 + 2 * 32 * 32 + 2 * 16 * 32) + 2 * 260 * 32
    assert f"({down / (down + others):.0%} of the weights)" in str(warning.message)
    with pytest.warns(UserWarning, match=r"rows of 32 .*other matrices .*become q5_0, q5_1 or q8_0\.$"):
        export_gguf(
            str(tiny_model("qwen3_moe")), out.with_name("k"), quant="q4_k_m", llama_cpp=out.parents[1] / "llama.cpp"
        )


def test_the_command(tiny_model: Callable, llama_cpp: Callable, out: Path, command: Callable) -> None:
    source = tiny_model("qwen3_moe")
    code, shown, _ = command("export", source, "--gguf", out, "--llama-cpp", llama_cpp())
    assert (code, shown) == (0, f"Wrote {out}.\n")
    for wrong, expected in (
        ([], "Say what to export to"),
        (["--dense", "--gguf", "b"], "Say what to export to"),
        (["--dense", "-o", "a", "--quant", "f16"], "--quant goes with --gguf"),
        (["--dense"], "--dense takes -o"),
        (["--gguf", "b", "-o", "a"], "-o goes with --dense"),
    ):
        code, _, said_ = command("export", source, *wrong)
        assert code == 2
        assert expected in said_


@pytest.mark.skipif(not os.environ.get("LLAMA_CPP"), reason="LLAMA_CPP names no folder of llama.cpp")
def test_llama_cpps_own_converter(reference_moe: Path, out: Path) -> None:
    with pytest.raises(UserError, match="--pre-tokenizer"):
        export_gguf(str(reference_moe), out)
    export_gguf(str(reference_moe), out, quant="f32", pre_tokenizer="qwen2")
    weights = sum(tensor.numel() for tensor in on_disk(reference_moe).values())
    assert 4 * weights < out.stat().st_size < 4.4 * weights
