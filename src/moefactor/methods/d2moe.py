"""d2moe: one base for the layer, each expert's delta at low rank (D²-MoE, arXiv 2502.17298).

1. Base W̄ = Σ_e F_e ⊙ W_e / Σ_e F_e, F the squared gradient of the language-model loss, elementwise, each sequence's
   gradient squared on its own; or weighted by routing frequency; or the plain mean.
2. Delta W_e − W̄ to rank r by whitened SVD; or with V shared by all experts, or U (`--shared v|u`).
3. Semi-dynamic pruning of the base: a static part of its columns goes for good, by ‖column‖·√E[x²] (`--base-pruning`);
   a further part is left out call by call, scored by the live input (`--dynamic`): compute, not memory.

The rank is what the ratio leaves once the base is paid for, over all layers at once.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..allocate import Offer
from ..errors import UserError
from ..fitting.stack import Stack, stack_error
from ..forms import BasePlusDelta, Form, SharedBasis, SharedPrivate
from ..forms.base import Factors
from .base import Fitted, StackOffers, lift
from .shared_basis import factorise as factorise_shared
from .svd import per_expert_offers
from .whitened_svd import factorise as factorise_whitened

Base = Literal["fisher", "frequency", "mean"]
Shared = Literal["none", "v", "u"]


def offers(stack: Stack, *, shared: Shared = "none", base_pruning: float = 0.0, dynamic: float = 0.0) -> StackOffers:
    """`base_pruning`, `dynamic`: fractions of the base's columns, from 0 to below 1."""
    for name, value in (("base_pruning", base_pruning), ("dynamic", dynamic)):
        if not 0 <= value < 1:
            raise UserError(f"d2moe: {name} is a fraction of the base's columns, from 0 to below 1; found {value}.")
    experts, width, hidden = stack.shape
    columns, rows = (width, hidden) if stack.writes else (hidden, width)
    kept = max(1, round((1 - base_pruning) * columns))
    fixed = kept * rows + (kept if kept < columns else 0)
    if shared == "none":
        inner = per_expert_offers(stack, stack.weights.float())
    else:
        # V lies on the inputs: the hidden side of gate and up, the intermediate side of down. U on the other.
        on_hidden = (shared == "v") != stack.writes
        one, each = (hidden, width) if on_hidden else (width, hidden)
        unit = Offer(stack.name, one + experts * each, min(one, experts * each), experts * width * hidden)

        form: Form = SharedPrivate(experts, width, hidden, rank=1)
        if on_hidden:
            form = SharedBasis(experts, width, hidden, groups=(tuple(range(experts)),), ranks=(1,))
        inner = StackOffers([unit], form)
    return StackOffers(
        inner.offers,
        form=BasePlusDelta(experts, width, hidden, delta=inner.form, kept=kept, writes=stack.writes, dynamic=dynamic),
        fixed=fixed,
    )


def factorise(stack: Stack, form: BasePlusDelta, *, seed: int, base: Base = "fisher") -> Fitted:
    merged = merged_base(stack, base)
    deltas = stack.of(stack.weights.float() - merged.float())
    if isinstance(form.delta, SharedPrivate):
        delta = _shared_private(deltas, form.delta, seed)
    else:
        assert isinstance(form.delta, SharedBasis)  # see offers
        fit = factorise_shared if len(form.delta.groups) == 1 else factorise_whitened
        delta = fit(deltas, form.delta, seed=seed).factors
    factors = _pruned(stack, merged, form) | {f"delta_{name}": tensor for name, tensor in delta.items()}
    return Fitted(factors, stack_error(stack, form, factors, weighted=True))


def merged_base(stack: Stack, base: Base) -> Tensor:
    """(width, H) float64: Σ_e F_e ⊙ W_e / Σ_e F_e."""
    # Expert by expert: a float64 copy of a stack is four times its size in bfloat16.
    mean = sum(weight.double() for weight in stack.weights) / len(stack.weights)
    if base == "mean":
        return mean
    if base == "frequency":
        share = stack.calibrated.frequency()
        return sum(s * weight.double() for s, weight in zip(share / share.sum(), stack.weights, strict=True))
    total, weighted = torch.zeros_like(mean), torch.zeros_like(mean)
    for fisher, weight in zip(_fisher(stack), stack.weights, strict=True):
        total += fisher
        weighted += fisher.double() * weight.double()
    # Where no gradient ever was, every expert counts alike.
    return torch.where(total > 0, weighted / total.clamp(min=1e-300), mean)


def _fisher(stack: Stack) -> Tensor:
    """(E, width, H): the stack's part of what calibration stored as gate, up, downᵀ."""
    width = stack.calibrated.required("hidden_moment").shape[1]
    blocks = stack.calibrated.required("fisher").split(width, dim=1)
    names = ("gate", "up", "down")[-len(blocks) :]
    wanted = ("gate", "up") if stack.name == "gate_up" else (stack.name,)
    return torch.cat([block for name, block in zip(names, blocks, strict=True) if name in wanted], dim=1)


def _shared_private(deltas: Stack, form: SharedPrivate, seed: int) -> Factors:
    """A shared basis of the stack seen from its other side."""
    experts = tuple(range(form.experts))
    mirrored = SharedBasis(form.experts, form.hidden, form.width, groups=(experts,), ranks=(form.rank,))
    factors = factorise_shared(deltas.flip(), mirrored, seed=seed).factors
    return {"private": factors[f"basis_r{form.rank}"][0], "basis": factors[f"private_r{form.rank}"]}


def _pruned(stack: Stack, merged: Tensor, form: BasePlusDelta) -> Factors:
    """The base with its `kept` best columns, by ‖column‖·√E[x²]."""
    axis = 0 if form.writes else 1
    if form.kept == form.columns:
        return {"base": merged}
    score = merged.norm(dim=1 - axis) * stack.layer_moment.diagonal().clamp(min=0).sqrt()
    columns = score.topk(form.kept).indices.sort().values
    return {"base": merged.index_select(axis, columns), "base_columns": columns.int()}


METHOD = lift(
    "d2moe",
    "a merged base and whitened low-rank deltas; the base works once a token",
    "D²-MoE, arXiv 2502.17298",
    offers,
    factorise,
    description=__doc__,
    joint=False,
    factorise_needs=lambda options: (
        {"input_moment", "hidden_moment"} | ({"fisher"} if options["base"] == "fisher" else set())
    ),
)
