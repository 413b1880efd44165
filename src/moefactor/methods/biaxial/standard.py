"""biaxial's ordinary checkpoint: fewer experts and narrower ones, as many and as wide in every layer.

Which experts and which channels stay goes by the channels' prices. How many of each is a choice of one pair for the
whole model: experts that go lose all they did and their tokens go elsewhere, channels that go are made up for by
those beside them.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...allocate import Budget, Planned, TooSmall
from ...errors import UserError, required
from ...experts import CompressedExperts, ExpertLayer, ExpertWeights
from ...fitting.channels import kept_biases, ragged_forms, width_of_atoms
from ...fitting.metrics import Cut, Metrics, relative_first_error
from ...fitting.refine import LayerTokens, refine_block
from ...plan import LayerPlan
from ..reap import best_in_groups

# What an expert that goes costs, over its channels' prices, where a channel that goes from one that stays costs one:
# after both were trained on the layer's tokens.
DROPPED = 1.6
STEPS, RATE = 300, 0.03
# Widths come in multiples of the largest power of two that leaves this many of them, and WIDEST at most: tiles of
# matrix kernels, and shards of a tensor-parallel engine, are no wider.
CHOICES, WIDEST = 6, 128


@dataclass(frozen=True)
class Shapes:
    """What a layer's experts and channels are worth, (E, I), and the multiples that what is left comes in."""

    layer: ExpertLayer
    prices: Tensor
    width_multiple: int
    experts_multiple: int

    def to_json(self) -> dict:
        rest = {"width_multiple": self.width_multiple, "experts_multiple": self.experts_multiple}
        return {"prices": self.prices.tolist(), **rest}

    @classmethod
    def from_json(cls, layer: ExpertLayer, data: dict) -> Shapes:
        return cls(layer, **{**data, "prices": torch.tensor(data["prices"], dtype=torch.float64)})

    def choices(self) -> Iterator[tuple[int, int]]:
        """(experts, width) that an ordinary MoE may have, the model's own among them."""
        layer = self.layer
        step = math.lcm(self.experts_multiple, layer.router_groups)
        counts = [n for n in range(step, layer.experts, step) if n >= layer.fewest_experts and not layer.fixed_count]
        widths = range(self.width_multiple, layer.intermediate, self.width_multiple)
        for experts in (*counts, layer.experts):
            for width in (*(() if layer.fixed_width else widths), layer.intermediate):
                yield experts, width

    def best(self, experts: int, width: int) -> tuple[tuple[int, ...], float]:
        """The experts that stay, and the estimated rise of the loss."""
        whole = self.prices.sum(1)
        cut = whole - self.prices.topk(width, dim=1).values.sum(1)
        groups = self.layer.router_groups
        kept = best_in_groups(DROPPED * whole - cut, groups, experts // groups)
        gone = torch.ones(len(whole), dtype=torch.bool).index_fill(0, torch.tensor(kept), False)
        return kept, float(DROPPED * whole[gone].sum() + cut[~gone].sum())

    def plan(self, experts: int, width: int) -> LayerPlan:
        kept = None if experts == self.layer.experts else self.best(experts, width)[0]
        return LayerPlan(self.layer, ragged_forms(replace(self.layer, experts=experts), (width,) * experts), kept=kept)


def shapes(metrics: Metrics, budget: Budget, width_multiple: int | None, experts_multiple: int) -> Shapes:
    """Raises UserError for multiples that make no sense."""
    layer = metrics.layer
    if budget.multiple is not None:
        raise UserError("biaxial: an ordinary checkpoint has no ranks; in place of --rank-multiple, --width-multiple.")
    if experts_multiple < 1 or layer.experts % experts_multiple:
        raise UserError(
            f"biaxial: experts_multiple must divide the model's {layer.experts} experts, found {experts_multiple}."
        )
    chosen = multiple_of(layer.intermediate) if width_multiple is None else width_of_atoms(width_multiple, layer)
    return Shapes(layer, metrics.prices().cpu(), chosen, experts_multiple)


def multiple_of(intermediate: int) -> int:
    """What widths come in multiples of unless the user says otherwise."""
    return min(WIDEST, 1 << max(0, (intermediate // CHOICES).bit_length() - 1))


def plan_shapes(tables: list[Shapes], budget: Budget) -> Planned:
    """The pair of least estimated loss, over all layers, that the budget holds."""
    first = tables[0]
    if any(list(table.choices()) != list(first.choices()) for table in tables):
        raise UserError(
            "biaxial: the model's layers have experts of different shapes, which one number and one width for all "
            "can't describe. Use --form fast, linear or tight."
        )

    costs = {shape: sum(parameters_of(table.layer, *shape) for table in tables) for shape in first.choices()}
    fitting = [shape for shape, parameters in costs.items() if parameters <= budget.parameters]
    if not fitting:
        whole = sum(table.layer.parameter_count for table in tables)
        reach = math.floor(1000 * (1 - min(costs.values()) / whole)) / 1000
        layer = first.layer
        widths = "their width" if layer.fixed_width else f"widths in multiples of {first.width_multiple}"
        counts = "all experts" if layer.fixed_count else f"experts in multiples of {first.experts_multiple}"
        raise TooSmall(
            f"biaxial: no ordinary checkpoint is so small: the highest ratio is {reach:.3f} with {counts} and {widths}"
            f"; the router needs {layer.fewest_experts}. --form fast, linear and tight go further."
        )
    loss, shape = min((sum(table.best(*shape)[1] for table in tables), shape) for shape in fitting)
    return Planned([table.plan(*shape) for table in tables], loss)


def parameters_of(layer: ExpertLayer, experts: int, width: int) -> int:
    """What LayerPlan counts: biases keep the width that they had."""
    weights = experts * width * layer.hidden * len(layer.projections)
    return weights + replace(layer, experts=experts).bias_count


def cut_experts(weights: ExpertWeights, metrics: Metrics, plan: LayerPlan) -> CompressedExperts:
    """What stays, down refitted for the channels that are gone."""
    layer = weights.layer
    kept = range(layer.experts) if plan.kept is None else plan.kept
    widths = [0] * layer.experts
    for expert, width in zip(kept, plan.forms["down"].rows().widths, strict=True):
        widths[expert] = width
    cut = Cut.of(metrics, metrics.prices(), widths)
    rows = cut.first_rows()
    tensors = {f"{layer.first_stack}_weight": torch.cat(rows), "down_weight": torch.cat(cut.down)}
    if layer.biased:
        down_bias = required(weights.down_bias, "down_bias")
        biases = [kept_biases(weights, e, cut.kept[e], layer.intermediate) for e in kept]
        tensors |= {"first_bias": torch.stack(biases), "down_bias": down_bias[list(kept)]}
    return CompressedExperts(
        plan.remaining, dict(plan.forms), tensors, {layer.first_stack: relative_first_error(cut, rows)}
    )


def train(
    compressed: CompressedExperts, tokens: LayerTokens, gradient: Tensor, *, steps: int, seed: int
) -> CompressedExperts:
    """Experts and router together, against what the dense layer's whole block gives; gradient as of refine_block."""
    if not steps:
        return compressed
    if tokens.block is None:
        warnings.warn(
            f"{compressed.layer.name}: cut and refitted, but not trained: its block takes more than hidden states.",
            stacklevel=2,
        )
        return compressed
    return refine_block(compressed, tokens.block, gradient, steps=steps, seed=seed, rate=RATE)
