"""rfid: ranks by fused routing frequency and effective rank, the residual brought back (RFID-MoE, arXiv 2602.09316).

1. Experts sorted by routing frequency, cut into groups of `group_size`.
2. Effective rank R_g = exp(−Σ p ln p), p = σ²/Σσ², of each group's stack.
3. Score ξ·R̂_g + (1−ξ)·F̂_g, both normalised over the layer's groups.
4. Ranks proportional to the scores; the budget is met to within one rank (allocate.py).
5. One basis a group: Ŵ_e = A_e · B_g. With one basis the stacked SVD is the optimum, so that is the default; the
   paper's fit, Adam on A and f(B) with f = SiLU, is `refine_steps`.
6. What is left over goes through a sparse projection into a vector of `residual` (3 %) of the stack's parameters.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..errors import UserError
from ..fitting.descent import Kept, descend
from ..fitting.linalg import effective_rank, gram, spectrum, top_eigenvectors
from ..fitting.stack import Stack, stack_error
from ..forms import SharedBasis, SparseResidual, WindowResidual
from .base import Fitted, StackOffers, lift
from .shared_basis import Group, consecutive, grouped_offers


def offers(
    stack: Stack,
    *,
    group_size: int = 4,
    grouping: Literal["frequency", "consecutive"] = "frequency",
    score: Literal["fused", "frequency", "effective_rank", "uniform"] = "fused",
    xi: float = 0.8,
    residual: float = 0.03,
    seed: int = 0,
) -> StackOffers:
    """`grouping`, `score` and `residual` (0 turns it off) are the paper's three parts, each to be ablated."""
    if not 0 <= xi <= 1:
        raise UserError(f"rfid: xi must be from 0 to 1, found {xi}.")
    if not 0 <= residual < 1:
        raise UserError(f"rfid: residual is a fraction of the parameters, from 0 to below 1; found {residual}.")
    frequency = _frequency(stack)
    groups = _groups(stack, frequency, group_size, grouping)
    energies = [spectrum(gram(stack.weights[list(g)].flatten(0, 1))) for g in groups]
    ranks = torch.tensor([effective_rank(energy.sqrt()) for energy in energies], dtype=torch.float64)
    used = torch.stack([frequency[list(g)].sum() for g in groups])
    scores = {
        "fused": xi * _normalised(ranks) + (1 - xi) * _normalised(used),
        "frequency": _normalised(used),
        "effective_rank": _normalised(ranks),
        "uniform": torch.ones(len(groups)),
    }[score]
    inner = grouped_offers(stack, groups, gains=energies, scores=scores.tolist())
    if residual == 0:
        return inner
    experts, width, hidden = stack.shape
    # A channel's share of its group's vector; on wide models a multiple that kernels like.
    share = residual * len(groups[0])
    if share > 1:
        raise UserError(f"rfid: residual {residual} is more than one expert's share of a group of {len(groups[0])}.")
    step = max(1, round(share * hidden))
    step = step if step < 64 else min(round(step / 8) * 8, hidden)
    sizes = (step * width,) * len(groups)
    return StackOffers(
        inner.offers,
        form=WindowResidual(experts, width, hidden, inner=inner.form, groups=tuple(groups), sizes=sizes, seed=seed),
        fixed=sum(sizes),
    )


def factorise(
    stack: Stack, form: SharedBasis | SparseResidual, *, seed: int, refine_steps: int = 0, refine_rate: float = 0.02
) -> Fitted:
    """`refine_steps`: Adam steps of the paper's own fit (0: the closed form, which it cannot beat)."""
    if refine_steps < 0:
        raise UserError(f"rfid: refine_steps must be 0 or more, found {refine_steps}.")
    basis_form = form.inner if isinstance(form, SparseResidual) else form
    assert isinstance(basis_form, SharedBasis)  # see offers
    bases: list[Tensor] = []
    privates: dict[int, Tensor] = {}
    for group, rank in zip(basis_form.groups, basis_form.ranks, strict=True):
        weights = stack.weights[list(group)]  # (n, width, H)
        basis = top_eigenvectors(gram(weights.flatten(0, 1)), rank)
        private = weights.double() @ basis.T  # (n, width, r)
        if refine_steps:
            basis, private = _refine(weights.float(), basis.float(), steps=refine_steps, rate=refine_rate)
        bases.append(basis)
        privates |= {expert: private[i].T for i, expert in enumerate(group)}
    factors = basis_form.pack(bases, privates)
    if isinstance(form, SparseResidual):
        factors["residual"] = form.project(
            w.double() - basis_form.dense(factors, e) for e, w in enumerate(stack.weights)
        )
    return Fitted(factors, stack_error(stack, form, factors, weighted=False))


def _refine(weights: Tensor, basis: Tensor, *, steps: int, rate: float) -> tuple[Tensor, Tensor]:
    """min ‖W_e − A_e f(B)‖², f = SiLU, by Adam from the SVD; the best state seen. Returns f(B) and A.

    weights (n, width, H), basis (r, H). The rows of B start at 0.7·√H, where SiLU is neither linear nor saturated,
    and A at its least squares. Nothing but f(B) is needed afterwards, since a group has one basis.
    """
    scale = weights.std().clamp(min=1e-12)
    target = weights / scale
    raw = (0.7 * basis.shape[1] ** 0.5 * basis).requires_grad_()
    start = torch.nn.functional.silu(raw.detach())
    private = torch.linalg.lstsq(start.T, target.flatten(0, 1).T).solution.T.reshape(*target.shape[:2], -1)
    private = private.contiguous().requires_grad_()
    optimiser = torch.optim.Adam([raw, private], lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps, eta_min=0.02 * rate)
    kept = Kept(lambda: {"basis": torch.nn.functional.silu(raw), "private": private})

    def gradient() -> float:
        loss = (target - private @ torch.nn.functional.silu(raw)).square().mean()
        loss.backward()
        return loss.item()

    descend(optimiser, schedule, gradient, kept, steps=steps + 1)
    return kept.best["basis"], kept.best["private"] * scale


def _frequency(stack: Stack) -> Tensor:
    if stack.stats is None:
        return torch.full((len(stack.weights),), 1 / len(stack.weights), dtype=torch.float64)
    return stack.stats.frequency().cpu()


def _groups(stack: Stack, frequency: Tensor, group_size: int, grouping: str) -> list[Group]:
    experts = len(stack.weights)
    if not 1 <= group_size <= experts:
        raise UserError(f"rfid: group_size must be from 1 to the number of experts, {experts}; found {group_size}.")
    if grouping == "consecutive":
        return consecutive(experts, -(-experts // group_size))
    order = torch.argsort(frequency, descending=True, stable=True)
    return [tuple(sorted(part.tolist())) for part in order.split(group_size)]


def _normalised(values: Tensor) -> Tensor:
    total = values.sum()
    return values / total if total > 0 else torch.full_like(values, 1 / len(values))


METHOD = lift(
    "rfid",
    "ranks by routing frequency and effective rank, residual through a sparse projection",
    "RFID-MoE, arXiv 2602.09316",
    offers,
    factorise,
    description=__doc__,
    joint=False,
    projections=("gate", "up"),
    rule="score",
    plan_needs=lambda options: (
        {"routing"} if options["grouping"] == "frequency" or options["score"] in ("fused", "frequency") else set()
    ),
)
