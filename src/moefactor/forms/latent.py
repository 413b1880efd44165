"""Latent: one basis for the layer, and another form in the space it spans. With dense experts inside this is a "latent
MoE": H → r, experts of hidden size r, r → H."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..errors import UserError
from .base import Factors, Form, Routing


@dataclass(frozen=True)
class Latent(Form):
    """`basis` (r, H) and the tensors of `inner`, whose hidden size is r: W_e = inner_e · basis.

    The basis works once a token, whatever the number of experts.
    """

    rank: int
    inner: Form

    @property
    def kept_widths(self) -> tuple[int, ...] | None:
        return self.inner.kept_widths

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {"basis": (self.rank, self.hidden), **self.inner.shapes()}

    def integers(self) -> frozenset[str]:
        return self.inner.integers()

    def dense(self, factors: Factors, expert: int) -> Tensor:
        return self.inner.dense(factors, expert) @ factors["basis"]

    def read(self, factors: Factors, tokens: Tensor, routing: Routing) -> Tensor:
        basis = factors["basis"]
        return self.inner.read(factors, tokens.to(basis.dtype) @ basis.T, routing)

    def write(self, factors: Factors, activations: Tensor, routing: Routing) -> Tensor:
        return self.inner.write(factors, activations, routing) @ factors["basis"]

    def write_combined(self, factors: Factors, activations: Tensor, routing: Routing) -> Tensor:
        return self.inner.write_combined(factors, activations, routing) @ factors["basis"]

    def to_json(self) -> dict:
        return {"form": "latent", "rank": self.rank, "inner": self.inner.to_json()}

    @classmethod
    def from_json(cls, data: dict, *, experts: int, width: int, hidden: int, where: str) -> Latent:
        from . import form_from_json

        rank = data["rank"]
        if not isinstance(rank, int) or not 1 <= rank <= hidden:
            raise UserError(f"{where}: rank {rank!r} does not fit; it must be a whole number from 1 to {hidden}.")
        inner = form_from_json(data["inner"], experts=experts, width=width, hidden=rank, where=where)
        return cls(experts, width, hidden, rank=rank, inner=inner)
