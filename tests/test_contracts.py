"""The contracts that every method of METHODS goes through, new ones without being asked."""

from __future__ import annotations

import itertools
from dataclasses import fields, replace

import pytest
import torch

from layers import LAYERS, UNUSED, factorised, random_stats, random_weights, stacked
from moefactor.experts import CompressedExperts, ExpertWeights
from moefactor.fitting.linalg import weighted_error
from moefactor.methods import METHODS
from moefactor.methods.biaxial import mixtures, planning
from moefactor.plan import LayerPlan
from moefactor.stats import STATISTICS, LayerStats

# What keeps a method that fits by gradient descent quick here; goes with every case of it. slbf's own rate wants more
# steps.
QUICK: dict[str, dict] = {"mobe": {"steps": 30}, "slbf": {"steps": 30, "rate": 0.03}, "biaxial": {"steps": 5}}
# Options to go through besides the defaults.
VARIANTS: dict[str, list[dict]] = {
    "svd": [{"joint": True}, {"projections": ("down",)}],
    "whitened_svd": [{"joint": True}],
    "shared_basis": [{"groups": 3}, {"whitened": False, "joint": False}],
    "rfid": [{"projections": ("gate", "up", "down"), "joint": True}, {"residual": 0.0, "group_size": 3}],
    "biaxial": [{"form": "linear"}, {"form": "tight"}, {"form": "standard"}, {"data_free": True}],
}
# Why a method with these options may give other experts when the experts come in another order.
ORDERED: dict[tuple[str, str], str] = {
    ("shared_basis", "groups=3"): "consecutive experts share a basis",
    ("rfid", ""): "the residual's projection goes by an expert's place in its group",
    ("rfid", "projections=gate,up,down joint=True"): "as above",
    ("mobe", ""): "bases start from runs of consecutive experts",
    ("slbf", ""): "as above",
    ("biaxial", "form=linear"): "mixtures start from runs of consecutive experts",
    ("biaxial", "form=tight"): "as above",
}
# How near a method comes to the weights when it may keep all it asks for, where that is not rounding, and why.
NEAR: dict[str, float] = {"mobe": 0.12, "slbf": 0.05}  # four hundred steps of a fit, with a ridge
# Methods without an error to report, and why.
ERRORLESS: dict[str, str] = {"reap": "drops experts and leaves the others as they are"}


def label(options: dict) -> str:
    def shown(value: object) -> str:
        return ",".join(value) if isinstance(value, tuple) else str(value)

    return " ".join(f"{name}={shown(value)}" for name, value in options.items())


CASES = [
    pytest.param(name, options, id=f"{name} {label(options)}".strip())
    for name in METHODS
    for options in [{}, *VARIANTS.get(name, [])]
]


def through(
    name: str, weights: ExpertWeights, stats: LayerStats, *, units: int | None = None, **options: object
) -> tuple[LayerPlan, CompressedExperts]:
    return factorised(METHODS[name], weights, stats, units=units, **QUICK.get(name, {}) | options)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """biaxial's table from shorter fits, and coarser."""
    monkeypatch.setattr(mixtures, "STEPS", 5)
    monkeypatch.setattr(planning, "SHARES", (0.0, 0.1, 0.25, 0.5))


@pytest.fixture(scope="module")
def weights() -> ExpertWeights:
    return random_weights()


@pytest.fixture(scope="module")
def stats(weights: ExpertWeights) -> LayerStats:
    return random_stats(weights)


@pytest.mark.parametrize(("name", "options"), CASES)
@pytest.mark.parametrize("kind", LAYERS)
def test_full_rank_is_exact(name: str, options: dict, kind: str) -> None:
    layer_weights = random_weights(LAYERS[kind])
    longer = {"steps": 400, "tolerance": 0.0} if name in NEAR else {}
    _, result = through(name, layer_weights, random_stats(layer_weights), **options, **longer)
    rebuilt = result.dense()
    for projection, original in stacked(layer_weights).items():
        torch.testing.assert_close(getattr(rebuilt, projection).float(), original, atol=NEAR.get(name, 1e-4), rtol=0)
    assert all(error < max(1e-7, NEAR.get(name, 0) ** 2) for error in result.errors.values())
    for bias in ("gate_bias", "up_bias", "down_bias"):
        kept, original = getattr(rebuilt, bias), getattr(layer_weights, bias)
        assert (kept is None) == (original is None)
        assert kept is None or torch.equal(kept, original)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_error_never_rises_with_rank(name: str, options: dict, weights: ExpertWeights, stats: LayerStats) -> None:
    if name in ERRORLESS:
        pytest.skip(ERRORLESS[name])
    errors = [through(name, weights, stats, units=units, **options)[1].errors for units in (1, 4, 8, 12)]
    assert errors[0]
    for fewer, more in itertools.pairwise(errors):
        assert more.keys() == fewer.keys()
        assert all(more[stack] <= fewer[stack] + 1e-9 for stack in more)
    # Twelve units say something that one does not, or the test above compares noughts.
    assert all(errors[-1][stack] < errors[0][stack] < 1 for stack in errors[0])


