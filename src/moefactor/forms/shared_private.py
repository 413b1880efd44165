"""SharedPrivate: W_e = Pᵀ · B_e, the factor on the intermediate side shared, the one on the hidden side each expert's.

The mirror image of a SharedBasis with one group; D²-MoE's shared U of gate and up and its shared V of down.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import Tensor

from .base import Factors, Form, TensorSpec, listed
from .fields import Fields


@dataclass(frozen=True)
class SharedPrivate(Form):
    """`private` (r, width), one for the layer, and `basis` (E, r, H)."""

    rank: int

    name = "shared_private"

    def tensors(self) -> dict[str, TensorSpec]:
        return {
            "private": TensorSpec((self.rank, self.width)),
            "basis": TensorSpec((self.experts, self.rank, self.hidden)),
        }

    def dense(self, factors: Factors, expert: int) -> Tensor:
        return factors["private"].T @ factors["basis"][expert]

    def units(self) -> tuple[int, ...]:
        return (self.rank,)

    def with_units(self, units: Iterable[int]) -> SharedPrivate:
        (rank,) = units
        return replace(self, rank=rank)

    def summary(self) -> str:
        return listed(f"{self.name}, rank", self.units())

    def to_json(self) -> dict:
        return {"form": "shared_private", "rank": self.rank}

    @classmethod
    def from_json(cls, data: Fields, *, experts: int, width: int, hidden: int) -> SharedPrivate:
        return cls(experts, width, hidden, rank=data.whole("rank", 1, min(width, experts * hidden)))
