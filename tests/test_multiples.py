"""Widths and ranks that kernels like: channels go in blocks of one expert, and the search knows it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import moefactor
from layers import LAYERS, only, random_stats, random_weights
from moefactor.allocate import Budget
from moefactor.errors import UserError
from moefactor.experts import ExpertWeights
from moefactor.fitting.channels import width_of_atoms
from moefactor.forms import BasisMixture, Latent
from moefactor.methods import METHODS, accepted
from moefactor.methods.biaxial import mixtures, planning
from moefactor.methods.biaxial.planning import block_prices, widths_at
from moefactor.plan import LayerPlan

UNEVEN: dict[str, tuple[str, dict]] = {
    "channels": ("channels", {}),
    "fast": ("biaxial", {"form": "fast"}),
    "latent": ("biaxial", {"form": "fast", "latent": True}),
    "linear": ("biaxial", {"form": "linear"}),
    "tight": ("biaxial", {"form": "tight"}),
    "data-free": ("biaxial", {"data_free": True}),
}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """biaxial's table from shorter fits, and coarser."""
    monkeypatch.setattr(mixtures, "STEPS", 5)
    monkeypatch.setattr(planning, "SHARES", (0.0, 0.25, 0.5, 0.7))


def planned(
    method: str, layers: list[ExpertWeights], keep: float, *, multiple: int | None = None, **options: object
) -> tuple[list[LayerPlan], float | None]:
    chosen = METHODS[method]
    complete = chosen.complete(options)
    budget = Budget(int(keep * sum(w.layer.parameter_count for w in layers)), 1 - keep, multiple=multiple)
    priced = []
    for weights in layers:
        stats = only(random_stats(weights), chosen.plan_needs(complete))
        found = chosen.price(weights, stats, budget, seed=0, **accepted(chosen.price, complete))
        priced.append(chosen.priced(weights.layer, json.loads(json.dumps(found.to_json()))))
    made = chosen.plan(priced, budget)
    return made.layers, made.loss


def widths_of(plan: LayerPlan) -> tuple[int, ...]:
    (widths,) = {form.kept_widths for form in plan.forms.values()}
    return widths


