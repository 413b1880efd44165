"""Spending a budget: never beyond it, next to nothing left, and what each rule promises."""

from __future__ import annotations

import itertools
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moefactor.allocate import (
    RULES,
    Budget,
    LayerOffers,
    Offer,
    TooSmall,
    plan_offers,
    spend,
    water_fill,
)
from moefactor.errors import NotFinite, UserError
from moefactor.experts import ExpertLayer
from moefactor.forms import SharedBasis
from moefactor.knapsack import Alternative, Slot, improve, knapsack

QUICK = settings(max_examples=60, deadline=None)
# Large enough that any of the offers below is a compression of it.
LAYER = ExpertLayer("model.layers.0.mlp.experts", "model.layers.0", experts=10, intermediate=40, hidden=50)


def layer_of(offers: list[Offer], fixed: int = 0) -> LayerOffers:
    return LayerOffers(LAYER, fixed, tuple(offers), {})


def offer(
    cost: int = 10, maximum: int = 20, *, score: float = 1.0, stack: str = "up", gains: list | None = None
) -> Offer:
    falling = gains if gains is not None else [1 / (n + 1) for n in range(maximum)]
    return Offer(stack, cost, maximum, cost * maximum, score=score, gains=torch.tensor(falling))


@st.composite
def layers(draw: st.DrawFn) -> list[LayerOffers]:
    def one() -> Offer:
        maximum = draw(st.integers(1, 20))
        gains = draw(st.lists(st.floats(0, 1), min_size=maximum, max_size=maximum))
        return offer(
            draw(st.integers(1, 40)), maximum, score=draw(st.floats(0, 5)), stack=draw(st.sampled_from(["up", "down"])),
            gains=sorted(gains, reverse=True),
        )  # fmt: skip

    def whole() -> LayerOffers:
        offers = sorted((one() for _ in range(draw(st.integers(1, 4)))), key=lambda o: o.stack)
        return layer_of(offers, fixed=draw(st.integers(0, 100)))

    return [whole() for _ in range(draw(st.integers(1, 3)))]


def cost(parts: list[LayerOffers], bought: list[list[int]]) -> int:
    return sum(
        layer.fixed + sum(n * o.unit_cost for n, o in zip(units, layer.offers, strict=True))
        for layer, units in zip(parts, bought, strict=True)
    )


def blocks(parts: list[LayerOffers], multiple: int) -> list[list[int]]:
    """The least that can be bought in blocks: one of each, or all of an offer that has fewer."""
    return [[min(multiple, o.maximum) for o in layer.offers] for layer in parts]


def extreme(parts: list[LayerOffers], what: str) -> int:
    return cost(parts, [[getattr(o, what) for o in layer.offers] for layer in parts])


@QUICK
@given(parts=layers(), rule=st.sampled_from(RULES), fraction=st.floats(0, 1.2), multiple=st.sampled_from([1, 1, 4, 8]))
def test_the_budget_is_met(parts: list[LayerOffers], rule: str, fraction: float, multiple: int) -> None:
    least, most = cost(parts, blocks(parts, multiple)), extreme(parts, "maximum")
    budget = least + int(fraction * (most - least))
    bought = spend(parts, budget, rule, multiple=multiple)
    left = budget - cost(parts, bought)
    assert left >= 0
    pairs = [
        (n, o) for layer, units in zip(parts, bought, strict=True) for n, o in zip(units, layer.offers, strict=True)
    ]
    assert all(o.minimum <= n <= o.maximum for n, o in pairs)
    if multiple == 1:
        # Nothing that could still be bought is left unbought.
        assert all(n == o.maximum or o.unit_cost > left for n, o in pairs)


@QUICK
@given(parts=layers(), rule=st.sampled_from(RULES), fraction=st.floats(0, 1))
def test_ranks_come_in_multiples(parts: list[LayerOffers], rule: str, fraction: float) -> None:
    """Of 4 here, except where an offer ends."""
    least = cost(parts, blocks(parts, 4))
    budget = least + int(fraction * (extreme(parts, "maximum") - least))
    for layer, units in zip(parts, spend(parts, budget, rule, multiple=4), strict=True):
        assert all(n % 4 == 0 or n == o.maximum for n, o in zip(units, layer.offers, strict=True))


@given(budget=st.integers(240, 1200), multiple=st.sampled_from([1, 4]))
@QUICK
def test_uniform_treats_equals_alike(budget: int, multiple: int) -> None:
    units = [n for part in spend([layer_of([offer()] * 3)] * 2, budget, "uniform", multiple=multiple) for n in part]
    assert max(units) - min(units) <= multiple


