"""biaxial's plan: for every layer, how many channels go and what each stack becomes, at the least estimated loss.

Every layer has a table: for each share of its channels taken out, what that costs the loss, and for each stack the
candidates left, (loss, parameters, rank, bases). A price of a parameter (a Lagrange multiplier) picks a row and
candidates in every layer alone; bisection finds the price at which the budget is met. What remains is spent on better
candidates, then on channels bought back.

Channels go, and come back, in blocks of one expert, in the order in which it gives them up. Prices of blocks only order
them: what a row's cut costs, with experts that give nothing in it, is measured whole.

The loss of channels and of one basis is in closed form; that of a mixture is foretold (biaxial_mixture.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ...allocate import PARAMETERS, Budget, Planned, Storage, TooSmall
from ...experts import ExpertLayer
from ...fitting.channels import ragged_forms
from ...fitting.metrics import Cut, Metrics
from ...fitting.rounding import relative_noise
from ...forms import BasisMixture, Form, Latent
from ...knapsack import Alternative, Slot, improve, knapsack
from ...plan import LayerPlan
from .mixtures import RANKS, MixturePrices, Side, highest_rank, mixture_prices

FormName = Literal["fast", "linear", "tight", "standard"]
MIXING = {"linear": "identity", "tight": "silu"}  # form -> activation of its mixtures; `fast` has none
SHARES = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.55, 0.6, 0.7, 0.8, 0.9)
# Shares where mixtures are probed for a whole grid of them: most at the first, near what is chosen from 40 % up.
PROBED = (0.25, 0.0, 0.5)
MOST_BASES = 64
LEAST_EXPERTS = 4  # for a mixture, which has two bases at least, and half as many as experts at most
FRONT = 100


@dataclass(frozen=True)
class Candidate:
    """What a stack can become; rank 0: as it is, bases 0: one linear basis.  cost: parameters, or bits where the budget
    is in them.  activation: of a mixture."""

    loss: float
    cost: float
    rank: int = 0
    bases: int = 0
    activation: str = "silu"


BOTH = "both"  # of the stacks, where one candidate is for the two of them


@dataclass(frozen=True)
class Row:
    """A layer with some of its channels taken out.  removed: what that costs the loss.  offers: of each stack, or of
    BOTH."""

    widths: list[int]
    removed: float
    offers: dict[str, list[Candidate]]

    def alternative(self) -> Alternative:
        slots = [
            Slot(
                torch.tensor([c.cost for c in cs], dtype=torch.float64),
                torch.tensor([c.loss for c in cs], dtype=torch.float64),
            )
            for cs in self.offers.values()
        ]
        return Alternative(self.removed, slots)


@dataclass(frozen=True)
class Table:
    """What a layer can become: its rows, and the block_prices of its channels, of `block` each."""

    layer: ExpertLayer
    rows: list[Row]
    prices: Tensor
    block: int = 1

    def to_json(self) -> dict:
        rows = [
            {**vars(row), "offers": {stack: [[*vars(c).values()] for c in cs] for stack, cs in row.offers.items()}}
            for row in self.rows
        ]
        return {"rows": rows, "prices": self.prices.tolist(), "block": self.block}

    @classmethod
    def from_json(cls, layer: ExpertLayer, data: dict) -> Table:
        rows = [
            Row(**{**row, "offers": {stack: [Candidate(*c) for c in cs] for stack, cs in row["offers"].items()}})
            for row in data["rows"]
        ]
        return cls(layer, rows, torch.tensor(data["prices"], dtype=torch.float64), data["block"])


def plan_tables(tables: list[Table], budget: Budget) -> Planned:
    """The plans of least estimated loss, channels that are left over bought back last."""
    storage = budget.storage
    available = int(budget.available - storage.floats(sum(table.layer.bias_count for table in tables)))
    choices = knapsack([[row.alternative() for row in table.rows] for table in tables], available)
    if choices is None:
        least = _least(tables)
        if storage.in_bits:
            raise TooSmall(f"biaxial: the least that the experts take with these options is {least / 8e9:.3g} GB.")
        highest = math.floor(1000 * (1 - least / sum(table.layer.parameter_count for table in tables))) / 1000
        raise TooSmall(f"biaxial: this ratio can't be reached; the highest with these options is {highest:.3f}.")
    rows = [table.rows[index] for table, (index, _) in zip(tables, choices, strict=True)]
    chosen = [
        {stack: cs[i] for (stack, cs), i in zip(row.offers.items(), indices, strict=True)}
        for row, (_, indices) in zip(rows, choices, strict=True)
    ]
    left = int(available - sum(candidate.cost for stacks in chosen for candidate in stacks.values()))
    widths = _buy_channels(tables, rows, chosen, left, storage)
    plans = []
    for table, kept, stacks in zip(tables, widths, chosen, strict=True):
        forms = forms_of(table.layer, tuple(kept), stacks)
        if storage.rounding:
            forms = {stack: storage.rounding.of(form) for stack, form in forms.items()}
        plans.append(LayerPlan(table.layer, forms))
    lost = sum(row.removed + sum(c.loss for c in stacks.values()) for row, stacks in zip(rows, chosen, strict=True))
    return Planned(plans, lost)


def _least(tables: list[Table]) -> float:
    """Parameters, or bits."""
    least = sum(min(sum(min(c.cost for c in cs) for cs in row.offers.values()) for row in t.rows) for t in tables)
    return least + sum(table.layer.bias_count for table in tables)


def _buy_channels(
    tables: list[Table], rows: list[Row], chosen: list[dict[str, Candidate]], left: int, storage: Storage
) -> list[list[int]]:
    """The widths once the dearest blocks of channels are back, for a parameter, as many as the budget holds."""
    slots = []
    for table, row, stacks in zip(tables, rows, chosen, strict=True):
        layer, block = table.layer, table.block
        halves = {"down": 1, BOTH: len(layer.projections)}
        each = sum(
            halves.get(stack, len(layer.projections) - 1) * storage.row(candidate.rank or layer.hidden)
            for stack, candidate in stacks.items()
        )
        for prices, width in zip(table.prices.sort(dim=1, descending=True).values, row.widths, strict=True):
            gone = prices[width // block :]
            lost = torch.cat((prices.new_zeros(1), gone.flip(0).cumsum(0))).flip(0)
            slots.append(Slot(each * block * torch.arange(len(lost), dtype=torch.float64), lost.double()))
    more = iter(improve(slots, [0] * len(slots), left))
    return [[width + table.block * next(more) for width in row.widths] for table, row in zip(tables, rows, strict=True)]


def forms_of(layer: ExpertLayer, widths: tuple[int, ...], chosen: dict[str, Candidate]) -> dict[str, Form]:
    """The forms of channels that are left; a stack with a rank lives behind one basis or a mixture of them."""
    forms: dict[str, Form] = {}
    for stack, ragged in ragged_forms(layer, widths).items():
        candidate = chosen.get(stack) or chosen.get(BOTH) or Candidate(0.0, 0)
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


# -- the table of a layer --------------------------------------------------------------------------------------------


def layer_table(
    fitted: Metrics, believed: Metrics, shares: tuple[float, ...], form: FormName, multiple: int, seed: int, *,
    block: int = 1, latent: bool = False, storage: Storage = PARAMETERS,
) -> Table:  # fmt: skip
    """What a layer can become.

    Args:
        fitted, believed: the metrics of what will be fitted, and of what is believed when it comes to spending.
        shares: of the layer's channels to take out, a row for each.
        multiple, block: ranks and experts' widths are multiples of these.
        latent: one rank for both stacks.
        storage: what a candidate costs, and the bits that it is rounded to, which is a part of its loss.
    """
    layer = fitted.layer
    prices, energy = fitted.prices(), believed.first_energy()
    blocks = block_prices(prices, block)

    def cut_at(share: float) -> Cut:
        return Cut.of(fitted, prices, widths_at(blocks, share, block))

    noises = None
    if storage.rounding:
        noises = {side: Noise.of(believed, side, storage, multiple) for side in ("first", "down")}
    foretold: dict[Side, MixturePrices] = {}
    if form in MIXING and layer.experts >= LEAST_EXPERTS:
        probed = shares if len(shares) == 1 else PROBED
        for side in ("first", "down"):
            noise = noises[side].share if noises else 0.0
            foretold[side] = mixture_prices(believed, cut_at, probed, side, MIXING[form], seed, noise)
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
            rounding = noises[side].over_ranks(cut.kept, halves) if noises else None
            offers[stack] = _latents(layer, halves * kept, directions, multiple, storage, rounding)
            if side in foretold:
                offers[stack] += _mixtures(
                    layer, halves, kept, whole, foretold[side], side, multiple, MIXING[form], storage
                )
        if latent:
            offers = {BOTH: _of_one_rank(*offers.values())}
        rows.append(Row(widths, removed, {stack: _front(candidates) for stack, candidates in offers.items()}))
    return Table(layer, rows, blocks.cpu(), block)


def block_prices(prices: Tensor, block: int) -> Tensor:
    """(E, I // block), rising: what each expert's channels (E, I) cost in the blocks that it gives them up in. Channels
    that make no whole block go whatever comes.

    The sums of the channels' prices. To price a block by what the expert loses once down is refitted expects less of a
    rise, and measures worse on text unlike the calibration's.
    """
    rising = prices.sort(dim=1).values[:, prices.shape[1] % block :]
    return rising.unflatten(1, (-1, block)).sum(2)


def widths_at(prices: Tensor, share: float, block: int = 1) -> list[int]:
    """Channels that each expert keeps when the cheapest `share` of the layer's blocks goes.  prices: block_prices."""
    every = prices.flatten()
    gone = torch.zeros(len(every), dtype=torch.bool, device=every.device)
    gone[every.argsort(stable=True)[: round(share * len(every))]] = True
    return (block * (~gone).view_as(prices).sum(1)).tolist()


def _down_costs(believed: Metrics, cut: Cut) -> tuple[float, float]:
    """What the channels taken out cost once down is refitted, and what the rest of down would."""
    removed = energy = 0.0
    nothing = torch.zeros_like(believed.down.weights[0], dtype=torch.float64)
    for expert, (channels, rows) in enumerate(zip(cut.kept, cut.down, strict=True)):
        removed += believed.down_cost(expert, cut.down_change(expert, rows))
        energy += believed.down_cost(expert, nothing.index_add(0, channels, rows))
    return removed, energy


@dataclass(frozen=True)
class Noise:
    """What rounding a stack to the bits of all costs.  share: of the energy that it costs a share of.  energies: rank
    (0: no basis) -> (E, rows), see Metrics.row_energies."""

    share: float
    energies: dict[int, Tensor]

    @classmethod
    def of(cls, metrics: Metrics, side: str, storage: Storage, multiple: int) -> Noise:
        hidden, rounding = metrics.layer.hidden, storage.required
        ranks = sorted({max(multiple, hidden * n // 8 // multiple * multiple) for n in range(1, 9)} | {0})
        stack = metrics.first if side == "first" else metrics.down
        share = relative_noise(stack.weights, rounding.group)[rounding.bits]
        energies = metrics.row_energies(side, rounding.group, ranks)
        return cls(share, {rank: noise for rank, (_, noise) in energies.items()})

    def over_ranks(self, kept: list[Tensor], halves: int) -> Callable[[int], float]:
        """rank -> the loss when the channels that are kept are rounded; straight lines between the ranks known."""
        known = {}
        for rank, energy in self.energies.items():
            of_channels = energy.unflatten(1, (halves, -1)).sum(1)
            known[rank] = self.share * float(sum(of_channels[e][k].sum() for e, k in enumerate(kept)))
        plain = known.pop(0)
        knots = sorted({0: 0.0, **known}.items())

        def at(rank: int) -> float:
            if not rank:
                return plain
            upper = next((i for i in range(1, len(knots)) if rank <= knots[i][0]), len(knots) - 1)
            (x0, y0), (x1, y1) = knots[upper - 1], knots[upper]
            return y0 + (y1 - y0) * (rank - x0) / (x1 - x0)

        return at


def _latents(
    layer: ExpertLayer, rows: int, directions: Tensor, multiple: int, storage: Storage,
    noise: Callable[[int], float] | None,
) -> list[Candidate]:  # fmt: skip
    """As it is, and one basis of every rank.  noise: what rounding costs, by the rank."""
    tails = directions.sum() - directions.cumsum(0)
    noise = noise or (lambda rank: 0.0)
    found = [Candidate(noise(0), rows * storage.row(layer.hidden))]
    for rank in _ranks(multiple, layer.hidden):
        cost = rows * storage.row(rank) + storage.basis(rank, layer.hidden)
        found.append(Candidate(max(0.0, float(tails[rank - 1])) + noise(rank), cost, rank))
    return found


def _of_one_rank(first: list[Candidate], down: list[Candidate]) -> list[Candidate]:
    """Each rank of the one stack together with the same of the other."""
    return [Candidate(a.loss + b.loss, a.cost + b.cost, a.rank) for a, b in zip(first, down, strict=True)]


def _mixtures(
    layer: ExpertLayer, halves: int, kept: int, energy: float, foretold: MixturePrices, side: Side, multiple: int,
    activation: str, storage: Storage,
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
            halves * kept * storage.row(rank)
            + bases * (storage.basis(rank, layer.hidden) + storage.floats(layer.experts)),
            rank, bases, activation,
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
    return range(multiple, most + 1, multiple)
