"""Spend a budget of parameters over all layers.

Two kinds of choice. *Offers* can be bought in equal units (a group's rank, a channel, an expert): three rules decide
what each gets, and all meet the budget to within one unit of the smallest offer left. *Tables* have alternatives for a
whole layer, each with slots of which one candidate is taken: the multiple-choice knapsack (knapsack.py). The rule
`loss` is that knapsack with an offer for a slot.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .errors import UserError, required, unknown
from .experts import ExpertLayer
from .forms import FLOAT, Form, Quantised, form_from_json
from .forms.packing import groups, words
from .knapsack import Alternative, Slot, knapsack
from .plan import LayerPlan

RULES = ("uniform", "score", "loss")
# Grouped GEMM wants ranks in multiples of 8; below this hidden size that would be too coarse a step, and the
# runtime pads activations instead.
WIDE = 512
EXACT = ("mix", "base_columns")  # what is small, and decides much
SHARED_BITS = 8  # of what experts share, at least: its error is every expert's


@dataclass(frozen=True)
class Rounding:
    """To how many bits what is private to an expert is rounded.

    Args:
        bits: of all of it, or 0 where every channel has its own.
        group: neighbours that share a scale.
    """

    bits: int
    group: int

    def of(self, inner: Form, channels: Mapping[int, Sequence[int]] | None = None) -> Quantised:
        """The form rounded.

        Args:
            channels: bits -> how many channels of each expert have them, where channels have several precisions.
        """
        own, bits = "" if channels is None else inner.channel_tensor, []
        for name, spec in inner.tensors().items():
            if name != own and spec.dtype == FLOAT and len(spec.shape) > 1 and not name.endswith(EXACT):
                shared = name.startswith("basis") or name.endswith("base")
                bits.append((name, max(SHARED_BITS, self.bits) if shared else self.bits))
        kept = {b: tuple(widths) for b, widths in (channels or {}).items() if any(widths)}
        return Quantised(
            inner.experts, inner.width, inner.hidden, inner=inner, group=self.group, tensor_bits=tuple(sorted(bits)),
            channels=tuple(sorted(kept.items(), reverse=True)),
        )  # fmt: skip


@dataclass(frozen=True)
class Storage:
    """What numbers cost: one each, or the bits that they take.

    Args:
        rounding: what private factors are rounded to, or None.
        in_bits: whether the budget is in bits.
        of_float: bits of a number that is not rounded, scales among them.
    """

    rounding: Rounding | None = None
    in_bits: bool = False
    of_float: int = 16

    @property
    def required(self) -> Rounding:
        return required(self.rounding, "what to round to")

    def floats(self, count: float) -> float:
        return count * self.of_float if self.in_bits else count

    def row(self, count: int, bits: int | None = None) -> float:
        """A row of `count` numbers of a private factor, in `bits` or in those of all."""
        bits = bits or (self.rounding.bits if self.rounding else 0)
        if not self.in_bits or not bits:
            return self.floats(count)
        return 32 * words(count, bits) + self.of_float * groups(count, self.required.group)

    def basis(self, rows: int, count: int) -> float:
        """`rows` rows of `count` numbers of what experts share."""
        return rows * self.row(count, max(SHARED_BITS, self.rounding.bits) if self.rounding else None)


PARAMETERS = Storage()


@dataclass(frozen=True)
class Budget:
    """What may be kept.

    Args:
        parameters: over all layers, what stays whatever is bought included.
        ratio: the removed share that they stand for.
        storage: what numbers cost.
        bits: over all layers, where the budget is in bits.
        rule: a name of RULES, or None for the method's own.
        multiple: ranks come in multiples of this; None for 8 on wide models, 1 on narrow ones, and 1 where the budget
            is too small for blocks.
    """

    parameters: int
    ratio: float
    rule: str | None = None
    multiple: int | None = None
    storage: Storage = PARAMETERS
    bits: int | None = None

    @property
    def available(self) -> float:
        return self.parameters if self.bits is None else self.bits

    def block(self, hidden: int) -> int:
        """The multiple on a model of that hidden size."""
        return self.multiple or (8 if hidden >= WIDE else 1)


@dataclass(frozen=True)
class Planned:
    """Every layer's plan, and the rise of the loss they are expected to cost, summed over the calibration tokens, or
    None where the method can't say."""

    layers: list[LayerPlan]
    loss: float | None = None


