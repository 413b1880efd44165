"""biaxial: the budget spent on both axes of an expert, in one currency, the estimated rise of the model's loss.

Along the *intermediate* axis, private to an expert, channels are removed; along the *hidden* axis, which experts share,
a basis is kept. Every candidate has a price in the same unit:

- channel k of expert e: ½·Σ_t h_k²·(d_kᵀ G_e d_k), as in channels.py;
- hidden direction of gate and up: the eigenvalues of ½·C^{1/2} (Σ_e n_e W_eᵀ diag(s_e) W_e) C^{1/2}, C the inputs'
  second moment, s_e the mean squared loss gradient at each pre-activation;
- hidden direction of down: the eigenvalues of ½·G^{1/2} (Σ_e n_e D_e E[h hᵀ] D_eᵀ) G^{1/2}, G the second moment of the
  loss gradient at the experts' outputs.

How many channels go first changes the directions' prices and costs, so the plan is the best of a grid over that share,
channels alone among them. Then closed-form fits: A_e by weighted least squares for its own inputs, and down against
the true output of the expert, from the compressed expert's own activations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor

from ..allocate import LayerOffers, Offer, spend
from ..errors import UserError
from ..experts import CompressedExperts, ExpertLayer, ExpertWeights
from ..forms import Form, Latent
from ..linalg import weighted_error, weighted_least_squares
from ..plan import LayerPlan
from ..stats import LayerStats, SecondLook
from .base import Method, Stack, options_of
from .channels import importance, kept_biases, ragged_forms, refitted_down

# Shares of all channels that are removed before bases are bought.
GRID = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5)
RIDGE = 1e-2


def planner(
    layers: Iterable[tuple[ExpertWeights, LayerStats]], budget: int, *, multiple: int, seed: int,
    tick: Callable[[], None], channel_share: float = -1.0,
) -> list[LayerPlan]:  # fmt: skip
    """The cheapest of the grid's plans by estimated loss.

    Prices are of the moments as they are: drawn to the identity (see factorise) they would make every direction dear
    and channels, whose prices sum to the same, look cheap beside them.

    Args:
        channel_share: share of the channels to remove; negative: the best of the grid.
    """
    scores = []
    for weights, stats in layers:
        scores.append(importance(weights, stats).cpu())
        tick()
    shares = GRID if channel_share < 0 else (channel_share,)
    grid = [(share, with_down) for share in shares for with_down in (True, False)]
    cuts = {share: _widths(scores, share) for share in shares}
    offers: dict[tuple[float, bool], list[LayerOffers]] = {choice: [] for choice in grid}
    for index, (weights, stats) in enumerate(layers):
        metrics = Metrics(weights, stats, 0.0)
        for share, widths in cuts.items():
            kept = [s.topk(w).indices.sort().values for s, w in zip(scores[index], widths[index], strict=True)]
            first, down = metrics.first_prices(kept)[0], metrics.down_prices(kept)[0]
            for with_down in (True, False):
                offers[share, with_down].append(_offers(weights.layer, kept, first, down if with_down else None))
        tick()
    candidates = []
    for share, with_down in grid:
        removed = _price_of_removed(scores, cuts[share])
        try:
            units = spend(offers[share, with_down], budget, "loss", multiple=multiple)
        except UserError:
            continue
        tails = sum(
            float(offer.gains[n:].sum())
            for layer, bought in zip(offers[share, with_down], units, strict=True)
            for offer, n in zip(layer.offers, bought, strict=True)
        )
        plans = [layer.plan(bought) for layer, bought in zip(offers[share, with_down], units, strict=True)]
        candidates.append((removed + tails, plans))
    if channel_share < 0:
        candidates.append(_channels_alone([layer.layer for layer in offers[grid[0]]], scores, budget))
    if not candidates:
        raise UserError("biaxial: this ratio can't be reached with that share of channels; leave channel_share out.")
    return min(candidates, key=lambda candidate: candidate[0])[1]


def _widths(scores: list[Tensor], share: float) -> list[list[int]]:
    """Channels that each expert keeps when the cheapest `share` of all channels goes."""
    every = torch.cat([s.flatten() for s in scores])
    gone = round(share * len(every))
    threshold = every.sort().values[gone - 1] if gone else torch.tensor(-1.0, dtype=every.dtype)
    return [[int((row > threshold).sum()) for row in s] for s in scores]


def _price_of_removed(scores: list[Tensor], widths: list[list[int]]) -> float:
    """Σ of the prices of the channels beyond each expert's width, its cheapest."""
    return sum(
        float(s.sort(descending=True).values[w:].sum())
        for layer_scores, layer_widths in zip(scores, widths, strict=True)
        for s, w in zip(layer_scores, layer_widths, strict=True)
    )


