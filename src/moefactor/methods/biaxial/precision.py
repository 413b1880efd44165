"""biaxial's plan when bits are spent beside channels: how many for every channel of every expert, none among them.

To second order a channel that goes costs its price (fitting/metrics.py), and one that stays in b bits costs what
rounding does to its rows: a share of their energy, in the metrics, that falls fourfold with a bit. Energies of channels
differ by orders of magnitude, so bits are given to channels, as water fills a vessel (Cover & Thomas 2006, 10.3.3), and
no bits are a channel that goes. A layer may have a basis for a stack as well: then rows are shorter, which costs the
energy beyond the basis, and there is a basis to store. A price of a bit (a Lagrange multiplier) decides all of it;
bisection finds the price at which the budget is met.

Noise of different rows adds up; that of the rows of down counts for more in some layers than that of gate and up, so
down's may have one or two steps of precision more or fewer than their channels' other rows, in the whole layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...allocate import Budget, Planned, Storage, TooSmall
from ...experts import ExpertLayer
from ...fitting.channels import ragged_forms
from ...fitting.metrics import Metrics
from ...fitting.rounding import relative_noise
from ...forms import Form, Latent
from ...forms.packing import BITS
from ...knapsack import Slot, improve
from ...plan import LayerPlan
from .planning import block_prices

SIXTEENTHS = (0, 2, 4, 6, 8, 10, 12, 14)  # of the hidden size: the ranks that are tried, 0 for no basis
SHIFTS = (-1, 0, 1, 2)  # steps of precision that down has more than gate and up
SWEEPS = 2
SIDES = ("first", "down")

Shape = tuple[int, int, int]  # rank of gate and up's basis, of down's, and down's shift


@dataclass(frozen=True)
class Precisions:
    """What a layer can become.

    prices: (E, blocks), rising: what each expert's blocks of `block` channels cost when they go.
    lost, noise: side -> rank (0: no basis) -> (E, blocks), of the same blocks: what the basis costs, and the energy of
        which rounding costs a share.
    shares: side -> bits -> that share.
    """

    layer: ExpertLayer
    prices: Tensor
    lost: dict[str, dict[int, Tensor]]
    noise: dict[str, dict[int, Tensor]]
    shares: dict[str, dict[int, float]]
    block: int = 1

    def to_json(self) -> dict:
        def listed(tables: dict[str, dict[int, Tensor]]) -> dict:
            return {side: {rank: t.tolist() for rank, t in table.items()} for side, table in tables.items()}

        return {
            "precisions": True, "prices": self.prices.tolist(), "lost": listed(self.lost), "noise": listed(self.noise),
            "shares": self.shares, "block": self.block,
        }  # fmt: skip

    @classmethod
    def from_json(cls, layer: ExpertLayer, data: dict) -> Precisions:
        def tensors(tables: dict) -> dict[str, dict[int, Tensor]]:
            return {
                side: {int(rank): torch.tensor(t, dtype=torch.float64) for rank, t in table.items()}
                for side, table in tables.items()
            }

        shares = {side: {int(b): share for b, share in of.items()} for side, of in data["shares"].items()}
        prices = torch.tensor(data["prices"], dtype=torch.float64)
        return cls(layer, prices, tensors(data["lost"]), tensors(data["noise"]), shares, data["block"])

    @property
    def halves(self) -> int:
        return len(self.layer.projections) - 1


def precisions(metrics: Metrics, block: int, group: int, multiple: int) -> Precisions:
    """Prices a layer.

    Args:
        metrics: as they are believed when it comes to spending.
        block: channels that go, and have one precision, together.
        multiple: ranks come in multiples of this.
    """
    layer = metrics.layer
    prices = metrics.prices()
    order = prices.argsort(dim=1)

    def blocks(values: Tensor) -> Tensor:
        """(E, I) -> (E, blocks), those that go first first; channels that make no whole block go whatever comes."""
        return values.gather(1, order)[:, layer.intermediate % block :].unflatten(1, (-1, block)).sum(2).cpu()

    ranks = sorted({s * layer.hidden // 16 // multiple * multiple for s in SIXTEENTHS})
    lost, noise, shares = {}, {}, {}
    for side in SIDES:
        halves = len(layer.projections) - 1 if side == "first" else 1
        energies = metrics.row_energies(side, group, ranks)

        def of_channels(rows: Tensor, halves: int = halves) -> Tensor:
            return blocks(rows.unflatten(1, (halves, -1)).sum(1))

        lost[side] = {rank: of_channels(gone) for rank, (gone, _) in energies.items()}
        noise[side] = {rank: of_channels(left) for rank, (_, left) in energies.items()}
        shares[side] = relative_noise(metrics.first.weights if side == "first" else metrics.down.weights, group)
    return Precisions(layer, block_prices(prices, block).cpu(), lost, noise, shares, block)


def plan_precisions(tables: list[Precisions], budget: Budget) -> Planned:
    """The plans of least estimated loss within the budget. Raises TooSmall where there is none."""
    storage = budget.storage
    rounding = storage.required
    allowed = (rounding.bits,) if rounding.bits else BITS
    shifts = (0,) if rounding.bits else SHIFTS
    smaller = storage.in_bits or budget.ratio > 0  # or nothing is to go, and a basis would be in the way
    layers = [_Layer(table, storage, allowed, bases=smaller) for table in tables]
    available = budget.available - storage.floats(sum(table.layer.bias_count for table in tables))
    least = sum(layer.least for layer in layers)
    if least > available:
        of_all = storage.floats(sum(table.layer.parameter_count for table in tables))
        raise TooSmall(
            f"biaxial: the experts may take {available / 8e9:.3g} GB, and as many of them as a token goes to, in "
            f"{min(allowed)} bits, take {least / 8e9:.3g}: allow {(least - available) / 8e9:.3g} GB more."
            if storage.in_bits
            else f"biaxial: this ratio can't be reached; the highest with these options is {1 - least / of_all:.3f}."
        )

    def everywhere(price: float, shapes: list[Shape] | None) -> tuple[list[Shape], float]:
        found = shapes or [layer.best(price, shifts) for layer in layers]
        return found, sum(layer.at(price, shape)[1] for layer, shape in zip(layers, found, strict=True))

    shapes, price = _cheapest(lambda price: everywhere(price, None), available)
    # Where a layer changes its shape the size jumps; with shapes held, channels take up what is left.
    _, price = _cheapest(lambda price: everywhere(price, shapes), available)
    pairs = list(zip(layers, shapes, strict=True))
    left = int(available - sum(layer.at(price, shape)[1] for layer, shape in pairs))
    # The last bits go one block after the other; to channels that no text used too, while there is room.
    chosen = [layer.chosen(price, shape) for layer, shape in pairs]
    slots = [slot for layer, shape in pairs for slot in layer.slots(shape)]
    bought = torch.tensor(improve(slots, torch.cat(chosen).tolist(), left))
    plans, loss = [], 0.0
    for (layer, shape), options in zip(pairs, bought.split([len(c) for c in chosen]), strict=True):
        plans.append(layer.plan(options, shape))
        loss += layer.loss(options, shape)
    return Planned(plans, loss)


def _cheapest(sizes: Callable[[float], tuple[list[Shape], float]], available: float) -> tuple[list[Shape], float]:
    """The shapes at the least price of a bit that meets the budget, and that price."""
    found, size = sizes(0.0)
    if size <= available:
        return found, 0.0
    low, high = 1e-24, 1e-24
    while size > available:
        low, high = high, high * 100
        found, size = sizes(high)
    for _ in range(60):
        middle = math.sqrt(low * high)
        tried, size = sizes(middle)
        if size > available:
            low = middle
        else:
            high, found = middle, tried
    return found, high


class _Layer:
    """A layer's options: every block of channels goes, or stays in one of the `allowed` bits."""

    def __init__(self, table: Precisions, storage: Storage, allowed: tuple[int, ...], *, bases: bool):
        self.table, self.storage, self.allowed, self.bases = table, storage, allowed, bases
        self.prices = table.prices.flatten()

    def _losses(self, side: str, rank: int, bits: int) -> Tensor:
        table = self.table
        return (table.lost[side][rank] + table.shares[side][bits] * table.noise[side][rank]).flatten()

    def _down_bits(self, index: int, shift: int) -> int:
        return self.allowed[min(max(index + shift, 0), len(self.allowed) - 1)]

    def _options(self, shape: Shape) -> tuple[Tensor, Tensor]:
        """Losses (blocks, 1 + allowed) and costs (1 + allowed,); the first option is to go."""
        first, down, shift = shape
        table, hidden, row = self.table, self.table.layer.hidden, self.storage.row
        losses, costs = [self.prices], [0.0]
        for index, bits in enumerate(self.allowed):
            of_down = self._down_bits(index, shift)
            kept = self._losses("first", first, bits) + self._losses("down", down, of_down)
            losses.append(torch.minimum(kept, self.prices))  # or what is free to stay would go
            costs.append(table.block * (table.halves * row(first or hidden, bits) + row(down or hidden, of_down)))
        return torch.stack(losses, 1), torch.tensor(costs, dtype=torch.float64)

    def chosen(self, price: float, shape: Shape) -> Tensor:
        """(blocks,): which option each takes."""
        losses, costs = self._options(shape)
        return (losses + price * costs).argmin(1)

    @property
    def least(self) -> float:
        """The size of as many experts as a token goes to, in the fewest bits."""
        layer, bits = self.table.layer, min(self.allowed)
        rows = layer.fewest_experts * layer.intermediate * len(layer.projections)
        return rows * self.storage.row(layer.hidden, bits)

    def at(self, price: float, shape: Shape) -> tuple[float, float]:
        """Loss and size."""
        losses, costs = self._options(shape)
        chosen = (losses + price * costs).argmin(1)
        shared = sum(self.storage.basis(rank, self.table.layer.hidden) for rank in shape[:2])
        return float(losses.gather(1, chosen.unsqueeze(1)).sum()), float(costs[chosen].sum()) + shared

    def loss(self, chosen: Tensor, shape: Shape) -> float:
        return float(self._options(shape)[0].gather(1, chosen.unsqueeze(1)).sum())

    def slots(self, shape: Shape) -> list[Slot]:
        """One for every block."""
        losses, costs = self._options(shape)
        return [Slot(costs, row) for row in losses]

    def best(self, price: float, shifts: Iterable[int]) -> Shape:
        """The shape of least loss and price · size, one of its three parts after the other."""
        ranks = [[*self.table.lost[side]] if self.bases else [0] for side in SIDES]
        choices = (*ranks, [*shifts])

        def value(shape: Shape) -> float:
            loss, size = self.at(price, shape)
            return loss + price * size

        shape: Shape = (0, 0, 0)
        for _ in range(SWEEPS):
            for part, options in enumerate(choices):
                tried = [(*shape[:part], option, *shape[part + 1 :]) for option in options]
                shape = min(tried, key=value)  # type: ignore[assignment, arg-type]  # a tuple of three all along
        return shape

    def plan(self, options: Tensor, shape: Shape) -> LayerPlan:
        """What the options that blocks take come to: channels of each expert in each precision."""
        layer, block = self.table.layer, self.table.block
        chosen = options.view(layer.experts, -1)
        counts = {index: tuple((block * (chosen == index + 1).sum(1)).tolist()) for index in range(len(self.allowed))}
        widths = tuple((block * (chosen > 0).sum(1)).tolist())
        forms: dict[str, Form] = {}
        for (stack, ragged), side, rank in zip(ragged_forms(layer, widths).items(), SIDES, shape[:2], strict=True):
            channels: dict[int, tuple[int, ...]] = {}
            for index, count in counts.items():
                bits = self._down_bits(index, shape[2]) if side == "down" else self.allowed[index]
                before = channels.get(bits, (0,) * layer.experts)
                channels[bits] = tuple(a + b for a, b in zip(before, count, strict=True))
            inner: Form = ragged
            if rank:
                inner = replace(ragged, hidden=rank)
                inner = Latent(layer.experts, ragged.width, layer.hidden, rank=rank, inner=inner)
            forms[stack] = self.storage.required.of(inner, channels)
        return LayerPlan(layer, forms)
