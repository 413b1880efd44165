"""Mixtures of bases on a CPU: experts' bases are formed a few rows at a time and used before they leave the cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import groupby

import torch
from torch import Tensor

from ...forms.base import Factors
from ...forms.basis_mixture import identity
from ...routing import Routing
from .basis_mixture import BasisMixtureKernel

AT_ONCE = 8  # experts whose rows are formed in one product
ENTRIES = 1 << 19  # that are formed together: 2 MB of float32
FEWEST_ROWS = 8
IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": partial(torch.nn.functional.silu, inplace=True),
    "tanh": torch.tanh_,
    "identity": identity,
}
Span = tuple[int, int, int]  # an expert, and where its pairs begin and end


class MixtureInCache(BasisMixtureKernel):
    """No expert's basis is ever whole in memory. Every block of the bases is read once for all experts hit.

    Written for inference; where gradients are asked for, its parent's products are what autograd sees.
    """

    def _into_rebuilt(self, factors: Factors, tokens: Tensor, routing: Routing) -> Tensor:
        if _tracked(factors, tokens):
            return super()._into_rebuilt(factors, tokens, routing)
        dtype = _working(factors["mix"].dtype, routing)
        rows = tokens.to(dtype)
        rows = rows.index_select(0, routing.token) if routing.tokens > 1 else rows
        out = rows.new_empty(len(routing.expert), self.form.rank)
        for spans, own, matrices in self._formed(factors, routing, dtype):
            if routing.tokens == 1:  # all experts of one token at once
                met = torch.mv(matrices.flatten(0, 1), rows[0]).view(len(spans), -1)
                for row, (_, start, end) in zip(met, spans, strict=True):
                    out[start:end, own] = row
            else:
                for matrix, (_, start, end) in zip(matrices, spans, strict=True):
                    out[start:end, own] = rows[start:end] @ matrix.T
        return out.to(factors["mix"].dtype)

    def _out_of_rebuilt(self, factors: Factors, latents: Tensor, routing: Routing) -> Tensor:
        if _tracked(factors, latents):
            return super()._out_of_rebuilt(factors, latents, routing)
        dtype = _working(factors["mix"].dtype, routing)
        rows = latents.to(dtype)
        out = torch.zeros(len(rows), self.form.hidden)  # a sum over blocks, so in float32
        for spans, own, matrices in self._formed(factors, routing, dtype):
            for matrix, (_, start, end) in zip(matrices, spans, strict=True):
                out[start:end] += rows[start:end, own] @ matrix
        return out.to(factors["mix"].dtype)

    def _formed(
        self, factors: Factors, routing: Routing, dtype: torch.dtype
    ) -> Iterator[tuple[list[Span], slice, Tensor]]:
        """(experts, rows, (experts, rows, H) of f(Σ_j α_ej B_j)) of all experts hit, in memory that the next one takes."""
        form = self.form
        hit = [(e, start, end) for e, (start, end) in enumerate(routing.bounds) if end > start]
        most = max(FEWEST_ROWS, ENTRIES // (AT_ONCE * form.hidden))
        room = factors["mix"].new_empty(min(AT_ONCE, len(hit)) * most * form.hidden)
        cast = room.new_empty(len(room), dtype=dtype)
        for group, members in groupby(hit, key=lambda span: span[0] // (form.experts // form.groups)):
            spans = list(members)
            mix = factors["mix"][[expert for expert, *_ in spans]]
            bases = self._bases(factors, group, most)
            for first in range(0, form.rank, most):
                own = slice(first, min(first + most, form.rank))
                block = bases(own)  # (m, rows · H)
                for at in range(0, len(spans), AT_ONCE):
                    some = mix[at : at + AT_ONCE]
                    formed = room[: len(some) * block.shape[1]].view(len(some), -1)
                    torch.mm(some, block, out=formed)
                    if dtype != formed.dtype:
                        formed = cast[: formed.numel()].view(formed.shape).copy_(formed)
                    formed = IN_PLACE[form.activation](formed)
                    yield spans[at : at + AT_ONCE], own, formed.view(len(some), -1, form.hidden)

    def _bases(self, factors: Factors, group: int, most: int) -> Callable[[slice], Tensor]:
        """Rows of a group's bases -> (m, rows · H); those of low rank are multiplied out, once for all experts."""
        form = self.form
        if not form.basis_rank:
            whole = factors["basis"][group].flatten(1)
            return lambda own: whole[:, own.start * form.hidden : own.stop * form.hidden]
        left, right = form.full_left(factors, group), factors["basis_right"][group]
        room = right.new_empty(form.bases * most * form.hidden)

        def multiplied(own: slice) -> Tensor:
            rows = own.stop - own.start
            out = room[: form.bases * rows * form.hidden].view(form.bases, rows, form.hidden)
            return torch.bmm(left[:, own], right, out=out).flatten(1)

        return multiplied


def _tracked(factors: Factors, rows: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in (rows, *factors.values()))


def _working(dtype: torch.dtype, routing: Routing) -> torch.dtype:
    """Of f and the product. A few rows of 16 bits are multiplied faster once they are float32, and f is faster too."""
    few = len(routing.expert) < 4 * sum(end > start for start, end in routing.bounds)
    return torch.float32 if few and dtype.itemsize < 4 else dtype
