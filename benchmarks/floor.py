"""What a form has to move and to multiply, whatever runs it: the floor under the seconds that speed.py measures."""

from __future__ import annotations

from dataclasses import dataclass
from functools import singledispatch

import torch

from moefactor.forms import (
    BasePlusDelta,
    BasisMixture,
    Dense,
    Form,
    Latent,
    Quantised,
    Ragged,
    SharedBasis,
    SparseResidual,
)


@dataclass
class Call:
    """One call's routing.  counts: (token, expert) pairs of each expert that has any."""

    tokens: int
    counts: dict[int, int]

    @classmethod
    def of(cls, ids: torch.Tensor) -> Call:
        experts, counts = ids.unique(return_counts=True)
        return cls(len(ids), dict(zip(experts.tolist(), counts.tolist(), strict=True)))

    @property
    def pairs(self) -> int:
        return sum(self.counts.values())


@dataclass
class Work:
    """numbers: of weights that must be read.  products: multiply-adds.  evaluations: of an activation on weights."""

    numbers: int = 0
    products: int = 0
    evaluations: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


@singledispatch
def work(form: Form, call: Call) -> Work:
    raise TypeError(form.name)


@work.register
def _(form: Dense, call: Call) -> Work:
    size = form.width * form.hidden
    return Work(len(call.counts) * size, call.pairs * size)


@work.register
def _(form: Ragged, call: Call) -> Work:
    row = form.halves * form.hidden
    return Work(
        sum(form.widths[e] * row for e in call.counts), sum(form.widths[e] * row * n for e, n in call.counts.items())
    )


@work.register
def _(form: Quantised, call: Call) -> Work:
    """Its numbers are those of 16 bits that take as much."""
    inner = work(form.inner, call)
    return Work(round(inner.numbers * form.bits() / form.inner.bits()), inner.products, inner.evaluations)


@work.register
def _(form: SharedBasis, call: Call) -> Work:
    """A basis works on a token once, or once a pair where that is less."""
    total, groups = Work(), {}
    for expert, count in call.counts.items():
        bucket, _, group = form.places[expert]
        groups.setdefault((bucket.rank, group), []).append(count)
        total += Work(bucket.rank * form.width, count * bucket.rank * form.width)
    for (rank, _), counts in groups.items():
        total += Work(rank * form.hidden, min(call.tokens, sum(counts)) * rank * form.hidden)
    return total


@work.register
def _(form: BasisMixture, call: Call) -> Work:
    """Every basis is read; each expert hit has its own formed, once, unless the mixture is linear."""
    whole, hit = form.rank * form.hidden, len(call.counts)
    groups = len({e // (form.experts // form.groups) for e in call.counts})
    bases = groups * form.bases
    inner = form.ragged or Dense(form.experts, form.width, form.rank)
    total = work(inner, call)
    if form.basis_rank:
        total += Work(bases * form.basis_rank * (form.rank + form.hidden), bases * form.basis_rank * whole)
    else:
        total += Work(bases * whole)
    formed = Work(0, (hit * form.bases + call.pairs) * whole, hit * whole)
    if form.activation == "identity" and not form.basis_rank:
        formed = Work(0, min(formed.products, call.tokens * bases * whole))
    return total + formed


@work.register
def _(form: Latent, call: Call) -> Work:
    size = form.rank * form.hidden
    return Work(size, call.tokens * size) + work(form.inner, call)


@work.register
def _(form: BasePlusDelta, call: Call) -> Work:
    size = form.kept * (form.hidden if form.writes else form.width)
    return Work(size, call.tokens * size) + work(form.delta, call)


@work.register
def _(form: SparseResidual, call: Call) -> Work:
    groups = {form.places[e][0] for e in call.counts}
    caught = Work(sum(form.sizes[g] for g in groups), call.pairs * form.width * form.hidden)
    return caught + work(form.inner, call)
