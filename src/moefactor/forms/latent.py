"""Latent: one basis for the layer, and another form in the space it spans. With dense experts inside this is a "latent
MoE": H → r, experts of hidden size r, r → H."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from .base import Factors, Form, TensorSpec, nested
from .fields import Fields
from .ragged import Ragged


@dataclass(frozen=True)
class Latent(Form):
    """`basis` (r, H) and the tensors of `inner`, whose hidden size is r: W_e = inner_e · basis."""

    rank: int
    inner: Form

    name = "latent"

    @cached_property
    def _names(self) -> dict[str, str]:
        return nested(("basis",), self.inner)

    def inner_factors(self, factors: Factors) -> Factors:
        return {name: factors[outer] for name, outer in self._names.items()}

    @property
    def mixes_bases(self) -> bool:
        return self.inner.mixes_bases

    @property
    def kept_widths(self) -> tuple[int, ...] | None:
        return self.inner.kept_widths

    @property
    def channel_tensor(self) -> str:
        return self._names.get(self.inner.channel_tensor, "")

    def rows(self) -> Ragged:
        return self.inner.rows()

    def tensors(self) -> dict[str, TensorSpec]:
        inner = self.inner.tensors()
        own = {"basis": TensorSpec((self.rank, self.hidden))}
        return own | {outer: inner[name] for name, outer in self._names.items()}

    def dense(self, factors: Factors, expert: int) -> Tensor:
        return self.inner.dense(self.inner_factors(factors), expert) @ factors["basis"]

    def summary(self) -> str:
        return f"{self.name}, rank {self.rank}; {self.inner.summary()}"

    def to_json(self) -> dict:
        return {"form": "latent", "rank": self.rank, "inner": self.inner.to_json()}

    @classmethod
    def from_json(cls, data: Fields, *, experts: int, width: int, hidden: int) -> Latent:
        rank = data.whole("rank", 1, hidden)
        return cls(experts, width, hidden, rank=rank, inner=data.inner("inner", rank))
