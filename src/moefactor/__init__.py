"""moefactor: smaller Mixture-of-Experts language models by factorised experts.

`import moefactor` is all that plain `from_pretrained` needs to load a compressed checkpoint.
"""

from __future__ import annotations

from .compare import Contender, compare
from .compress import compress
from .errors import UserError
from .evaluate import evaluate
from .export import export_dense
from .heal import heal
from .inspect import inspect
from .methods import METHODS

__all__ = ["METHODS", "Contender", "UserError", "compare", "compress", "evaluate", "export_dense", "heal",
           "inspect"]  # fmt: skip
