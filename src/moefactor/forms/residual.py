"""SparseResidual: what another form leaves over, caught in one short vector a group (RFID, arXiv 2602.09316 §3.3;
the projection is Uni-LoRA's, arXiv 2506.00799).

P has one non-zero a row, its column drawn from a seed, columns scaled so that PᵀP = I. Then η = Pᵀ vec(R) is the
least-squares answer and P η gives every entry of a column the mean of what was caught there. That mean is what is
stored, so P is needed neither on disk nor in memory: its column numbers come back from a hash of the seed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..errors import UserError
from .base import Factors, Form, Routing

MASK = 0xFFFFFFFF


def projection_columns(seed: int, start: int, count: int, columns: int, device: torch.device) -> Tensor:
    """Column of the non-zero in rows start … start+count of P: (count,) in [0, columns).

    A counter-based hash (the 32-bit finaliser of MurmurHash3, twice) in int64: the same on every device and in every
    version of torch, which a torch.Generator would not promise. Rows beyond 2³² mix in their upper half.
    """
    row = torch.arange(start, start + count, dtype=torch.int64, device=device)
    value = (row & MASK) ^ ((seed * 0x9E3779B9) & MASK) ^ (((row >> 32) * 0x85EBCA6B) & MASK)
    for multiplier in (0x85EBCA6B, 0xC2B2AE35):
        value = ((value ^ (value >> 16)) * multiplier) & MASK
        value = ((value ^ (value >> 13)) * 0x27D4EB2F) & MASK
    value = value ^ (value >> 16)
    return (value * columns) >> 32


@dataclass(frozen=True)
class SparseResidual(Form):
    """Another form's tensors plus `residual` (Σ sizes): η of each group, one after the other.

    Args:
        inner: the form that it corrects.
        groups: the experts that share a vector; a partition of range(E).
        sizes: entries of each group's vector.
        seed: of the projections; group g of a layer uses seed + g.
    """

    inner: Form
    groups: tuple[tuple[int, ...], ...]
    sizes: tuple[int, ...]
    seed: int

    def __post_init__(self):
        # As in SharedBasis: JSON keeps membership, not order.
        object.__setattr__(self, "groups", tuple(tuple(sorted(g)) for g in self.groups))

    def integers(self) -> frozenset[str]:
        return self.inner.integers()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {**self.inner.shapes(), "residual": (sum(self.sizes),)}

    @cached_property
    def _places(self) -> dict[int, tuple[int, int, int]]:
        """expert -> its group, its place in the group, where the group's vector starts."""
        starts = [0]
        for size in self.sizes:
            starts.append(starts[-1] + size)
        return {e: (g, place, starts[g]) for g, members in enumerate(self.groups) for place, e in enumerate(members)}

    def columns(self, expert: int, device: torch.device) -> Tensor:
        """(width · H,) places in `residual` that the expert's entries share, row by row."""
        group, place, start = self._places[expert]
        count = self.width * self.hidden
        return start + projection_columns(self.seed + group, place * count, count, self.sizes[group], device)

    def catch(self, residuals: Iterable[Tensor]) -> Tensor:
        """residuals: (width, H) of each expert in turn -> `residual`: the mean of every column, η_j / √n_j."""
        total = hits = torch.zeros(())
        for expert, residual in enumerate(residuals):
            if expert == 0:
                total, hits = residual.new_zeros(2, sum(self.sizes))
            columns = self.columns(expert, residual.device)
            total.index_add_(0, columns, residual.reshape(-1))
            hits.index_add_(0, columns, torch.ones_like(residual).reshape(-1))
        return total / hits.clamp(min=1)

    def thrown_back(self, factors: Factors, expert: int) -> Tensor:
        """(width, H): the expert's part of P η."""
        vector = factors["residual"]
        return vector[self.columns(expert, vector.device)].view(self.width, self.hidden)

    def dense(self, factors: Factors, expert: int) -> Tensor:
        return self.inner.dense(factors, expert) + self.thrown_back(factors, expert)

    def read(self, factors: Factors, tokens: Tensor, routing: Routing) -> Tensor:
        out = self.inner.read(factors, tokens, routing)
        tokens = tokens.to(factors["residual"].dtype)
        parts = [tokens[routing.token[a:b]] @ self.thrown_back(factors, e).T for e, (a, b) in self._hit(routing)]
        return out + torch.cat(parts) if parts else out

    def write(self, factors: Factors, activations: Tensor, routing: Routing) -> Tensor:
        return self.inner.write(factors, activations, routing) + self._write_residual(factors, activations, routing)

    def write_combined(self, factors: Factors, activations: Tensor, routing: Routing) -> Tensor:
        inner = self.inner.write_combined(factors, activations, routing)
        return inner + routing.combine(self._write_residual(factors, activations, routing))

    def _write_residual(self, factors: Factors, activations: Tensor, routing: Routing) -> Tensor:
        activations = activations.to(factors["residual"].dtype)
        parts = [activations[a:b] @ self.thrown_back(factors, e) for e, (a, b) in self._hit(routing)]
        return torch.cat(parts) if parts else activations.new_zeros(0, self.hidden)

    def _hit(self, routing: Routing) -> list[tuple[int, tuple[int, int]]]:
        """Experts that have rows: the residual of the others is never rebuilt."""
        return [(e, (a, b)) for e, (a, b) in enumerate(routing.bounds) if b > a]

    def to_json(self) -> dict:
        group_of = {e: str(g) for g, members in enumerate(self.groups) for e in members}
        return {
            "form": "sparse_residual",
            "inner": self.inner.to_json(),
            "groups": " ".join(group_of[e] for e in range(self.experts)),
            "sizes": list(self.sizes),
            "seed": self.seed,
        }

    @classmethod
    def from_json(cls, data: dict, *, experts: int, width: int, hidden: int, where: str) -> SparseResidual:
        from . import form_from_json

        inner = form_from_json(data["inner"], experts=experts, width=width, hidden=hidden, where=where)
        ids = [int(g) for g in data["groups"].split()]
        sizes = tuple(data["sizes"])
        if sorted(set(ids)) != list(range(len(sizes))) or len(ids) != experts:
            raise UserError(f"{where}: 'groups' must name a group below {len(sizes)} for each of {experts} experts.")
        groups = tuple(tuple(e for e, g in enumerate(ids) if g == index) for index in range(len(sizes)))
        for group, size in zip(groups, sizes, strict=True):
            if not isinstance(size, int) or not 1 <= size <= len(group) * width * hidden:
                raise UserError(
                    f"{where}: a residual of {size!r} entries does not fit; it must be from 1 to "
                    f"{len(group) * width * hidden}, the group's own parameters."
                )
        return cls(experts, width, hidden, inner=inner, groups=groups, sizes=sizes, seed=int(data["seed"]))