@pytest.mark.parametrize(("name", "options"), CASES)
@pytest.mark.parametrize("kind", LAYERS)
def test_parameter_count_is_what_is_stored(name: str, options: dict, kind: str) -> None:
    layer_weights = random_weights(LAYERS[kind])
    plan, result = through(name, layer_weights, random_stats(layer_weights), units=5, **options)
    stored = sum(tensor.numel() for tensor in result.tensors.values())
    assert plan.parameter_count() == stored == result.parameter_count()
    for stack, form in plan.forms.items():
        assert {k: tuple(t.shape) for k, t in result.factors(stack).items()} == form.shapes()


@pytest.mark.parametrize(("name", "options"), CASES)
def test_experts_commute(name: str, options: dict, weights: ExpertWeights, stats: LayerStats) -> None:
    if (name, label(options)) in ORDERED:
        pytest.skip(ORDERED[name, label(options)])
    order = torch.randperm(8, generator=torch.Generator().manual_seed(3))
    shuffled = replace(weights, **{key: value[order] for key, value in stacked(weights).items()})
    moved = {f.name: getattr(stats, f.name)[order] for f in fields(stats) if getattr(stats, f.name) is not None}
    plan, straight = through(name, weights, stats, units=5, **options)
    moved_plan, mixed = through(name, shuffled, LayerStats(**moved), units=5, **options)
    kept, moved_kept = (list(p.kept or range(8)) for p in (plan, moved_plan))
    assert sorted(order[moved_kept].tolist()) == kept
    expected = stacked(straight.dense())
    places = [kept.index(expert) for expert in order[moved_kept].tolist()]
    for projection, tensor in stacked(mixed.dense()).items():
        torch.testing.assert_close(tensor, expected[projection][places], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("name", "options"), CASES)
@pytest.mark.parametrize("trouble", ["unused expert", "no tokens at all", "expert of zeros", "one token"])
def test_nothing_becomes_nan(name: str, options: dict, trouble: str, weights: ExpertWeights) -> None:
    if trouble == "no tokens at all":
        seen = LayerStats.zeros(LAYERS["gated"], STATISTICS)
    elif trouble == "one token":
        seen = random_stats(weights, tokens=1)
    else:
        seen = random_stats(weights)
        assert seen.count[UNUSED] == 0
    if trouble == "expert of zeros":
        weights = replace(weights, **{k: v.index_fill(0, torch.tensor([1]), 0) for k, v in stacked(weights).items()})
    _, result = through(name, weights, seen, units=5, **options)
    assert all(torch.isfinite(tensor).all() for tensor in result.tensors.values())
    assert all(0 <= error <= 1 + 1e-6 for error in result.errors.values())


@pytest.mark.parametrize(("name", "options"), CASES)
def test_same_seed_same_bytes(name: str, options: dict, weights: ExpertWeights, stats: LayerStats) -> None:
    torch.manual_seed(1)
    _, first = through(name, weights, stats, units=5, **options)
    torch.manual_seed(2)  # the global generator must not matter
    state = torch.get_rng_state()
    _, second = through(name, weights, stats, units=5, **options)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(tensor, second.tensors[key]) for key, tensor in first.tensors.items())


@pytest.mark.parametrize("name", METHODS)
def test_needs_are_known_statistics(name: str) -> None:
    """Each test above hands a method only what it says it needs; here, that somebody collects it."""
    options = METHODS[name].complete({})
    assert METHODS[name].plan_needs(options) | METHODS[name].factorise_needs(options) <= set(STATISTICS)


def output_errors(weights: ExpertWeights, stats: LayerStats, rebuilt: ExpertWeights, projection: str) -> torch.Tensor:
    """(E,) ‖(W − Ŵ) S‖² of each expert under its own inputs."""
    moment = "hidden_moment" if projection == "down" else "input_moment"
    layer = stats.layer_moment(moment)
    difference = getattr(weights, projection).double() - getattr(rebuilt, projection).double()
    return torch.stack([weighted_error(difference[e], stats.mean_moment(moment, e, layer)) for e in range(8)])


@pytest.mark.parametrize("projection", ["gate", "up", "down"])
def test_whitened_svd_beats_svd_in_the_weighted_norm(
    projection: str, weights: ExpertWeights, stats: LayerStats
) -> None:
    _, plain = factorised(METHODS["svd"], weights, stats, units=5)
    _, whitened = factorised(METHODS["whitened_svd"], weights, stats, units=5)
    better = output_errors(weights, stats, whitened.dense(), projection)
    worse = output_errors(weights, stats, plain.dense(), projection)
    assert (better <= worse * (1 + 1e-5)).all()
    assert better.sum() < 0.9 * worse.sum()


def test_whitened_basis_for_down_beats_the_plain_one(weights: ExpertWeights, stats: LayerStats) -> None:
    """Only for down is the shared basis exactly optimal, and only in the sum over the experts by their tokens."""
    _, plain = factorised(METHODS["shared_basis"], weights, stats, units=5, whitened=False)
    _, whitened = factorised(METHODS["shared_basis"], weights, stats, units=5)
    share = (stats.weight_square / stats.weight_square.mean()).clamp(min=1e-2)
    better = (share * output_errors(weights, stats, whitened.dense(), "down")).sum()
    assert better < 0.99 * (share * output_errors(weights, stats, plain.dense(), "down")).sum()