# -- blocks ------------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(values=st.lists(st.integers(0, 30), min_size=1, max_size=60), experts=st.integers(1, 5), share=st.floats(0, 1))
def test_the_cheapest_blocks_go_first(values: list[int], experts: int, share: float) -> None:
    """Against experts that give up one block after the other, the cheapest on offer taken; ties among them."""
    count = -(-len(values) // experts)
    prices = torch.tensor(values + [3] * (experts * count - len(values)), dtype=torch.float64).view(experts, count)
    prices = prices.sort(dim=1).values
    widths = widths_at(prices, share, 4)
    left = prices.tolist()
    for _ in range(round(share * experts * count)):
        del min((row for row in left if row), key=lambda row: row[0])[:1]
    assert sum(widths) == 4 * sum(map(len, left))
    dearest = [row.topk(width // 4).values.sum() for row, width in zip(prices, widths, strict=True)]
    assert sum(map(sum, left)) == float(sum(dearest))


@settings(max_examples=60, deadline=None)
@given(
    experts=st.lists(st.lists(st.integers(0, 30), min_size=7, max_size=7), min_size=1, max_size=4),
    block=st.integers(1, 7),
)
def test_a_block_costs_what_its_channels_do(experts: list[list[int]], block: int) -> None:
    """In the order in which an expert gives them up, the cheapest first; what makes no whole block goes before all."""
    found = block_prices(torch.tensor(experts, dtype=torch.float64), block)
    starts = range(7 % block, 7, block)
    assert found.tolist() == [[sum(sorted(row)[start : start + block]) for start in starts] for row in experts]
    assert (found.diff(dim=1) >= 0).all()


@pytest.mark.parametrize(
    ("channels", "multiple"),
    [(48, 1), (384, 1), (512, 64), (704, 64), (768, 128), (1408, 128), (2048, 128), (2880, 64), (14336, 128), (520, 8)],
)
def test_the_multiple_that_nobody_asked_for(channels: int, multiple: int) -> None:
    """Divides the width, so that an expert that keeps everything is whole atoms too."""
    layer = replace(LAYERS["gated"], intermediate=channels)
    assert width_of_atoms(None, layer) == multiple
    assert width_of_atoms(channels, layer) == channels


# -- plans -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "name", "block"),
    [("gated", name, block) for name in UNEVEN for block in (5, 8)]
    + [(kind, name, 4) for kind in ("ungated", "biased") for name in ("channels", "fast", "latent")],
)
def test_every_width_is_a_multiple(kind: str, name: str, block: int) -> None:
    """Of experts of 16 channels, in the plan as its file has it; and the budget is spent."""
    method, options = UNEVEN[name]
    layers = [random_weights(LAYERS[kind], seed=seed) for seed in range(2)]
    plans, _ = planned(method, layers, 0.5, width_multiple=block, **options)
    budget = int(0.5 * sum(weights.layer.parameter_count for weights in layers))
    spent = sum(plan.parameter_count() for plan in plans)
    # What is left would not have bought a block of one expert back.
    assert budget - 3 * block * layers[0].layer.hidden < spent <= budget
    for plan in plans:
        written = json.loads(json.dumps(plan.to_json()))
        assert LayerPlan.from_json(written, plan.layer) == plan
        assert all(width % block == 0 for width in widths_of(plan))


@pytest.mark.parametrize("name", ["channels", "fast", "tight"])
def test_a_multiple_of_one_is_what_narrow_experts_have(name: str) -> None:
    method, options = UNEVEN[name]
    layers = [random_weights(seed=seed) for seed in range(2)]
    assert planned(method, layers, 0.5, **options) == planned(method, layers, 0.5, width_multiple=1, **options)


def test_an_expert_may_keep_nothing() -> None:
    for name in ("channels", "fast"):
        method, options = UNEVEN[name]
        plans, _ = planned(method, [random_weights()], 0.35, width_multiple=16, **options)
        assert set(widths_of(plans[0])) == {0, 16}


@pytest.mark.parametrize("widths", ["layer", "model"])
def test_one_width_for_all_obeys_too(widths: str) -> None:
    plans, _ = planned("channels", [random_weights()], 0.6, widths=widths, width_multiple=8)
    assert set(widths_of(plans[0])) == {8}
    plans, _ = planned("channels", [random_weights()], 0.6, widths=widths)
    assert set(widths_of(plans[0])) == {9}


# -- ranks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("multiple", [8, 24])
@pytest.mark.parametrize("name", ["fast", "latent", "tight"])
def test_ranks_are_multiples_of_what_was_asked_for(name: str, multiple: int) -> None:
    """Whole bases among them, and ranks that no mixture of so narrow a stack can have."""
    method, options = UNEVEN[name]
    plans, _ = planned(method, [random_weights()], 0.3, multiple=multiple, **options)
    forms = plans[0].forms.values()
    assert all(form.rank % multiple == 0 for form in forms if isinstance(form, Latent | BasisMixture))


def test_a_rank_that_no_basis_can_have() -> None:
    with pytest.raises(UserError, match="--rank-multiple must be at most the hidden size, 24, found 32"):
        planned("biaxial", [random_weights()], 0.5, multiple=32)


@pytest.mark.parametrize("kind", LAYERS)
def test_a_latent_layer_has_one_rank(kind: str) -> None:
    """For gate and up's input and down's output; such plans are among those of the fast form, so it costs no less."""
    layers, bases = [random_weights(LAYERS[kind], seed=seed) for seed in range(2)], 0
    for keep in (0.2, 0.5):
        plans, loss = planned("biaxial", layers, keep, latent=True)
        for plan in plans:
            first, down = plan.forms.values()
            assert type(first) is type(down)
            if isinstance(first, Latent):
                assert first.rank == down.rank
                bases += 1
        assert loss >= 0.99 * planned("biaxial", layers, keep)[1]
    assert bases


@pytest.mark.parametrize("form", ["linear", "tight"])
def test_mixtures_are_not_latent(form: str) -> None:
    with pytest.raises(UserError, match="--latent is of --form fast"):
        planned("biaxial", [random_weights()], 0.5, form=form, latent=True)


# -- whole models ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["biaxial", "channels"])
def test_plan_json_has_the_widths(
    method: str, tiny_model: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    out = moefactor.compress(
        str(tiny_model("mixtral")), method, 0.4, tmp_path / "out", calibration=str(text_file), samples=8, seqlen=16,
        own_text=0.0, width_multiple=4, **({"refine_steps": 2, "latent": True} if method == "biaxial" else {}),
    )  # fmt: skip
    plan = json.loads((out / "plan.json").read_text())
    assert plan["options"]["width_multiple"] == 4
    for layer in plan["layers"]:
        down = layer["stacks"]["down"]
        widths = down.get("inner", down)["widths"]
        assert len(widths) == layer["experts"]
        assert all(width % 4 == 0 for width in widths)
