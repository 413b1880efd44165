"""Models that are built once a session and only read; a test that damages one copies it first."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch

import moefactor
from moefactor import cli
from moefactor.cli import shared
from moefactor.stages import Recipe
from tiny import build

REFERENCE = Path(__file__).parent.parent / "assets" / "reference-moe"
# Tiny matrices: more threads only wait for each other.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def reference_moe() -> Path:
    return REFERENCE


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20,000 characters of English: enough to calibrate a tiny model, quick to tokenise byte by byte."""
    path = tmp_path_factory.mktemp("text") / "topics.txt"
    path.write_text("\n\n".join(topics[name] for name in sorted(topics))[:20_000])
    return path


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny_model("mixtral")`: the folder of a random model, built at the first call."""
    root = tmp_path_factory.mktemp("tiny")

    @cache
    def make(kind: str, dtype: torch.dtype = torch.float32, **changes: object) -> Path:
        name = "-".join([kind, str(dtype).removeprefix("torch."), *map(str, changes.values())])
        return build(kind, root / name, dtype=dtype, **changes)

    return make


@pytest.fixture(scope="session")
def compressed(
    tiny_model: Callable[..., Path], text_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """`compressed("mixtral", "svd")`: the folder of that tiny model compressed, made at the first call."""
    root = tmp_path_factory.mktemp("compressed")

    @cache
    def make(kind: str, method: str = "svd", ratio: float = 0.4, dtype: torch.dtype = torch.float32, **options) -> Path:
        out = root / f"{kind}-{method}-{ratio}-{str(dtype).removeprefix('torch.')}-{len(list(root.iterdir()))}"
        recipe = Recipe.of(method, options)
        text = {"calibration": str(text_file), "samples": 4, "seqlen": 16} if recipe.reads_text else {}
        return moefactor.compress(str(tiny_model(kind, dtype)), method, ratio, out, **text, **options)

    return make


@pytest.fixture
def copied(tmp_path: Path) -> Callable[[Path], Path]:
    """A copy of a model's folder, to damage."""

    def copy(folder: Path) -> Path:
        return Path(shutil.copytree(folder, tmp_path / f"copy-of-{folder.name}"))

    return copy


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., tuple[int, str, str]]:
    """`command("inspect", folder)`: the command line in this process -> exit code, standard output and error."""
    # Tables are cut to the terminal's width, and pytest has none. Not by COLUMNS alone: some versions of rich read it
    # once, when the console is made.
    monkeypatch.setenv("COLUMNS", "200")
    for console in (shared.console, shared.errors):
        monkeypatch.setattr(console, "_width", 200)
    monkeypatch.setenv("NO_COLOR", "1")

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["moefactor", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run
