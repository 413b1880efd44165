"""Dense: the stack as it was."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .base import Factors, Form, Routing, grouped_linear


@dataclass(frozen=True)
class Dense(Form):
    """`weight` (E, width, H)."""

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {"weight": (self.experts, self.width, self.hidden)}

    def dense(self, factors: Factors, expert: int) -> Tensor:
        return factors["weight"][expert]

    def read(self, factors: Factors, tokens: Tensor, routing: Routing) -> Tensor:
        return grouped_linear(tokens.index_select(0, routing.token), factors["weight"].transpose(1, 2), routing.offsets)

    def write(self, factors: Factors, activations: Tensor, routing: Routing) -> Tensor:
        return grouped_linear(activations, factors["weight"], routing.offsets)

    def to_json(self) -> dict:
        return {"form": "dense"}

    @classmethod
    def from_json(cls, data: dict, *, experts: int, width: int, hidden: int, where: str) -> Dense:
        return cls(experts, width, hidden)
