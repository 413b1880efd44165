"""Who may import whom, read from the source: nouns < methods < verbs, foreign libraries behind the doors."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import moefactor

SOURCE = Path(moefactor.__file__).parent
NOUNS = {"errors", "progress", "experts", "stats", "linalg", "plan", "allocate", "forms", "optimise"}
VERBS = {
    "inspect",
    "calibrate",
    "planning",
    "factorise",
    "evaluate",
    "generate",
    "export",
    "compress",
    "compare",
    "heal",
    "report",
    "write",
}
DOORS = {
    "checkpoint",
    "discover",
    "streaming",
    "text",
    "run_folder",
    "runtime",
    "cli",
    "fp8",
    "models",
    "fields",
    "prediction",
}
BEHIND_DOORS = {"transformers", "safetensors", "datasets", "accelerate", "huggingface_hub", "typer", "rich", "vllm"}
ONLY_IN_CLI = {"typer", "rich"}
# (importer, imported) -> why it may, against the rule that verbs do not import each other.
ALLOWED = {
    ("factorise", "calibrate"): "sequential factorising observes each layer on what those before it give",
}


def modules() -> dict[str, Path]:
    """`forms.dense` -> file, for every module of the package."""
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        found[".".join(p for p in parts if p != "__init__")] = path
    return found


def room(module: str) -> str:
    return module.split(".")[0]


def imports(module: str, path: Path) -> tuple[set[str], set[str]]:
    """The rooms of our own and the foreign packages that a file imports anywhere in it."""
    package = module.split(".") if path.stem == "__init__" and module else module.split(".")[:-1]
    own, foreign = set(), set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            foreign |= {room(alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            foreign.add(room(node.module))
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1]
            # `from . import rfid` names modules, `from .rfid import offers` what is in one.
            tails = [node.module] if node.module else [alias.name for alias in node.names]
            own |= {room(".".join([*base, tail])) for tail in tails}
    return own, foreign - set(sys.stdlib_module_names)


MODULES = modules()
OWN = {name: imports(name, path)[0] for name, path in MODULES.items()}
FOREIGN = {name: imports(name, path)[1] for name, path in MODULES.items()}


def test_every_module_has_a_room() -> None:
    assert {room(m) for m in MODULES} - NOUNS - VERBS - DOORS == {"", "methods"}


@pytest.mark.parametrize("module", [m for m in MODULES if room(m) in NOUNS])
def test_nouns_import_nouns_torch_and_the_standard_library(module: str) -> None:
    assert OWN[module] <= NOUNS
    assert FOREIGN[module] <= {"torch"}


@pytest.mark.parametrize("module", [m for m in MODULES if room(m) == "methods"])
def test_methods_import_nouns_and_methods(module: str) -> None:
    assert OWN[module] <= NOUNS | {"methods"}
    assert FOREIGN[module] <= {"torch"}


@pytest.mark.parametrize("module", sorted(VERBS & set(MODULES)))
def test_verbs_do_not_import_each_other(module: str) -> None:
    if module in ("compress", "compare"):
        return  # the stages in order, once and many times
    others = OWN[module] & (VERBS - {module})
    assert {(module, other) for other in others} <= set(ALLOWED)


def test_exceptions_are_still_needed() -> None:
    for importer, imported in ALLOWED:
        assert imported in OWN[importer]


def test_nothing_but_the_command_line_imports_it() -> None:
    assert not [m for m in MODULES if "cli" in OWN[m]]


@pytest.mark.parametrize("module", MODULES)
def test_foreign_libraries_stay_behind_the_doors(module: str) -> None:
    if room(module) not in DOORS:
        assert not FOREIGN[module] & BEHIND_DOORS
    if room(module) != "cli":
        assert not FOREIGN[module] & ONLY_IN_CLI


def test_the_library_needs_no_terminal() -> None:
    """typer and rich are looked up only when the command line runs."""
    code = "import sys; import moefactor; print('moefactor.cli' in sys.modules, 'typer' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
