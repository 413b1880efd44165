"""The loop that optimises and keeps the best state it saw."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..errors import NotFinite, required

Schedule = torch.optim.lr_scheduler.LRScheduler


class Kept:
    """Copies of some tensors where a value was least.

    Args:
        tensors: gives them as they are now.
        value: what a state must beat to be kept; copies of the first that does are made.
    """

    def __init__(self, tensors: Callable[[], dict[str, Tensor]], value: float = math.inf):
        self.tensors, self.value, self.step = tensors, value, 0
        self.state: dict[str, Tensor] | None = None

    @property
    def best(self) -> dict[str, Tensor]:
        """The state that is kept, once one is."""
        return required(self.state, "a state that is kept")

    def offer(self, value: float, step: int) -> bool:
        """Whether this is the best so far."""
        if not value < self.value:
            return False
        self.value, self.step = value, step
        self.state = {name: tensor.detach().clone() for name, tensor in self.tensors().items()}
        return True


def descend(
    optimiser: torch.optim.Optimizer, schedule: Schedule, gradient: Callable[[], float], kept: Kept, *, steps: int,
    start: int = 0, look: Callable[[], float] | None = None, every: int = 1,
    looked: Callable[[int, float], None] = lambda step, value: None, stop: Callable[[int], bool] = lambda step: False,
    stalled: Callable[[list[float]], bool] = lambda losses: False,
) -> list[float]:  # fmt: skip
    """Takes `steps` steps and returns the loss before each.

    Args:
        gradient: leaves the gradients on the parameters and returns the loss.
        look: what decides which state is kept, asked after every `every` steps and after the last; without it the loss
            itself, before each step, since the last improvement may be the largest.
        looked: told the step and the value of each look.
        stop: asked before each step.
        stalled: asked once the loss of a step is known, with all losses up to it; ends before that step is taken.

    Raises NotFinite for a loss that isn't, unless a look decides.
    """
    losses: list[float] = []
    for step in range(start, steps):
        if stop(step):
            break
        optimiser.zero_grad()
        loss = gradient()
        losses.append(loss)
        if look is None:
            if not math.isfinite(loss):
                raise NotFinite(f"the loss of step {step}")
            kept.offer(loss, step)
        if stalled(losses):
            break
        optimiser.step()
        schedule.step()
        if look is not None and ((step + 1) % every == 0 or step + 1 == steps):
            value = look()
            kept.offer(value, step + 1)
            looked(step + 1, value)
    return losses
