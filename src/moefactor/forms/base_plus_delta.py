"""BasePlusDelta: W_e = W̄ + Δ_e, one base for the layer and each expert's delta in another form (D²-MoE).

The base can work once a token, not once an expert: on the way in its product is shared by a token's experts, on the
way out it is applied to their weighted sum.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import Tensor

from .base import INT32, Factors, Form, TensorSpec
from .fields import Fields


@dataclass(frozen=True)
class BasePlusDelta(Form):
    """`base` without the columns that static pruning removed, `base_columns` int32 that say which it has (when some
    are gone), and the delta's tensors as `delta_…`.

    Columns are the base's inputs: the hidden side of gate and up, where `base` is (width, kept), or the intermediate
    side of down, where it is (kept, H).

    Args:
        delta: form of the deltas.
        kept: columns of the base that are stored.
        writes: True for down.
        dynamic: fraction of the stored columns that each call leaves out, those with the least ‖column‖·‖input‖.
            Saves compute, never memory.
    """

    delta: Form
    kept: int
    writes: bool
    dynamic: float = 0.0

    name = "base_plus_delta"

    @property
    def columns(self) -> int:
        return self.width if self.writes else self.hidden

    @property
    def mixes_bases(self) -> bool:
        return self.delta.mixes_bases

    def tensors(self) -> dict[str, TensorSpec]:
        specs = {"base": TensorSpec((self.kept, self.hidden) if self.writes else (self.width, self.kept))}
        if self.kept < self.columns:
            specs["base_columns"] = TensorSpec((self.kept,), INT32)
        return specs | {f"delta_{name}": spec for name, spec in self.delta.tensors().items()}

    def delta_factors(self, factors: Factors) -> Factors:
        return {name: factors[f"delta_{name}"] for name in self.delta.tensors()}

    def dense(self, factors: Factors, expert: int) -> Tensor:
        base = factors["base"]
        if self.kept < self.columns:
            full = base.new_zeros(self.width, self.hidden)
            columns = factors["base_columns"].long()
            base = full.index_copy(0 if self.writes else 1, columns, base)
        return base + self.delta.dense(self.delta_factors(factors), expert)

    def units(self) -> tuple[int, ...]:
        return self.delta.units()

    def with_units(self, units: Iterable[int]) -> BasePlusDelta:
        return replace(self, delta=self.delta.with_units(units))

    def summary(self) -> str:
        return f"{self.name}, {self.kept} columns of the base; {self.delta.summary()}"

    def to_json(self) -> dict:
        return {
            "form": "base_plus_delta", "delta": self.delta.to_json(), "kept": self.kept, "writes": self.writes,
            "dynamic": self.dynamic,
        }  # fmt: skip

    @classmethod
    def from_json(cls, data: Fields, *, experts: int, width: int, hidden: int) -> BasePlusDelta:
        writes = data.flag("writes")
        kept = data.whole("kept", 1, width if writes else hidden)
        return cls(experts, width, hidden, data.inner("delta"), kept, writes, data.fraction("dynamic"))
