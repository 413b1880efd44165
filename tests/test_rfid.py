"""RFID-MoE against its formulas worked out in plain numpy, and its switches."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from layers import factorised, priced, random_stats, random_weights, stacked
from moefactor.allocate import spend
from moefactor.errors import UserError
from moefactor.experts import ExpertWeights
from moefactor.forms import SharedBasis, WindowResidual
from moefactor.methods import METHODS
from moefactor.stats import LayerStats

RFID = METHODS["rfid"]
# 8 experts of 16 × 24 in pairs: a rank costs 2·16 + 24 parameters.
GROUP, COST = 2, 2 * 16 + 24


@pytest.fixture(scope="module")
def weights() -> ExpertWeights:
    return random_weights(seed=11)


@pytest.fixture(scope="module")
def stats(weights: ExpertWeights) -> LayerStats:
    return random_stats(weights, seed=12)


def planned(weights: ExpertWeights, stats: LayerStats | None, budget: int, **options: object) -> dict:
    offers = priced(RFID, weights, stats, RFID.complete({"group_size": GROUP, **options}))
    (units,) = spend([offers], budget, RFID.rule)
    return RFID.build(offers, units).forms


def paper(stack: np.ndarray, count: np.ndarray, budget: float, xi: float) -> tuple[list[tuple], np.ndarray]:
    """Groups by frequency, and their ranks before rounding: K_total · C_g / ΣC (§3.1 and 3.2)."""
    by_frequency = sorted(range(len(count)), key=lambda e: -count[e])
    groups = [tuple(sorted(by_frequency[i : i + GROUP])) for i in range(0, len(count), GROUP)]
    effective, used = [], []
    for group in groups:
        energy = np.linalg.svd(np.concatenate([stack[e] for e in group]), compute_uv=False) ** 2
        p = energy / energy.sum()
        effective.append(np.exp(-(p * np.log(p)).sum()))
        used.append(count[list(group)].sum())
    score = xi * np.array(effective) / sum(effective) + (1 - xi) * np.array(used) / sum(used)
    return groups, budget / COST * score / score.sum()


@pytest.mark.parametrize("xi", [0.8, 0.3, 1.0, 0.0])
def test_groups_and_ranks_are_the_papers(xi: float, weights: ExpertWeights, stats: LayerStats) -> None:
    budget = 6000  # of 2 · 3072 for gate and up, less the dense down of 3072 and no residual
    forms = planned(weights, stats, 3072 + 3700, xi=xi, residual=0.0)
    assert sum(form.parameter_count() for form in forms.values()) <= 3072 + 3700 < budget + 3072
    wanted, fractions, found = [], [], []
    for name in ("gate", "up"):
        groups, ranks = paper(getattr(weights, name).double().numpy(), stats.count.numpy(), 3700 / 2, xi)
        assert forms[name].groups == tuple(groups)
        assert (ranks >= 1).all()
        assert (ranks <= 24).all()
        found += forms[name].ranks
        wanted += [int(rank) for rank in ranks]
        fractions += [rank % 1 for rank in ranks]
    # What is left after rounding down goes to the largest fractions.
    left = 3700 // COST - sum(wanted)
    for index in sorted(range(len(wanted)), key=lambda i: -fractions[i])[:left]:
        wanted[index] += 1
    assert found == wanted


def test_factors_are_the_stacked_svd_of_each_group(weights: ExpertWeights, stats: LayerStats) -> None:
    _, result = factorised(RFID, weights, stats, units=6, group_size=GROUP, residual=0.0)
    rebuilt = stacked(result.dense())
    assert torch.equal(rebuilt["down"], weights.down)
    for name in ("gate", "up"):
        for group in result.forms[name].groups:
            matrix = np.concatenate([getattr(weights, name)[e].double().numpy() for e in group])
            u, s, vt = np.linalg.svd(matrix, full_matrices=False)
            best = (u[:, :6] * s[:6]) @ vt[:6]
            found = np.concatenate([rebuilt[name][e].numpy() for e in group])
            np.testing.assert_allclose(found, best, atol=1e-5)


def test_residual_off_and_on(weights: ExpertWeights, stats: LayerStats) -> None:
    bare, off = factorised(RFID, weights, stats, units=3, residual=0.0)
    full, on = factorised(RFID, weights, stats, units=3, residual=0.1)
    assert isinstance(bare.forms["up"], SharedBasis)
    assert isinstance(full.forms["up"], WindowResidual)
    assert full.forms["up"].sizes == (16 * round(0.1 * 4 * 24),) * 2
    assert all(0.8 * off.errors[stack] < on.errors[stack] < off.errors[stack] for stack in ("gate", "up"))


def test_every_switch_changes_what_it_should(weights: ExpertWeights, stats: LayerStats) -> None:
    budget = 3072 + 3700
    usual = planned(weights, stats, budget)["up"].inner
    consecutive = planned(weights, stats, budget, grouping="consecutive")["up"].inner
    assert consecutive.groups == ((0, 1), (2, 3), (4, 5), (6, 7)) != usual.groups
    even = planned(weights, stats, budget, score="uniform")["up"].inner
    assert even.groups == usual.groups
    assert max(even.ranks) - min(even.ranks) <= 1
    by_use = planned(weights, stats, budget, score="frequency")["up"].inner
    assert list(by_use.ranks) == sorted(by_use.ranks, reverse=True)
    assert by_use.ranks != usual.ranks
    assert planned(weights, stats, budget, score="effective_rank") == planned(weights, stats, budget, xi=1.0)
    assert planned(weights, stats, budget, score="frequency") == planned(weights, stats, budget, xi=0.0)


def test_without_routing_statistics_where_none_are_needed(weights: ExpertWeights) -> None:
    options = RFID.complete({"grouping": "consecutive", "score": "effective_rank"})
    assert RFID.plan_needs(options) == set()
    assert RFID.plan_needs(RFID.complete({"grouping": "consecutive"})) == {"routing"}
    assert planned(weights, None, 3072 + 3700, grouping="consecutive", score="effective_rank")


def test_the_papers_fit_never_beats_the_closed_form(weights: ExpertWeights, stats: LayerStats) -> None:
    _, closed = factorised(RFID, weights, stats, units=6, residual=0.0)
    _, fitted = factorised(RFID, weights, stats, units=6, residual=0.0, refine_steps=60)
    for stack in ("gate", "up"):
        assert closed.errors[stack] < fitted.errors[stack] < 1.5 * closed.errors[stack]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"xi": 1.5}, "xi must be from 0 to 1"), ({"residual": 1.0}, "residual"), ({"group_size": 9}, "group_size"),
        ({"group_size": 0}, "group_size"), ({"score": "fussed"}, "Did you mean 'fused'"),
    ],
)  # fmt: skip
def test_unfit_options(options: dict, message: str, weights: ExpertWeights, stats: LayerStats) -> None:
    with pytest.raises(UserError, match=message):
        planned(weights, stats, 6000, **options)
