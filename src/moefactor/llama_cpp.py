"""llama.cpp's own programs where they are installed: its converter of a checkpoint to GGUF, and its quantiser."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from .errors import UserError, unknown
from .files import FULL

CONVERTER, QUANTISER = "convert_hf_to_gguf.py", "llama-quantize"
PLACES = ("", "bin", "build/bin")  # of a checkout, an installation and a build
CONVERTED = ("f32", "f16", "bf16", "q8_0")  # what the converter writes itself
# Weights of a row that are packed together, by llama-quantize's name of a type.
BLOCKS = {
    **dict.fromkeys(("f32", "f16", "bf16"), 1),
    **dict.fromkeys(("q8_0", "q4_0", "q4_1", "q5_0", "q5_1", "iq4_nl", "mxfp4_moe"), 32),
    **dict.fromkeys(
        (
            "q2_k", "q2_k_s", "q3_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_k", "q4_k_s", "q4_k_m", "q5_k", "q5_k_s",
            "q5_k_m", "q6_k", "iq1_s", "iq1_m", "iq2_xxs", "iq2_xs", "iq2_s", "iq2_m", "iq3_xxs", "iq3_xs", "iq3_s",
            "iq3_m", "iq4_xs", "tq1_0", "tq2_0",
        ),
        256,
    ),
}  # fmt: skip

# The converter knows a pre-tokenizer by a hash of what it makes of one text, and has no option for others. This runs it
# with a name for those, one of its own. Until 2026 the class was in the converter's file.
NAMED_PRE_TOKENIZER = """
import importlib, inspect, re, sys
from pathlib import Path
converter, named, *sys.argv[1:] = sys.argv[1:]
sys.path.insert(0, str(Path(converter).parent))
sys.argv[0] = converter
module = importlib.import_module(Path(converter).stem)
model = getattr(module, "TextModel", None) or importlib.import_module("conversion.base").TextModel
known = model.get_vocab_base_pre
names = sorted(set(re.findall(r'res = "([^"]+)"', inspect.getsource(known))))
if named not in names:
    sys.exit(f"No pre-tokenizer {named!r}. Available: {', '.join(names)}.")
def get_vocab_base_pre(self, tokenizer):
    try:
        return known(self, tokenizer)
    except NotImplementedError:
        return named
model.get_vocab_base_pre = get_vocab_base_pre
module.main()
"""


def checked_type(name: str) -> str:
    """A type's name in small letters; UserError for one that llama.cpp lacks."""
    if name.lower() not in BLOCKS:
        raise unknown("GGUF type", name, BLOCKS)
    return name.lower()


def instead_of(kind: str, row: int) -> str | None:
    """What a matrix with rows of `row` weights is stored as instead of `kind`, whose blocks don't divide them; None
    where they do. As src/llama-quant.cpp has it (tensor_type_fallback)."""
    if row % BLOCKS[kind] == 0:
        return None
    return "q5_0, q5_1 or q8_0" if row % 32 == 0 else "f16"


def find_converter(folder: Path | None) -> Path:
    return _find(CONVERTER, folder, "have a checkout of https://github.com/ggml-org/llama.cpp")


def find_quantiser(folder: Path | None) -> Path:
    return _find(QUANTISER, folder, "build llama.cpp, or install a build of it (brew, nix, conda-forge)")


def _find(name: str, folder: Path | None, how: str) -> Path:
    """In llama.cpp's folder, or on the PATH."""
    folder = folder or (Path(os.environ["LLAMA_CPP"]) if os.environ.get("LLAMA_CPP") else None)
    if folder and not folder.expanduser().is_dir():
        raise UserError(f"{folder}: no such folder; --llama-cpp and LLAMA_CPP name llama.cpp's.")
    inside = [folder.expanduser() / place / name for place in PLACES] if folder else []
    on_path = shutil.which(name)
    found = next((path for path in [*inside, *([Path(on_path)] if on_path else [])] if path.is_file()), None)
    if found is None:
        where = f"neither in {folder} nor on the PATH" if folder else "not on the PATH"
        raise UserError(
            f"llama.cpp's {name} is {where}. For a GGUF, {how}, and name its folder with --llama-cpp or LLAMA_CPP."
        )
    return found


def convert(
    converter: Path, model: Path, file: Path, kind: str, *, name: str, pre_tokenizer: str | None = None
) -> None:
    """Writes the GGUF of an ordinary checkpoint.

    Args:
        kind: one of CONVERTED.
        name: what the GGUF calls the model.
        pre_tokenizer: llama.cpp's name of what splits text as the model's tokenizer does, where it does not know that.
    """
    command: list[str | Path] = [sys.executable, converter]
    if pre_tokenizer is not None:
        command[1:] = ["-c", NAMED_PRE_TOKENIZER, converter, pre_tokenizer]
    said = _run([*command, model, "--outfile", file, "--outtype", kind, "--model-name", name])
    if "BPE pre-tokenizer was not recognized" in said:
        raise UserError(
            f"{name}: llama.cpp's converter does not know how its tokenizer splits text. Say whose it splits it like: "
            "--pre-tokenizer qwen2, or gpt-2, llama-bpe, deepseek-v3 ..."
        )
    _check(CONVERTER, said, file)


def quantise(quantiser: Path, source: Path, file: Path, kind: str) -> None:
    """Writes a GGUF with another GGUF's tensors in `kind`."""
    _check(QUANTISER, _run([quantiser, source, file, kind.upper()]), file)


def _run(command: Sequence[str | Path]) -> str:
    """What a program said when it failed; nothing when it did not."""
    try:
        done = subprocess.run(
            [str(word) for word in command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, errors="replace", check=False,
        )  # fmt: skip
    except OSError as error:
        return f"{command[0]} can't be run: {error.strerror}"
    if done.returncode < 0:  # what it said last has nothing to do with it
        return f"{done.stdout}\nwas ended by signal {-done.returncode}" + "; out of memory?" * (done.returncode == -9)
    return (done.stdout.strip() or f"ended with code {done.returncode}") if done.returncode else ""


def _check(program: str, said: str, file: Path) -> None:
    """UserError with the last line of what a failed program said, or where it left no GGUF."""
    full = next((text for code, text in FULL.items() if os.strerror(code) in said), None)
    if full:
        raise UserError(f"{file.parent}: {full}. Make room, then give the same command again.")
    if said:
        raise UserError(f"llama.cpp's {program}: {[line for line in said.splitlines() if line.strip()][-1].strip()}")
    if not file.is_file() or file.open("rb").read(4) != b"GGUF":
        raise UserError(f"llama.cpp's {program} ended well and wrote no GGUF.")