def test_uniform_keeps_the_same_fraction_of_unequal_offers() -> None:
    bought = spend([layer_of([offer(10, 100), offer(30, 40)]), layer_of([offer(5, 60)])], 1250, "uniform")
    assert bought == [[50, 20], [30]]  # half of each


@QUICK
@given(scores=st.lists(st.floats(0.5, 2), min_size=2, max_size=6), total=st.integers(40, 120))
def test_score_is_the_closed_form_where_nothing_binds(scores: list[float], total: int) -> None:
    """K_g = K_total · C_g / ΣC, to within the one rank that rounding takes (RFID eq. 9)."""
    ranks = [total * s / sum(scores) for s in scores]
    assume(min(ranks) >= 1)
    (units,) = spend([layer_of([offer(7, 1000, score=s) for s in scores])], 7 * total, "score")
    assert sum(units) == total
    assert all(abs(n - rank) < 1 for n, rank in zip(units, ranks, strict=True))


def test_score_splits_each_stack_on_its_own() -> None:
    """A stack with large scores takes nothing from the other."""
    offers = [offer(10, 100, score=s, stack="up") for s in (1, 3)]
    offers += [offer(10, 100, score=s, stack="down") for s in (600, 200)]
    assert spend([layer_of(offers)], 800, "score") == [[10, 30, 30, 10]]


def test_what_a_cap_cuts_off_goes_to_the_others_in_proportion() -> None:
    offers = [offer(10, 5, score=1000.0), offer(10, 100, score=1.0), offer(10, 100, score=2.0)]
    assert spend([layer_of(offers)], 350, "score") == [[5, 10, 20]]


@QUICK
@given(
    gains=st.lists(
        st.lists(st.floats(0, 1), min_size=4, max_size=4).map(lambda g: sorted(g, reverse=True)), min_size=2, max_size=3
    ),
    extra=st.integers(0, 9),
)
def test_loss_is_the_best_of_all_ways_to_spend(gains: list[list[float]], extra: int) -> None:
    """Against every combination there is; with equal prices and falling gains greedy must be optimal."""
    count = len(gains)
    (units,) = spend([layer_of([offer(10, 4, gains=g) for g in gains])], 10 * (count + extra), "loss")

    def recovered(choice: tuple[int, ...]) -> float:
        return sum(sum(g[:n]) for g, n in zip(gains, choice, strict=True))

    ways = itertools.product(range(1, 5), repeat=count)
    assert recovered(tuple(units)) == pytest.approx(
        max(recovered(w) for w in ways if sum(w) <= count + extra), abs=1e-5
    )


def test_loss_goes_by_gain_for_each_parameter() -> None:
    """The second offer gains less a unit but costs a tenth."""
    dear, cheap = offer(100, 3, gains=[9, 5, 5]), offer(10, 3, gains=[9, 1, 1])
    assert spend([layer_of([dear, cheap])], 130, "loss") == [[1, 3]]


@QUICK
@given(parts=layers(), rule=st.sampled_from(RULES))
def test_a_budget_too_small_is_refused_with_one_that_is_not(parts: list[LayerOffers], rule: str) -> None:
    least, total = extreme(parts, "minimum"), LAYER.parameter_count * len(parts)
    assume(least < 0.99 * total)
    with pytest.raises(UserError, match="can't be reached") as refused:
        spend(parts, least - 1, rule)
    ratio = float(re.search(r"highest ratio .* is (0\.\d+)", str(refused.value)).group(1))
    assert int((1 - ratio) * total) - least <= 0.002 * total
    spend(parts, int((1 - ratio) * total), rule)  # as make_plan counts it


def test_water_fill_fills_to_the_budget_or_the_brim() -> None:
    weights, low, high = torch.tensor([[1.0, 2.0, 4.0], [0.0, 0.0, 1.0], [9.0, 9.0, 5.0]]).double()
    torch.testing.assert_close(
        water_fill(weights, low, high, 9.5), torch.tensor([1.5, 3.0, 5.0]).double(), atol=1e-6, rtol=0
    )
    assert water_fill(weights, low, high, 99).tolist() == high.tolist()


# -- prices that fall (slbf's gauge-fixed bases), offers that must be equal, offers that may go empty ---------------


def curved(unit: int, curvature: int, maximum: int, *, score: float = 1.0) -> Offer:
    return Offer("up", unit, maximum, share=unit * maximum, score=score, curvature=curvature)


