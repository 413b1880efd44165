"""What `make demo` shows: the reference model, 40 % of its experts' parameters removed, before and after.

    python benchmarks/demo.py
    python benchmarks/demo.py --keep demo       leave the compressed models there

Calibrates on the language reference that every Python has, biaxial half on text that the model writes, and measures on
something else that every Python has: the prose in the docstrings of the standard library.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import re
import sysconfig
import tempfile
import time
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.table import Table

import moefactor
from moefactor.evaluation import Evaluation
from moefactor.generate import generate

MODEL = Path(__file__).resolve().parents[1] / "assets" / "reference-moe"
RATIO = 0.4
SAMPLES = 128  # calibration windows of 256 tokens
WINDOWS = 96  # of the held-out text
PROMPT = "The company said it"

# Row -> method and options.
ROWS = {
    "plain SVD": ("svd", {}),
    "RFID-MoE": ("rfid", {}),
    # 150 steps unless said otherwise: two minutes more. Half of the text its own, as with a file.
    "biaxial": ("biaxial", {"refine_steps": 20, "own_text": 0.5}),
}
SHOWN = "biaxial"  # the row that goes on with PROMPT

# Long prose in their docstrings, and there in every Python since 3.10, on every system.
MODULES = (
    "_pydecimal", "argparse", "bisect", "calendar", "cmd", "codecs", "configparser", "contextlib", "copy", "csv",
    "dataclasses", "difflib", "dis", "doctest", "enum", "fileinput", "fractions", "ftplib", "functools", "heapq",
    "imaplib", "inspect", "ipaddress", "locale", "mimetypes", "optparse", "os", "pathlib", "pdb", "pickle",
    "pickletools", "platform", "pydoc", "random", "sched", "shutil", "smtplib", "socket", "socketserver", "ssl",
    "statistics", "subprocess", "tarfile", "tempfile", "textwrap", "threading", "timeit", "tokenize", "traceback",
    "turtle", "types", "typing", "warnings", "weakref", "asyncio/events", "collections/__init__",
    "concurrent/futures/process", "email/header", "email/message", "email/policy", "http/client", "http/cookiejar",
    "http/server", "logging/__init__", "logging/handlers", "unittest/case", "unittest/loader", "unittest/mock",
    "urllib/parse", "urllib/request", "xml/dom/minidom", "xml/sax/handler", "xmlrpc/client",
)  # fmt: skip


def heldout_text() -> str:
    """The paragraphs of MODULES' docstrings that are English sentences: no signatures, tables or examples."""
    paragraphs = []
    for module in MODULES:
        path = Path(sysconfig.get_path("stdlib")) / f"{module}.py"
        if not path.is_file():  # some distributions leave modules out
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            for paragraph in (ast.get_docstring(node) or "").split("\n\n"):
                sentence = " ".join(paragraph.split())
                words = sum(c.isalpha() or c == " " for c in sentence) / max(1, len(sentence))
                if (
                    len(sentence) >= 120
                    and sentence.endswith(".")
                    and words > 0.94
                    and not re.search("--|>>>", sentence)
                ):
                    paragraphs.append(sentence)
    return "\n\n".join(paragraphs[::3])  # a little of every module


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="work there and leave everything")
    arguments = parser.parse_args()
    # The matrices are small. On a busy machine, threads that wait for each other have cost fifty times as much.
    torch.set_num_threads(1)
    with contextlib.nullcontext(arguments.keep) if arguments.keep else tempfile.TemporaryDirectory() as folder:
        try:
            show(Path(folder), Console())
        except moefactor.UserError as error:
            raise SystemExit(f"error: {error}") from None


def show(folder: Path, console: Console) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = folder / "heldout.txt"
    text.write_text(heldout_text(), encoding="utf-8")

    def measured(model: Path) -> tuple[Evaluation, float]:
        # float32: processors without bfloat16 instructions emulate them, three times as slow.
        result = moefactor.evaluate(str(model), [str(text)], max_windows=WINDOWS, dtype="float32")
        return result, result.mean_perplexity

    dense, dense_perplexity = measured(MODEL)
    found = moefactor.inspect(str(MODEL))
    experts = found.layers[0]
    console.print(
        f"{MODEL.name}: {found.model_type}, {len(found.layers)} layers of {experts.experts} experts, "
        f"{found.expert_parameters / found.parameters:.0%} of the parameters in them"
    )
    table = Table(title=f"{RATIO:.0%} of the experts' parameters removed", title_justify="left", box=box.SIMPLE_HEAD)
    table.pad_edge, table.collapse_padding = False, True  # fits 80 columns
    for name in ("", "parameters", "in experts", "on disk", "perplexity", "× dense", "seconds"):
        table.add_column(name, justify="right" if name else "left")

    def row(label: str, result: Evaluation, perplexity: float, seconds: str) -> None:
        table.add_row(
            label, f"{result.parameters:,}", f"{result.expert_parameters:,}", f"{result.disk_bytes / 1e6:.2f} MB",
            f"{perplexity:.2f}", f"{perplexity / dense_perplexity:.3f}", seconds,
        )  # fmt: skip

    row("dense", dense, dense_perplexity, "")
    for label, (method, options) in ROWS.items():
        console.print(f"compressing with {label} ...")
        started = time.perf_counter()
        output = moefactor.compress(str(MODEL), method, RATIO, folder / method, samples=SAMPLES, **options)
        seconds = time.perf_counter() - started
        row(label, *measured(output), f"{seconds:.1f}")
    console.print(table)
    console.print("Perplexity on prose from the standard library's docstrings; seconds to compress.\n")
    for label, model in (("dense", MODEL), (SHOWN, folder / ROWS[SHOWN][0])):
        words = " ".join(generate(str(model), PROMPT, tokens=16).split())
        console.print(f"{label}: {words}", markup=False, highlight=False)


if __name__ == "__main__":
    main()
