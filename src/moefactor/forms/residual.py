"""What another form leaves over, caught in one short vector a group (RFID, arXiv 2602.09316 §3.3; the projection is
Uni-LoRA's, arXiv 2506.00799).

P has one non-zero a row, columns scaled so that PᵀP = I. Then η = Pᵀ vec(R) is the least-squares answer and P η gives
every entry of a column the mean of what was caught there. That mean is what is stored, so P is needed neither on disk
nor in memory: its column numbers come back from a seed. SparseResidual hashes every entry's number, which is as slow as
it sounds; WindowResidual, what is made today, lets a row of a matrix be a window of the vector, which a GEMM can read.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from .base import Factors, Form, TensorSpec, nested
from .fields import Fields

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

    name = "sparse_residual"

    def __post_init__(self):
        # As in SharedBasis: JSON keeps membership, not order.
        object.__setattr__(self, "groups", tuple(tuple(sorted(g)) for g in self.groups))

    @cached_property
    def _names(self) -> dict[str, str]:
        return nested(("residual",), self.inner)

    def inner_factors(self, factors: Factors) -> Factors:
        return {name: factors[outer] for name, outer in self._names.items()}

    @property
    def mixes_bases(self) -> bool:
        return self.inner.mixes_bases

    def tensors(self) -> dict[str, TensorSpec]:
        inner = self.inner.tensors()
        own = {"residual": TensorSpec((sum(self.sizes),))}
        return {outer: inner[name] for name, outer in self._names.items()} | own

    @cached_property
    def places(self) -> dict[int, tuple[int, int, int]]:
        """expert -> its group, its place in the group, where the group's vector starts."""
        starts = [0]
        for size in self.sizes:
            starts.append(starts[-1] + size)
        return {e: (g, place, starts[g]) for g, members in enumerate(self.groups) for place, e in enumerate(members)}

    def columns(self, expert: int, device: torch.device) -> Tensor:
        """(width · H,) places in `residual` that the expert's entries share, row by row."""
        group, place, start = self.places[expert]
        count = self.width * self.hidden
        return start + projection_columns(self.seed + group, place * count, count, self.sizes[group], device)

    def project(self, residuals: Iterable[Tensor]) -> Tensor:
        """residuals: (width, H) of each expert in turn -> `residual`: the mean of every column, η_j / √n_j."""
        total = hits = torch.zeros(())
        for expert, residual in enumerate(residuals):
            if expert == 0:
                total, hits = residual.new_zeros(2, sum(self.sizes))
            columns = self.columns(expert, residual.device)
            total.index_add_(0, columns, residual.reshape(-1))
            hits.index_add_(0, columns, torch.ones_like(residual).reshape(-1))
        return total / hits.clamp(min=1)

    def back_projected(self, factors: Factors, expert: int) -> Tensor:
        """(width, H): the expert's part of P η."""
        vector = factors["residual"]
        return vector[self.columns(expert, vector.device)].view(self.width, self.hidden)

    def dense(self, factors: Factors, expert: int) -> Tensor:
        return self.inner.dense(self.inner_factors(factors), expert) + self.back_projected(factors, expert)

    def units(self) -> tuple[int, ...]:
        return self.inner.units()

    def with_units(self, units: Iterable[int]) -> SparseResidual:
        return replace(self, inner=self.inner.with_units(units))

    def summary(self) -> str:
        return f"{self.inner.summary()}; a residual of {sum(self.sizes):,}"

    def to_json(self) -> dict:
        group_of = {e: str(g) for g, members in enumerate(self.groups) for e in members}
        return {
            "form": self.name,
            "inner": self.inner.to_json(),
            "groups": " ".join(group_of[e] for e in range(self.experts)),
            "sizes": list(self.sizes),
            "seed": self.seed,
        }

    @classmethod
    def from_json(cls, data: Fields, *, experts: int, width: int, hidden: int) -> SparseResidual:
        sizes = data.list("sizes")
        cls._check_sizes(data, sizes, width)
        groups = data.groups("groups", len(sizes), experts, "sizes")
        for group, size in zip(groups, sizes, strict=True):
            data.within("size", size, 1, len(group) * width * hidden, why=", the group's own parameters")
        seed = data.whole("seed", 0, 1 << 128)
        return cls(experts, width, hidden, inner=data.inner("inner"), groups=groups, sizes=sizes, seed=seed)

    @classmethod
    def _check_sizes(cls, data: Fields, sizes: tuple, width: int) -> None:
        pass


class WindowResidual(SparseResidual):
    """The same, row i of an expert's matrix being H entries of its group's vector on end, in an order of the hidden
    side that is drawn from the seed: one order for each place in a group, the same in all groups.

    The vector is a circle of width · s entries, and row i starts at entry i · s: every expert of the group has as many
    numbers in one entry as in another, to within one.
    """

    name = "window_residual"

    @property
    def step(self) -> int:
        """s, the same in all groups."""
        return self.sizes[0] // self.width

    def order(self, place: int, device: torch.device) -> Tensor:
        """(H,): which hidden unit each entry of a window belongs to, for the experts at one place of their groups."""
        return projection_columns(self.seed, place * self.hidden, self.hidden, 1 << 31, device).argsort(stable=True)

    def columns(self, expert: int, device: torch.device) -> Tensor:
        group, place, start = self.places[expert]
        first = torch.arange(self.width, device=device).unsqueeze(1) * self.step
        return (start + (first + self.order(place, device).argsort()) % self.sizes[group]).flatten()

    @classmethod
    def _check_sizes(cls, data: Fields, sizes: tuple, width: int) -> None:
        if len({*sizes}) > 1 or any(not isinstance(size, int) or size % width for size in sizes):
            raise data.error(f"sizes {[*sizes]} do not fit; they must be one multiple of the width, {width}.")
