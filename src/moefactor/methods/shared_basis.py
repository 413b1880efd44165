"""shared_basis: one basis for a group of experts, a private factor for each (MoLAE, arXiv 2503.23100).

B_g: the top right singular vectors of the group's stack, in the norm of its inputs unless `whitened` is off; then
A_e = W_e C_e Bᵀ (B C_e Bᵀ)⁻¹ for the expert's own second moment C_e. For down, whose inputs lie on the private side,
the stack is weighted by S_eᵀ from the left and B_g is exactly optimal.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..allocate import Offer
from ..errors import UserError
from ..fitting.linalg import gram, spectrum, top_eigenvectors, weighted_least_squares, whitening
from ..fitting.stack import Stack, stack_error
from ..forms import SharedBasis
from .base import Fitted, StackOffers, lift

Group = tuple[int, ...]


def offers(stack: Stack, *, groups: int = 1, whitened: bool = True) -> StackOffers:
    """`groups`: how many bases a layer has; consecutive experts share one."""
    members = consecutive(len(stack.weights), groups)
    whitened = whitened and stack.stats is not None and stack.stats.input_moment is not None
    grams = [group_gram(stack, group, whitened=whitened) for group in members]
    return grouped_offers(stack, members, gains=[spectrum(g) for g in grams])


def grouped_offers(
    stack: Stack, groups: list[Group], *, gains: list[Tensor], scores: list[float] | None = None
) -> StackOffers:
    """One offer a group: a rank costs its n·width private entries and H of the basis. gains: falling, per group."""
    experts, width, hidden = stack.shape
    total = sum(float(g.sum()) for g in gains) or 1.0
    limits = [min(len(group) * width, hidden) for group in groups]
    return StackOffers(
        offers=[
            Offer(
                stack.name,
                len(group) * width + hidden,
                limit,
                len(group) * width * hidden,
                score=1.0 if scores is None else score,
                gains=gain[:limit].cpu() / total,
            )
            for group, limit, gain, score in zip(groups, limits, gains, scores or [1.0] * len(groups), strict=True)
        ],
        form=SharedBasis(experts, width, hidden, groups=tuple(groups), ranks=(1,) * len(groups)),
    )


def factorise(stack: Stack, form: SharedBasis, *, seed: int, whitened: bool = True) -> Fitted:
    bases, privates = [], {}
    for group, rank in zip(form.groups, form.ranks, strict=True):
        basis = top_eigenvectors(group_gram(stack, group, whitened=whitened), rank)
        if whitened and not stack.writes:
            basis = basis @ whitening(_pooled(stack, group))[1]
        bases.append(basis)
        for expert in group:
            weight = stack.weights[expert].double()
            if whitened and not stack.writes:
                private = weighted_least_squares(weight, basis, stack.moment(expert))
            else:
                private = weight @ basis.T  # orthonormal rows; a metric on the private side cancels
            privates[expert] = private.T.float()
    factors = form.pack(bases, privates)
    return Fitted(factors, stack_error(stack, form, factors, weighted=whitened))


def group_gram(stack: Stack, group: Group, *, whitened: bool) -> Tensor:
    """(H, H) Gram matrix of the group's stack, float64; its eigenvectors are the basis sought.

    Whitened gate and up: Sᵀ (Σ_e p_e W_eᵀ W_e) S with S Sᵀ the group's pooled moment and p_e the experts' share of
    the tokens, so that a basis serves the experts in use. Whitened down: Σ_e p_e W_eᵀ C_e W_e.
    """
    if not whitened:
        return gram(stack.weights[list(group)].flatten(0, 1))
    mass = stack.calibrated.weight_square
    # Never quite zero: an expert that calibration missed still has to be rebuilt.
    share = (mass / mass.mean().clamp(min=1e-30)).clamp(min=1e-2)
    total = torch.zeros((), dtype=torch.float64, device=stack.weights.device)
    for expert in group:
        weight = stack.weights[expert].double()
        inner = weight.T @ stack.moment(expert) @ weight if stack.writes else weight.T @ weight
        total = total + share[expert] * inner
    if stack.writes:
        return total
    factor, _ = whitening(_pooled(stack, group))
    return factor.T @ total @ factor


def _pooled(stack: Stack, group: Group) -> Tensor:
    """The group's mean second moment, experts weighted by their tokens' Σg²; the layer's where they saw none."""
    mass = stack.calibrated.weight_square[list(group)]
    if mass.sum() == 0:
        return stack.layer_moment
    return sum(m * stack.moment(e) for m, e in zip(mass / mass.sum(), group, strict=True))


def consecutive(experts: int, groups: int) -> list[Group]:
    """`groups` runs of consecutive experts, as equal as can be."""
    if not 1 <= groups <= experts:
        raise UserError(f"shared_basis: groups must be from 1 to the number of experts, {experts}; found {groups}.")
    return [tuple(part.tolist()) for part in torch.arange(experts).tensor_split(groups)]


METHOD = lift(
    "shared_basis",
    "one basis a layer (or few), private factors by weighted least squares",
    "MoLAE, arXiv 2503.23100, made activation-aware",
    offers,
    factorise,
    description=__doc__,
    joint=True,
    factorise_needs=lambda options: {"input_moment", "hidden_moment"} if options["whitened"] else set(),
)