@dataclass(frozen=True)
class Offer:
    """One thing to buy.

    Args:
        stack: the part of the layer it belongs to; `score` splits a stack's budget over the stack's offers.
        block: units come in multiples of this, None for those of the budget, as ranks do; bases and experts come one
            by one, channels in multiples of their own.
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
    block: int | None = None

    def cost(self, units: int) -> int:
        return self.unit_cost * units - self.curvature * units * units

    def slot(self, least: int, block: int) -> Slot:
        """What the rule `loss` chooses from: `least` units and whole blocks more, by what is not gained."""
        units = torch.arange(least, self.maximum + 1, block, dtype=torch.float64)
        gained = torch.cat((torch.zeros(1, dtype=torch.float64), required(self.gains, "gains").double().cumsum(0)))
        return Slot(self.unit_cost * units - self.curvature * units * units, float(gained[-1]) - gained[units.long()])

    def to_json(self) -> dict:
        return {**vars(self), "gains": None if self.gains is None else self.gains.tolist()}

    @classmethod
    def from_json(cls, data: dict) -> Offer:
        gains = data["gains"]
        return cls(**{**data, "gains": None if gains is None else torch.tensor(gains, dtype=torch.float64)})

    def units(self, parameters: float) -> float:
        """The inverse of `cost`."""
        if not self.curvature:
            return parameters / self.unit_cost
        discriminant = max(0.0, self.unit_cost**2 - 4 * self.curvature * parameters)
        return (self.unit_cost - discriminant**0.5) / (2 * self.curvature)


@dataclass(frozen=True)
class LayerOffers:
    """What a layer can spend on.

    Args:
        fixed: parameters it stores whatever is bought.
        offers: in the order of the stacks' units (Form.units).
        forms: each stack as it would be, whatever number of units was bought of it; what is bought is put in.
        equal: every offer of every layer gets the same number of units, as an ordinary checkpoint demands.
        notes: what else a method wants to know when units are bought; JSON.
    """

    layer: ExpertLayer
    fixed: int
    offers: tuple[Offer, ...]
    forms: dict[str, Form]
    equal: bool = False
    notes: dict = field(default_factory=dict)

    def to_json(self) -> dict:
        forms = {stack: form.to_json() for stack, form in self.forms.items()}
        offers = [offer.to_json() for offer in self.offers]
        return {"fixed": self.fixed, "offers": offers, "forms": forms, "equal": self.equal, "notes": self.notes}

    @classmethod
    def from_json(cls, layer: ExpertLayer, data: dict) -> LayerOffers:
        forms = {
            stack: form_from_json(
                form, experts=layer.experts, width=layer.stack_width(stack), hidden=layer.hidden,
                where=f"{layer.name} {stack}",
            )
            for stack, form in data["forms"].items()
        }  # fmt: skip
        offers = tuple(Offer.from_json(offer) for offer in data["offers"])
        return cls(layer, data["fixed"], offers, forms, data["equal"], data["notes"])


def by_stacks(offers: LayerOffers, units: Sequence[int]) -> LayerPlan:
    """The plan of a layer whose stacks take their units one after the other."""
    left, forms = list(units), {}
    for stack, form in offers.forms.items():
        count = len(form.units())
        forms[stack] = form.with_units(left[:count]) if count else form
        del left[:count]
    return LayerPlan(offers.layer, forms)


def plan_offers(
    priced: list[LayerOffers], budget: Budget, *, own_rule: str,
    build: Callable[[LayerOffers, Sequence[int]], LayerPlan] = by_stacks,
) -> Planned:  # fmt: skip
    """The plan of methods that make offers; `build` puts what was bought of one layer together."""
    rule = budget.rule or own_rule
    if rule not in RULES:
        raise unknown("allocation", rule, RULES)
    if budget.multiple and all(offer.block for layer in priced for offer in layer.offers):
        raise UserError("--rank-multiple: this method buys no ranks; leave it out. (Channels have --width-multiple.)")
    multiple = budget.block(priced[0].layer.hidden)
    try:
        bought = spend(priced, budget.parameters, rule, multiple=multiple)
    except TooSmall:
        if budget.multiple or multiple == 1:
            raise
        bought = spend(priced, budget.parameters, rule, multiple=1)
    return Planned([build(offers, units) for offers, units in zip(priced, bought, strict=True)])


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
        multiple: units are bought in blocks of this many, except where an offer has fewer, or a block of its own.

    Raises UserError when even the minima exceed the budget.
    """
    offers = [offer for layer in layers for offer in layer.offers]
    available = budget - sum(layer.fixed for layer in layers)
    block = [o.block or min(multiple, o.maximum) for o in offers]
    low = [max(o.minimum, b) if o.minimum else 0 for o, b in zip(offers, block, strict=True)]
    if _total(offers, low) > available:
        raise _too_small(layers, multiple)
    if layers[0].equal:
        least = max(low)
        most = min(o.maximum for o in offers)
        steps = [*range(least, most, block[0]), most]
        fitting = [n for n in steps if _total(offers, [n] * len(offers)) <= available]
        if not fitting:
            raise _too_small(layers, multiple)
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


class TooSmall(UserError):
    """The budget can't hold even the smallest purchase."""


def _too_small(layers: list[LayerOffers], multiple: int) -> TooSmall:
    total = sum(layer.layer.parameter_count for layer in layers)
    least = sum(layer.fixed + sum(o.cost(o.minimum) for o in layer.offers) for layer in layers)
    if least >= total:
        return TooSmall(
            f"No ratio can be reached: the parts that stay as they are take {least / total:.1%} of the experts' "
            "parameters. Give mobe and slbf a smaller --rank, d2moe --base-pruning, or take another method."
        )
    reach = int((1 - least / total) * 1000) / 1000
    blocks = f" in multiples of {multiple} (--rank-multiple)" if multiple > 1 else ""
    return TooSmall(
        f"This ratio can't be reached{blocks}: what stays as it is "
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
    slots = [offer.slot(least, size) for offer, least, size in zip(offers, low, block, strict=True)]
    # The minima fit, so there is an answer.
    ((_, chosen),) = required(knapsack([[Alternative(0.0, slots)]], available), "a choice that fits")
    return [least + size * index for least, size, index in zip(low, block, chosen, strict=True)]


def _split(units: list[int], layers: list[LayerOffers]) -> list[list[int]]:
    parts, start = [], 0
    for layer in layers:
        parts.append(units[start : start + len(layer.offers)])
        start += len(layer.offers)
    return parts
