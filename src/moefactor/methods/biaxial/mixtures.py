"""biaxial's mixtures of bases: what they are fitted to, and what one costs before it is fitted.

That loss is not in closed form. Short fits of a few mixtures are interpolated: the log of the relative loss goes in
straight lines over the rank, and the number of bases and the share of channels gone multiply it, to within a tenth.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from ...fitting.metrics import Cut, Metrics
from ...fitting.mixture import Problem, Solution, group_starts, mixed, one_hot, solve

Side = Literal["first", "down"]
# The highest rank of the short fits, over the mean number of channels kept; and over the hidden size, near which a fit
# becomes exact and says nothing of lower ranks.
HIGHEST: dict[Side, float] = {"first": 1.6, "down": 1.0}
WHOLE = 0.8
# All their ranks, over the highest; they have MANY bases, but for one of FEW.
RANKS: dict[Side, tuple[float, float, float]] = {"first": (0.375, 0.6875, 1.0), "down": (0.5, 0.75, 1.0)}
MANY, FEW = 8, 2
STEPS = 60
# How far the log of a fit of 600 steps is below that of a short one, over √bases · (rank / hidden)². What these two
# foretell is off by 0.1, root mean square, and short fits alone by 0.27 (benchmarks/mixture_prices.py, where the
# middle and highest ranks want 0.6 to 1.6 for gate and up and 1.4 to 3.1 for down; without a text 0.7 to 1.0 and 0.9 to
# 1.5).
UNFINISHED: dict[Side, float] = {"first": 0.65, "down": 1.5}
MOST = 2.0  # that the share of channels gone is believed to multiply a log by
RATE = 0.1


@dataclass(frozen=True)
class MixturePrices:
    """log(relative loss) of the mixtures that could stand for a stack, at any rank, number of bases and cut.

    knots: (rank over the highest_rank, log) at MANY bases and the first cut, from (0, 0) on.
    few: what FEW bases multiply the log by.
    shares: (share of the channels gone, what it multiplies the log by), rising.
    """

    knots: tuple[tuple[float, float], ...]
    few: float
    shares: tuple[tuple[float, float], ...]

    def log_loss(self, rank: float, bases: int, share: float) -> float:
        """rank over the highest_rank of a cut that takes `share` of the channels."""
        fewer = math.log(MANY / bases) / math.log(MANY / FEW)
        gone = max(0.0, _through(self.shares, share))
        return min(0.0, _through(self.knots, rank)) * (1 + (self.few - 1) * fewer) * gone


def highest_rank(side: Side, mean: float, hidden: int) -> float:
    """Of the short fits to a stack whose experts keep `mean` channels."""
    return min(HIGHEST[side] * mean, WHOLE * hidden)


def mixture_prices(
    believed: Metrics, cut_at: Callable[[float], Cut], shares: tuple[float, ...], side: Side, activation: str,
    seed: int, noise: float = 0.0,
) -> MixturePrices:  # fmt: skip
    """From short fits to a stack of a layer.

    Args:
        believed: the metrics that the loss is measured in; those of the cut are what is fitted in.
        cut_at: share of the channels gone -> the layer without them.
        shares: where to fit; most of it is done at the first.
        noise: see Problem; what rounding costs is then a part of the loss.
    """
    share, *others = shares
    probe = Probe(believed, cut_at(share), side, activation, seed, noise)
    # Ranks of a small stack can round to the same; more bases include fewer, so that fewer gain less.
    knots = ((0.0, 0.0), *sorted(dict(probe.log_loss(rank, MANY) for rank in RANKS[side]).items()))
    middle, log = knots[len(knots) // 2]
    prices = MixturePrices(knots, min(1.0, probe.log_loss(middle, FEW)[1] / log), ((share, 1.0),))
    del probe  # two at a time would hold the moments of all experts twice
    found = [*prices.shares]
    for other in others:
        rank, log = Probe(believed, cut_at(other), side, activation, seed, noise).log_loss(middle, MANY)
        factor = log / min(-1e-6, prices.log_loss(rank, MANY, share))
        found.append((other, min(MOST, max(1 / MOST, factor))))
    return replace(prices, shares=tuple(sorted(found)))


class Probe:
    """Fits to one stack of one cut."""

    def __init__(self, believed: Metrics, cut: Cut, side: Side, activation: str, seed: int, noise: float = 0.0):
        self.believed, self.cut, self.side, self.seed = believed, cut, side, seed
        self.rows = cut.first_rows() if side == "first" else cut.down
        self.problem = mixture_problem(cut, side, activation, noise)
        self.energy = max(cost_of(believed, cut, side, self.rows), 1e-30)
        self.hidden = believed.layer.hidden
        mean = max(1e-9, sum(len(k) for k in cut.kept) / believed.layer.experts)
        self.highest = highest_rank(side, mean, self.hidden)

    def log_loss(self, rank: float, bases: int) -> tuple[float, float]:
        """The whole rank nearest to `rank`, both over the highest, and what a long fit of it would come to."""
        whole = max(1, min(round(rank * self.highest), self.problem.weights.shape[1]))
        bases = min(bases, len(self.rows))
        log = self.fitted(whole, bases, STEPS) - UNFINISHED[self.side] * bases**0.5 * (whole / self.hidden) ** 2
        return whole / self.highest, min(-1e-6, log)

    def fitted(self, rank: int, bases: int, steps: int) -> float:
        """log(relative loss) that a fit comes to."""
        solution, rebuilt = fit_mixture(self.problem, bases, rank, steps, self.seed)
        changes = (r - f[: len(r)].to(r) for r, f in zip(self.rows, rebuilt, strict=True))
        relative = cost_of(self.believed, self.cut, self.side, changes) / self.energy
        if self.problem.noise:
            basis, mix = solution.parameters
            private = solution.private / self.problem.level
            energy = self.problem.rounding_energy(private, mixed(mix, basis, self.problem.activation))
            relative += self.problem.noise * float(energy) / self.problem.scale
        return math.log(max(relative, 1e-12))


def _through(knots: tuple[tuple[float, float], ...], x: float) -> float:
    """The value at x of straight lines from knot to knot; beyond the outer ones the lines go on."""
    if len(knots) == 1:
        return knots[0][1]
    upper = next((i for i in range(1, len(knots)) if x <= knots[i][0]), len(knots) - 1)
    (x0, y0), (x1, y1) = knots[upper - 1 : upper + 1]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


def cost_of(metrics: Metrics, cut: Cut, side: Side, changes: Iterable[Tensor]) -> float:
    """What a change of a stack's rows, expert by expert, costs the loss."""
    if side == "first":
        return sum(
            metrics.first_cost(e, metrics.rows(k), c) for e, (k, c) in enumerate(zip(cut.kept, changes, strict=True))
        )
    nothing = torch.zeros_like(metrics.down.weights[0], dtype=torch.float64)
    return sum(
        metrics.down_cost(e, nothing.index_add(0, k, c.to(nothing)))
        for e, (k, c) in enumerate(zip(cut.kept, changes, strict=True))
    )


