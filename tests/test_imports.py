"""Who may import whom, read from the source: nouns < methods < verbs, foreign libraries behind the doors."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import moefactor

SOURCE = Path(moefactor.__file__).parent
NOUNS = {
    "errors", "progress", "experts", "stats", "routing", "plan", "allocate", "size", "knapsack", "forms", "coverage",
    "divergence",
}  # fmt: skip
MATHS = {"fitting", "methods"}
VERBS = {
    "inspection", "calibrate", "planning", "factorise", "write", "stages", "compression", "comparison", "evaluation",
    "generate", "healing", "export", "quantisation", "chat", "contrast",
}  # fmt: skip
DOORS = {
    "files", "checkpoint", "discover", "streaming", "observing", "loading", "text", "run_folder", "identity", "runtime",
    "cli", "fp8", "models", "compat", "fields", "prediction", "llama_cpp", "compressed_tensors", "serving", "ordinary",
    "rest", "baseline",
    "__main__",
}  # fmt: skip
BEHIND_DOORS = {
    "transformers", "safetensors", "datasets", "accelerate", "huggingface_hub", "filelock", "typer", "rich", "vllm",
    "sglang", "compressed_tensors",
}  # fmt: skip
ONLY_IN_CLI = {"typer", "rich"}
# Verb -> the verbs that it may import, and why.
ALLOWED = {
    "stages": {"calibrate", "planning", "factorise", "write"},  # it is the one that puts them in order
    "factorise": {"calibrate"},  # what the text is
    "compression": {"stages", "healing", "quantisation"},
    "contrast": {"evaluation"},
    "comparison": {"stages", "evaluation", "contrast"},
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
    assert {room(m) for m in MODULES} - NOUNS - MATHS - VERBS - DOORS == {""}


@pytest.mark.parametrize("module", [m for m in MODULES if room(m) in NOUNS])
def test_nouns_import_nouns_torch_and_the_standard_library(module: str) -> None:
    assert OWN[module] <= NOUNS
    assert FOREIGN[module] <= {"torch"}


@pytest.mark.parametrize("module", [m for m in MODULES if room(m) in MATHS])
def test_mathematics_imports_nouns(module: str) -> None:
    """What methods share does not know the methods."""
    assert OWN[module] <= NOUNS | {"fitting"} | ({"methods"} if room(module) == "methods" else set())
    assert FOREIGN[module] <= {"torch"}


def test_forms_do_not_know_kernels() -> None:
    for module in MODULES:
        if room(module) == "forms":
            assert OWN[module] <= {"forms", "errors"}


@pytest.mark.parametrize("module", sorted(VERBS & set(MODULES)))
def test_verbs_do_not_import_each_other(module: str) -> None:
    """But for the exceptions, each of which is still needed."""
    assert OWN[module] & (VERBS - {module}) == ALLOWED.get(module, set())


def test_nothing_but_the_command_line_imports_it() -> None:
    assert {room(m) for m in MODULES if "cli" in OWN[m]} == {"__main__", "cli"}


@pytest.mark.parametrize("module", MODULES)
def test_foreign_libraries_stay_behind_the_doors(module: str) -> None:
    if room(module) not in DOORS:
        assert not FOREIGN[module] & BEHIND_DOORS
    if room(module) != "cli":
        assert not FOREIGN[module] & ONLY_IN_CLI


def in_a_new_process(code: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_an_engine_can_import_forms_and_kernels_with_torch_alone() -> None:
    """No foreign library is even looked up; other packages than torch may have brought numpy."""
    code = """
import sys
BANNED = {"transformers", "safetensors", "datasets", "accelerate", "huggingface_hub", "filelock", "typer", "rich"}
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BANNED:
            raise AssertionError(name)
sys.meta_path.insert(0, Refuse())
import moefactor, moefactor.forms, moefactor.runtime.kernels, moefactor.runtime.module, moefactor.methods
print(len(moefactor.forms.FORMS), moefactor.runtime.kernels.KERNELS.keys() >= {"latent"})
"""
    assert in_a_new_process(code) == ["11", "True"]


@pytest.mark.parametrize("first", ["moefactor", "transformers"])
def test_the_plug_in_is_there_whichever_is_imported_first(first: str) -> None:
    second = {"moefactor": "transformers", "transformers": "moefactor"}[first]
    code = f"""
import sys, {first}
print("transformers.quantizers" in sys.modules)
import {second}
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
print("moefactor" in AUTO_QUANTIZER_MAPPING, transformers.__spec__.loader.__class__.__name__)
"""
    assert in_a_new_process(code) == ["False", "True", "SourceFileLoader"]


def test_asking_whether_transformers_is_there_changes_nothing() -> None:
    """As accelerate, datasets and others do before they import it."""
    code = """
import moefactor
from importlib.util import find_spec
print(find_spec("transformers") is not None, find_spec("transformers.models") is not None)
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
print("moefactor" in AUTO_QUANTIZER_MAPPING)
"""
    assert in_a_new_process(code) == ["True", "True", "True"]


def test_functions_stay_functions() -> None:
    """Whatever modules are imported, and in whatever order."""
    code = """
import moefactor.evaluation, moefactor.cli, moefactor.healing
import moefactor
print(*(callable(getattr(moefactor, name)) for name in moefactor.__all__ if name != "METHODS"))
print("biaxial" in moefactor.METHODS, set(moefactor.__all__) <= set(dir(moefactor)), hasattr(moefactor, "nothing"))
"""
    assert in_a_new_process(code) == ["True"] * 11 + ["True", "True", "False"]


def test_the_library_needs_no_terminal() -> None:
    """typer and rich are looked up only when the command line runs."""
    code = "import sys; import moefactor; print('moefactor.cli' in sys.modules, 'typer' in sys.modules)"
    assert in_a_new_process(code) == ["False", "False"]


# Leaves a process as it is where the extras are not installed: these packages can't be found.
WITHOUT_EXTRAS = """
import sys
from importlib.machinery import PathFinder

class Core(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        hidden = name.partition(".")[0] in ("accelerate", "datasets", "pyarrow", "psutil", "rich", "typer")
        return None if hidden else super().find_spec(name, path, target)

sys.meta_path[:] = [Core if finder is PathFinder else finder for finder in sys.meta_path]
"""


def without_extras(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", WITHOUT_EXTRAS + code], capture_output=True, text=True, check=False)


def test_a_compressed_folder_is_served_without_the_extras(compressed: Callable[..., Path]) -> None:
    folder = compressed("qwen3_moe")
    done = without_extras(f"""
import moefactor
from transformers import AutoModelForCausalLM, AutoTokenizer
from moefactor.generate import generate

folder = {str(folder)!r}
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
prompt = tokenizer("The history of", return_tensors="pt")
out = model.generate(input_ids=prompt["input_ids"], max_new_tokens=5, do_sample=False)
print(generate(folder, "The history of", tokens=5, device="cpu") == tokenizer.decode(out[0], skip_special_tokens=True))
print([type(m).__name__ for m in model.modules()].count("FactorisedExperts"))
""")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True", "2"]


def test_the_command_line_says_which_extra_it_lacks() -> None:
    done = without_extras("from moefactor.__main__ import main; main()")
    assert done.returncode == 2
    assert done.stderr == "error: The library is here, its command line is not: pip install 'moefactor[cli]'\n"


def test_a_dataset_says_what_it_lacks() -> None:
    done = without_extras("from moefactor.text import read_text; read_text('wikitext2')")
    assert "UserError: wikitext2: no such file or folder, and reading a dataset needs datasets" in done.stderr
