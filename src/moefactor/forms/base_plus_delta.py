"""BasePlusDelta: W_e = W̄ + Δ_e, one base for the layer and each expert's delta in another form (D²-MoE).

The base works once a token, not once an expert: on the way in its product is shared by a token's experts, on the way
out it is applied to their weighted sum.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..errors import UserError
from .base import Factors, Form, Routing


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

    @property
    def columns(self) -> int:
        return self.width if self.writes else self.hidden

    def shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = {"base": (self.kept, self.hidden) if self.writes else (self.width, self.kept)}
        if self.kept < self.columns:
            shapes["base_columns"] = (self.kept,)
        return shapes | {f"delta_{name}": shape for name, shape in self.delta.shapes().items()}

    def integers(self) -> frozenset[str]:
        return frozenset({"base_columns", *(f"delta_{name}" for name in self.delta.integers())})

    def delta_factors(self, factors: Factors) -> Factors:
        return {name: factors[f"delta_{name}"] for name in self.delta.shapes()}

    def dense(self, factors: Factors, expert: int) -> Tensor:
        base = factors["base"]
        if self.kept < self.columns:
            full = base.new_zeros(self.width, self.hidden)
            columns = factors["base_columns"].long()
            base = full.index_copy(0 if self.writes else 1, columns, base)
        return base + self.delta.dense(self.delta_factors(factors), expert)

    def read(self, factors: Factors, tokens: Tensor, routing: Routing) -> Tensor:
        shared = self._through_base(factors, tokens)  # (T, width)
        return shared[routing.token] + self.delta.read(self.delta_factors(factors), tokens, routing)

    def write(self, factors: Factors, activations: Tensor, routing: Routing) -> Tensor:
        delta = self.delta.write(self.delta_factors(factors), activations, routing)
        return self._through_base(factors, activations) + delta

    def write_combined(self, factors: Factors, activations: Tensor, routing: Routing) -> Tensor:
        shared = self._through_base(factors, routing.combine(activations))
        return shared + self.delta.write_combined(self.delta_factors(factors), activations, routing)

    def _through_base(self, factors: Factors, rows: Tensor) -> Tensor:
        """rows (n, H) or (n, width) through the columns that this call uses."""
        base = factors["base"] if self.writes else factors["base"].T  # (kept, out)
        rows = rows.to(base.dtype)
        if self.kept < self.columns:
            rows = rows[:, factors["base_columns"].long()]
        used = self.kept - int(self.dynamic * self.kept)
        if used < self.kept:
            score = base.float().norm(dim=1) * rows.float().norm(dim=0)
            chosen = score.topk(used).indices.sort().values
            base, rows = base[chosen], rows[:, chosen]
        return rows @ base

    def to_json(self) -> dict:
        return {
            "form": "base_plus_delta", "delta": self.delta.to_json(), "kept": self.kept, "writes": self.writes,
            "dynamic": self.dynamic,
        }  # fmt: skip

    @classmethod
    def from_json(cls, data: dict, *, experts: int, width: int, hidden: int, where: str) -> BasePlusDelta:
        from . import form_from_json

        delta = form_from_json(data["delta"], experts=experts, width=width, hidden=hidden, where=where)
        form = cls(experts, width, hidden, delta, data["kept"], data["writes"], data["dynamic"])
        if not isinstance(form.kept, int) or not 1 <= form.kept <= form.columns:
            raise UserError(f"{where}: 'kept' must be from 1 to {form.columns}, found {form.kept!r}.")
        if not 0 <= form.dynamic < 1:
            raise UserError(f"{where}: 'dynamic' must be from 0 to below 1, found {form.dynamic!r}.")
        return form
