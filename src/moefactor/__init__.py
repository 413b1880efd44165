"""moefactor: smaller Mixture-of-Experts language models by factorised experts.

`import moefactor` is all that plain `from_pretrained` needs to load a compressed checkpoint: transformers gets the
plug-in when it is imported, before or after. Nothing heavy is imported before it is asked for, so that an engine can
import `moefactor.forms` with torch alone.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from .errors import UserError
from .runtime.hook import register_with_transformers

if TYPE_CHECKING:
    from .comparison import Contender, compare
    from .compression import compress
    from .contrast import evaluate_against
    from .evaluation import evaluate
    from .export import export_dense, export_gguf
    from .healing import heal
    from .inspection import inspect
    from .methods import METHODS
    from .quantisation import export_quantised

__all__ = ["METHODS", "Contender", "UserError", "compare", "compress", "evaluate", "evaluate_against", "export_dense",
           "export_gguf", "export_quantised", "heal", "inspect"]  # fmt: skip

_HOME = {
    "METHODS": "methods", "Contender": "comparison", "compare": "comparison", "compress": "compression",
    "evaluate": "evaluation", "evaluate_against": "contrast", "export_dense": "export", "export_gguf": "export",
    "export_quantised": "quantisation", "heal": "healing", "inspect": "inspection",
}  # fmt: skip


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_with_transformers()
