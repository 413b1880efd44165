"""svd: each expert's matrix to rank r by truncated SVD. No data.

argmin ‖W_e − A_e B_e‖_F over rank r (Eckart & Young 1936); r = ⌊(1 − ratio)·out·in / (out + in)⌋, the remainder of
the budget handed out one rank at a time.
"""

from __future__ import annotations

import torch

from ..allocate import Offer
from ..fitting.linalg import truncated_svd
from ..fitting.stack import Stack, stack_error
from ..forms import SharedBasis, low_rank
from .base import Fitted, StackOffers, lift


def offers(stack: Stack) -> StackOffers:
    return per_expert_offers(stack, stack.weights.float())


def per_expert_offers(stack: Stack, whitened: torch.Tensor) -> StackOffers:
    """One offer an expert; gains are the squared singular values of `whitened` (E, width, H), relative to the stack."""
    experts, width, hidden = stack.shape
    energy = torch.linalg.svdvals(whitened).square()  # (E, min(width, H))
    energy = energy / energy.sum().clamp(min=1e-30)
    return StackOffers(
        offers=[
            Offer(stack.name, width + hidden, min(width, hidden), width * hidden, gains=energy[e].cpu())
            for e in range(experts)
        ],
        form=low_rank(experts, width, hidden, (1,) * experts),
    )


def factorise(stack: Stack, form: SharedBasis, *, seed: int) -> Fitted:
    bases, privates = [], {}
    for expert, rank in enumerate(form.ranks):
        left, right = truncated_svd(stack.weights[expert].float(), rank)
        privates[expert] = left.T
        bases.append(right)
    factors = form.pack(bases, privates)
    return Fitted(factors, stack_error(stack, form, factors, weighted=False))


METHOD = lift(
    "svd",
    "truncated SVD of every expert, no data",
    "Eckart & Young 1936",
    offers,
    factorise,
    description=__doc__,
    joint=False,
)