def _channels_alone(layers: list[ExpertLayer], scores: list[Tensor], budget: int) -> tuple[float, list[LayerPlan]]:
    """No bases: the dense channels that the budget pays for."""
    price = len(layers[0].projections) * layers[0].hidden
    every = sum(s.numel() for s in scores)
    share = 1 - (budget - sum(layer.bias_count for layer in layers)) / (every * price)
    widths = _widths(scores, min(1.0, share + 1 / every))
    return _price_of_removed(scores, widths), [
        LayerPlan(layer, _ragged(layer, tuple(w))) for layer, w in zip(layers, widths, strict=True)
    ]


def _ragged(layer: ExpertLayer, widths: tuple[int, ...], ranks: dict[str, int] | None = None) -> dict[str, Form]:
    """The forms of channels that are left; a stack named in `ranks` lives behind a basis of that rank."""
    forms: dict[str, Form] = {}
    for stack, form in ragged_forms(layer, widths).items():
        rank = (ranks or {}).get(stack)
        if rank:
            inner = replace(form, hidden=rank)
            form = Latent(layer.experts, form.width, layer.hidden, rank=rank, inner=inner)
        forms[stack] = form
    return forms


def _offers(layer: ExpertLayer, kept: list[Tensor], first: Tensor, down: Tensor | None) -> LayerOffers:
    """Directions on offer, by their prices; without `down`'s it stays as it is, apart from the channels."""
    name, halves = layer.first_stack, len(layer.projections) - 1
    total = sum(len(k) for k in kept)
    widths = tuple(len(k) for k in kept)
    wanted = {name: (halves, first)} | ({} if down is None else {"down": (1, down)})
    offers = tuple(
        Offer(stack, h * total + layer.hidden, layer.hidden, h * total * layer.hidden, gains=prices.cpu())
        for stack, (h, prices) in wanted.items()
    )

    def plan(ranks: list[int]) -> LayerPlan:
        return LayerPlan(layer, _ragged(layer, widths, dict(zip(wanted, ranks, strict=True))))

    fixed = layer.bias_count + (total * layer.hidden if down is None else 0)
    return LayerOffers(layer, fixed, offers, plan)


