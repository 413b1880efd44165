"""What a kernel is: one way to run a form."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import cached_property
from typing import Generic, TypeVar

from torch import Tensor

from ...forms import Form
from ...forms.base import Factors
from ...routing import Routing
from .grouped import Linear, grouped_linear
from .setting import Setting

FormT = TypeVar("FormT", bound=Form)


class Kernel(ABC, Generic[FormT]):
    """Runs one stack. It may keep index maps of its form, never weights.

    Args:
        form: of the stack.
        setting: what it is to run on.
        linear: how products with a matrix an expert are done, see grouped.py.
    """

    def __init__(self, form: FormT, setting: Setting, linear: Linear = grouped_linear):
        self.form, self.setting, self.linear = form, setting, linear
        # Worked out now: torch.compile can't enter a cached_property's lock (Python 3.11).
        for owner in (form, self):
            for kind in type(owner).__mro__:
                for name, value in vars(kind).items():
                    if isinstance(value, cached_property):
                        getattr(owner, name)

    def laid_out(self, factors: Factors) -> Factors:
        """The tensors as this kernel wants them in memory, called once after loading. Names and shapes stay, since
        the same tensors are saved again. Here: at addresses that a grouped GEMM takes."""
        if self.linear is not grouped_linear:
            return factors
        return {name: t.clone() if t.device.type != "meta" and t.data_ptr() % 16 else t for name, t in factors.items()}

    @abstractmethod
    def read(self, factors: Factors, tokens: Tensor, routing: Routing) -> Tensor:
        """From the hidden side: tokens (T, H) -> (pairs, width), rows in routing's order (gate, up)."""

    @abstractmethod
    def write(self, factors: Factors, activations: Tensor, routing: Routing) -> Tensor:
        """To the hidden side: (pairs, width) in routing's order -> (pairs, H), not yet weighted (down)."""

    def write_combined(self, factors: Factors, activations: Tensor, routing: Routing) -> Tensor:
        """`write`, weighted and summed over each token's experts: (pairs, width) -> (T, H)."""
        return routing.combine(self.write(factors, activations, routing))
