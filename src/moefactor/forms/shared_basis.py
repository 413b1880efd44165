"""SharedBasis: W_e = A_eᵀ · B_g, the basis B_g owned by a group of experts, the factor A_e by each expert."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from .base import Factors, Form, TensorSpec, listed
from .fields import Fields


@dataclass(frozen=True)
class Bucket:
    """The groups that have one rank; their tensors are stored together, so one grouped GEMM serves them all."""

    rank: int
    experts: tuple[int, ...]  # in group order
    group_sizes: tuple[int, ...]

    @property
    def groups(self) -> int:
        return len(self.group_sizes)

    @property
    def basis(self) -> str:
        return f"basis_r{self.rank}"

    @property
    def private(self) -> str:
        return f"private_r{self.rank}"


@dataclass(frozen=True)
class SharedBasis(Form):
    """For every rank r that occurs: `basis_r{r}` (groups, r, H) and `private_r{r}` (experts, r, width).

    Args:
        groups: the experts of each group; a partition of range(E). Groups of one expert are plain low rank.
        ranks: r_g of each group.

    Within a rank, groups keep their order in `groups`; the experts of a group ascend.
    """

    groups: tuple[tuple[int, ...], ...]
    ranks: tuple[int, ...]

    name = "shared_basis"

    def __post_init__(self):
        # JSON keeps only which group an expert is in, so the order inside a group must not carry anything.
        object.__setattr__(self, "groups", tuple(tuple(sorted(g)) for g in self.groups))

    @cached_property
    def buckets(self) -> tuple[Bucket, ...]:
        by_rank: dict[int, list[tuple[int, ...]]] = {}
        for group, rank in zip(self.groups, self.ranks, strict=True):
            by_rank.setdefault(rank, []).append(group)
        return tuple(
            Bucket(rank, tuple(e for g in groups for e in g), tuple(len(g) for g in groups))
            for rank, groups in sorted(by_rank.items())
        )

    @cached_property
    def places(self) -> dict[int, tuple[Bucket, int, int]]:
        """expert -> its bucket, its place in it, its group's place in it."""
        places = {}
        for bucket in self.buckets:
            group_of_place = [g for g, size in enumerate(bucket.group_sizes) for _ in range(size)]
            for place, (expert, group) in enumerate(zip(bucket.experts, group_of_place, strict=True)):
                places[expert] = (bucket, place, group)
        return places

    def tensors(self) -> dict[str, TensorSpec]:
        specs = {}
        for bucket in self.buckets:
            specs[bucket.basis] = TensorSpec((bucket.groups, bucket.rank, self.hidden))
            specs[bucket.private] = TensorSpec((len(bucket.experts), bucket.rank, self.width))
        return specs

    def pack(self, bases: list[Tensor], privates: dict[int, Tensor]) -> Factors:
        """bases: (r_g, H) of each group; privates: expert -> (r_g, width). The inverse of how `dense` reads.

        In float32: methods work in float64, and a layer of it would take twice the memory until it is written.
        """
        factors = {}
        for bucket in self.buckets:
            of_rank = [b for b, rank in zip(bases, self.ranks, strict=True) if rank == bucket.rank]
            factors[bucket.basis] = torch.stack(of_rank).float()
            factors[bucket.private] = torch.stack([privates[e].float() for e in bucket.experts])
        return factors

    def dense(self, factors: Factors, expert: int) -> Tensor:
        bucket, place, group = self.places[expert]
        return factors[bucket.private][place].T @ factors[bucket.basis][group]

    @property
    def _is_low_rank(self) -> bool:
        return all(group == (e,) for e, group in enumerate(self.groups))

    def units(self) -> tuple[int, ...]:
        return self.ranks

    def with_units(self, units: Iterable[int]) -> SharedBasis:
        return replace(self, ranks=tuple(units))

    def summary(self) -> str:
        return listed(f"{'low_rank' if self._is_low_rank else self.name}, ranks", self.ranks)

    def to_json(self) -> dict:
        if self._is_low_rank:
            return {"form": "low_rank", "ranks": list(self.ranks)}
        group_of = {e: str(g) for g, members in enumerate(self.groups) for e in members}
        groups = " ".join(group_of[e] for e in range(self.experts))
        return {"form": "shared_basis", "groups": groups, "ranks": list(self.ranks)}

    @classmethod
    def from_json(cls, data: Fields, *, experts: int, width: int, hidden: int) -> SharedBasis:
        ranks = data.list("ranks")
        groups: tuple[tuple[int, ...], ...]
        if data.text("form") == "low_rank":
            groups = tuple((e,) for e in range(experts))
        else:
            groups = data.groups("groups", len(ranks), experts, "ranks")
        if len(ranks) != len(groups):
            raise data.error(f"{len(groups)} groups need as many ranks; found {len(ranks)}.")
        for index, (group, rank) in enumerate(zip(groups, ranks, strict=True)):
            most = min(len(group) * width, hidden)
            why = f" = min(experts in the group × {width}, {hidden}). Edit it or raise the ratio"
            data.within("rank", rank, 1, most, of=f" of group {index}", why=why)
        return cls(experts, width, hidden, groups=groups, ranks=ranks)
