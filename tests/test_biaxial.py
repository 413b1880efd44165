"""biaxial: the latent form, gradients at the pre-activations, the metrics, the plan over both axes, fits and refits."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import moefactor
from layers import (
    LAYERS,
    UNUSED,
    Experts,
    activation,
    only,
    random_stats,
    random_weights,
    routed,
    routed_tokens,
    stacked,
)
from models import IDS, load, logits, read_plan, rebuilt
from moefactor.allocate import PARAMETERS, Budget
from moefactor.errors import UserError
from moefactor.experts import CompressedExperts, ExpertLayer, ExpertWeights
from moefactor.fitting.metrics import RIDGE, Cut, Metrics, roots
from moefactor.fitting.mixture import Problem, group_starts
from moefactor.fitting.refine import LayerTokens, refine
from moefactor.forms import BasisMixture, Latent, Ragged, form_from_json
from moefactor.methods import METHODS, biaxial
from moefactor.methods.biaxial import mixtures as biaxial_mixture
from moefactor.methods.biaxial import planning as biaxial_plan
from moefactor.methods.biaxial.mixtures import MixturePrices, mixture_prices
from moefactor.methods.biaxial.planning import Candidate, forms_of
from moefactor.plan import LayerPlan
from moefactor.routing import Routing
from moefactor.runtime.kernels import Setting, choose
from moefactor.runtime.module import FactorisedExperts
from moefactor.stats import STATISTICS, LayerStats
from moefactor.streaming import _observed_forward

REFERENCE = Path(__file__).resolve().parents[1] / "assets" / "reference-moe"
NEEDS = set(biaxial.NEEDS)

# -- the latent form, gradients at the pre-activations -----------------------------------------------------------------


def latent(experts: int = 4, width: int = 6, hidden: int = 10, rank: int = 5, halves: int = 1) -> Latent:
    inner = Ragged(experts, halves * width, rank, widths=(6, 0, 3, 5), halves=halves)
    return Latent(experts, halves * width, hidden, rank=rank, inner=inner)


def random_factors(form: Latent) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in form.shapes().items()}


@pytest.mark.parametrize("halves", [1, 2])
def test_latent_is_its_dense_experts(halves: int) -> None:
    form = latent(halves=halves)
    factors, run = random_factors(form), choose(form, Setting("cpu", torch.float32))
    ids, weights = torch.tensor([[0, 2], [3, 1], [2, 3]]), torch.rand(3, 2)
    routing = Routing(ids, weights, 4)
    tokens = torch.randn(3, form.hidden)
    rows = run.read(factors, tokens, routing)
    for row, token, expert in zip(rows, routing.token, routing.expert, strict=True):
        torch.testing.assert_close(row, form.dense(factors, int(expert)) @ tokens[token])
    assert form_from_json(form.to_json(), experts=4, width=form.width, hidden=10, where="here") == form
    if halves == 2:
        return
    h = torch.randn(6, form.width)
    h *= torch.tensor([[float(k < form.inner.widths[e]) for k in range(6)] for e in routing.expert.tolist()])
    pairs = torch.stack([x @ form.dense(factors, int(e)) for x, e in zip(h, routing.expert, strict=True)])
    torch.testing.assert_close(run.write(factors, h, routing), pairs)
    torch.testing.assert_close(run.write_combined(factors, h, routing), routing.combine(pairs))


def test_first_gradient_is_the_chain_rule_by_hand() -> None:
    """gate's: (∇ᵀd_k)·u_k·silu'(gate_k); up's: (∇ᵀd_k)·silu(gate_k), ∇ with the router weight in it."""
    module, layer = Experts(), ExpertLayer("experts", "layer", 3, 4, 6)
    stats = LayerStats.zeros(layer, {"first_gradient", "output_gradient"})
    module.gradient_observer = stats
    x = torch.randn(5, 6, requires_grad=True)
    ids, g = torch.tensor([[0, 1], [1, 2], [0, 2], [2, 1], [0, 1]]), torch.rand(5, 2)
    upstream = torch.randn(5, 6)
    _observed_forward(module, x, ids, g).backward(upstream)
    expected = torch.zeros(3, 8)
    for token in range(5):
        for expert, weight in zip(ids[token].tolist(), g[token], strict=True):
            gate, up = (module.gate_up_proj[expert] @ x[token]).chunk(2)
            through = (weight * upstream[token]) @ module.down_proj[expert]
            sigma = gate.sigmoid()
            slope = sigma * (1 + gate * (1 - sigma))
            expected[expert] += torch.cat((through * up * slope, through * nn.functional.silu(gate))).square()
    torch.testing.assert_close(stats.first_gradient, expected.detach(), rtol=1e-4, atol=1e-5)


# -- metrics -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights() -> ExpertWeights:
    return random_weights()


@pytest.fixture(scope="module")
def stats(weights: ExpertWeights) -> LayerStats:
    return only(random_stats(weights), NEEDS)


def is_multiple_of_identity(matrix: Tensor) -> bool:
    return torch.allclose(matrix, matrix.diagonal().mean() * torch.eye(len(matrix), dtype=matrix.dtype), rtol=1e-9)


def test_a_prior_of_one_knows_no_directions(weights: ExpertWeights, stats: LayerStats) -> None:
    blind, seen = Metrics(weights, stats, 1.0), Metrics(weights, stats, 0.0)
    for of in ("input", "hidden", "output"):
        matrices = [getattr(blind, of)(expert) for expert in range(8)]
        assert all(is_multiple_of_identity(m) and torch.equal(m, matrices[0]) for m in matrices)
        assert not is_multiple_of_identity(getattr(seen, of)(0))  # or the line above says nothing
    assert is_multiple_of_identity(blind.pooled_input())
    assert is_multiple_of_identity(blind.pooled_output())
    assert torch.equal(blind.count, torch.full((8,), float(stats.count.mean()), dtype=torch.float64))
    assert (blind.sensitivity == blind.sensitivity[0, 0]).all()
    # Only the level comes from the text: channels rank as without any.
    torch.testing.assert_close(blind.prices() / blind.prices().sum(), _shares(Metrics(weights, None, 1.0).prices()))


