"""biaxial's plan: for every layer, how many channels go and what each stack becomes, at the least estimated loss.

Every layer has a table: for each share of its channels taken out, what that costs the loss, and for each stack the
candidates left, (loss, parameters, rank, bases). A price of a parameter (a Lagrange multiplier) picks a row and
candidates in every layer alone; bisection finds the price at which the budget is met. What remains is spent on better
candidates, then on channels bought back.

The loss of channels and of one basis is in closed form; that of a mixture is foretold (biaxial_mixture.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ..errors import UserError
from ..experts import ExpertLayer, ExpertWeights
from ..forms import BasisMixture, Form, Latent, Ragged
from ..plan import LayerPlan
from ..stats import LayerStats
from .biaxial_mixture import RANKS, MixturePrices, Side, highest_rank, mixture_prices
from .channels import ragged_forms
from .metrics import Cut, Metrics

FormName = Literal["fast", "linear", "tight"]
MIXING = {"linear": "identity", "tight": "silu"}  # form -> activation of its mixtures; `fast` has none
SHARES = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.7, 0.8, 0.9)
# Shares where mixtures are probed for a whole grid of them: most at the first, near what is chosen from 40 % up.
PROBED = (0.25, 0.0, 0.5)
MOST_BASES = 64
LEAST_EXPERTS = 4  # for a mixture, which has two bases at least, and half as many as experts at most
FRONT = 100


@dataclass(frozen=True)
class Candidate:
    """What a stack can become; rank 0: as it is, bases 0: one linear basis.  activation: of a mixture."""

    loss: float
    cost: int
    rank: int = 0
    bases: int = 0
    activation: str = "silu"


@dataclass
class Row:
    """A layer with some of its channels taken out.  removed: what that costs the loss.  offers: of each stack."""

    widths: list[int]
    removed: float
    offers: dict[str, list[Candidate]]


@dataclass
class Choice:
    row: Row
    chosen: dict[str, Candidate]

    @property
    def cost(self) -> int:
        return sum(candidate.cost for candidate in self.chosen.values())

    @property
    def loss(self) -> float:
        return self.row.removed + sum(candidate.loss for candidate in self.chosen.values())


def plan_layers(
    layers: Iterable[tuple[ExpertWeights, LayerStats | None]], budget: int, *, form: FormName, multiple: int, seed: int,
    fit_prior: float, plan_prior: float, channel_share: float, tick: Callable[[], None],
) -> tuple[list[LayerPlan], float]:  # fmt: skip
    """The plans and the loss they are expected to cost, summed over the calibration tokens.

    Args:
        fit_prior, plan_prior: Metrics.prior of what will be fitted, and of what is believed when it comes to spending.
        channel_share: of every layer's channels to take out; negative: the best for each layer.
    """
    tables: list[list[Row]] = []
    shapes: list[ExpertLayer] = []
    prices: list[Tensor] = []
    for weights, stats in layers:
        layer = weights.layer
        fitted, believed = Metrics(weights, stats, fit_prior), Metrics(weights, stats, plan_prior)
        shares = SHARES if channel_share < 0 else (channel_share,)
        tables.append(_table(fitted, believed, shares, form, multiple, seed))
        prices.append(fitted.prices().cpu())
        shapes.append(layer)
        tick()
    budget -= sum(layer.bias_count for layer in shapes)
    choices = _spend(tables, budget)
    if not choices:
        least = sum(min(_least(row) for row in table) for table in tables)
        least += sum(layer.bias_count for layer in shapes)
        reach = math.floor(1000 * (1 - least / sum(layer.parameter_count for layer in shapes))) / 1000
        raise UserError(f"biaxial: this ratio can't be reached; the highest with these options is {reach:.3f}.")
    left = budget - sum(choice.cost for choice in choices)
    _improve(tables, choices, left)
    widths = [list(choice.row.widths) for choice in choices]
    _buy_channels(shapes, choices, widths, prices, budget - sum(choice.cost for choice in choices))
    plans = [
        LayerPlan(layer, forms_of(layer, tuple(kept), choice.chosen))
        for layer, kept, choice in zip(shapes, widths, choices, strict=True)
    ]
    return plans, sum(choice.loss for choice in choices)


def forms_of(layer: ExpertLayer, widths: tuple[int, ...], chosen: dict[str, Candidate]) -> dict[str, Form]:
    """The forms of channels that are left; a stack with a rank lives behind one basis or a mixture of them."""
    forms: dict[str, Form] = {}
    for stack, ragged in ragged_forms(layer, widths).items():
        candidate = chosen.get(stack, Candidate(0.0, 0))
        forms[stack] = ragged
        if candidate.bases:
            forms[stack] = BasisMixture(
                layer.experts, ragged.width, layer.hidden, bases=candidate.bases, rank=candidate.rank,
                activation=candidate.activation, widths=widths, halves=ragged.halves,
            )  # fmt: skip
        elif candidate.rank:
            inner = replace(ragged, hidden=candidate.rank)
            forms[stack] = Latent(layer.experts, ragged.width, layer.hidden, rank=candidate.rank, inner=inner)
    return forms


def ragged_of(form: Form) -> Ragged:
    """The part of a form of `forms_of` that has a row for every channel left."""
    if isinstance(form, Latent):
        return form.inner
    if isinstance(form, BasisMixture):
        return Ragged(form.experts, form.width, form.rank, widths=form.widths, halves=form.halves)
    return form


# -- the table of a layer --------------------------------------------------------------------------------------------


def _table(
    fitted: Metrics, believed: Metrics, shares: tuple[float, ...], form: FormName, multiple: int, seed: int
) -> list[Row]:
    layer = fitted.layer
    prices, energy = fitted.prices(), believed.first_energy()

    def cut_at(share: float) -> Cut:
        return Cut.of(fitted, prices, widths_at(prices, share))

    foretold: dict[Side, MixturePrices] = {}
    if form in MIXING and layer.experts >= LEAST_EXPERTS:
        probed = shares if len(shares) == 1 else PROBED
        for side in ("first", "down"):
            foretold[side] = mixture_prices(believed, cut_at, probed, side, MIXING[form], seed)
    rows = []
    for share in shares:
        cut = cut_at(share)
        widths = [len(channels) for channels in cut.kept]
        kept = sum(widths)
        removed, down_energy = _down_costs(believed, cut)
        first_energy = float(sum(energy[e][believed.rows(k)].sum() for e, k in enumerate(cut.kept)))
        offers = {}
        for side, stack, halves, directions, whole in (
            ("first", layer.first_stack, fitted.halves, cut.first_directions(believed)[0], first_energy),
            ("down", "down", 1, cut.down_directions(believed)[0], down_energy),
        ):
            offers[stack] = _latents(layer, halves * kept, directions, multiple)
            if side in foretold:
                offers[stack] += _mixtures(layer, halves, kept, whole, foretold[side], side, multiple, MIXING[form])
            offers[stack] = _front(offers[stack])
        rows.append(Row(widths, removed, offers))
    return rows


def widths_at(prices: Tensor, share: float) -> list[int]:
    """Channels that each expert keeps when the cheapest `share` of the layer's goes."""
    every = prices.flatten()
    gone = torch.zeros(len(every), dtype=torch.bool, device=every.device)
    gone[every.argsort(stable=True)[: round(share * len(every))]] = True
    return (~gone).view_as(prices).sum(1).tolist()


