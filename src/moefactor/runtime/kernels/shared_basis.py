"""Shared bases: a basis works on a token once for all experts of its group, where that is less work."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor

from ...errors import required
from ...forms import SharedBasis, SharedPrivate
from ...forms.base import Factors
from ...forms.shared_basis import Bucket
from ...routing import Routing
from .base import Kernel
from .grouped import Linear, grouped_linear
from .setting import Setting


class SharedBasisKernel(Kernel[SharedBasis]):
    """Projection and back-projection through the groups' bases; low rank is groups of one expert."""

    def __init__(self, form: SharedBasis, setting: Setting, linear: Linear = grouped_linear):
        super().__init__(form, setting, linear)
        self._maps: dict[torch.device, dict[str, Tensor]] = {}

    def read(self, factors: Factors, tokens: Tensor, routing: Routing) -> Tensor:
        parts = []
        for part in self._parts(routing):
            basis, private = factors[part.bucket.basis], factors[part.bucket.private]
            if part.bucket.groups * routing.tokens <= part.pairs:
                # Fewer groups than experts a token: project every token once on every basis, then gather.
                latent = tokens.to(basis.dtype) @ basis.flatten(0, 1).T  # (T, groups·r)
                latent = latent.view(-1, part.bucket.groups, part.bucket.rank)[part.token, part.group]
            else:
                latent = self.linear(tokens[part.token], basis.transpose(1, 2), part.group_offsets)
            parts.append(self.linear(latent, private, part.offsets))
        return self._unsort(parts, routing)

    def write(self, factors: Factors, activations: Tensor, routing: Routing) -> Tensor:
        parts = [
            self.linear(self._inward(factors, activations, part), factors[part.bucket.basis], part.group_offsets)
            for part in self._parts(routing)
        ]
        return self._unsort(parts, routing)

    def write_combined(self, factors: Factors, activations: Tensor, routing: Routing) -> Tensor:
        total: Tensor | None = None
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
                rows = self.linear(weighted.to(basis.dtype), basis, part.group_offsets)
                out = weighted.new_zeros(routing.tokens, self.form.hidden).index_add_(0, part.token, rows.float())
            total = out if total is None else total + out
        return required(total, "a group of experts").to(activations.dtype)

    def _inward(self, factors: Factors, activations: Tensor, part: _Part) -> Tensor:
        rows = activations if part.rows is None else activations[part.rows]
        return self.linear(rows, factors[part.bucket.private].transpose(1, 2), part.offsets)

    @cached_property
    def _slot_order(self) -> tuple[int, ...]:
        return tuple(e for bucket in self.form.buckets for e in bucket.experts)

    def _map(self, device: torch.device) -> dict[str, Tensor]:
        """Index maps on `device`: expert -> slot, expert -> its group's place, the slots' experts, and group ends."""
        if device not in self._maps:
            order = self._slot_order
            slot = sorted(range(self.form.experts), key=order.__getitem__)  # the inverse permutation
            group = [self.form.places[e][2] for e in range(self.form.experts)]
            self._maps[device] = {
                name: torch.tensor(values, device=device)
                for name, values in (("slot", slot), ("group", group), ("order", order))
            }
            for bucket in self.form.buckets:
                ends = torch.tensor(bucket.group_sizes, device=device).cumsum(0) - 1
                self._maps[device][bucket.basis] = ends  # its groups' last experts
        return self._maps[device]

    def _parts(self, routing: Routing) -> Iterator[_Part]:
        """The pairs of each bucket, its experts' rows contiguous and in the order of its tensors."""
        maps = self._map(routing.expert.device)
        in_order = self._slot_order == tuple(range(self.form.experts))
        rows = None if in_order else torch.argsort(maps["slot"][routing.expert], stable=True)
        counts = routing.counts if in_order else routing.counts[maps["order"]]
        # One bucket needs no row numbers on the host, hence no synchronisation.
        ends = [len(routing.expert)] if len(self.form.buckets) == 1 else None
        first_slot, start = 0, 0
        for index, bucket in enumerate(self.form.buckets):
            bucket_counts = counts[first_slot : first_slot + len(bucket.experts)]
            if ends is None:
                end = start + sum(b - a for a, b in (routing.bounds[e] for e in bucket.experts))
            else:
                end = ends[index]
            # Of many ranks most have no rows when one token is decoded; training wants a gradient of all, if of 0.
            if end > start or torch.is_grad_enabled() or not len(routing.expert):
                yield _Part(bucket, routing, rows, slice(start, end), bucket_counts, maps)
            first_slot, start = first_slot + len(bucket.experts), end

    def _unsort(self, parts: list[Tensor], routing: Routing) -> Tensor:
        """Rows of all buckets back in the routing's order."""
        together = parts[0] if len(parts) == 1 else torch.cat(parts)
        if self._slot_order == tuple(range(self.form.experts)):
            return together
        rows = torch.argsort(self._map(together.device)["slot"][routing.expert], stable=True)
        out = torch.empty_like(together)
        out[rows] = together
        return out


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


class SharedPrivateKernel(Kernel[SharedPrivate]):
    """A basis an expert, then the factor that all share."""

    def read(self, factors: Factors, tokens: Tensor, routing: Routing) -> Tensor:
        rows = tokens.index_select(0, routing.token)
        return self.linear(rows, factors["basis"].transpose(1, 2), routing.offsets) @ factors["private"]

    def write(self, factors: Factors, activations: Tensor, routing: Routing) -> Tensor:
        private = factors["private"]
        return self.linear(activations.to(private.dtype) @ private.T, factors["basis"], routing.offsets)
