"""SharedPrivate: W_e = Pᵀ · B_e, the factor on the intermediate side shared, the one on the hidden side each expert's.

The mirror image of a SharedBasis with one group; D²-MoE's shared U of gate and up and its shared V of down.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..errors import UserError
from .base import Factors, Form, Routing, grouped_linear


@dataclass(frozen=True)
class SharedPrivate(Form):
    """`private` (r, width), one for the layer, and `basis` (E, r, H)."""

    rank: int

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {"private": (self.rank, self.width), "basis": (self.experts, self.rank, self.hidden)}

    def dense(self, factors: Factors, expert: int) -> Tensor:
        return factors["private"].T @ factors["basis"][expert]

    def read(self, factors: Factors, tokens: Tensor, routing: Routing) -> Tensor:
        rows = tokens.index_select(0, routing.token)
        latent = grouped_linear(rows, factors["basis"].transpose(1, 2), routing.offsets)
        return latent @ factors["private"]

    def write(self, factors: Factors, activations: Tensor, routing: Routing) -> Tensor:
        private = factors["private"]
        return grouped_linear(activations.to(private.dtype) @ private.T, factors["basis"], routing.offsets)

    def to_json(self) -> dict:
        return {"form": "shared_private", "rank": self.rank}

    @classmethod
    def from_json(cls, data: dict, *, experts: int, width: int, hidden: int, where: str) -> SharedPrivate:
        rank, limit = data["rank"], min(width, experts * hidden)
        if not isinstance(rank, int) or not 1 <= rank <= limit:
            raise UserError(f"{where}: rank {rank!r} does not fit; it must be a whole number from 1 to {limit}.")
        return cls(experts, width, hidden, rank=rank)