def mixture_problem(cut: Cut, side: Side, activation: str, noise: float = 0.0) -> Problem:
    """What a mixture is fitted to: the rows left of each expert, zeros behind them, in the metrics of the cut; noise,
    see Problem."""
    metrics = cut.metrics
    if side == "first":
        rows = cut.first_rows()
        left = [metrics.sensitivity[e][metrics.rows(k)] for e, k in enumerate(cut.kept)]
        right = metrics.input
    else:
        rows = cut.down
        left = [metrics.count[e] * metrics.hidden(e)[k][:, k] for e, k in enumerate(cut.kept)]
        right = metrics.output
    width = max(1, *(len(r) for r in rows))
    padded = torch.stack([torch.nn.functional.pad(r.float(), (0, 0, 0, width - len(r))) for r in rows])
    pad = [(0, width - len(a)) * a.ndim for a in left]
    lefts = torch.stack([torch.nn.functional.pad(a, p) for a, p in zip(left, pad, strict=True)])
    rights = None  # without a text, the identity
    if metrics.stats is not None:
        rights = torch.stack([right(e).float() for e in range(metrics.layer.experts)])
        rights /= rights.diagonal(dim1=1, dim2=2).mean().clamp(min=1e-30)
    # Levels near 1, or float32 runs out; none of it changes the minimum.
    deviation = padded[padded != 0].std() if (padded != 0).sum() > 1 else torch.tensor(1.0)
    lefts = lefts / lefts.abs().max().clamp(min=1e-30)
    level = float(deviation.clamp(min=1e-12))
    return Problem(padded / level, activation, right=rights, left=lefts.float(), level=level, noise=noise)


def fit_mixture(problem: Problem, bases: int, rank: int, steps: int, seed: int) -> tuple[Solution, Tensor]:
    """The solution, private factors in the weights' own units, and the experts it stands for (E, width, H)."""
    start = [
        group_starts(problem, bases, rank).to(problem.weights),
        one_hot(len(problem.weights), bases, noise=0.05, seed=seed).to(problem.weights),
    ]
    solution = solve(
        problem, lambda p: mixed(p[1], p[0], problem.activation), start, solver="varpro", steps=steps,
        rates=[RATE, RATE],
    )  # fmt: skip
    solution.private = solution.private * problem.level
    basis, mix = solution.parameters
    return solution, solution.private @ mixed(mix, basis, problem.activation)
