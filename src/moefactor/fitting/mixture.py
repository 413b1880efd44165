"""Solvers for mixtures of bases: W_e ≈ A_e f(Σ_j α_ej B_j). What mobe and slbf share.

Both minimise Σ_e ⟨L_e R_e, R_e C_e⟩ / Σ_e ⟨L_e W_e, W_e C_e⟩, R_e = W_e − A_e B_e, with metrics L (on the width) and
C (on the hidden side) that are the identity unless a method weights its experts.

*Variable projection*: given the bases, each A_e is a least-squares solution. It is solved exactly at every step, and
only bases and mixing are optimised: at the optimal A the gradient is that of the plain objective with A held fixed
(Golub & Pereyra 1973). *Adam*: the papers' solver, over everything at once.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import NotFinite, UserError
from ..forms.basis_mixture import ACTIVATIONS
from .descent import Kept, descend

RIDGE = 1e-5  # of the mean diagonal of B C Bᵀ; smaller ones made single experts blow up between steps


@dataclass
class Problem:
    """What is to be approximated.

    weights: (E, width, H) float32.
    right: (E, H, H) C_e, or None for the identity.
    left: (E, width, width) L_e, or (E, width) its diagonal, or None.
    level: what the weights were divided by, for the caller to remember.
    triangles: solve for A by two triangular systems; over many small matrices on a CPU in two fifths of the time of
        cholesky_solve, and other in the last bits.
    noise: variance of what rounding adds to A_e, over the square of what it is added to. The loss is then what is
        expected of rounded factors: without it, factors that rounding ruins are fitted, large ones that cancel.
    """

    weights: Tensor
    activation: str
    right: Tensor | None = None
    left: Tensor | None = None
    level: float = 1.0
    triangles: bool = False
    noise: float = 0.0
    scale: float = field(init=False)

    def __post_init__(self) -> None:
        self.scale = float(self._energy(self.weights)) or 1.0  # experts of zeros: their loss is 0, not NaN

    def private(self, bases: Tensor) -> Tensor:
        """(E, width, r): argmin over A_e, whatever L is (with `noise`, where L is diagonal; near it where not). bases
        (E, r, H)."""
        metric = bases.transpose(1, 2) if self.right is None else self.right @ bases.transpose(1, 2)  # (E, H, r)
        normal = bases @ metric
        diagonal = normal.diagonal(dim1=1, dim2=2)
        ridge = (RIDGE * diagonal.mean(1, keepdim=True)).clamp(min=1e-30) + self.noise * diagonal
        normal = normal + torch.diag_embed(ridge)
        factor, info = torch.linalg.cholesky_ex(normal)
        if info.any():
            factor = _lifted_cholesky(normal, info)
        if self.triangles:
            half = torch.linalg.solve_triangular(factor.mT, self.weights @ metric, upper=True, left=False)
            return torch.linalg.solve_triangular(factor, half, upper=False, left=False)
        return torch.cholesky_solve((self.weights @ metric).transpose(1, 2), factor).transpose(1, 2)

    def loss(self, private: Tensor, bases: Tensor) -> Tensor:
        """Relative squared error in the metrics; private (E, width, r), bases (E, r, H)."""
        lost = self._energy(self.weights - private @ bases)
        return (lost + self.noise * self.rounding_energy(private, bases) if self.noise else lost) / self.scale

    def rounding_energy(self, private: Tensor, bases: Tensor) -> Tensor:
        """Σ_e Σ_rows Σ_r L_e A² (B C_e Bᵀ)_rr, of which rounding A costs the share `noise`."""
        metric = bases if self.right is None else bases @ self.right
        weight = (metric * bases).sum(2)  # (E, r)
        squares = private.square()
        if self.left is not None:
            diagonal = self.left if self.left.ndim == 2 else self.left.diagonal(dim1=1, dim2=2)
            squares = diagonal.unsqueeze(2) * squares
        return (squares.sum(1) * weight).sum()

    def _energy(self, rows: Tensor) -> Tensor:
        other = rows if self.right is None else rows @ self.right
        return (self.weighted(rows) * other).sum()

    def weighted(self, rows: Tensor) -> Tensor:
        """L_e · rows."""
        if self.left is None:
            return rows
        return self.left.unsqueeze(-1) * rows if self.left.ndim == 2 else self.left @ rows


def _lifted_cholesky(normal: Tensor, info: Tensor) -> Tensor:
    """Of (E, r, r) matrices some of which rounding has left indefinite: those get a ridge, tenfold until it serves."""
    level = normal.diagonal(dim1=1, dim2=2).mean(1).abs().view(-1, 1, 1)
    eye = torch.eye(normal.shape[1], dtype=normal.dtype, device=normal.device)
    for power in range(-4, 2):
        lifted = normal + 10.0**power * (info != 0).view(-1, 1, 1) * level * eye
        factor, still = torch.linalg.cholesky_ex(lifted)
        if not still.any():
            return factor
    raise NotFinite("the least-squares solution of a mixture of bases")


@dataclass
class Solution:
    """private (E, width, r); the solver's parameters at the best loss; the best loss up to each step."""

    private: Tensor
    parameters: list[Tensor]
    curve: list[float]


