"""A residual on one of several ranks. Its vector is whole on each, since any row of any expert may read any entry; what
is cut is the form that it corrects, and the rows. These forms are a rank's own and in no file."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ...forms import Form, SparseResidual, TensorSpec
from ...forms.base import Factors, nested
from ...routing import Routing
from .base import Kernel
from .setting import Setting


@dataclass(frozen=True)
class Zero(Form):
    """A stack of zeros, which takes no tensors."""

    name = "zero"

    def tensors(self) -> dict[str, TensorSpec]:
        return {}

    def dense(self, factors: Factors, expert: int) -> Tensor:
        raise TypeError("a stack of zeros has neither device nor dtype")

    def to_json(self) -> dict:
        return {"form": self.name}

    @classmethod
    def from_json(cls, data: object, *, experts: int, width: int, hidden: int) -> Zero:
        return cls(experts, width, hidden)


@dataclass(frozen=True)
class ResidualShare(Form):
    """The tensors of `inner`, the rank's part of what is corrected, and `residual`, of which it reads some rows.

    Args:
        whole: the layer's residual, around nothing.
        own_rows: of each expert's matrix in it, those that the rank has.
    """

    inner: Form
    whole: SparseResidual
    own_rows: tuple[int, ...]

    name = "residual_share"

    @classmethod
    def of(cls, form: SparseResidual, inner: Form, rows: Tensor) -> ResidualShare:
        whole = replace(form, inner=Zero(form.experts, form.width, form.hidden))
        return cls(inner.experts, inner.width, inner.hidden, inner, whole, tuple(rows.tolist()))

    @cached_property
    def _names(self) -> dict[str, str]:
        return nested(("residual",), self.inner)

    def inner_factors(self, factors: Factors) -> Factors:
        return {name: factors[outer] for name, outer in self._names.items()}

    def tensors(self) -> dict[str, TensorSpec]:
        inner = self.inner.tensors()
        return {outer: inner[name] for name, outer in self._names.items()} | self.whole.tensors()

    def factors(self, inner: Factors, residual: Tensor) -> Factors:
        """The inverse of `inner_factors`."""
        return {outer: inner[name] for name, outer in self._names.items()} | {"residual": residual}

    def dense(self, factors: Factors, expert: int) -> Tensor:
        return (
            self.inner.dense(self.inner_factors(factors), expert)
            + self.whole.back_projected(factors, expert)[list(self.own_rows)]
        )

    def to_json(self) -> dict:
        raise TypeError("a rank's own form is in no file")

    @classmethod
    def from_json(cls, data: object, *, experts: int, width: int, hidden: int) -> ResidualShare:
        raise TypeError("a rank's own form is in no file")


class ZeroKernel(Kernel[Zero]):
    def read(self, factors: Factors, tokens: Tensor, routing: Routing) -> Tensor:
        return tokens.new_zeros(len(routing.expert), self.form.width)

    def write(self, factors: Factors, activations: Tensor, routing: Routing) -> Tensor:
        return activations.new_zeros(len(routing.expert), self.form.hidden)

    def write_combined(self, factors: Factors, activations: Tensor, routing: Routing) -> Tensor:
        return activations.new_zeros(routing.tokens, self.form.hidden)


class ResidualShareKernel(Kernel[ResidualShare]):
    """The rank's part by its own kernel, and the rank's rows of the whole residual by the residual's."""

    def __init__(self, form: ResidualShare, setting: Setting, inner: Kernel, whole: Kernel):
        super().__init__(form, setting, inner.linear)
        self.inner, self.whole = inner, whole
        self._on: dict[torch.device, Tensor] = {}

    def read(self, factors: Factors, tokens: Tensor, routing: Routing) -> Tensor:
        residual = self.whole.read(factors, tokens, routing).index_select(1, self._rows(tokens.device))
        return self.inner.read(self.form.inner_factors(factors), tokens, routing) + residual

    def write(self, factors: Factors, activations: Tensor, routing: Routing) -> Tensor:
        inner = self.inner.write(self.form.inner_factors(factors), activations, routing)
        return inner + self.whole.write(factors, self._widened(activations), routing)

    def write_combined(self, factors: Factors, activations: Tensor, routing: Routing) -> Tensor:
        inner = self.inner.write_combined(self.form.inner_factors(factors), activations, routing)
        return inner + self.whole.write_combined(factors, self._widened(activations), routing)

    def _widened(self, activations: Tensor) -> Tensor:
        """(pairs, width of the part) -> (pairs, width): zero where other ranks' channels are."""
        full = activations.new_zeros(len(activations), self.form.whole.width)
        return full.index_copy(1, self._rows(full.device), activations)

    def _rows(self, device: torch.device) -> Tensor:
        if device not in self._on:
            self._on[device] = torch.tensor(self.form.own_rows, device=device)
        return self._on[device]
