"""Dense: the stack as it was."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .base import Factors, Form, TensorSpec
from .fields import Fields
from .ragged import Ragged


@dataclass(frozen=True)
class Dense(Form):
    """`weight` (E, width, H)."""

    name = "dense"
    channel_tensor = "weight"

    def tensors(self) -> dict[str, TensorSpec]:
        return {"weight": TensorSpec((self.experts, self.width, self.hidden))}

    def dense(self, factors: Factors, expert: int) -> Tensor:
        return factors["weight"][expert]

    def rows(self) -> Ragged:
        """`weight` as if every row were a channel; of an expert's all are there."""
        return Ragged(self.experts, self.width, self.hidden, widths=(self.width,) * self.experts)

    def ordinary_widths(self) -> frozenset[int]:
        return frozenset()

    def to_json(self) -> dict:
        return {"form": "dense"}

    @classmethod
    def from_json(cls, data: Fields, *, experts: int, width: int, hidden: int) -> Dense:
        return cls(experts, width, hidden)