def _down_costs(believed: Metrics, cut: Cut) -> tuple[float, float]:
    """What the channels taken out cost once down is refitted, and what the rest of down would."""
    removed = energy = 0.0
    nothing = torch.zeros_like(believed.down.weights[0], dtype=torch.float64)
    for expert, (channels, rows) in enumerate(zip(cut.kept, cut.down, strict=True)):
        removed += believed.down_cost(expert, cut.down_change(expert, rows))
        energy += believed.down_cost(expert, nothing.index_add(0, channels, rows))
    return removed, energy


def _latents(layer: ExpertLayer, rows: int, directions: Tensor, multiple: int) -> list[Candidate]:
    """As it is, and one basis of every rank."""
    tails = directions.sum() - directions.cumsum(0)
    found = [Candidate(0.0, rows * layer.hidden)]
    for rank in _ranks(multiple, layer.hidden):
        found.append(Candidate(max(0.0, float(tails[rank - 1])), rank * (rows + layer.hidden), rank))
    return found


def _mixtures(
    layer: ExpertLayer, halves: int, kept: int, energy: float, foretold: MixturePrices, side: Side, multiple: int,
    activation: str,
) -> list[Candidate]:  # fmt: skip
    """Mixtures of every rank and number of bases that the short fits can speak for."""
    mean = max(kept / layer.experts, 1e-9)
    share = 1 - mean / layer.intermediate
    highest = highest_rank(side, mean, layer.hidden)
    ranks = _ranks(multiple, min(layer.hidden, halves * layer.intermediate, int(1.2 * highest)))
    every = [m for m in range(2, min(MOST_BASES, layer.experts // 2) + 1) if m <= 16 or m % 4 == 0]
    return [
        Candidate(
            energy * math.exp(foretold.log_loss(rank / highest, bases, share)),
            halves * kept * rank + bases * (rank * layer.hidden + layer.experts), rank, bases, activation,
        )
        for rank in ranks
        if rank >= 0.7 * RANKS[side][0] * highest
        for bases in every
    ]  # fmt: skip


def _front(candidates: list[Candidate]) -> list[Candidate]:
    """Those that no other beats in both loss and parameters, thinned: a table holds them for every layer and share."""
    front: list[Candidate] = []
    for candidate in sorted(candidates, key=lambda c: (c.cost, c.loss)):
        if not front or candidate.loss < front[-1].loss:
            front.append(candidate)
    step = -(-len(front) // FRONT)
    return [*front[:-1:step], front[-1]]


def _ranks(multiple: int, most: int) -> range:
    return range(min(multiple, most), most + 1, multiple) if most >= 1 else range(0)


# -- spending ----------------------------------------------------------------------------------------------------------


def _spend(tables: list[list[Row]], budget: int) -> list[Choice]:
    """The cheapest choices in loss that fit the budget at one price of a parameter; [] where none do."""
    arrays = [
        [
            (
                row,
                {
                    stack: (torch.tensor([c.loss for c in cs]), torch.tensor([float(c.cost) for c in cs]), cs)
                    for stack, cs in row.offers.items()
                },
            )
            for row in table
        ]
        for table in tables
    ]

    def at(price: float) -> list[Choice]:
        found = []
        for table in arrays:
            best, value = None, math.inf
            for row, stacks in table:
                total, chosen = row.removed, {}
                for stack, (losses, costs, candidates) in stacks.items():
                    values = losses + price * costs
                    index = int(values.argmin())
                    total += float(values[index])
                    chosen[stack] = candidates[index]
                if total < value:
                    best, value = Choice(row, chosen), total
            found.append(best)
        return found

    def cost(choices: list[Choice]) -> int:
        return sum(choice.cost for choice in choices)

    worst = max(row.removed + sum(c.loss for cs in row.offers.values() for c in cs) for t in tables for row in t)
    low, high = 0.0, max(worst, 1e-30)  # a whole layer's loss for one parameter: everything goes
    if cost(at(low)) <= budget:
        return at(low)
    if cost(at(high)) > budget:
        return []
    for _ in range(100):
        middle = math.sqrt(low * high) if low > 0 else high * 1e-12
        if cost(at(middle)) > budget:
            low = middle
        else:
            high = middle
        if low > 0 and high / low < 1 + 1e-9:
            break
    return at(high)


def _improve(tables: list[list[Row]], choices: list[Choice], left: int) -> None:
    """Spends what is left on the candidates, of the rows chosen, that gain most for a parameter."""
    while True:
        best = None
        for choice in choices:
            for stack, current in choice.chosen.items():
                for candidate in choice.row.offers[stack]:
                    more, gain = candidate.cost - current.cost, current.loss - candidate.loss
                    if 0 < more <= left and gain > 0 and (best is None or gain / more > best[0]):
                        best = (gain / more, choice, stack, candidate, more)
        if best is None:
            return
        _, choice, stack, candidate, more = best
        choice.chosen[stack] = candidate
        left -= more


def _buy_channels(
    layers: list[ExpertLayer], choices: list[Choice], widths: list[list[int]], prices: list[Tensor], left: int
) -> None:
    """Puts the dearest channels back, for a parameter, while the budget lasts."""
    queue = []
    for number, (layer, choice, kept, price) in enumerate(zip(layers, choices, widths, prices, strict=True)):
        each = sum(
            (len(layer.projections) - 1 if stack != "down" else 1) * (candidate.rank or layer.hidden)
            for stack, candidate in choice.chosen.items()
        )
        order = price.sort(dim=1, descending=True).values
        for expert, width in enumerate(kept):
            queue += [(float(value) / each, number, expert, each) for value in order[expert, width:]]
    # Within an expert prices fall, so a prefix of its queue is bought.
    for _, number, expert, each in sorted(queue, key=lambda entry: -entry[0]):
        if each <= left:
            widths[number][expert] += 1
            left -= each


def _least(row: Row) -> int:
    return sum(min(candidate.cost for candidate in candidates) for candidates in row.offers.values())