class Metrics:
    """A layer's moments, shrunk, and the directions they single out."""

    def __init__(self, weights: ExpertWeights, stats: LayerStats, shrinkage: float):
        self.weights, self.stats, self.shrinkage = weights, stats, shrinkage
        first = weights.layer.first_stack
        self.first = Stack(first, weights.stack(first), stats)
        self.down = Stack("down", weights.stack("down"), stats)
        self.count = stats.count.clamp(min=1).double()

    def shrunk(self, moment: Tensor) -> Tensor:
        mean = moment.diagonal().mean()
        return (1 - self.shrinkage) * moment + self.shrinkage * mean * torch.eye(len(moment)).to(moment)

    def rows(self, expert: int, channels: Tensor) -> Tensor:
        """Which rows of the first stack belong to some channels: gate's, then up's."""
        if not self.weights.layer.gated:
            return channels
        return torch.cat((channels, channels + self.weights.layer.intermediate))

    def sensitivity(self, expert: int) -> Tensor:
        """(2I or I,) s_e·n_e, drawn to its mean."""
        total = self.stats.first_gradient[expert].double()
        return (1 - self.shrinkage) * total + self.shrinkage * total.mean()

    def first_prices(self, kept: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Prices (H,), falling, of gate and up's directions, and the directions (H, H) as rows, C^{1/2} undone."""
        gram = 0.0
        for expert, channels in enumerate(kept):
            rows = self.rows(expert, channels)
            w = self.first.weights[expert][rows].double()
            gram = gram + w.T @ (self.sensitivity(expert)[rows].unsqueeze(1) * w)
        root, inverse = _roots(self.shrunk(self.first.layer_moment))
        values, vectors = torch.linalg.eigh(0.5 * root @ gram @ root)
        return values.flip(0).clamp(min=0), vectors.flip(1).T @ inverse

    def down_prices(self, kept: list[Tensor], refitted: list[Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """The same of down, whose directions are G^{1/2}'s on the way in and undone on the way out."""
        gradient = self.stats.output_gradient.sum(0).double() / self.count.sum()
        root, inverse = _roots(self.shrunk(gradient))
        gram = 0.0
        for expert, channels in enumerate(kept):
            d = self.down.weights[expert][channels].double() if refitted is None else refitted[expert]
            moment = self.down.moment(expert)[channels][:, channels]
            if len(channels):
                gram = gram + self.count[expert] * d.T @ self.shrunk(moment) @ d
        values, vectors = torch.linalg.eigh(0.5 * root @ gram @ root)
        # D ≈ D·(G^{1/2} v)(v G^{-1/2}): project with root, rebuild with inverse.
        return values.flip(0).clamp(min=0), (vectors.flip(1).T @ inverse, root @ vectors.flip(1))


def _roots(moment: Tensor) -> tuple[Tensor, Tensor]:
    values, axes = torch.linalg.eigh(moment)
    half = values.clamp(min=1e-8 * float(values[-1]) + 1e-30).sqrt()
    return axes * half @ axes.T, axes / half @ axes.T


def factorise(
    weights: ExpertWeights, stats: LayerStats, plan: LayerPlan, *, seed: int, shrinkage: float = 0.25
) -> CompressedExperts:
    """The first projections for good, and down as far as moments of the dense activations take it.

    `shrinkage`: how far moments are drawn to a multiple of the identity, 0 to 1. Text unlike what the model will read
    wants more.
    """
    if not 0 <= shrinkage <= 1:
        raise UserError(f"biaxial: shrinkage must be from 0 to 1, found {shrinkage}.")
    layer = weights.layer
    metrics = Metrics(weights, stats, shrinkage)
    kept = kept_channels(weights, stats, plan, shrinkage)
    first = metrics.first.name
    tensors: dict[str, Tensor] = {}
    form = plan.forms[first]
    rows = [metrics.first.weights[e][metrics.rows(e, k)].double() for e, k in enumerate(kept)]
    if isinstance(form, Latent):
        basis = metrics.first_prices(kept)[1][: form.rank]
        moments = (metrics.shrunk(metrics.first.moment(e)) for e in range(layer.experts))
        rows = [weighted_least_squares(w, basis, c) for w, c in zip(rows, moments, strict=True)]
        tensors[f"{first}_basis"] = basis
    tensors[f"{first}_weight"] = torch.cat(rows)
    down = [refitted_down(metrics.down, e, k, refit=True, centred=False)[0].double() for e, k in enumerate(kept)]
    tensors |= _down_tensors(metrics, plan, kept, down)
    if layer.biased:
        biases = [kept_biases(weights, e, k, layer.intermediate) for e, k in enumerate(kept)]
        tensors |= {"first_bias": torch.stack(biases), "down_bias": weights.down_bias}
    return CompressedExperts(layer, dict(plan.forms), tensors, _errors(metrics, plan, kept, tensors))


def refit(
    weights: ExpertWeights, stats: LayerStats, compressed: CompressedExperts, seen: SecondLook, plan: LayerPlan, *,
    shrinkage: float = 0.25,
) -> CompressedExperts:  # fmt: skip
    """Down again: D_e ← argmin Σ g²‖y − D h'‖² + ridge‖D − D_e‖², y what the dense expert gives and h' what the
    compressed one has, then its directions."""
    metrics = Metrics(weights, stats, shrinkage)
    kept = kept_channels(weights, stats, plan, shrinkage)
    down = []
    for expert, channels in enumerate(kept):
        width = len(channels)
        original = metrics.down.weights[expert][channels].double()  # (w, H)
        moment = seen.moment[expert][:width, :width].double()
        cross = seen.cross[expert][:width].double()  # (w, H)
        if width and stats.count[expert] > 0:
            ridge = RIDGE * (1 + 64 / float(stats.count[expert])) * moment.diagonal().mean() + 1e-30
            moment = moment + ridge * torch.eye(width, dtype=moment.dtype, device=moment.device)
            original = torch.linalg.solve(moment, cross + ridge * original)
        down.append(original)
    tensors = compressed.tensors | _down_tensors(metrics, plan, kept, down)
    return CompressedExperts(weights.layer, dict(plan.forms), tensors, compressed.errors)


def kept_channels(weights: ExpertWeights, stats: LayerStats, plan: LayerPlan, shrinkage: float) -> list[Tensor]:
    form = plan.forms["down"]
    widths = (form.inner if isinstance(form, Latent) else form).widths
    scores = importance(weights, stats, shrinkage)
    return [s.topk(w).indices.sort().values for s, w in zip(scores, widths, strict=True)]


def _down_tensors(metrics: Metrics, plan: LayerPlan, kept: list[Tensor], down: list[Tensor]) -> dict[str, Tensor]:
    """down: (w, H) of each expert -> what the form stores."""
    form = plan.forms["down"]
    if not isinstance(form, Latent):
        return {"down_weight": torch.cat(down)}
    basis, inward = metrics.down_prices(kept, down)[1]
    rows = [d @ inward[:, : form.rank] for d in down]
    return {"down_basis": basis[: form.rank], "down_weight": torch.cat(rows)}


def _errors(metrics: Metrics, plan: LayerPlan, kept: list[Tensor], tensors: dict[str, Tensor]) -> dict[str, float]:
    """Of the first projections, in the norm of their inputs, channels that went counted as lost."""
    first, lost, total = metrics.first, 0.0, 0.0
    result = CompressedExperts(metrics.weights.layer, dict(plan.forms), tensors)
    form, factors = plan.forms[first.name], result.factors(first.name)
    for expert, channels in enumerate(kept):
        original = first.weights[expert].double()
        rows = metrics.rows(expert, channels)
        places = metrics.rows(expert, torch.arange(len(channels), device=rows.device))
        rebuilt = torch.zeros_like(original)
        rebuilt[rows] = form.dense(factors, expert).double()[places]
        moment = first.moment(expert)
        difference = original - rebuilt
        lost += float(weighted_error(difference, moment))
        total += float(weighted_error(original, moment))
    return {first.name: lost / total if total else 0.0}


METHOD = Method(
    "biaxial",
    "channels removed and one shared basis a projection, priced in the model's loss; refitted",
    "moefactor's own",
    __doc__,
    None,
    factorise,
    options_of(planner, factorise),
    plan_needs=lambda options: {
        "input_moment", "hidden_moment", "hidden_square", "output_gradient", "first_gradient",
    },
    factorise_needs=lambda options: {
        "input_moment", "hidden_moment", "hidden_square", "output_gradient", "first_gradient",
    },
    planner=planner,
    refit=refit,
)  # fmt: skip
