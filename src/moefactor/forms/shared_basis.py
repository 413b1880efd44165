"""SharedBasis: W_e = A_eᵀ · B_g, the basis B_g owned by a group of experts, the factor A_e by each expert."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..errors import UserError
from .base import Factors, Form, Routing, grouped_linear


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
    def _places(self) -> dict[int, tuple[Bucket, int, int]]:
        """expert -> its bucket, its place in it, its group's place in it."""
        places = {}
        for bucket in self.buckets:
            group_of_place = [g for g, size in enumerate(bucket.group_sizes) for _ in range(size)]
            for place, (expert, group) in enumerate(zip(bucket.experts, group_of_place, strict=True)):
                places[expert] = (bucket, place, group)
        return places

    def shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = {}
        for bucket in self.buckets:
            shapes[bucket.basis] = (bucket.groups, bucket.rank, self.hidden)
            shapes[bucket.private] = (len(bucket.experts), bucket.rank, self.width)
        return shapes

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
        bucket, place, group = self._places[expert]
        return factors[bucket.private][place].T @ factors[bucket.basis][group]

    # -- application ---------------------------------------------------------------------------------------------

    def read(self, factors: Factors, tokens: Tensor, routing: Routing) -> Tensor:
        parts = []
        for part in self._parts(routing):
            basis, private = factors[part.bucket.basis], factors[part.bucket.private]
            if part.bucket.groups * routing.tokens <= part.pairs:
                # Fewer groups than experts a token: project every token once on every basis, then gather.
                latent = tokens.to(basis.dtype) @ basis.flatten(0, 1).T  # (T, groups·r)
                latent = latent.view(-1, part.bucket.groups, part.bucket.rank)[part.token, part.group]
            else:
                latent = grouped_linear(tokens[part.token], basis.transpose(1, 2), part.group_offsets)
            parts.append(grouped_linear(latent, private, part.offsets))
        return self._unsort(parts, routing)

    def write(self, factors: Factors, activations: Tensor, routing: Routing) -> Tensor:
        parts = [
            grouped_linear(self._inward(factors, activations, part), factors[part.bucket.basis], part.group_offsets)
            for part in self._parts(routing)
        ]
        return self._unsort(parts, routing)

    def write_combined(self, factors: Factors, activations: Tensor, routing: Routing) -> Tensor:
        total = None
        for part in self._parts(routing):
            basis = factors[part.bucket.basis]
            latent = self._inward(factors, activations, part)  # (pairs, r)
            weighted = latent.float() * part.weight.unsqueeze(-1)
            groups, rank = part.bucket.groups, part.bucket.rank
            if groups * routing.tokens <= part.pairs:
                # Sum in the latent space, then leave it once a token instead of once an expert.
                cell = part.token * groups + part.group
                summed = weighted.new_zeros(routing.tokens * groups, rank).index_add_(0, cell, weighted)
                out = (summed.to(basis.dtype).view(routing.tokens, groups * rank) @ basis.flatten(0, 1)).float()
            else:
                rows = grouped_linear(weighted.to(basis.dtype), basis, part.group_offsets)
                out = weighted.new_zeros(routing.tokens, self.hidden).index_add_(0, part.token, rows.float())
            total = out if total is None else total + out
        return total.to(activations.dtype)

    def _inward(self, factors: Factors, activations: Tensor, part: _Part) -> Tensor:
        rows = activations if part.rows is None else activations[part.rows]
        return grouped_linear(rows, factors[part.bucket.private].transpose(1, 2), part.offsets)

    @cached_property
    def _slot_order(self) -> tuple[int, ...]:
        return tuple(e for bucket in self.buckets for e in bucket.experts)

    @cached_property
    def _maps(self) -> dict[torch.device, dict[str, Tensor]]:
        return {}

    def _map(self, device: torch.device) -> dict[str, Tensor]:
        """Index maps on `device`: expert -> slot, expert -> its group's place, the slots' experts, and group ends."""
        if device not in self._maps:
            order = self._slot_order
            slot = sorted(range(self.experts), key=order.__getitem__)  # the inverse permutation
            group = [self._places[e][2] for e in range(self.experts)]
            self._maps[device] = {
                name: torch.tensor(values, device=device)
                for name, values in (("slot", slot), ("group", group), ("order", order))
            }
            for bucket in self.buckets:
                ends = torch.tensor(bucket.group_sizes, device=device).cumsum(0) - 1
                self._maps[device][bucket.basis] = ends  # its groups' last experts
        return self._maps[device]

    def _parts(self, routing: Routing) -> Iterator[_Part]:
        """The pairs of each bucket, its experts' rows contiguous and in the order of its tensors."""
        maps = self._map(routing.expert.device)
        in_order = self._slot_order == tuple(range(self.experts))
        rows = None if in_order else torch.argsort(maps["slot"][routing.expert], stable=True)
        counts = routing.counts if in_order else routing.counts[maps["order"]]
        # One bucket needs no row numbers on the host, hence no synchronisation.
        ends = [len(routing.expert)] if len(self.buckets) == 1 else None
        first_slot, start = 0, 0
        for index, bucket in enumerate(self.buckets):
            bucket_counts = counts[first_slot : first_slot + len(bucket.experts)]
            if ends is None:
                end = start + sum(b - a for a, b in (routing.bounds[e] for e in bucket.experts))
            else:
                end = ends[index]
            yield _Part(bucket, routing, rows, slice(start, end), bucket_counts, maps)
            first_slot, start = first_slot + len(bucket.experts), end

    def _unsort(self, parts: list[Tensor], routing: Routing) -> Tensor:
        """Rows of all buckets back in the routing's order."""
        together = parts[0] if len(parts) == 1 else torch.cat(parts)
        if self._slot_order == tuple(range(self.experts)):
            return together
        rows = torch.argsort(self._map(together.device)["slot"][routing.expert], stable=True)
        out = torch.empty_like(together)
        out[rows] = together
        return out

    # -- JSON ----------------------------------------------------------------------------------------------------

    def to_json(self) -> dict:
        if all(group == (e,) for e, group in enumerate(self.groups)):
            return {"form": "low_rank", "ranks": list(self.ranks)}
        group_of = {e: str(g) for g, members in enumerate(self.groups) for e in members}
        return {
            "form": "shared_basis",
            "groups": " ".join(group_of[e] for e in range(self.experts)),
            "ranks": list(self.ranks),
        }

    @classmethod
    def from_json(cls, data: dict, *, experts: int, width: int, hidden: int, where: str) -> SharedBasis:
        ranks = tuple(data["ranks"])
        if data["form"] == "low_rank":
            groups = tuple((e,) for e in range(experts))
        else:
            ids = [int(g) for g in data["groups"].split()]
            if len(ids) != experts:
                raise UserError(f"{where}: 'groups' names {len(ids)} experts, the layer has {experts}.")
            if sorted(set(ids)) != list(range(len(ranks))):
                raise UserError(
                    f"{where}: {len(ranks)} ranks are for the groups 0 to {len(ranks) - 1}; 'groups' names others."
                )
            groups = tuple(tuple(e for e, g in enumerate(ids) if g == index) for index in range(len(ranks)))
        if len(ranks) != len(groups) or not all(groups):
            raise UserError(f"{where}: {len(groups)} groups need as many ranks and an expert each; found {len(ranks)}.")
        for index, (group, rank) in enumerate(zip(groups, ranks, strict=True)):
            limit = min(len(group) * width, hidden)
            if not isinstance(rank, int) or not 1 <= rank <= limit:
                raise UserError(
                    f"{where}: rank {rank!r} of group {index} does not fit; it must be a whole number from 1 to "
                    f"{limit} = min(experts in the group × {width}, {hidden}). Edit it or raise the ratio."
                )
        return cls(experts, width, hidden, groups=groups, ranks=ranks)


class _Part:
    """One bucket's share of a call: pairs sorted by the bucket's experts."""

    def __init__(
        self, bucket: Bucket, routing: Routing, rows: Tensor | None, window: slice, counts: Tensor,
        maps: dict[str, Tensor],
    ):  # fmt: skip
        whole = window == slice(0, len(routing.expert))
        self.bucket = bucket
        self.pairs = window.stop - window.start
        self.offsets = counts.cumsum(0, dtype=torch.int32)
        self.group_offsets = self.offsets[maps[bucket.basis]]
        if rows is not None:
            rows = rows[window]
        elif not whole:
            rows = torch.arange(window.start, window.stop, device=counts.device)
        self.rows = rows  # None: all, in the routing's order
        self.token = routing.token if rows is None else routing.token[rows]
        self.weight = routing.weight if rows is None else routing.weight[rows]
        self.group = maps["group"][routing.expert if rows is None else routing.expert[rows]]
