"""mobe: a mixture of basis experts, Ŵ_e = A_e f(Σ_j α_ej B_j) (MoBE, arXiv 2508.05257).

A (I, r) private, B (r, H) shared, r = I, α on the simplex (softmax), f = silu or tanh. gate and up each alone, as in
the paper; down too, on its transpose, so that the bases lie on the hidden side.

Start: experts in m consecutive runs, the stacked SVD of each run gives B_j. The default solver is ours, variable
projection (mixture.py), from a mixing near one-hot. `--solver adam` is the public code's loop, with its start as it
stands (published_start), its one rate that never falls, and the best of all steps in place of every 200th.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from torch import Tensor

from ..allocate import Offer
from ..errors import UserError
from ..fitting.mixture import Problem, Solution, group_starts, mixed, one_hot, solve
from ..fitting.stack import Stack, stack_error
from ..forms import BasisMixture
from ..forms.base import Factors
from .base import Fitted, StackOffers, lift

Solver = Literal["varpro", "adam"]
# Logits of a mixing that starts near one-hot: 90 % of the weight on the expert's own basis among 7. At 7 (99 %) the
# softmax is so flat that experts hardly leave their first basis.
START_LOGIT = 4.0
RATES = {"varpro": 0.2, "adam": 0.07}
MIX_RATE = 2.0  # times the bases' rate, for the same reason
STEPS = {"varpro": 1500, "adam": 10_000}
# Of Adam in variable projection. Bases travel far, growing tenfold; a rate that is held and a short memory take them
# there, and are worth about twice the steps under a cosine (docs/log.md).
BETAS = (0.8, 0.95)
HELD = 0.7  # of the steps; then a straight line to 0


def offers(
    stack: Stack, *, rank: int = 0, activation: Literal["silu", "tanh"] = "silu", expert_groups: int = 1
) -> StackOffers:
    """What is bought is bases. `rank`: r, 0 for I; `expert_groups`: runs of experts with bases of their own."""
    experts, width, hidden = stack.shape
    rank = rank or min(width, hidden)
    if not 1 <= rank <= min(width, hidden):
        raise UserError(f"mobe: rank must be from 1 to {min(width, hidden)}, found {rank}.")
    if expert_groups < 1 or experts % expert_groups:
        raise UserError(f"mobe: {experts} experts can't be cut into {expert_groups} equal groups.")
    unit = Offer(
        stack.name,
        unit_cost=expert_groups * rank * hidden + experts,
        maximum=experts // expert_groups,
        share=experts * width * hidden,
        block=1,
    )
    return StackOffers(
        [unit],
        form=BasisMixture(experts, width, hidden, bases=1, rank=rank, activation=activation, groups=expert_groups),
        fixed=experts * width * rank,
    )


def factorise(
    stack: Stack, form: BasisMixture, *, seed: int, solver: Solver = "varpro", steps: int = 0, rate: float = 0.0,
    tolerance: float = 0.0, weighted: bool = False,
) -> Fitted:  # fmt: skip
    """`steps` and `rate` of 0 mean the solver's own: 1,500 at 0.2 for varpro, 10,000 at 0.07 for adam.

    `tolerance`: stop early once the best loss fell by less than this fraction over the last tenth of the steps; 0:
    never, since the last steps, where the rate falls, gain much even where the steps before them gained nothing.
    `weighted`: in the norm of each expert's own inputs, which needs calibration.
    """
    size = form.experts // form.groups
    parts: list[tuple[Factors, Solution]] = []
    for group in range(form.groups):
        experts = list(range(group * size, (group + 1) * size))
        parts.append(_fit(stack, form, experts, solver, steps, rate, tolerance, weighted, seed))
    factors = {
        "private": torch.cat([f["private"] for f, _ in parts]),
        "mix": torch.cat([f["mix"] for f, _ in parts]),
        "basis": torch.stack([f["basis"] for f, _ in parts]),
    }
    curves = [solution.curve for _, solution in parts]
    curve = [sum(values) / len(values) for values in zip(*curves, strict=False)]
    return Fitted(factors, stack_error(stack, form, factors, weighted=weighted), tuple(curve))


def _fit(
    stack: Stack, form: BasisMixture, experts: list[int], solver: Solver, steps: int, rate: float, tolerance: float,
    weighted: bool, seed: int,
) -> tuple[Factors, Solution]:  # fmt: skip
    weights = stack.weights[experts].float()
    # float32 and divided by the standard deviation, so that one learning rate fits every layer.
    deviation = weights.std().clamp(min=1e-12)
    left, right = metrics(stack, experts, weighted)
    problem = Problem(weights / deviation, form.activation, left=left, right=right, triangles=True)
    private: Tensor | None = None
    if solver == "adam":
        private, basis, logits = published_start(weights, form.bases, form.rank)
    else:
        basis = group_starts(problem, form.bases, form.rank).to(weights)
        logits = START_LOGIT * one_hot(len(experts), form.bases, noise=0.05, seed=seed).to(weights)

    def bases(parameters: list[Tensor]) -> Tensor:
        return mixed(parameters[1].softmax(1), parameters[0], form.activation)

    rate = rate or RATES[solver]
    if solver == "adam":
        fit = partial(solve, rates=[rate, rate], private=private, private_rate=rate, falling=lambda progress: 1.0)
    else:
        fit = partial(solve, rates=[rate, MIX_RATE * rate], betas=BETAS, falling=held)
    solution = fit(problem, bases, [basis, logits], solver=solver, steps=steps or STEPS[solver], tolerance=tolerance)
    basis, logits = solution.parameters
    private = (solution.private * deviation).transpose(1, 2)
    return {"private": private, "mix": logits.softmax(1), "basis": basis}, solution


def published_start(weights: Tensor, bases: int, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """private (E, width, r), basis (m, r, H) and logits (E, m) of the public code (train.py of inclusionAI/MoBE).

    U S and Vᵀ of each run's stacked SVD, logits 0 and 1, whose softmax is nearly uniform. The SVD is that of the
    weights (E, width, H) as they are, the target that of the weights over their deviation. That looks like an
    oversight, but small private factors leave the work to the bases: with U S at the target's scale the same steps end
    3 % worse.
    """
    private = weights.new_zeros(len(weights), weights.shape[1], rank)
    basis = weights.new_zeros(bases, rank, weights.shape[2])
    for j, run in enumerate(torch.arange(len(weights)).tensor_split(bases)):
        u, s, vt = torch.linalg.svd(weights[run].flatten(0, 1), full_matrices=False)
        private[run] = (u[:, :rank] * s[:rank]).unflatten(0, (len(run), -1))
        basis[j] = vt[:rank]
    return private, basis, one_hot(len(weights), bases, noise=0.0, seed=0).to(weights)


def held(progress: float) -> float:
    """What rates are multiplied by: 1 for HELD of the steps, then a straight line to 0."""
    return min(1.0, max(0.0, 1 - progress) / (1 - HELD))


def metrics(stack: Stack, experts: list[int], weighted: bool) -> tuple[Tensor | None, Tensor | None]:
    """Problem's `left` and `right`: the second moments of what the experts' matrices multiply, on the side where it
    lies; neither when unweighted."""
    if not weighted:
        return None, None
    moments = torch.stack([stack.moment(e) for e in experts])
    # Experts count by their tokens; each moment is scaled to a mean diagonal of 1 first.
    share = stack.calibrated.weight_square[experts]
    share = (share / share.mean().clamp(min=1e-30)).clamp(min=1e-2)
    level = moments.diagonal(dim1=1, dim2=2).mean(1).mean()
    metric = (moments * (share / level).view(-1, 1, 1)).float()
    return (metric, None) if stack.writes else (None, metric)


METHOD = lift(
    "mobe",
    "mixtures of shared bases behind an activation; rebuilds weights at run time",
    "MoBE, arXiv 2508.05257",
    offers,
    factorise,
    description=__doc__,
    joint=False,
    projections=("gate", "up"),
    factorise_needs=lambda options: {"input_moment", "hidden_moment"} if options["weighted"] else set(),
)