def solve(
    problem: Problem, bases: Callable[[list[Tensor]], Tensor], start: list[Tensor], *, solver: str, steps: int,
    rates: list[float], private: Tensor | None = None, tolerance: float = 0.0, weight_decay: float = 0.0,
    private_rate: float = 0.07, betas: tuple[float, float] = (0.9, 0.999),
    falling: Callable[[float], float] | None = None,
) -> Solution:  # fmt: skip
    """Fits the parameters behind `bases`.

    Args:
        bases: parameters -> (E, r, H).
        start: the parameters' first values.
        solver: `varpro` solves A at every step; `adam` learns it too, at `private_rate`, from `private`.
        rates: learning rate of each parameter.
        falling: progress from 0 to 1 -> what the rates are multiplied by; None: cosine to 2 %.
        betas: Adam's.
        tolerance: stop once the best loss fell by less than this fraction over the last tenth of the steps; 0: never.
    """
    parameters = [p.detach().clone().requires_grad_() for p in start]
    groups = [{"params": [p], "lr": rate} for p, rate in zip(parameters, rates, strict=True)]
    learned = None
    if solver == "adam":
        learned = (problem.private(bases(start)) if private is None else private).detach().clone().requires_grad_()
        groups.append({"params": [learned], "lr": private_rate})
    optimiser: torch.optim.Optimizer
    if weight_decay:
        optimiser = torch.optim.AdamW(groups, betas=betas, weight_decay=weight_decay)
    else:
        optimiser = torch.optim.Adam(groups, betas=betas)
    falling = falling or (lambda progress: 0.02 + 0.98 * _cosine(progress))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: falling(step / max(1, steps)))
    if steps < 1:
        raise UserError(f"steps must be at least 1, found {steps}.")
    found: list[Tensor] = []  # A at this step

    def gradient() -> float:
        current = bases(parameters)
        with torch.no_grad():
            found[:] = [problem.private(current) if learned is None else learned]
        loss = problem.loss(found[0], current)
        loss.backward()
        return loss.item()

    kept = Kept(lambda: {"private": found[0], **{str(i): p for i, p in enumerate(parameters)}})
    window = max(50, steps // 10)

    def stalled(losses: list[float]) -> bool:
        """The best loss fell by too little over the last `window` steps."""
        if not tolerance or len(losses) <= window:
            return False
        earlier = min(losses[: len(losses) - window + 1])
        return earlier - kept.value < tolerance * kept.value

    losses = descend(optimiser, schedule, gradient, kept, steps=steps + 1, stalled=stalled)
    best = [kept.best[str(i)] for i in range(len(parameters))]
    return Solution(kept.best["private"], best, list(itertools.accumulate(losses, min)))


def _cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))


def group_starts(problem: Problem, bases: int, rank: int) -> Tensor:
    """(m, r, H): the top right singular vectors of m runs of consecutive experts, in the metrics.

    Rows are scaled to 0.35·√H for silu and tanh (0.7 and 0.2 ended worse on the reference model), √H for identity.
    """
    experts, _, hidden = problem.weights.shape
    runs = torch.arange(experts).tensor_split(bases)
    found = []
    for run in runs:
        rows = problem.weights[run].double()
        gram = torch.einsum("eih,eik->hk", problem.weighted(problem.weights)[run].double(), rows)
        if problem.right is None:
            vectors = torch.linalg.eigh(gram).eigenvectors
        else:
            moment = problem.right[run].double().mean(0)
            values, axes = torch.linalg.eigh(moment)
            root = values.clamp(min=1e-12 * float(values[-1])).sqrt()
            half, inverse = axes * root @ axes.T, axes / root @ axes.T
            vectors = inverse @ torch.linalg.eigh(half @ gram @ half).eigenvectors
        top = vectors.flip(1)[:, :rank].T
        found.append(top / top.norm(dim=1, keepdim=True).clamp(min=1e-30))
    level = 1.0 if problem.activation == "identity" else 0.35
    return (torch.stack(found) * level * hidden**0.5).float()


def one_hot(experts: int, bases: int, *, noise: float, seed: int) -> Tensor:
    """(E, m): 1 for the basis that started from the expert's own run, plus Gaussian noise to break ties."""
    start = torch.zeros(experts, bases)
    for j, run in enumerate(torch.arange(experts).tensor_split(bases)):
        start[run, j] = 1.0
    return start + noise * torch.randn(start.shape, generator=torch.Generator().manual_seed(seed))


def mixed(mix: Tensor, basis: Tensor, activation: str) -> Tensor:
    """f(Σ_j α_ej B_j): mix (E, m), basis (m, r, H) -> (E, r, H)."""
    return ACTIVATIONS[activation]((mix @ basis.flatten(1)).view(-1, *basis.shape[1:]))