@st.composite
def curves(draw: st.DrawFn) -> Offer:
    """Whose price rises with every unit up to the maximum, as k·(r + H − k) does up to r ≤ H."""
    maximum, curvature = draw(st.integers(1, 20)), draw(st.integers(0, 5))
    return curved(2 * curvature * maximum + draw(st.integers(1, 40)), curvature, maximum, score=draw(st.floats(0, 5)))


@QUICK
@given(offer=curves())
def test_units_is_the_inverse_of_cost(offer: Offer) -> None:
    for n in range(offer.maximum + 1):
        assert offer.cost(n) == offer.unit_cost * n - offer.curvature * n**2
        assert offer.units(offer.cost(n)) == pytest.approx(n, abs=1e-6)


@QUICK
@given(
    offers=st.lists(curves(), min_size=1, max_size=5), rule=st.sampled_from(["uniform", "score"]),
    fraction=st.floats(0, 1.1), fixed=st.integers(0, 50),
)  # fmt: skip
def test_the_budget_is_met_where_prices_fall(offers: list[Offer], rule: str, fraction: float, fixed: int) -> None:
    least, most = (sum(o.cost(getattr(o, end)) for o in offers) for end in ("minimum", "maximum"))
    budget = fixed + least + int(fraction * (most - least))
    (units,) = spend([layer_of(offers, fixed)], budget, rule)
    left = budget - fixed - sum(o.cost(n) for o, n in zip(offers, units, strict=True))
    assert left >= 0
    assert all(n == o.maximum or o.cost(n + 1) - o.cost(n) > left for o, n in zip(offers, units, strict=True))


def test_uniform_keeps_the_same_fraction_where_prices_fall() -> None:
    """Half of the parameters, which is less than half of the units: 100n − 2n² is 1,200 for all 20."""
    straight, falling = Offer("up", 60, 20, share=1200), Offer("up", 100, 20, share=1200, curvature=2)
    assert falling.cost(7) == 602
    assert spend([layer_of([falling, straight])], 1202, "uniform") == [[7, 10]]


def equal_layers(prices: list[int], maximum: int, *, fixed: int = 0, minimum: int = 1) -> list[LayerOffers]:
    return [
        LayerOffers(
            LAYER, fixed, (Offer("experts", price, maximum, price * maximum, minimum=minimum, block=1),), {},
            equal=True,
        )
        for price in prices
    ]  # fmt: skip


@QUICK
@given(
    prices=st.lists(st.integers(1, 40), min_size=1, max_size=4), maximum=st.integers(1, 12), fixed=st.integers(0, 9),
    minimum=st.integers(1, 12), fraction=st.floats(0, 1.2), rule=st.sampled_from(RULES),
    multiple=st.sampled_from([1, 8]),
)  # fmt: skip
def test_equal_offers_get_equal_units(
    prices: list[int], maximum: int, fixed: int, minimum: int, fraction: float, rule: str, multiple: int
) -> None:
    """As many as the budget holds, in every layer; an ordinary checkpoint has one number of experts."""
    minimum = min(minimum, maximum)
    parts = equal_layers(prices, maximum, fixed=fixed, minimum=minimum)
    least, most = extreme(parts, "minimum"), extreme(parts, "maximum")
    budget = least + int(fraction * (most - least))
    bought = spend(parts, budget, rule, multiple=multiple)
    (units,) = {n for units in bought for n in units}
    assert minimum <= units <= maximum
    assert cost(parts, bought) <= budget
    assert units == maximum or cost(parts, [[units + 1]] * len(parts)) > budget


def test_equal_offers_below_their_minimum_are_refused() -> None:
    with pytest.raises(UserError, match="can't be reached"):
        spend(equal_layers([10, 10], 8, minimum=4), 79, "uniform")


@pytest.mark.parametrize("multiple", [1, 4])
def test_offers_without_a_minimum_may_go_empty(multiple: int) -> None:
    """An expert whose channels all gain less than another's keeps none."""
    worth = Offer("experts", 10, 8, 80, gains=torch.full((8,), 9.0), minimum=0)
    worthless = Offer("experts", 10, 8, 80, gains=torch.full((8,), 1.0), minimum=0)
    assert spend([layer_of([worth, worthless])], 80, "loss", multiple=multiple) == [[8, 0]]
    assert spend([layer_of([worth, worthless])], 0, "loss", multiple=multiple) == [[0, 0]]


def test_loss_needs_gains_to_go_by() -> None:
    with pytest.raises(UserError, match="loss"):
        spend([layer_of([Offer("up", 10, 8, 80)])], 40, "loss")


# -- blocks that do not fit, and blocks that nothing comes in ----------------------------------------------------------


