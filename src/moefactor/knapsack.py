"""The multiple-choice knapsack: of every slot exactly one candidate, the least loss in all, within a budget.

How every rule that goes by an estimated loss spends: offers bought unit by unit (allocate.py), and biaxial's tables of
what a layer can become.
"""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import NotFinite


@dataclass(frozen=True)
class Slot:
    """Something of which exactly one candidate is taken: (n,) parameters and losses, float64."""

    costs: Tensor
    losses: Tensor


@dataclass(frozen=True)
class Alternative:
    """One way to do a layer: what it costs the loss by itself, and its slots."""

    loss: float
    slots: list[Slot]


Choice = tuple[int, list[int]]  # an alternative of a layer, and a candidate of each of its slots


def knapsack(tables: list[list[Alternative]], budget: int) -> list[Choice] | None:
    """For each table (a layer) the alternative and the candidates of least loss in all whose parameters fit the budget;
    None where none do.

    A price of a parameter (a Lagrange multiplier) decides every slot alone; bisection finds the price at which the
    budget is met, and what remains is spent on the candidates that gain most for a parameter.
    """
    flat = _Flat(tables)
    choices = flat.within(budget)
    if choices is None:
        return None
    slots = [slot for (a, _), table in zip(choices, tables, strict=True) for slot in table[a].slots]
    chosen = [index for _, indices in choices for index in indices]
    left = budget - sum(int(slot.costs[index]) for slot, index in zip(slots, chosen, strict=True))
    better = iter(improve(slots, chosen, left))
    return [(a, [next(better) for _ in indices]) for a, indices in choices]


def improve(slots: list[Slot], chosen: list[int], left: int) -> list[int]:
    """Spends `left` parameters on dearer candidates, those that gain most for a parameter first; what gains nothing
    comes last, but comes."""
    chosen = list(chosen)

    def best(number: int) -> tuple[float, int, int] | None:
        slot, now = slots[number], chosen[number]
        more, gain = slot.costs - slot.costs[now], slot.losses[now] - slot.losses
        fitting = ((more > 0) & (more <= left) & (gain >= 0)).nonzero().flatten()
        if not len(fitting):
            return None
        density = gain[fitting] / more[fitting]
        first = int(density.argmax())
        return -float(density[first]), number, int(fitting[first])

    queue = [entry for entry in map(best, range(len(slots))) if entry is not None]
    heapq.heapify(queue)
    while queue:
        _, number, index = heapq.heappop(queue)
        price = int(slots[number].costs[index] - slots[number].costs[chosen[number]])
        if price <= left:
            left -= price
            chosen[number] = index
        entry = best(number)  # the next one, or one that fits in what is left
        if entry is not None:
            heapq.heappush(queue, entry)
    return chosen


class _Flat:
    """All candidates of all tables one behind the other, so that a price is tried in a few products."""

    def __init__(self, tables: list[list[Alternative]]):
        alternatives = [alternative for table in tables for alternative in table]
        slots = [slot for alternative in alternatives for slot in alternative.slots]
        self.tables = [len(table) for table in tables]
        self.slots = [len(alternative.slots) for alternative in alternatives]
        self.costs = torch.cat([slot.costs for slot in slots]).double()
        self.losses = torch.cat([slot.losses for slot in slots]).double()
        self.alone = torch.tensor([alternative.loss for alternative in alternatives], dtype=torch.float64)
        if not (self.losses.isfinite().all() and self.alone.isfinite().all()):
            raise NotFinite("the estimated loss of what could be bought")
        self.sizes = torch.tensor([len(slot.costs) for slot in slots])
        self.starts = self.sizes.cumsum(0) - self.sizes
        self.of_slot = torch.arange(len(slots)).repeat_interleave(self.sizes)
        self.of_alternative = torch.arange(len(alternatives)).repeat_interleave(torch.tensor(self.slots))

    def within(self, budget: int) -> list[Choice] | None:
        """The choices at the least price of a parameter that meets the budget."""
        low, high = 0.0, max(float(self.losses.clamp(min=0).sum() + self.alone.sum()), 1e-30)
        choices, cost = self.at(low)
        if cost <= budget:
            return choices
        choices, cost = self.at(high)  # all of the loss for one parameter: everything goes
        if cost > budget:
            return None
        for _ in range(100):
            middle = math.sqrt(low * high) if low > 0 else high * 1e-12
            found, cost = self.at(middle)
            if cost > budget:
                low = middle
            else:
                high, choices = middle, found
            if low > 0 and high / low < 1 + 1e-9:
                break
        return choices

    def at(self, price: float) -> tuple[list[Choice], int]:
        """The choices of least loss + price · parameters, and their parameters."""
        values = self.losses + price * self.costs
        least = torch.full((len(self.sizes),), math.inf, dtype=torch.float64)
        least.scatter_reduce_(0, self.of_slot, values, "amin")
        places = torch.arange(len(values)).masked_fill(values != least[self.of_slot], len(values))
        index = torch.full((len(self.sizes),), len(values)).scatter_reduce_(0, self.of_slot, places, "amin")
        totals = self.alone.index_add(0, self.of_alternative, least)
        choices, cost, first, first_slot = [], 0, 0, 0
        costs, local = self.costs[index], (index - self.starts).tolist()
        for count in self.tables:
            chosen = int(totals[first : first + count].argmin())
            start = first_slot + sum(self.slots[first : first + chosen])
            end = start + self.slots[first + chosen]
            choices.append((chosen, local[start:end]))
            cost += int(costs[start:end].sum())
            first_slot += sum(self.slots[first : first + count])
            first += count
        return choices, cost
