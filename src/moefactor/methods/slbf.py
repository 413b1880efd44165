"""slbf: mixtures of bases that are themselves of low rank (Shared Low-rank Basis Factorization, 2026).

Ŵ_e = A_e f(Σ_j α_ej U_j V_j), m = E bases of rank k, r = I, silu, α = softmax, all three projections. Stored
gauge-fixed, so a basis costs k·(r + H − k): U_j ← U_j U_a⁻¹, V_j ← U_a V_j with the rows of U_a picked by pivoted QR.

Start (the paper's "matrix sign", no spectrum): U_e = [I_k; 0], V_e the top k right singular vectors of W_e, α logits
1 on the diagonal. `--solver adam` is the paper's AdamW; the default is variable projection (see mixture.py).
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from torch import Tensor

from ..allocate import Offer
from ..errors import UserError
from ..fitting.mixture import Problem, mixed, solve
from ..fitting.stack import Stack, stack_error
from ..forms import BasisMixture
from ..forms.basis_mixture import pack_bases
from .base import Fitted, StackOffers, lift
from .mobe import BETAS, Solver, held, metrics

RATES = {"varpro": 0.2, "adam": 0.1}
MIX_RATE = 2.0  # times that of U and V
STEPS = {"varpro": 1000, "adam": 8_000}


def offers(stack: Stack, *, bases: int = 0, rank: int = 0, activation: Literal["silu", "tanh"] = "silu") -> StackOffers:
    """What is bought is the bases' rank k. `bases`: m, 0 for one an expert; `rank`: r, 0 for I (or H, if less)."""
    experts, width, hidden = stack.shape
    count, rank = bases or experts, rank or min(width, hidden)
    if not 1 <= rank <= min(width, hidden):
        raise UserError(f"slbf: rank must be from 1 to {min(width, hidden)}, found {rank}.")
    if not 1 <= count <= experts:
        raise UserError(f"slbf: bases must be from 1 to the number of experts, {experts}; found {count}.")
    unit = Offer(
        stack.name,
        # k pivots, (r − k)·k of U, k·H of V
        unit_cost=count * (1 + rank + hidden),
        curvature=count,
        maximum=rank,
        share=experts * width * hidden,
    )
    return StackOffers(
        [unit],
        form=BasisMixture(experts, width, hidden, bases=count, rank=rank, activation=activation, basis_rank=1),
        fixed=experts * (width * rank + count),
    )


def factorise(
    stack: Stack, form: BasisMixture, *, seed: int, solver: Solver = "varpro", steps: int = 0, rate: float = 0.0,
    tolerance: float = 0.0, weighted: bool = False,
) -> Fitted:  # fmt: skip
    """`steps` and `rate` of 0 mean the solver's own: 1,000 at 0.2 for varpro, 8,000 at 0.1 for adam.

    `tolerance`: as of mobe.
    """
    experts = list(range(form.experts))
    weights = stack.weights.float()
    deviation = weights.std().clamp(min=1e-12)
    of_width, of_hidden = metrics(stack, experts, weighted)
    problem = Problem(weights / deviation, form.activation, left=of_width, right=of_hidden, triangles=True)
    k, m = form.basis_rank, form.bases
    u, _, vt = torch.linalg.svd(problem.weights[:m], full_matrices=False)
    # The first rows of a basis carry V, scaled into the range where f bends; the rest start small but not dead.
    generator = torch.Generator().manual_seed(seed)
    left = 0.1 * torch.randn(m, form.rank, k, generator=generator).to(weights)
    left[:, :k] = torch.eye(k).to(weights)
    right = 0.7 * form.hidden**0.5 * vt[:, :k]
    logits = torch.eye(form.experts, m).to(weights)

    def bases(parameters: list[Tensor]) -> Tensor:
        # U V first: mixing U and stacking V instead costs k times as much where m is E.
        return mixed(parameters[2].softmax(1), parameters[0] @ parameters[1], form.activation)

    rate = rate or RATES[solver]
    if solver == "adam":
        # The paper's ratio of rates: bases at 0.1 to 0.36 of that of A and α.
        private = u[:, :, : form.rank] if m == form.experts else None
        rates = [0.2 * rate, 0.2 * rate, rate]
        fit = partial(solve, rates=rates, private=private, private_rate=rate, weight_decay=0.02)
    else:
        fit = partial(solve, rates=[rate, rate, MIX_RATE * rate], betas=BETAS, falling=held)
    solution = fit(
        problem, bases, [left, right, logits], solver=solver, steps=steps or STEPS[solver], tolerance=tolerance
    )
    left, right, logits = solution.parameters
    factors = {
        "private": (solution.private * deviation).transpose(1, 2),
        "mix": logits.softmax(1),
        **pack_bases(left.unsqueeze(0), right.unsqueeze(0)),
    }
    return Fitted(factors, stack_error(stack, form, factors, weighted=weighted), tuple(solution.curve))


METHOD = lift(
    "slbf",
    "mixtures of low-rank bases behind an activation; rebuilds weights at run time",
    "SLBF, 2026",
    offers,
    factorise,
    description=__doc__,
    joint=False,
    factorise_needs=lambda options: {"input_moment", "hidden_moment"} if options["weighted"] else set(),
)
