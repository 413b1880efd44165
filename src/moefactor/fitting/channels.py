"""Intermediate channels: what each costs when it goes, and the layer without some of them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import UserError
from ..experts import ExpertLayer, ExpertWeights
from ..forms import Ragged
from ..stats import LayerStats

# Kernels run an expert of any width as atoms of one width, which are to be tiles of theirs, and quantised ones go by
# blocks of 128. Multiples of a sixth of the width are within the noise between texts (benchmarks/multiples.py), so that
# is 128 from 768 channels on, 64 from 512. Narrower experts are not rounded.
ATOMS = {768: 128, 512: 64}


def width_of_atoms(wanted: int | None, layer: ExpertLayer) -> int:
    """What the widths of a layer's experts are multiples of: what was asked for, or None for what its kernels like.

    Raises UserError for a multiple that no expert is as wide as.
    """
    channels = layer.intermediate
    if wanted is None:
        atom = next((atom for narrowest, atom in ATOMS.items() if channels >= narrowest), 1)
        return math.gcd(atom, channels)  # an expert that keeps everything is made of whole atoms too
    if not 1 <= wanted <= channels:
        raise UserError(
            f"--width-multiple must be from 1 to the experts' width, {channels} in {layer.name}, found {wanted}."
        )
    return wanted


def ragged_forms(layer: ExpertLayer, widths: tuple[int, ...]) -> dict[str, Ragged]:
    """The forms of a layer whose experts kept `widths` channels each."""
    halves = len(layer.projections) - 1
    first = Ragged(layer.experts, halves * layer.intermediate, layer.hidden, widths=widths, halves=halves)
    return {
        layer.first_stack: first,
        "down": Ragged(layer.experts, layer.intermediate, layer.hidden, widths=widths),
    }


def importance(weights: ExpertWeights, stats: LayerStats, shrinkage: float = 0.0) -> Tensor:
    """(E, I) float64: the estimated rise of the loss, summed over the calibration tokens, when a channel goes.

    ½ Σ_t h_k² · d_kᵀ G_e d_k, G_e the mean of ∇ ∇ᵀ over the expert's tokens, drawn to a multiple of the identity by
    `shrinkage`.
    """
    count = stats.count.clamp(min=1).view(-1, 1)
    scores = torch.empty(weights.down.shape[0], weights.down.shape[2], dtype=torch.float64, device=weights.down.device)
    for expert, down in enumerate(weights.down):
        d = down.double()  # (H, I)
        gradient = stats.required("output_gradient")[expert].double()
        own = (d * (gradient @ d)).sum(0)
        scores[expert] = (1 - shrinkage) * own + shrinkage * gradient.diagonal().mean() * d.square().sum(0)
    return 0.5 * stats.required("hidden_square").double() * scores / count


def kept_biases(weights: ExpertWeights, expert: int, channels: Tensor, intermediate: int) -> Tensor:
    """(2I or I,): the biases of the channels left, in their order, zeros behind them."""
    parts = []
    for bias in (weights.gate_bias, weights.up_bias):
        if bias is not None:
            full = torch.zeros(intermediate, dtype=bias.dtype, device=bias.device)
            full[: len(channels)] = bias[expert][channels]
            parts.append(full)
    return torch.cat(parts)
