"""How factors are trained: SOAP, at rates that fit each tensor, falling to nothing.

SOAP (Vyas et al. 2024, arXiv 2409.11321) is Adam in the eigenbasis of the gradients' second moment, which a step of
subspace iteration now and then keeps up to date. Factors are badly conditioned, since a change of a latent moves every
expert behind it. Here only the shorter side of a matrix is rotated: the longer one is often many experts' rows, one
below the other, which have nothing to do with each other.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..errors import required

BETAS = (0.9, 0.99)  # Adam's
MEMORY = 0.95  # of the gradients' second moment, a step
EVERY = 10  # steps between updates of the eigenbasis
LONGEST = 8192  # shorter sides beyond this are left as they are: a basis of a vocabulary would be as large as a model
FLOOR = 1e-4  # of the gradients' root mean square: directions that only rounding errors have a gradient in stay


class Soap(torch.optim.Optimizer):
    """SOAP with a learning rate for each tensor: a fraction of its root mean square.

    One rate for all diverges, since factors differ in scale by orders of magnitude.

    Args:
        rates: (parameter, rate) pairs; a step moves about rate · rms(parameter).

    A tensor of more than two dimensions is a stack of matrices, each with an eigenbasis of its own; vectors, and
    matrices with one row, take plain Adam. The first step only fills the moments, as in the authors' code.
    """

    def __init__(self, rates: Iterable[tuple[Tensor, float]]):
        super().__init__([{"params": [p], "lr": rate * _scale(p)} for p, rate in rates if p.numel()], {})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # takes no closure, which torch asks for
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group["lr"])

    def _update(self, parameter: Tensor, rate: float) -> None:
        gradient, upright = _matrices(required(parameter.grad, "a gradient"))
        state = self.state[parameter]
        if not state:
            state["step"] = 0
            state["mean"], state["square"] = torch.zeros_like(gradient), torch.zeros_like(gradient)
        state["step"] += 1
        step = state["step"]
        basis = _follow(state, gradient)
        state["mean"].lerp_(gradient, 1 - BETAS[0])
        state["square"].lerp_(_rotated(gradient, basis).square(), 1 - BETAS[1])
        if step == 1:
            return
        mean = _rotated(state["mean"], basis) / (1 - BETAS[0] ** step)
        square = state["square"] / (1 - BETAS[1] ** step)
        floor = FLOOR * square.mean((1, 2), keepdim=True).sqrt()
        change = mean / (square.sqrt() + floor).clamp(min=1e-30)
        if basis is not None:
            change = change @ basis.mT
        change = change if upright else change.mT
        parameter.add_(change.reshape(parameter.shape), alpha=-rate)


def _matrices(gradient: Tensor) -> tuple[Tensor, bool]:
    """(n, long, short) float32, and whether the short side was the last."""
    rows = gradient.float()
    rows = rows.view(1, 1, -1) if rows.ndim < 2 else rows.flatten(0, -3) if rows.ndim > 2 else rows.unsqueeze(0)
    upright = rows.shape[1] >= rows.shape[2] or rows.shape[1] == 1
    return (rows if upright else rows.mT), upright


def _follow(state: dict, gradient: Tensor) -> Tensor | None:
    """(n, short, short): the eigenbasis of the decaying mean of gᵀg, EVERY steps old at most; None where there is
    nothing to rotate."""
    long, short = gradient.shape[1:]
    if long == 1 or not 1 < short <= LONGEST:
        return None
    moment = gradient.mT @ gradient
    if "moment" not in state:
        state["moment"] = moment
        # The largest first: the iteration keeps the first columns best, and the last may be what rounding left.
        state["basis"] = _eigenvectors(moment).flip(-1)
        return state["basis"]
    state["moment"].lerp_(moment, 1 - MEMORY)
    if state["step"] % EVERY == 0:
        state["basis"] = torch.linalg.qr(state["moment"] @ state["basis"]).Q
    return state["basis"]


def _eigenvectors(moment: Tensor) -> Tensor:
    """Of symmetric matrices, many of whose eigenvalues may be 0 alike, which float32 solvers sometimes fail on."""
    moment = moment.nan_to_num()
    try:
        return torch.linalg.eigh(moment).eigenvectors
    except torch.linalg.LinAlgError:
        return torch.linalg.eigh(moment.double()).eigenvectors.to(moment)


def _rotated(rows: Tensor, basis: Tensor | None) -> Tensor:
    return rows if basis is None else rows @ basis


def _scale(parameter: Tensor) -> float:
    return float(parameter.detach().float().square().mean().sqrt()) or 1e-3


def falling(step: int, steps: int, warmup: int) -> float:
    """A straight line from 1 to 0, the first `warmup` steps from 0 up to it."""
    return min(1.0, (step + 1) / warmup) * max(0.0, 1 - step / steps)
