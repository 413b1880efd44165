"""Mixtures of bases on a CPU: experts' bases are formed a few rows at a time and used before they leave the cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from ...forms.base import Factors
from ...forms.basis_mixture import identity
from ...routing import Routing
from .basis_mixture import BasisMixtureKernel

ENTRIES = 1 << 20  # that are formed together, 4 MB of float32; more or fewer by half cost 5 to 20 %
FEWEST_ROWS = 8
FEW = 8  # rows an expert: fewer of 16 bits are multiplied faster once they are float32
IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": partial(torch.nn.functional.silu, inplace=True),
    "tanh": torch.tanh_,
    "identity": identity,
}


class Span(NamedTuple):
    """An expert hit, its place among those, and its pairs."""

    place: int
    expert: int
    rows: slice


class MixtureInCache(BasisMixtureKernel):
    """No expert's basis is ever whole in memory. Every block of the bases is read once for all experts hit.

    Written for inference; where gradients are asked for, its parent's products are what autograd sees.
    """

    def _into_rebuilt(self, factors: Factors, tokens: Tensor, routing: Routing) -> Tensor:
        if _tracked(factors, tokens):
            return super()._into_rebuilt(factors, tokens, routing)
        dtype = _working(factors["mix"].dtype, routing)
        if routing.tokens == 1:
            return self._one_token(factors, tokens[0].to(dtype), routing).to(factors["mix"].dtype)
        rows = tokens.to(dtype).index_select(0, routing.token)
        out = rows.new_empty(len(rows), self.form.rank)
        for spans, own, matrices in self._formed(factors, routing, dtype):
            for matrix, span in zip(matrices, spans, strict=True):
                out[span.rows, own] = rows[span.rows] @ matrix.T
        return out.to(factors["mix"].dtype)

    def _one_token(self, factors: Factors, token: Tensor, routing: Routing) -> Tensor:
        """(H,) -> (k, r): all its experts in one product."""
        sizes = torch.tensor([end - start for start, end in routing.bounds if end > start])
        out = token.new_empty(len(sizes), self.form.rank)
        for spans, own, matrices in self._formed(factors, routing, token.dtype):
            met = torch.mv(matrices.flatten(0, 1), token).view(len(spans), -1)
            out[spans[0].place : spans[-1].place + 1, own] = met
        return out.repeat_interleave(sizes, 0)

    def _out_of_rebuilt(self, factors: Factors, latents: Tensor, routing: Routing) -> Tensor:
        if _tracked(factors, latents):
            return super()._out_of_rebuilt(factors, latents, routing)
        dtype = _working(factors["mix"].dtype, routing)
        rows = latents.to(dtype)
        out = torch.zeros(len(rows), self.form.hidden)  # a sum over blocks, so in float32
        for spans, own, matrices in self._formed(factors, routing, dtype):
            for matrix, span in zip(matrices, spans, strict=True):
                out[span.rows] += rows[span.rows, own] @ matrix
        return out.to(factors["mix"].dtype)

    def _formed(
        self, factors: Factors, routing: Routing, dtype: torch.dtype
    ) -> Iterator[tuple[list[Span], slice, Tensor]]:
        """(experts, rows, (experts, rows, H) of f(Σ_j α_ej B_j)) of all experts hit, where the next will be."""
        form = self.form
        bounds = [(expert, slice(*rows)) for expert, rows in enumerate(routing.bounds) if rows[1] > rows[0]]
        hit = [Span(place, *bound) for place, bound in enumerate(bounds)]
        at_once = 8 if form.bases < 16 else 16  # experts a product: the more bases, the more that copying them costs
        most = max(FEWEST_ROWS, ENTRIES // (at_once * form.hidden))
        room = factors["mix"].new_empty(min(at_once, len(hit)) * most * form.hidden)
        cast = room.new_empty(len(room), dtype=dtype)
        for group, members in groupby(hit, key=lambda span: span.expert // (form.experts // form.groups)):
            spans = list(members)
            mix = factors["mix"][[span.expert for span in spans]]
            bases = self._bases(factors, group, most)
            # 16 bits are widened before mixing where the bases are fewer than what is made of them.
            early = form.bases <= len(spans)
            mix, wide = (mix.to(dtype), cast.new_empty(form.bases * most * form.hidden)) if early else (mix, cast)
            for first in range(0, form.rank, most):
                own = slice(first, min(first + most, form.rank))
                block = bases(own)  # (m, rows · H)
                if early and block.dtype != dtype:
                    block = wide[: block.numel()].view(block.shape).copy_(block)
                for at in range(0, len(spans), at_once):
                    some = mix[at : at + at_once]
                    size = len(some) * block.shape[1]
                    formed = torch.mm(some, block, out=(cast if early else room)[:size].view(len(some), -1))
                    formed = formed if formed.dtype == dtype else cast[:size].view(formed.shape).copy_(formed)
                    formed = IN_PLACE[form.activation](formed)
                    yield spans[at : at + at_once], own, formed.view(len(some), -1, form.hidden)

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
    """Of f and the product."""
    few = len(routing.expert) < FEW * sum(end > start for start, end in routing.bounds)
    return torch.float32 if few and dtype.itemsize < 4 else dtype