def _shares(prices: Tensor) -> Tensor:
    return prices / prices.sum()


@pytest.mark.parametrize("kind", LAYERS)
def test_costs_without_a_prior_by_hand(kind: str) -> None:
    """½ Σ over pairs of tokens, with all of them at one expert, so that nothing is borrowed from the others."""
    layer = LAYERS[kind]
    weights, stats = random_weights(layer), LayerStats.zeros(layer, NEEDS)
    generator = torch.Generator().manual_seed(4)
    _, x, h, y, g = max(routed_tokens(weights), key=lambda seen: len(seen[1]))
    outward = torch.randn(y.shape, generator=generator)
    before = torch.randn(len(x), layer.stack_width(layer.first_stack), generator=generator)
    stats.add(2, x, h, y, g)
    stats.add_gradient(2, outward)
    stats.add_first_gradient(2, before)
    metrics = Metrics(weights, stats, 0.0)
    x, h, outward, before, g = (t.double() for t in (x, h, outward, before, g))

    change = torch.randn(layer.intermediate, layer.hidden, generator=generator).double()
    # n · E_s[h hᵀ] ⊗ E_t[∇ ∇ᵀ], s weighted by g²: every pair of tokens (s, t).
    pairs = g.square().unsqueeze(1) * (h @ change @ outward.T).square()
    assert metrics.down_cost(2, change) == pytest.approx(float(0.5 * pairs.sum() / g.square().sum()), rel=1e-4)

    rows = torch.tensor([0, 3, 7])
    change = torch.randn(3, layer.hidden, generator=generator).double()
    squares = (g.square().unsqueeze(1) * (x @ change.T).square()).sum(0) / g.square().sum()
    by_hand = 0.5 * (before[:, rows].square().sum(0) * squares).sum()
    assert metrics.first_cost(2, rows, change) == pytest.approx(float(by_hand), rel=1e-4)
    whole = metrics.first.weights[2].double()
    alone = [metrics.first_cost(2, torch.tensor([k]), whole[k : k + 1]) for k in range(5)]
    assert metrics.first_energy()[2, :5].tolist() == pytest.approx(alone)

    columns = weights.down[2].double()
    expected = 0.5 * h.square().sum(0) * (outward @ columns).square().mean(0)
    torch.testing.assert_close(metrics.prices()[2], expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", LAYERS)
def test_costs_without_statistics_are_relative_squared_errors(kind: str) -> None:
    weights = random_weights(LAYERS[kind])
    change = torch.randn(8, 16, 24, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    for stats in (None, LayerStats.zeros(LAYERS[kind], STATISTICS)):  # a text that never came here is no text
        metrics = Metrics(weights, stats, 0.5)
        first = metrics.first.weights.double()
        every = torch.arange(first.shape[1])
        assert sum(metrics.first_cost(e, every, w) for e, w in enumerate(first)) == pytest.approx(1)
        assert float(metrics.first_energy().sum()) == pytest.approx(1)
        relative = change.square().sum() / weights.down.double().square().sum()
        assert sum(metrics.down_cost(e, c) for e, c in enumerate(change)) == pytest.approx(float(relative))


def test_an_expert_that_nothing_reached_is_all_prior(weights: ExpertWeights, stats: LayerStats) -> None:
    metrics = Metrics(weights, stats, 0.25)
    assert float(metrics.count[UNUSED]) == pytest.approx(0.25 * float(stats.count.mean()))
    for of in (metrics.input, metrics.hidden, metrics.output):
        assert is_multiple_of_identity(of(UNUSED))
        assert not is_multiple_of_identity(of(0))
    assert (metrics.prices()[UNUSED] > 0).all()
    torch.testing.assert_close(
        metrics.sensitivity[UNUSED], torch.full((32,), 0.25 * float(stats.first_gradient.mean()), dtype=torch.float64)
    )


def test_refitted_down_is_ridge_least_squares(weights: ExpertWeights, stats: LayerStats) -> None:
    """By lstsq on the rows of a root of the moment, with the ridge as rows of their own."""
    metrics, channels = Metrics(weights, stats, 0.3), torch.tensor([1, 2, 5, 8, 13, 15])
    for expert in (0, 6, UNUSED):
        moment, down = metrics.hidden(expert), weights.down[expert].T.double()
        rows = torch.linalg.cholesky(moment).T
        tokens = max(1.0, float(stats.count[expert]))
        ridge = RIDGE * (1 + 64 / tokens) * moment.diagonal()[channels].mean()
        eye = torch.eye(len(channels), dtype=torch.float64)
        left = torch.cat([rows[:, channels], ridge.sqrt() * eye])
        right = torch.cat([rows @ down, ridge.sqrt() * down[channels]])
        torch.testing.assert_close(metrics.refitted_down(expert, channels), torch.linalg.lstsq(left, right).solution)
    assert metrics.refitted_down(0, channels[:0]).shape == (0, 24)


def test_a_cut_that_keeps_everything_costs_nothing(weights: ExpertWeights, stats: LayerStats) -> None:
    metrics = Metrics(weights, stats, 0.5)
    cut = Cut.of(metrics, metrics.prices(), [16] * 8)
    removed, energy = biaxial_plan._down_costs(metrics, cut)
    assert removed < 1e-12 * energy
    assert all(torch.equal(rows.float(), metrics.first.weights[e]) for e, rows in enumerate(cut.first_rows()))
    # And each channel less costs more, up to all of down.
    costs = [biaxial_plan._down_costs(metrics, Cut.of(metrics, metrics.prices(), [w] * 8))[0] for w in (15, 10, 4, 0)]
    assert costs == sorted(costs)
    assert costs[-1] == pytest.approx(energy)


def test_roots() -> None:
    moment = torch.randn(6, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    moment = moment @ moment.T
    half, inverse = roots(moment)
    torch.testing.assert_close(half @ half, moment)
    torch.testing.assert_close(half @ inverse, torch.eye(6, dtype=torch.float64))
    assert all(torch.isfinite(part).all() for part in roots(torch.zeros(4, 4, dtype=torch.float64)))


# -- the plan ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prices of mixtures from shorter fits, and a coarser table."""
    monkeypatch.setattr(biaxial_mixture, "STEPS", 20)
    monkeypatch.setattr(biaxial_plan, "SHARES", (0.0, 0.1, 0.2, 0.3, 0.4, 0.6, 0.9))


def planned(
    layers: list[tuple[ExpertWeights, LayerStats | None]], keep: float, *, multiple: int = 1, **options: object
) -> tuple[list[LayerPlan], float]:
    parameters = int(keep * sum(weights.layer.parameter_count for weights, _ in layers))
    budget = Budget(parameters, 1 - keep, multiple=multiple)
    tables = [biaxial.price(weights, stats, budget, seed=0, **options) for weights, stats in layers]
    made = biaxial.plan_tables(tables, budget)
    return made.layers, made.loss


def seen(kind: str = "gated", count: int = 1) -> list[tuple[ExpertWeights, LayerStats]]:
    drawn = [random_weights(LAYERS[kind], seed=seed) for seed in range(count)]
    return [(weights, only(random_stats(weights), NEEDS)) for weights in drawn]


@pytest.mark.parametrize("form", ["fast", "linear", "tight"])
@pytest.mark.parametrize("kind", LAYERS)
def test_the_plan_meets_the_budget_and_counts_what_it_stores(kind: str, form: str, quick: None) -> None:
    ((weights, stats),) = seen(kind)
    layer, losses = weights.layer, []
    for keep in (0.3, 0.45, 0.6, 0.9):
        (plan,), loss = planned([(weights, stats)], keep, form=form)
        budget = int(keep * layer.parameter_count)
        # A layer as small as this buys in large pieces; of a whole model a percent is left at most, see below.
        assert 0.98 * budget <= plan.parameter_count() <= budget
        assert LayerPlan.from_json(plan.to_json(), layer) == plan
        result = biaxial.factorise(weights, stats, plan, seed=0, steps=5)
        assert result.parameter_count() == plan.parameter_count()
        assert all(torch.isfinite(tensor).all() for tensor in result.tensors.values())
        losses.append(loss)
        mixing = {f.activation for f in plan.forms.values() if isinstance(f, BasisMixture)}
        assert mixing <= {"fast": set(), "linear": {"identity"}, "tight": {"silu"}}[form]
    # A layer this small can take the same row of its table for two budgets; channels bought back are not counted.
    assert all(fewer >= more > 0 for fewer, more in itertools.pairwise(losses)), losses
    assert losses[0] > 2 * losses[-1]


def test_doubt_falls_with_the_square_of_the_ratio_below_forty_per_cent(quick: None) -> None:
    layers = seen()
    for keep, doubt in ((0.8, 0.025), (0.6, 0.1), (0.4, 0.1)):
        assert planned(layers, keep) == planned(layers, keep, doubt=doubt)
    assert planned(layers, 0.8)[1] < planned(layers, 0.8, doubt=0.1)[1]  # what goes is what nobody used


@pytest.mark.parametrize("form", ["linear", "tight"])
def test_one_budget_over_layers(form: str, quick: None) -> None:
    """Within a percent; more goes to the layer whose loss is steeper; a mixture where it pays."""
    (first, quiet), (second, loud) = seen(count=2)
    loud = replace(loud, first_gradient=100 * loud.first_gradient, output_gradient=100 * loud.output_gradient)
    total, losses, used = 2 * first.layer.parameter_count, [], set()
    for keep in (0.3, 0.4, 0.7):
        plans, loss = planned([(first, quiet), (second, loud)], keep, form=form)
        small, large = (plan.parameter_count() for plan in plans)
        assert 0.99 * int(keep * total) <= small + large <= int(keep * total)
        assert small < large
        losses.append(loss)
        used |= {type(form) for plan in plans for form in plan.forms.values()}
    assert losses == sorted(losses, reverse=True)
    assert BasisMixture in used


@pytest.mark.parametrize(("form", "multiple"), [("fast", 4), ("linear", 4), ("tight", 4), ("fast", 5)])
def test_ranks_come_in_multiples(form: str, multiple: int, quick: None) -> None:
    ranks = []
    for keep in (0.3, 0.5):
        plans, _ = planned(seen(count=2), keep, form=form, multiple=multiple)
        ranks += [f.rank for plan in plans for f in plan.forms.values() if isinstance(f, Latent | BasisMixture)]
    assert ranks
    assert all(rank % multiple == 0 for rank in ranks)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5])
def test_a_share_of_the_channels_is_taken_out(share: float) -> None:
    """But for the few that what is left of the budget buys back, less than a rank of gate and up would cost."""
    for plan in planned(seen(count=2), 0.35, channel_share=share)[0]:
        kept, form = sum(plan.forms["down"].kept_widths), plan.forms["gate_up"]
        assert plan.forms["gate_up"].kept_widths == plan.forms["down"].kept_widths
        bought_back = kept - (1 - share) * 128
        assert bought_back >= 0
        assert bought_back * (2 * form.rank + 24) <= 2 * 128 + 24


def highest_ratio(kind: str, **options: object) -> float:
    with pytest.raises(UserError, match="the highest with these options is") as caught:
        planned(seen(kind), 0.005, **options)
    return float(re.search(r"is (0\.\d+)", str(caught.value)).group(1))


@pytest.mark.parametrize(("share", "probed"), [(0.5, (0.5,)), (-1.0, biaxial_plan.PROBED)])
def test_mixtures_are_probed_on_the_cut_where_it_is_known(
    share: float, probed: tuple[float, ...], quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Short fits of a layer with other channels than it will have price its mixtures too high."""
    found: list[int] = []

    def noted(believed: Metrics, cut_at: Callable[[float], Cut], *rest: object) -> MixturePrices:
        def kept_at(gone: float) -> Cut:
            found.append(sum(len(channels) for channels in cut_at(gone).kept))
            return cut_at(gone)

        return mixture_prices(believed, kept_at, *rest)

    monkeypatch.setattr(biaxial_plan, "mixture_prices", noted)
    ((weights, stats),) = seen()
    planned([(weights, stats)], 0.35, form="tight", channel_share=share)
    channels = weights.layer.experts * weights.layer.intermediate
    assert found == [round((1 - share) * channels) for share in probed] * 2  # gate and up, down


@pytest.mark.parametrize("options", [{}, {"channel_share": 0.1}, {"form": "tight", "channel_share": 0.2}])
def test_the_highest_ratio_is_named(options: dict, quick: None) -> None:
    highest = highest_ratio("gated", **options)
    planned(seen("gated"), 1.001 - highest, **options)
    with pytest.raises(UserError, match="the highest"):
        planned(seen("gated"), 0.998 - highest, **options)


@pytest.mark.parametrize("kind", LAYERS)
def test_the_highest_ratio_can_be_had(kind: str) -> None:
    planned(seen(kind), 1 - highest_ratio(kind))


def test_data_free_reads_no_statistics(weights: ExpertWeights, stats: LayerStats, quick: None) -> None:
    for form in ("fast", "linear", "tight"):
        (blind,), loss = planned([(weights, None)], 0.4, form=form, data_free=True)
        (same,), again = planned([(weights, stats)], 0.4, form=form, data_free=True)
        assert blind == same != planned([(weights, stats)], 0.4, form=form)[0][0]
        assert loss == again
        result = biaxial.factorise(weights, None, blind, seed=0, steps=5, data_free=True)
        told = biaxial.factorise(weights, stats, blind, seed=0, steps=5, data_free=True)
        assert all(torch.equal(tensor, told.tensors[name]) for name, tensor in result.tensors.items())
    method = METHODS["biaxial"]
    options = method.complete({"data_free": True})
    assert method.plan_needs(options) == method.factorise_needs(options) == set()


@pytest.mark.parametrize("ratio", [0.3, 0.6])
def test_without_text_a_third_of_the_ratio_goes_as_channels(ratio: float, weights: ExpertWeights, quick: None) -> None:
    """But for those that what was left of the budget buys back; the user may say otherwise."""
    (plan,), _ = planned([(weights, None)], 1 - ratio, form="fast", data_free=True)
    layer = weights.layer
    gone = layer.experts * layer.intermediate - sum(plan.forms["down"].rows().widths)
    most = round(ratio / 3 * layer.experts * layer.intermediate)
    assert 0.5 * most < gone <= most
    (whole,), _ = planned([(weights, None)], 1 - ratio, form="fast", data_free=True, channel_share=0.0)
    assert sum(whole.forms["down"].rows().widths) == layer.experts * layer.intermediate


@pytest.mark.parametrize("damping", [0.0, 1.0])
def test_what_a_basis_is_priced_at(weights: ExpertWeights, stats: LayerStats, damping: float) -> None:
    """With experts that differ in nothing but their weights, the tail of a singular value decomposition."""
    metrics = Metrics(weights, None if damping == 0 else stats, damping)
    cut = Cut.of(metrics, metrics.prices(), [16] * 8)
    offers = biaxial_plan._latents(weights.layer, 2 * 8 * 16, cut.first_directions()[0], 1, PARAMETERS, None)
    singular = torch.linalg.svdvals(metrics.first.weights.double().flatten(0, 1))
    level = 0.5 * metrics.sensitivity[0, 0] * metrics.input(0)[0, 0]
    whole = biaxial_mixture.cost_of(metrics, cut, "first", cut.first_rows())
    for offer in offers[1:]:
        assert offer.cost == offer.rank * (256 + 24)
        tail = float(level * singular[offer.rank :].square().sum())
        assert offer.loss == pytest.approx(tail, rel=1e-6, abs=1e-9 * whole)
    plan = LayerPlan(weights.layer, forms_of(weights.layer, (16,) * 8, {"gate_up": offers[7], "down": Candidate(0, 0)}))
    result = biaxial.factorise(weights, metrics.stats, plan, seed=0, shrinkage=damping, data_free=damping == 0)
    changes = [w - result.stack("gate_up")[e].double() for e, w in enumerate(cut.first_rows())]
    assert biaxial_mixture.cost_of(metrics, cut, "first", changes) == pytest.approx(offers[7].loss, rel=1e-4)
    # The same of down: D ≈ D·(G^{1/2} v)(v G^{-1/2}).
    prices, basis, inward = cut.down_directions()
    changes = [d - d @ inward[:, :9] @ basis[:9] for d in cut.down]
    assert biaxial_mixture.cost_of(metrics, cut, "down", changes) == pytest.approx(float(prices[9:].sum()), rel=1e-4)


def test_a_front_has_nothing_that_another_beats() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.rand(3000, 2, generator=generator)
    drawn[:, 0] += 1 / drawn[:, 1]  # loss falls as the cost grows, about
    every = [Candidate(float(loss), int(1000 * cost), rank) for rank, (loss, cost) in enumerate(drawn)]
    front = biaxial_plan._front(every)
    assert all(a.cost < b.cost and a.loss > b.loss for a, b in itertools.pairwise(front))
    assert not [c for c in front for other in every if other.cost <= c.cost and other.loss < c.loss]
    assert front[-1].loss == min(c.loss for c in every)
    assert front[0].cost == min(c.cost for c in every)
    dense = biaxial_plan._front([Candidate(1000.0 - cost, cost) for cost in range(1000)])
    assert len(dense) <= biaxial_plan.FRONT + 1
    assert (dense[0].cost, dense[-1].cost) == (0, 999)


def test_prices_of_mixtures_go_in_straight_lines_through_what_was_fitted() -> None:
    few, many = biaxial_mixture.FEW, biaxial_mixture.MANY
    prices = MixturePrices(((0.0, 0.0), (0.5, -1.0), (1.0, -3.0)), 0.5, ((0.0, 1.5), (0.2, 1.0)))
    for rank, log in ((0.0, 0.0), (0.25, -0.5), (0.5, -1.0), (0.75, -2.0), (1.0, -3.0), (1.25, -4.0)):
        assert prices.log_loss(rank, many, 0.2) == pytest.approx(log)
        assert prices.log_loss(rank, few, 0.2) == pytest.approx(log / 2)
        assert prices.log_loss(rank, 4, 0.2) == pytest.approx(0.75 * log)  # 4: halfway from 2 to 8
        assert prices.log_loss(rank, many, 0.1) == pytest.approx(1.25 * log)
        assert prices.log_loss(rank, many, 0.4) == pytest.approx(log / 2)
        assert prices.log_loss(rank, many, 0.7) == 0.0  # no mixture adds to the loss


@pytest.mark.parametrize("gone", [0.0, 0.125, 0.375])
@pytest.mark.parametrize(("hidden", "intermediate"), [(24, 16), (16, 24)])
@pytest.mark.parametrize("side", ["first", "down"])
def test_prices_of_mixtures_are_near_what_long_fits_come_to(
    side: biaxial_mixture.Side, hidden: int, intermediate: int, gone: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At ranks, numbers of bases and cuts between those fitted and beyond, however wide the experts are."""
    # Fitted long, so that what is left is the interpolation: weights drawn at random converge sooner than trained ones.
    monkeypatch.setattr(biaxial_mixture, "STEPS", 150)
    monkeypatch.setattr(biaxial_mixture, "UNFINISHED", {"first": 0.0, "down": 0.0})
    layer = replace(LAYERS["gated"], experts=16, hidden=hidden, intermediate=intermediate)
    metrics = Metrics(random_weights(layer, seed=0), None, 0.0)

    def cut_at(share: float) -> Cut:
        return Cut.of(metrics, metrics.prices(), [round((1 - share) * intermediate)] * 16)

    prices = mixture_prices(metrics, cut_at, biaxial_plan.PROBED, side, "silu", 0)
    cut = cut_at(gone)
    rows = cut.first_rows() if side == "first" else cut.down
    problem = biaxial_mixture.mixture_problem(cut, side, "silu")
    highest = biaxial_mixture.highest_rank(side, (1 - gone) * intermediate, hidden)
    for part, bases in ((0.5, 6), (0.85, 4)):
        rank = round(part * highest)
        _, rebuilt = biaxial_mixture.fit_mixture(problem, bases, rank, 150, 0)
        changes = [r - f[: len(r)].double() for r, f in zip(rows, rebuilt, strict=True)]
        whole = biaxial_mixture.cost_of(metrics, cut, side, rows)
        log = math.log(biaxial_mixture.cost_of(metrics, cut, side, changes) / whole)
        assert prices.log_loss(rank / highest, bases, gone) == pytest.approx(log, rel=0.2)


@pytest.mark.parametrize("form", ["linear", "tight"])
@pytest.mark.parametrize("sizes", [{"hidden": 4}, {"experts": 3}, {"hidden": 8, "intermediate": 32}])
def test_layers_of_odd_sizes(sizes: dict, form: str, quick: None) -> None:
    """Short fits of one rank, too few experts to mix, experts wider than the hidden size."""
    layer = replace(LAYERS["gated"], **sizes)
    weights = random_weights(layer, seed=0)
    (plan,), loss = planned([(weights, None)], 0.5, form=form)
    assert 0.9 * 0.5 * layer.parameter_count <= plan.parameter_count() <= 0.5 * layer.parameter_count
    assert loss > 0


def test_a_diagonal_metric_is_a_matrix() -> None:
    """Sensitivities of gate and up weight rows as their diagonal matrix would, in the loss and where it starts."""
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    rows, right, left = draw(6, 5, 8), draw(6, 8, 8), torch.rand(6, 5, generator=generator)
    right = right @ right.transpose(1, 2)
    thin, full = (Problem(rows, "silu", right=right, left=metric) for metric in (left, torch.diag_embed(left)))
    private, bases = draw(6, 5, 3), draw(6, 3, 8)
    off = rows - private @ bases
    by_hand = sum((left[e].diag() @ off[e] @ right[e] * off[e]).sum() for e in range(6))
    whole = sum((left[e].diag() @ rows[e] @ right[e] * rows[e]).sum() for e in range(6))
    for problem in (thin, full):
        torch.testing.assert_close(problem.loss(private, bases), by_hand / whole, rtol=1e-4, atol=0)
    starts = [group_starts(problem, 2, 3) for problem in (thin, full)]
    torch.testing.assert_close(starts[0].abs(), starts[1].abs(), rtol=1e-3, atol=1e-3)


# -- factorise ---------------------------------------------------------------------------------------------------------

NONE, BASIS, MIXTURE = Candidate(0, 0), Candidate(0, 0, rank=9), Candidate(0, 0, rank=7, bases=3)
LINEAR = replace(MIXTURE, activation="identity")
UNEVEN = (16, 0, 5, 12, 16, 3, 1, 9)


def layer_plan(layer: ExpertLayer, first: Candidate, down: Candidate, widths: tuple[int, ...] = UNEVEN) -> LayerPlan:
    return LayerPlan(layer, forms_of(layer, widths, {layer.first_stack: first, "down": down}))


def in_float64(result: CompressedExperts) -> CompressedExperts:
    return replace(result, tensors={name: tensor.double() for name, tensor in result.tensors.items()})


@pytest.mark.parametrize("down", [NONE, BASIS, LINEAR, MIXTURE], ids=["whole", "basis", "linear", "mixture"])
@pytest.mark.parametrize("first", [NONE, BASIS, LINEAR, MIXTURE], ids=["whole", "basis", "linear", "mixture"])
@pytest.mark.parametrize("kind", LAYERS)
def test_what_is_stored_is_what_was_planned(kind: str, first: Candidate, down: Candidate) -> None:
    ((weights, stats),) = seen(kind)
    plan = layer_plan(weights.layer, first, down)
    assert LayerPlan.from_json(json.loads(json.dumps(plan.to_json())), weights.layer) == plan
    result = biaxial.factorise(weights, stats, plan, seed=0, steps=5)
    assert result.parameter_count() == plan.parameter_count()
    for stack, form in plan.forms.items():
        assert {name: tuple(t.shape) for name, t in result.factors(stack).items()} == form.shapes()
    assert all(0 < error < 1 for error in result.errors.values())
    assert set(result.curves) == {s for s, form in plan.forms.items() if isinstance(form, BasisMixture)}
    # Expert 1 kept nothing and gives nothing but its bias; a channel that is gone has no bias left.
    dense = in_float64(result).dense()
    assert not any(tensor[1].any() for tensor in stacked(dense).values())
    if weights.layer.biased:
        assert torch.equal(dense.down_bias, weights.down_bias)
        assert (dense.up_bias != 0).sum(1).tolist() == list(UNEVEN)
        order = Metrics(weights, stats, 0.5).prices()[2].topk(5).indices.sort().values
        assert torch.equal(dense.gate_bias[2, :5], weights.gate_bias[2][order])


def test_a_mixture_of_down_can_be_rebuilt(weights: ExpertWeights, stats: LayerStats) -> None:
    result = biaxial.factorise(weights, stats, layer_plan(weights.layer, MIXTURE, MIXTURE), seed=0, steps=2)
    assert result.dense().down.shape == weights.down.shape


@pytest.mark.parametrize("kind", LAYERS)
def test_everything_kept_is_exact(kind: str) -> None:
    """Whole channels behind a whole basis: the dense experts again, whatever the metrics."""
    ((weights, stats),) = seen(kind)
    whole = Candidate(0, 0, rank=24)
    for chosen in ((NONE, NONE), (whole, whole)):
        plan = layer_plan(weights.layer, *chosen, widths=(16,) * 8)
        result = biaxial.factorise(weights, stats, plan, seed=0)
        for name, original in stacked(weights).items():
            torch.testing.assert_close(getattr(result.dense(), name).float(), original, atol=1e-4, rtol=0)
        assert max(result.errors.values()) < 1e-9


def test_a_mixture_of_whole_rank_is_near_exact(weights: ExpertWeights, stats: LayerStats) -> None:
    """Bases of 24 rows over 24 columns span everything, so the private factors, of 32 rows, undo them."""
    plan = layer_plan(weights.layer, Candidate(0, 0, rank=24, bases=2), NONE, widths=(16,) * 8)
    assert biaxial.factorise(weights, stats, plan, seed=0, steps=100).errors["gate_up"] < 1e-3


@pytest.mark.parametrize(
    "chosen", [(BASIS, BASIS), (LINEAR, LINEAR), (MIXTURE, MIXTURE)], ids=["basis", "linear", "mixture"]
)
@pytest.mark.parametrize("trouble", ["unused expert", "no tokens at all", "expert of zeros", "one token"])
def test_nothing_becomes_nan(trouble: str, chosen: tuple[Candidate, Candidate], quick: None) -> None:
    ((weights, stats),) = seen()
    if trouble == "no tokens at all":
        stats = LayerStats.zeros(weights.layer, STATISTICS)
    elif trouble == "one token":
        stats = only(random_stats(weights, tokens=1), NEEDS)
    elif trouble == "expert of zeros":
        weights = replace(weights, **{k: v.index_fill(0, torch.tensor([1]), 0) for k, v in stacked(weights).items()})
    else:
        assert stats.count[UNUSED] == 0
    form = {BASIS: "fast", LINEAR: "linear", MIXTURE: "tight"}[chosen[0]]
    (found,), loss = planned([(weights, stats)], 0.4, form=form)
    assert 0 <= loss < float("inf")
    for plan in (found, layer_plan(weights.layer, *chosen)):
        result = biaxial.factorise(weights, stats, plan, seed=0, steps=10)
        assert all(torch.isfinite(tensor).all() for tensor in result.tensors.values())
        assert all(0 <= error <= 1 + 1e-6 for error in result.errors.values())
        again = biaxial.refit(weights, stats, result, layer_tokens(weights, plan, count=1), plan, seed=0)
        assert all(torch.isfinite(tensor).all() for tensor in again.tensors.values())


def test_same_seed_same_bytes(weights: ExpertWeights, stats: LayerStats) -> None:
    plan, found = layer_plan(weights.layer, MIXTURE, MIXTURE), []
    for seed in (1, 2):
        torch.manual_seed(seed)  # the global generator must not matter
        made = biaxial.factorise(weights, stats, plan, seed=5, steps=10)
        found.append(biaxial.refit(weights, stats, made, layer_tokens(weights, plan), plan, seed=5, refine_steps=10))
    assert all(torch.equal(tensor, found[1].tensors[name]) for name, tensor in found[0].tensors.items())


# -- refit and refine --------------------------------------------------------------------------------------------------


class Shell(nn.Module):
    """What FactorisedExperts takes over from the module it stands for."""

    def __init__(self, layer: ExpertLayer):
        super().__init__()
        self.layer, self.act_fn, self.has_post_expert_norm = layer, nn.functional.silu, False
        self.placeholder = nn.Parameter(torch.zeros(()))

    def _apply_gate(self, first: Tensor) -> Tensor:
        gate, up = first.chunk(2, dim=1) if self.layer.concatenated else (first[:, 0::2], first[:, 1::2])
        return nn.functional.silu(gate) * up


def layer_tokens(weights: ExpertWeights, plan: LayerPlan, *, count: int = 700) -> LayerTokens:
    """What `refit` is given of a layer: its tokens, and its dense experts in a loop."""
    layer = weights.layer
    x, index, g = routed(layer, tokens=count)
    biases = weights.biases()

    def hidden(number: int, rows: Tensor) -> Tensor:
        before = rows @ weights.stack(layer.first_stack)[number].T
        return activation(layer, before + biases["first_bias"][number] if layer.biased else before)

    def expert(number: int, rows: Tensor) -> Tensor:
        return hidden(number, rows) @ weights.down[number].T

    def dense(rows: Tensor, chosen: Tensor, weight: Tensor) -> Tensor:
        out = torch.zeros_like(rows)
        for number in range(layer.experts):
            share = (weight * (chosen == number)).sum(1, keepdim=True)
            out += share * (expert(number, rows) + (biases["down_bias"][number] if layer.biased else 0))
        return out

    def module(tensors: dict[str, Tensor]) -> FactorisedExperts:
        built = FactorisedExperts.replacing(Shell(layer), plan)
        copies = {k: v.to(torch.float32, copy=True) if v.is_floating_point() else v for k, v in tensors.items()}
        built.load_state_dict(copies, assign=True, strict=False)
        return built

    return LayerTokens(layer, x, index, g, dense, expert, lambda before: activation(layer, before), module)


@pytest.mark.parametrize("kind", LAYERS)
def test_the_refit_is_least_squares_on_the_tokens(kind: str) -> None:
    """Σ g²‖y − D h'‖², h' what the compressed expert makes of its tokens, by lstsq; and lower than without."""
    ((weights, stats),) = seen(kind)
    layer = weights.layer
    plan = layer_plan(layer, BASIS, NONE)
    first = biaxial.factorise(weights, stats, plan, seed=0)
    tokens = layer_tokens(weights, plan)
    again = biaxial.refit(weights, stats, first, tokens, plan, seed=0, refine_steps=0)
    prices, before, after = Metrics(weights, stats, 0.5).prices(), 0.0, 0.0
    for expert, kept in enumerate(UNEVEN):
        token, slot = (tokens.index == expert).nonzero(as_tuple=True)
        rows, g = tokens.inputs[token], tokens.weight[token, slot].unsqueeze(1)
        pre = rows @ first.stack(layer.first_stack)[expert].float().T
        h = activation(layer, pre + first.tensors["first_bias"][expert] if layer.biased else pre)
        scaled, wanted = (h * g).double(), (tokens.expert(expert, rows) * g).double()
        found = [result.stack("down")[expert].double() for result in (first, again)]
        before += float((wanted - scaled @ found[0]).square().sum())
        after += float((wanted - scaled @ found[1]).square().sum())
        if expert == UNUSED or not kept:
            assert torch.equal(found[0], found[1])
            continue
        channels = prices[expert].topk(kept).indices.sort().values
        normal = scaled[:, :kept]
        ridge = RIDGE * (1 + 64 / float(stats.count[expert])) * normal.square().sum(0).mean()
        left = torch.cat([normal, ridge.sqrt() * torch.eye(kept, dtype=torch.float64)])
        right = torch.cat([wanted, ridge.sqrt() * weights.down[expert].T[channels].double()])
        expected = torch.linalg.lstsq(left, right).solution
        torch.testing.assert_close(found[1][:kept], expected, atol=1e-4 * float(expected.abs().max()), rtol=0)
    assert after < 0.97 * before


CHOICES = {"whole": (NONE, NONE), "basis": (BASIS, BASIS), "linear": (LINEAR, LINEAR), "mixture": (MIXTURE, MIXTURE)}


def held_out_error(tokens: LayerTokens, compressed: CompressedExperts) -> float:
    """Of the tokens that refine does not learn from: sixteen of every 272."""
    held = torch.arange(len(tokens.inputs)) % 272 < 16
    batch = tokens.inputs[held], tokens.index[held], tokens.weight[held]
    with torch.no_grad():
        return float((tokens.module(compressed.tensors)(*batch) - tokens.dense(*batch)).square().sum())


@pytest.mark.parametrize("chosen", CHOICES.values(), ids=CHOICES)
@pytest.mark.parametrize("kind", LAYERS)
def test_refining_lowers_the_error_of_tokens_it_has_not_seen(kind: str, chosen: tuple[Candidate, Candidate]) -> None:
    ((weights, stats),) = seen(kind)
    plan = layer_plan(weights.layer, *chosen)
    start = biaxial.factorise(weights, stats, plan, seed=0, steps=10)
    copies = {name: tensor.clone() for name, tensor in start.tensors.items()}
    tokens = layer_tokens(weights, plan, count=2000)
    better = refine(start, tokens, torch.eye(24), steps=40, seed=0)
    assert held_out_error(tokens, better) < 0.995 * held_out_error(tokens, start)
    assert all(torch.equal(tensor, copies[name]) for name, tensor in start.tensors.items())
    assert {n: t.shape for n, t in better.tensors.items()} == {n: t.shape for n, t in start.tensors.items()}
    assert len(better.curves["refine"]) == 40


def test_refining_gives_back_what_it_can_not_better(
    weights: ExpertWeights, stats: LayerStats, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = layer_plan(weights.layer, BASIS, BASIS)
    start = biaxial.factorise(weights, stats, plan, seed=0)
    few = layer_tokens(weights, plan, count=70)  # 54 of them to learn from
    assert refine(start, few, torch.eye(24), steps=5, seed=0) is start
    monkeypatch.setattr("moefactor.fitting.refine.RATE", 1e3)
    tokens = layer_tokens(weights, plan)
    assert refine(start, tokens, torch.eye(24), steps=30, seed=0) is start


def test_the_refit_ends_with_refining(weights: ExpertWeights, stats: LayerStats) -> None:
    """In the norm of the layer's gradients."""
    plan = layer_plan(weights.layer, BASIS, BASIS)
    start = biaxial.factorise(weights, stats, plan, seed=0)
    tokens = layer_tokens(weights, plan, count=3000)  # so many that the refit has not learned those held out by heart
    solved, whole = (
        biaxial.refit(weights, stats, start, tokens, plan, seed=3, shrinkage=0.2, refine_steps=n) for n in (0, 40)
    )
    expected = refine(solved, tokens, Metrics(weights, stats, 0.2).pooled_output(), steps=40, seed=3)
    assert "refine" in whole.curves
    assert all(torch.equal(tensor, expected.tensors[name]) for name, tensor in whole.tensors.items())
    assert not torch.equal(whole.tensors["gate_up_basis"], solved.tensors["gate_up_basis"])


def test_refining_minimises_in_the_norm_of_the_gradient(weights: ExpertWeights, stats: LayerStats) -> None:
    """Where the loss does not look, outputs are left to drift; where it does, they are nearer than in a plain norm."""
    plan = layer_plan(weights.layer, BASIS, NONE)
    start = biaxial.factorise(weights, stats, plan, seed=0)
    tokens, half = layer_tokens(weights, plan), torch.arange(24) < 12
    errors = {}
    for name, gradient in (("plain", torch.eye(24)), ("half", torch.diag(half.double()))):
        better = refine(start, tokens, gradient, steps=60, seed=0)
        with torch.no_grad():
            batch = tokens.inputs, tokens.index, tokens.weight
            off = (tokens.module(better.tensors)(*batch) - tokens.dense(*batch)).square().sum(0)
        errors[name] = float(off[half].sum()), float(off[~half].sum())
    assert errors["half"][0] < errors["plain"][0]
    assert errors["half"][1] > errors["plain"][1]


# -- whole models ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prose to measure on that calibration has not seen."""
    from moefactor.text import read_text

    path = tmp_path_factory.mktemp("text") / "held-out.txt"
    path.write_text(read_text(None)[-60_000:])
    return path


def test_tight_beats_plain_svd_on_the_reference_model(
    tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(biaxial_mixture, "STEPS", 2)
    monkeypatch.setattr(biaxial_plan, "SHARES", (0.1, 0.3))
    options = {"form": "tight", "steps": 10, "refine_steps": 3}
    moefactor.compress(str(REFERENCE), "svd", 0.5, tmp_path / "svd")
    moefactor.compress(str(REFERENCE), "biaxial", 0.5, tmp_path / "biaxial", samples=16, seqlen=64, **options)
    dense, svd, tight = (
        moefactor.evaluate(str(folder), [str(text)], window=128, max_windows=16, dtype="float32")
        for folder in (REFERENCE, tmp_path / "svd", tmp_path / "biaxial")
    )
    assert 0.495 <= tight.expert_parameters / dense.expert_parameters <= 0.5
    assert tight.mean_perplexity < 0.7 * svd.mean_perplexity
    plan = json.loads((tmp_path / "biaxial" / "plan.json").read_text())
    assert "basis_mixture" in {stack["form"] for layer in plan["layers"] for stack in layer["stacks"].values()}
    # Nats a token: of the order of what was measured, which the refit and the text decide too.
    rise = torch.tensor(tight.mean_perplexity / dense.mean_perplexity).log().item()
    assert 0.2 * rise < plan["expected_loss"] < 5 * rise


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss", "nemotron_h"])
@pytest.mark.parametrize(
    "options", [{"form": f, "steps": 5, "refine_steps": 3} for f in ("linear", "tight")] + [{"data_free": True}]
)
def test_what_is_loaded_is_what_the_factors_stand_for(
    kind: str, options: dict, tiny_model: Callable[..., Path], text_file: Path, tmp_path: Path, quick: None,
) -> None:  # fmt: skip
    """gated, biased and ungated experts, through from_pretrained."""
    source = tiny_model(kind)
    calibration = {} if "data_free" in options else {"calibration": str(text_file), "samples": 16, "seqlen": 16}
    out = moefactor.compress(str(source), "biaxial", 0.6, tmp_path / "out", **calibration, **options)
    dense, found = load(source), logits(load(out))
    torch.testing.assert_close(found, logits(rebuilt(dense, out)), atol=1e-3, rtol=1e-3)
    expected = read_plan(out, dense).expected_loss
    assert (expected is None) == ("data_free" in options)
    assert not torch.allclose(found, logits(dense, IDS), atol=1e-2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shrinkage": 2.0}, "biaxial: shrinkage must be from 0 to 1"),
        ({"doubt": 1.5}, "biaxial: doubt must be from 0 to 1"),
        ({"channel_share": "many"}, "biaxial: channel_share must be float"),
        ({"form": "tihgt"}, "Did you mean 'tight'"),
    ],
)
def test_bad_options_are_refused(
    options: dict, message: str, tiny_model: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        moefactor.compress(
            str(tiny_model("mixtral")), "biaxial", 0.5, tmp_path / "out", samples=2, seqlen=16,
            calibration=str(text_file), **options,
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_half_of_the_calibration_text_is_the_models_own(
    tiny_model: Callable[..., Path], text_file: Path, tmp_path: Path, quick: None
) -> None:
    """Unless the user says otherwise, or no text is read at all."""
    how = {"calibration": str(text_file), "samples": 4, "seqlen": 16, "refine_steps": 2}

    def read(name: str, **options: object) -> str:
        out = moefactor.compress(
            str(tiny_model("qwen3_moe")),
            "biaxial",
            0.3,
            tmp_path / name,
            run=tmp_path / f"{name}.run",
            **how,
            **options,
        )
        calibration = json.loads((out / "compression.json").read_text())["calibration"]
        assert calibration["samples"] == 4
        return calibration["sha256"]

    default, half, given = read("default"), read("half", own_text=0.5), read("given", own_text=0.0)
    assert default == half != given
    written: list[str] = []
    moefactor.compress(
        str(tiny_model("qwen3_moe")), "biaxial", 0.3, tmp_path / "free", data_free=True,
        progress=lambda stage, *rest: written.append(stage),
    )  # fmt: skip
    assert "write" not in written
    assert set(written) >= {"plan", "factorise"}
