"""whitened_svd: the SVD of W_e S, which minimises the error of the output rather than of the weight.

argmin ‖(W_e − Ŵ_e) S‖_F, S Sᵀ = E[x xᵀ]  (SVD-LLM, arXiv 2403.07378, eq. 3). The experts' own second moments, those
with few tokens borrowing from their layer.
"""

from __future__ import annotations

import torch

from ..fitting.linalg import truncated_svd, whitening
from ..fitting.stack import Stack, stack_error
from ..forms import SharedBasis
from .base import Fitted, StackOffers, lift
from .svd import per_expert_offers


def offers(stack: Stack) -> StackOffers:
    if stack.stats is None or stack.stats.input_moment is None:
        # Only the rule `loss` reads the gains; the others plan without moments.
        return per_expert_offers(stack, stack.weights.float())
    frequency = stack.stats.frequency()
    whitened = [_whiten(stack, e)[0] * frequency[e].clamp(min=1e-6).sqrt() for e in range(len(stack.weights))]
    return per_expert_offers(stack, torch.stack(whitened).float())


def factorise(stack: Stack, form: SharedBasis, *, seed: int) -> Fitted:
    bases, privates = [], {}
    for expert, rank in enumerate(form.ranks):
        whitened, inverse = _whiten(stack, expert)
        left, right = truncated_svd(whitened, rank)
        if stack.writes:
            left = inverse.T @ left
        else:
            right = right @ inverse
        privates[expert] = left.T.float()
        bases.append(right.float())
    factors = form.pack(bases, privates)
    return Fitted(factors, stack_error(stack, form, factors, weighted=True))


def _whiten(stack: Stack, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
    """W_e S (or Sᵀ W_e for down, whose inputs lie on its width) and S⁻¹, float64."""
    factor, inverse = whitening(stack.moment(expert))
    weight = stack.weights[expert].double()
    return (factor.T @ weight if stack.writes else weight @ factor), inverse


METHOD = lift(
    "whitened_svd",
    "truncated SVD of every expert in the norm of its own inputs",
    "SVD-LLM, arXiv 2403.07378",
    offers,
    factorise,
    description=__doc__,
    joint=False,
    factorise_needs=lambda options: {"input_moment", "hidden_moment"},
)
