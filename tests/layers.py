"""Random experts and what a router would have shown them, for tests of one layer's mathematics."""

from __future__ import annotations

import json
from dataclasses import fields

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from moefactor.allocate import Budget, LayerOffers
from moefactor.experts import CompressedExperts, ExpertLayer, ExpertWeights
from moefactor.methods import Method, accepted
from moefactor.plan import LayerPlan
from moefactor.stats import STATISTICS, LayerStats

UNUSED = 3  # the expert that no token reaches

LAYERS = {
    "gated": ExpertLayer("model.layers.0.mlp.experts", "model.layers.0", 8, 16, 24),
    "ungated": ExpertLayer("model.layers.0.mlp.experts", "model.layers.0", 8, 16, 24, gated=False),
    "biased": ExpertLayer(
        "model.layers.0.mlp.experts", "model.layers.0", 8, 16, 24, concatenated=False, transposed=True, biased=True
    ),
}


class Experts(nn.Module):
    """As much of a fused experts module as the observed forward asks for; `norm` is what outputs go through before they
    are weighed and added."""

    has_gate, has_bias, is_transposed, is_concatenated = True, False, False, True

    def __init__(self, norm: nn.Module | None = None):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.gate_up_proj = nn.Parameter(torch.randn(3, 8, 6, generator=generator))
        self.down_proj = nn.Parameter(torch.randn(3, 6, 4, generator=generator))
        self.has_post_expert_norm = norm is not None
        if norm is not None:
            self.post_expert_norm = norm

    def _apply_gate(self, first: Tensor) -> Tensor:
        gate, up = first.chunk(2, dim=-1)
        return silu(gate) * up


def random_weights(layer: ExpertLayer = LAYERS["gated"], *, seed: int = 0) -> ExpertWeights:
    """Experts with something in common and a spectrum that falls, as trained ones have."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    e, i, h = layer.experts, layer.intermediate, layer.hidden
    falling = 1 / torch.arange(1, h + 1).sqrt()

    def matrices() -> Tensor:
        return (normal(e, i, h) + 0.5 * normal(i, h)) * falling

    biases = {}
    if layer.biased:
        biases = {"gate_bias": normal(e, i), "up_bias": normal(e, i), "down_bias": normal(e, h)}
    gate = matrices() if layer.gated else None
    return ExpertWeights(layer, up=matrices(), down=matrices().transpose(1, 2), gate=gate, **biases)


def routed(layer: ExpertLayer, *, tokens: int = 400, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """(x, index, g) of a layer's tokens: correlated inputs, uneven routing to two experts, expert UNUSED left out."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(layer.hidden, layer.hidden, generator=generator)
    x = torch.randn(tokens, layer.hidden, generator=generator) @ mixing
    logits = x[:, : layer.experts] + torch.linspace(3, 0, layer.experts)
    logits[:, UNUSED] = -torch.inf
    g, chosen = logits.softmax(-1).topk(2)
    return x, chosen, g


def routed_tokens(
    weights: ExpertWeights, *, tokens: int = 400, seed: int = 1
) -> list[tuple[int, Tensor, Tensor, Tensor, Tensor]]:
    """(expert, x, h, y, g) of every expert in use."""
    layer, seen = weights.layer, []
    x, chosen, g = routed(layer, tokens=tokens, seed=seed)
    for expert in range(layer.experts):
        token, slot = (chosen == expert).nonzero(as_tuple=True)
        rows = x[token]
        if len(rows):
            h = activation(layer, rows @ weights.stack(layer.first_stack)[expert].T)
            seen.append((expert, rows, h, h @ weights.down[expert].T, g[token, slot]))
    return seen


def activation(layer: ExpertLayer, before: Tensor) -> Tensor:
    """(n, 2I or I), gate then up, biases added -> (n, I)."""
    if not layer.gated:
        return silu(before)
    gate, up = before.chunk(2, dim=1)
    return silu(gate) * up


def random_stats(weights: ExpertWeights, **how: int) -> LayerStats:
    """Every statistic there is; gradients at the outputs, which no loss stands behind here, are random."""
    layer = weights.layer
    stats = LayerStats.zeros(layer, STATISTICS)
    generator = torch.Generator().manual_seed(2)
    for expert, x, h, y, g in routed_tokens(weights, **how):
        stats.add(expert, x, h, y, g)
        gradient = g[:, None] * torch.randn(y.shape, generator=generator)
        stats.add_gradient(expert, gradient)
        before = (x @ weights.stack(layer.first_stack)[expert].T).requires_grad_()
        out = activation(layer, before) @ weights.down[expert].T
        stats.add_first_gradient(expert, torch.autograd.grad(out, before, gradient)[0])
        stats.fisher[expert] += len(g) * torch.rand(stats.fisher[expert].shape, generator=generator)
    return stats


SUMS = {"count", "weight", "weight_square", "output_norm"}  # always collected


def only(stats: LayerStats, needs: set[str]) -> LayerStats | None:
    """What a run folder would hold if no more than `needs` had been collected."""
    if not needs:
        return None
    kept = SUMS | needs | ({"hidden_sum"} if "hidden_square" in needs else set())
    return LayerStats(**{f.name: getattr(stats, f.name) if f.name in kept else None for f in fields(stats)})


def priced(
    method: Method, weights: ExpertWeights, stats: LayerStats | None, options: dict, budget: Budget | None = None
) -> object:
    """What a method says a layer can spend on, from no more statistics than it says it plans by; through JSON, as a
    resumed run reads it."""
    seen = only(stats, method.plan_needs(options)) if stats is not None else None
    budget = budget or Budget(weights.layer.parameter_count, 0.5)
    found = method.price(weights, seen, budget, seed=5, **accepted(method.price, options))
    return method.priced(weights.layer, json.loads(json.dumps(found.to_json())))


def planned(
    method: Method, weights: ExpertWeights, stats: LayerStats | None, options: dict, *, units: int | None = None
) -> LayerPlan:
    """One layer planned, every offer bought `units` times (None: as often as can be); of a method without offers, a
    twentieth of the layer for each unit and a quarter besides."""
    share = 1.0 if units is None else min(1.0, 0.25 + units / 20)
    budget = Budget(int(share * weights.layer.parameter_count), max(0.01, 1 - share))
    found = priced(method, weights, stats, options, budget)
    if not isinstance(found, LayerOffers):
        return method.plan([found], budget).layers[0]
    bought = [o.maximum if units is None else max(o.minimum, min(units, o.maximum)) for o in found.offers]
    return method.build(found, bought)


def factorised(
    method: Method, weights: ExpertWeights, stats: LayerStats, *, units: int | None = None, **options: object
) -> tuple[LayerPlan, CompressedExperts]:
    """One layer through a method."""
    options = method.complete(options)
    plan = planned(method, weights, stats, options, units=units)
    given = accepted(method.factorise, options)
    return plan, method.factorise(weights, only(stats, method.factorise_needs(options)), plan, seed=5, **given)


def stacked(weights: ExpertWeights) -> dict[str, Tensor]:
    """Every projection by name, to compare two layers."""
    return {name: getattr(weights, name) for name in weights.layer.projections}