def ranks_of(budget: Budget, *, block: int | None = None) -> list[int]:
    """What two groups of a shared basis get, 10 parameters a rank."""
    form = SharedBasis(10, 40, 50, groups=((0, 1, 2, 3, 4), (5, 6, 7, 8, 9)), ranks=(1, 1))
    offers = tuple(replace(offer(10, 40), block=block) for _ in form.groups)
    planned = plan_offers([LayerOffers(LAYER, 0, offers, {"up": form})], budget, own_rule="uniform")
    return list(planned.layers[0].forms["up"].ranks)


def test_a_multiple_that_was_asked_for_is_obeyed_or_refused() -> None:
    assert ranks_of(Budget(500, 0.5, multiple=8)) == [24, 24]
    with pytest.raises(TooSmall, match="in multiples of 8"):
        ranks_of(Budget(100, 0.5, multiple=8))
    with pytest.raises(UserError, match="leave it out"):
        ranks_of(Budget(500, 0.5, multiple=8), block=1)


def test_a_multiple_that_nobody_asked_for_gives_way() -> None:
    wide = replace(LAYER, hidden=512)
    form = SharedBasis(10, 40, 512, groups=(tuple(range(10)),), ranks=(1,))
    (plan,) = plan_offers(
        [LayerOffers(wide, 0, (offer(10, 40),), {"up": form})], Budget(30, 0.5), own_rule="uniform"
    ).layers
    assert plan.forms["up"].ranks == (3,)


# -- the knapsack ------------------------------------------------------------------------------------------------------


@st.composite
def tables(draw: st.DrawFn) -> list[list[Alternative]]:
    def slot() -> Slot:
        size = draw(st.integers(1, 4))
        costs = draw(st.lists(st.integers(0, 20), min_size=size, max_size=size))
        losses = draw(st.lists(st.floats(0, 10), min_size=size, max_size=size))
        return Slot(torch.tensor(costs, dtype=torch.float64), torch.tensor(losses, dtype=torch.float64))

    def alternative() -> Alternative:
        return Alternative(draw(st.floats(0, 5)), [slot() for _ in range(draw(st.integers(1, 2)))])

    return [[alternative() for _ in range(draw(st.integers(1, 3)))] for _ in range(draw(st.integers(1, 2)))]


def every_choice(table: list[Alternative]) -> list[tuple[int, float]]:
    """(cost, loss) of everything that a layer can be."""
    found = []
    for alternative in table:
        for picks in itertools.product(*(range(len(slot.costs)) for slot in alternative.slots)):
            pairs = list(zip(alternative.slots, picks, strict=True))
            loss = alternative.loss + sum(float(slot.losses[i]) for slot, i in pairs)
            found.append((sum(int(slot.costs[i]) for slot, i in pairs), loss))
    return found


@QUICK
@given(parts=tables(), budget=st.integers(0, 100))
def test_the_knapsack_is_the_best_there_is_at_its_cost(parts: list[list[Alternative]], budget: int) -> None:
    """Against every combination: none that costs no more loses less, but for what the remainder of the budget bought;
    and there is an answer whenever there can be one."""
    combined = [
        (sum(cost for cost, _ in picks), sum(loss for _, loss in picks))
        for picks in itertools.product(*map(every_choice, parts))
    ]
    fitting = [loss for cost, loss in combined if cost <= budget]
    choices = knapsack(parts, budget)
    assert (choices is None) == (not fitting)
    if choices is None:
        return
    cost = loss = 0.0
    for table, (index, picks) in zip(parts, choices, strict=True):
        loss += table[index].loss
        for slot, pick in zip(table[index].slots, picks, strict=True):
            cost, loss = cost + float(slot.costs[pick]), loss + float(slot.losses[pick])
    assert cost <= budget
    assert loss >= min(fitting) - 1e-9
    # The gap of a Lagrangian answer is at most what one layer's dearest step is worth.
    assert loss <= min(fitting) + 15 + 1e-6


def test_the_remainder_is_spent_even_where_nothing_is_gained() -> None:
    """A channel that no text used is kept while there is room for it: another text may use it."""
    slot = Slot(torch.arange(5, dtype=torch.float64), torch.tensor([2.0, 1.0, 0.0, 0.0, 0.0], dtype=torch.float64))
    assert improve([slot], [0], 4) == [4]
    assert knapsack([[Alternative(0.0, [slot])]], 4) == [(0, [4])]


def test_a_loss_that_is_no_number_is_refused() -> None:
    slot = Slot(torch.ones(2, dtype=torch.float64), torch.tensor([0.0, float("nan")], dtype=torch.float64))
    with pytest.raises(NotFinite, match="estimated loss"):
        knapsack([[Alternative(0.0, [slot])]], 5)
