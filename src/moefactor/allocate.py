"""Spend a budget of parameters over all layers' offers.

An offer is one thing that can be bought in equal units: a group's rank here, a channel or an expert for other
methods. Three rules decide what each gets; all meet the budget to within one unit of the smallest offer left.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import UserError
from .experts import ExpertLayer
from .plan import LayerPlan

RULES = ("uniform", "score", "loss")


@dataclass(frozen=True)
class Offer:
    """One thing to buy.

    Args:
        stack: the part of the layer it belongs to; `score` splits a stack's budget over the stack's offers.
        in_blocks: units come in blocks of `multiple`, as ranks and channels do; bases and experts do not.
        unit_cost, curvature: n units cost unit_cost·n − curvature·n² parameters.
        maximum: units beyond which there is nothing to gain.
        share: its original parameters, what `uniform` is proportional to.
        score: what the rule `score` is proportional to.
        gains: (maximum,) fall of the estimated loss with each further unit, falling; what `loss` ranks.
        minimum: units it cannot do without.
    """

    stack: str
    unit_cost: int
    maximum: int
    share: int
    score: float = 1.0
    gains: Tensor | None = None
    minimum: int = 1
    curvature: int = 0
    in_blocks: bool = True

    def cost(self, units: int) -> int:
        return self.unit_cost * units - self.curvature * units * units

    def units(self, parameters: float) -> float:
        """The inverse of `cost`."""
        if not self.curvature:
            return parameters / self.unit_cost
        discriminant = max(0.0, self.unit_cost**2 - 4 * self.curvature * parameters)
        return (self.unit_cost - discriminant**0.5) / (2 * self.curvature)


@dataclass(frozen=True)
class LayerOffers:
    """A layer's offers, what it stores whatever is bought, and what a purchase makes of the layer.

    `equal`: every offer of every layer gets the same number of units, as an ordinary checkpoint demands.
    """

    layer: ExpertLayer
    fixed: int
    offers: tuple[Offer, ...]
    plan: Callable[[list[int]], LayerPlan]
    equal: bool = False


def water_fill(weights: Tensor, low: Tensor, high: Tensor, budget: float) -> Tensor:
    """x = clip(t·weights, low, high) with t such that Σx = budget (or as near as the bounds allow). All (n,) float64.

    What a cap cuts off goes to the others in proportion, which is what RFID's remainder rule asks for.
    """
    if budget >= float(high.sum()):
        return high.clone()
    lower, upper = 0.0, 1.0
    while float((upper * weights).clamp(low, high).sum()) < budget and upper < 1e30:
        upper *= 2
    for _ in range(200):
        middle = (lower + upper) / 2
        if float((middle * weights).clamp(low, high).sum()) < budget:
            lower = middle
        else:
            upper = middle
    return (lower * weights).clamp(low, high)


def spend(layers: list[LayerOffers], budget: int, rule: str, *, multiple: int = 1) -> list[list[int]]:
    """Units of every offer of every layer, Σ cost ≤ budget (parameters, over all layers, fixed ones included).

    Args:
        rule: `uniform`: every offer keeps the same fraction. `score`: every stack keeps the same fraction, and within
            a stack ranks are proportional to the scores (RFID eq. 9). `loss`: the largest fall of the estimated loss
            for each parameter, over all layers at once.
        multiple: units are bought in blocks of this many, except where an offer has fewer.

    Raises UserError when even the minima exceed the budget.
    """
    offers = [offer for layer in layers for offer in layer.offers]
    available = budget - sum(layer.fixed for layer in layers)
    block = [min(multiple, o.maximum) if o.in_blocks else 1 for o in offers]
    low = [max(o.minimum, b) if o.minimum else 0 for o, b in zip(offers, block, strict=True)]
    if _total(offers, low) > available:
        if multiple > 1:
            return spend(layers, budget, rule, multiple=1)
        _refuse(layers)
    if layers[0].equal:
        least = max(low)
        most = min(o.maximum for o in offers)
        steps = [*range(least, most, block[0]), most]
        fitting = [n for n in steps if _total(offers, [n] * len(offers)) <= available]
        if not fitting:
            _refuse(layers)
        units = [fitting[-1]] * len(offers)
    elif rule == "loss":
        if any(offer.gains is None for offer in offers):
            raise UserError(
                "This method has no estimate of what each further rank or basis gains, which the allocation 'loss' "
                "goes by. Use --allocation uniform."
            )
        units = _by_loss(offers, low, block, available)
    else:
        units = _proportional(layers, offers, low, block, available, by_score=rule == "score")
    return _split(units, layers)


def _total(offers: list[Offer], units: list[int]) -> int:
    return sum(offer.cost(n) for offer, n in zip(offers, units, strict=True))


def _refuse(layers: list[LayerOffers]) -> None:
    total = sum(layer.layer.parameter_count for layer in layers)
    least = sum(layer.fixed + sum(o.cost(o.minimum) for o in layer.offers) for layer in layers)
    if least >= total:
        raise UserError(
            f"No ratio can be reached: the parts that stay as they are take {least / total:.1%} of the experts' "
            "parameters. Give mobe and slbf a smaller --rank, d2moe --base-pruning, or take another method."
        )
    reach = int((1 - least / total) * 1000) / 1000
    raise UserError(
        "This ratio can't be reached: what stays as it is "
        f"(fixed parts and the smallest ranks) already takes {least / total:.1%} of the experts' parameters. "
        f"The highest ratio with these projections and options is {reach:.3f}; compress more projections "
        "(--projections gate,up,down) or ask for less."
    )


def _proportional(
    layers: list[LayerOffers], offers: list[Offer], low: list[int], block: list[int], available: int, *, by_score: bool
) -> list[int]:
    cost = torch.tensor([o.unit_cost for o in offers], dtype=torch.float64)
    lows = torch.tensor([o.cost(n) for o, n in zip(offers, low, strict=True)], dtype=torch.float64)
    highs = torch.tensor([o.cost(o.maximum) for o in offers], dtype=torch.float64)
    share = torch.tensor([o.share for o in offers], dtype=torch.float64)
    if not by_score:
        parameters = water_fill(share, lows, highs, available)
    else:
        stacks: dict[tuple[str, str], list[int]] = {}
        owners = [layer.layer.name for layer in layers for _ in layer.offers]
        for index, (owner, offer) in enumerate(zip(owners, offers, strict=True)):
            stacks.setdefault((owner, offer.stack), []).append(index)
        members = list(stacks.values())

        def total(values: Tensor) -> Tensor:
            return torch.stack([values[m].sum() for m in members])

        of_stack = water_fill(total(share), total(lows), total(highs), available)
        parameters = torch.zeros_like(share)
        for stack_budget, m in zip(of_stack.tolist(), members, strict=True):
            # Ranks, not parameters, are proportional to the score; floor it, or a group of score 0 stalls the search.
            score = torch.tensor([max(offers[i].score, 1e-9) for i in m], dtype=torch.float64)
            parameters[m] = water_fill(score * cost[m], lows[m], highs[m], stack_budget)
    wanted = [offer.units(p) for offer, p in zip(offers, parameters.tolist(), strict=True)]
    return _to_blocks(offers, wanted, low, block, available)


def _to_blocks(offers: list[Offer], wanted: list[float], low: list[int], block: list[int], available: int) -> list[int]:
    """Floors to whole blocks, then hands the remainder out by largest fraction, ties in the layers' order."""
    units, fraction = [], []
    for want, least, size in zip(wanted, low, block, strict=True):
        blocks = int(want / size + 1e-9)
        units.append(max(least, blocks * size))
        fraction.append(round(want / size - blocks, 6))
    left = available - _total(offers, units)
    order = sorted(range(len(offers)), key=lambda i: -fraction[i])
    bought = True
    while bought:
        bought = False
        for i in order:
            step = min(block[i], offers[i].maximum - units[i])
            price = offers[i].cost(units[i] + step) - offers[i].cost(units[i])
            if step > 0 and price <= left:
                units[i] += step
                left -= price
                bought = True
    return units


def _by_loss(offers: list[Offer], low: list[int], block: list[int], available: int) -> list[int]:
    units = list(low)
    left = available - _total(offers, units)
    values, owner = [], []
    for index, (offer, least, size) in enumerate(zip(offers, low, block, strict=True)):
        blocks = offer.gains[least:].double().split(size)
        whole = [b.mean() / offer.unit_cost for b in blocks if len(b) == size]
        if whole:
            values.append(torch.stack(whole))
            owner.append(torch.full((len(whole),), index))
    if not values:
        return units
    # Gains fall within an offer, so the best blocks overall are a prefix of every offer.
    for index in torch.cat(owner)[torch.cat(values).argsort(descending=True, stable=True)].tolist():
        price = block[index] * offers[index].unit_cost
        if price <= left:
            units[index] += block[index]
            left -= price
    return units


def _split(units: list[int], layers: list[LayerOffers]) -> list[list[int]]:
    parts, start = [], 0
    for layer in layers:
        parts.append(units[start : start + len(layer.offers)])
        start += len(layer.offers)
    return parts
