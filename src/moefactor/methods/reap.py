"""reap: the experts that add least are dropped, the router is cut (REAP, arXiv 2510.13999).

Saliency of e: the mean over its tokens of g·‖f_e(x)‖. The lowest go, as many in every layer, so the result is a
standard, smaller MoE. A group-limited router keeps as many experts in each of its groups. With `--intercept` the
router stays whole and a dropped expert gives a constant, its mean output (MoNE, arXiv 2507.00390).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..allocate import LayerOffers, Offer
from ..experts import CompressedExperts, ExpertWeights
from ..fitting.channels import ragged_forms
from ..forms import Dense
from ..plan import LayerPlan
from ..stats import LayerStats
from .base import offering


def offers(weights: ExpertWeights, stats: LayerStats, *, seed: int, intercept: bool = False) -> LayerOffers:
    layer = weights.layer
    groups = 1 if intercept else layer.router_groups
    # With intercepts every expert keeps its biases, and one that stays needs no constant.
    fixed = layer.bias_count + layer.experts * layer.hidden if intercept else 0
    price = groups * ((layer.parameter_count - fixed) // layer.experts)
    unit = Offer(
        "experts",
        price,
        layer.experts // groups,
        layer.parameter_count,
        gains=saliency(stats).sort(descending=True).values.cpu(),
        minimum=1 if intercept else -(-layer.fewest_experts // groups),
        block=1,
    )

    notes = {"scores": saliency(stats).tolist(), "groups": groups, "intercept": intercept}
    return LayerOffers(layer, fixed, (unit,), {}, equal=True, notes=notes)


def build(offers: LayerOffers, bought: Sequence[int]) -> LayerPlan:
    """The best experts of every group of the router stay."""
    layer = offers.layer
    scores = torch.tensor(offers.notes["scores"], dtype=torch.float64)
    kept = best_in_groups(scores, offers.notes["groups"], bought[0])
    if not offers.notes["intercept"]:
        stacks = layer.stacks((), joint=True)
        return LayerPlan(
            layer, {name: Dense(len(kept), layer.stack_width(name), layer.hidden) for name in stacks}, kept=kept
        )
    widths = tuple(layer.intermediate if e in kept else 0 for e in range(layer.experts))
    dropped = tuple(e for e in range(layer.experts) if e not in kept)
    return LayerPlan(layer, ragged_forms(layer, widths), intercept=dropped)


def saliency(stats: LayerStats) -> Tensor:
    """(E,) Σ g·‖f_e(x)‖ / tokens; 0 for an expert that saw none."""
    return stats.output_norm / stats.count.clamp(min=1)


def best_in_groups(scores: Tensor, groups: int, each: int) -> tuple[int, ...]:
    """The `each` best experts of every run of E/groups, ascending."""
    grouped = scores.view(groups, -1)
    starts = torch.arange(groups, device=scores.device).unsqueeze(1) * grouped.shape[1]
    return tuple((grouped.topk(each, dim=1).indices + starts).flatten().sort().values.tolist())


def factorise(
    weights: ExpertWeights, stats: LayerStats, plan: LayerPlan, *, seed: int, intercept: bool = False
) -> CompressedExperts:
    """Only what the plan keeps; with intercepts each dropped expert's mean output."""
    stacks = {name: weights.stack(name) for name in plan.forms}
    if plan.kept is not None:
        ids = torch.tensor(plan.kept, device=weights.down.device)
        tensors = {f"{name}_weight": stack[ids] for name, stack in stacks.items()}
        tensors |= {name: bias[ids] for name, bias in weights.biases().items()}
        return CompressedExperts(plan.remaining, dict(plan.forms), tensors)
    kept = [e for e in range(plan.layer.experts) if e not in plan.intercept]
    tensors = dict(weights.biases())
    for name, stack in stacks.items():
        tensors[f"{name}_weight"] = stack[kept].flatten(0, 1)
    mean = stats.required("hidden_sum").double() / stats.weight_square.clamp(min=1e-300).unsqueeze(1)
    constants = torch.stack([d.double() @ m for d, m in zip(weights.down, mean, strict=True)])
    if plan.intercept:
        tensors["intercept"] = constants[list(plan.intercept)]
    return CompressedExperts(plan.layer, dict(plan.forms), tensors)


METHOD = offering(
    "reap",
    "whole experts dropped by their routed output, the router cut: a standard checkpoint",
    "REAP, arXiv 2510.13999; intercept: MoNE, arXiv 2507.00390",
    offers,
    factorise,
    description=__doc__,
    rule="uniform",
    build=build,
    plan_needs=lambda options: {"routing"},
    factorise_needs=lambda options: {"hidden_square"} if options["intercept"] else set(),
    standard=lambda options: "" if options["intercept"] else "count",
)
