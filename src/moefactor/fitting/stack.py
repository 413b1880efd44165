"""One stack of a layer, with what calibration says of it, and the error of what stands for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from ..errors import required
from ..forms import Form
from ..forms.base import Factors
from ..stats import LayerStats
from .linalg import weighted_error


@dataclass(frozen=True)
class Stack:
    """One stack of a layer with what calibration says of it.

    Args:
        name: `gate_up`, `gate`, `up` or `down`.
        weights: (E, width, H), seen from the hidden side.
        stats: of the layer, or None.
        flipped: seen from the other side instead, (E, H, width), for methods that share the private factor.
    """

    name: str
    weights: Tensor
    stats: LayerStats | None
    flipped: bool = False

    @property
    def shape(self) -> tuple[int, int, int]:
        experts, rows, columns = self.weights.shape
        return experts, rows, columns

    @property
    def writes(self) -> bool:
        """Whether what the matrices multiply lies on their rows: true for down, whose inputs are its width."""
        return (self.name == "down") != self.flipped

    @property
    def calibrated(self) -> LayerStats:
        """The statistics, for methods that ask for some."""
        return required(self.stats, f"what calibration knows of {self.name}")

    @property
    def _moments(self) -> str:
        return "hidden_moment" if self.name == "down" else "input_moment"

    @cached_property
    def layer_moment(self) -> Tensor:
        """Second moment over all of the layer's tokens of what its matrices multiply, float64."""
        return self.calibrated.layer_moment(self._moments)

    def of(self, weights: Tensor) -> Stack:
        """Other weights under the same inputs: deltas, say."""
        return replace(self, weights=weights)

    def flip(self) -> Stack:
        return replace(self, weights=self.weights.transpose(1, 2), flipped=not self.flipped)

    def moment(self, expert: int) -> Tensor:
        """The same of one expert's own tokens: (H, H), or (width, width) for down."""
        return self.calibrated.mean_moment(self._moments, expert, self.layer_moment)


def relative_error(original: Tensor, rebuilt: Callable[[int], Tensor], moment: Callable[[int], Tensor] | None) -> float:
    """Σ_e ‖W_e − Ŵ_e‖² / Σ_e ‖W_e‖²; with moments (of the right-hand side) in their norm, tr D C Dᵀ."""
    lost = total = torch.zeros((), dtype=torch.float64, device=original.device)
    for expert, weight in enumerate(original):
        difference = weight.double() - rebuilt(expert).double()
        if moment is None:
            lost, total = lost + difference.square().sum(), total + weight.double().square().sum()
        else:
            c = moment(expert)
            lost = lost + weighted_error(difference, c)
            total = total + weighted_error(weight.double(), c)
    return float(lost / total) if total > 0 else 0.0


def stack_error(stack: Stack, form: Form, factors: Factors, *, weighted: bool) -> float:
    """`relative_error` of a stack, in the metric of its own inputs where `weighted`."""
    if not weighted:
        return relative_error(stack.weights, lambda e: form.dense(factors, e), None)
    if stack.writes:
        flipped = stack.weights.transpose(1, 2)
        return relative_error(flipped, lambda e: form.dense(factors, e).T, stack.moment)
    return relative_error(stack.weights, lambda e: form.dense(factors, e), stack.moment)
