"""biaxial's ordinary checkpoints: which experts and which width, the router trained with them, what is written."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import moefactor
from layers import LAYERS, random_stats, random_weights
from models import load, on_disk
from moefactor.allocate import Budget
from moefactor.errors import UserError
from moefactor.experts import CompressedExperts, ExpertLayer
from moefactor.fitting.refine import BlockTokens, refine_block
from moefactor.methods import METHODS, biaxial
from moefactor.methods.biaxial.standard import DROPPED, Shapes, multiple_of, plan_shapes
from moefactor.observing import standing_in
from moefactor.ordinary import SmallBlock, Smaller
from moefactor.plan import Plan
from moefactor.run_folder import RunFolder
from moefactor.runtime.module import FactorisedExperts
from moefactor.stages import Recipe, Run
from moefactor.streaming import StreamedModel
from tiny import TINY

LAYER = LAYERS["gated"]  # 8 experts of width 16


def table(layer: ExpertLayer = LAYER, *, seed: int = 0, width_multiple: int = 4, experts_multiple: int = 1) -> Shapes:
    generator = torch.Generator().manual_seed(seed)
    worth = torch.rand(layer.experts, 1, dtype=torch.float64, generator=generator).pow(3)
    prices = worth * torch.rand(layer.experts, layer.intermediate, dtype=torch.float64, generator=generator)
    return Shapes(layer, prices, width_multiple, experts_multiple)


def of(layer: ExpertLayer, ratio: float, layers: int = 2) -> Budget:
    return Budget(int((1 - ratio) * layers * layer.parameter_count), ratio)


# -- the pair ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.2, 0.5, 0.8])
def test_the_pair_is_the_best_of_all(ratio: float) -> None:
    """By brute force over every set of experts, in two layers that must agree on the pair."""
    small = replace(LAYER, experts=5)
    tables, best = [table(small, seed=1), table(small, seed=2)], (float("inf"), 0, 0)
    budget = of(small, ratio)
    for experts, width in itertools.product(range(1, 6), (4, 8, 12, 16)):
        if 2 * experts * width * small.hidden * 3 > budget.parameters:
            continue
        loss = 0.0
        for found in tables:
            alone = found.prices.sort(dim=1, descending=True).values
            loss += min(
                float(sum(alone[e, width:].sum() if e in kept else DROPPED * alone[e].sum() for e in range(5)))
                for kept in itertools.combinations(range(5), experts)
            )
        best = min(best, (loss, experts, width))
    planned = plan_shapes(tables, budget)
    assert planned.loss == pytest.approx(best[0])
    assert {entry.standard() for entry in planned.layers} == {best[1:]}
    assert sum(entry.parameter_count() for entry in planned.layers) <= budget.parameters


@pytest.mark.parametrize(
    ("change", "allowed"),
    [
        ({"fixed_count": True}, lambda e, w: e == 8 and w < 16),
        ({"fixed_width": True}, lambda e, w: e < 8 and w == 16),
        ({"router_groups": 4, "fewest_experts": 4}, lambda e, w: e in (4, 8)),
        ({"fewest_experts": 7}, lambda e, w: e >= 7),
    ],
    ids=["count", "width", "groups", "top-k"],
)
def test_the_pair_is_one_that_the_model_can_have(change: dict, allowed: Callable[[int, int], bool]) -> None:
    layer = replace(LAYER, **change)
    planned = plan_shapes([table(layer, seed=seed) for seed in (1, 2)], of(layer, 0.5))
    for entry in planned.layers:
        experts, width = entry.standard()
        assert allowed(experts, width)
        if entry.kept is not None:
            members = [sum(e * layer.router_groups // 8 == g for e in entry.kept) for g in range(layer.router_groups)]
            assert len(set(members)) == 1  # as many in each of the router's groups


@pytest.mark.parametrize(("width", "experts"), [(4, 1), (8, 2), (16, 2), (3, 4)])
def test_multiples_are_obeyed(width: int, experts: int) -> None:
    for ratio in (0.3, 0.5, 0.7):
        tables = [table(seed=seed, width_multiple=width, experts_multiple=experts) for seed in (1, 2)]
        ((found, wide),) = {entry.standard() for entry in plan_shapes(tables, of(LAYER, ratio)).layers}
        assert found % experts == 0
        assert wide % width == 0 or wide == 16


@pytest.mark.parametrize(
    ("intermediate", "multiple"), [(768, 128), (2048, 128), (14336, 128), (512, 64), (48, 8), (96, 16), (5, 1)]
)
def test_widths_come_in_tiles_where_there_is_room(intermediate: int, multiple: int) -> None:
    assert multiple_of(intermediate) == multiple


def test_what_cannot_be_is_said() -> None:
    with pytest.raises(UserError, match=r"the highest ratio is 0\.812 with .* multiples of 8; the router needs 3"):
        plan_shapes([table(replace(LAYER, fewest_experts=3), width_multiple=8)], of(LAYER, 0.95, 1))
    other = replace(LAYER, intermediate=20)
    with pytest.raises(UserError, match="experts of different shapes"):
        plan_shapes([table(), table(other)], of(LAYER, 0.5))
    weights = random_weights()
    for options, message in (
        ({"width_multiple": 17}, "width-multiple must be from 1 to the experts' width, 16"),
        ({"experts_multiple": 3}, "must divide the model's 8 experts"),
        ({"channel_share": 0.2}, "channel_share is of the other forms"),
        ({"form": "fast", "experts_multiple": 2}, "is of --form standard"),
    ):
        with pytest.raises(UserError, match=message):
            biaxial.price(weights, random_stats(weights), of(LAYER, 0.5, 1), seed=0, **{"form": "standard"} | options)
    with pytest.raises(UserError, match="has no ranks; in place of --rank-multiple"):
        biaxial.price(weights, random_stats(weights), Budget(9000, 0.5, multiple=8), seed=0, form="standard")


def test_prices_survive_json() -> None:
    given = table()
    again = METHODS["biaxial"].priced(LAYER, json.loads(json.dumps(given.to_json())))
    assert torch.equal(again.prices, given.prices)
    assert list(again.choices()) == list(given.choices())


# -- through a model -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=TINY)
def made(
    request: pytest.FixtureRequest, tiny_model: Callable[..., Path], text_file: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, Path, Plan, RunFolder]:  # fmt: skip
    """(source, checkpoint, plan, run folder) of every architecture, the router free to move."""
    source, folder = tiny_model(request.param), tmp_path_factory.mktemp("standard")
    how = {"calibration": str(text_file), "own_text": 0.0, "samples": 16, "seqlen": 32}
    options = {"form": "standard", "refine_steps": 50}
    run = RunFolder(folder / "run")
    plan = Run(StreamedModel(str(source)), Recipe.of("biaxial", options, ratio=0.4, **how), run).all(folder / "out")
    return source, folder / "out", plan, run


def test_every_architecture_is_an_ordinary_one_again(made: tuple[Path, Path, Plan, RunFolder]) -> None:
    _, out, plan, _ = made
    experts, width = plan.standard()
    entry = plan.layers[0]
    assert (experts, width) != (entry.layer.experts, entry.layer.intermediate)
    assert plan.parameter_count() <= 0.6 * plan.original_count
    model = load(out)
    assert not [m for m in model.modules() if isinstance(m, FactorisedExperts)]
    assert not [p.name for p in out.iterdir() if p.suffix == ".py"]
    for entry in plan.layers:
        down = model.get_submodule(entry.layer.name).down_proj
        assert sorted(down.shape) == sorted((experts, width, entry.layer.hidden))


def test_the_trained_router_is_what_is_written(made: tuple[Path, Path, Plan, RunFolder]) -> None:
    """Everywhere; and what chooses experts without a gradient is only cut."""
    source, out, plan, run = made
    dense, small = load(source).state_dict(), load(out).state_dict()
    moved, given = 0, 0
    for index, entry in enumerate(plan.layers):
        journal = run.layer(index)
        for name, axis in entry.layer.router:
            kept = range(entry.layer.experts) if entry.kept is None else entry.kept
            cut = dense[name].index_select(axis, torch.tensor(list(kept)))
            assert torch.equal(small[name].float(), journal.get(name, cut).float())
            if "correction" in name:
                assert torch.equal(small[name], cut)
            else:
                moved += not torch.equal(small[name], cut)
                given += name in journal
    assert moved == given
    assert given or "minimax" in str(source)  # whose tiny model is not brought nearer by so few steps
    assert on_disk(out).keys() <= on_disk(source).keys()


def test_layers_are_calibrated_through_what_will_be_run(made: tuple[Path, Path, Plan, RunFolder]) -> None:
    """The stand-in of a decoder layer gives what that layer of the written model gives."""
    source, out, plan, run = made
    streamed, written = StreamedModel(str(source)), load(out)
    smaller = Smaller(streamed, plan)
    states: list[Tensor] = []
    layers = {entry.layer.decoder_layer: index for index, entry in enumerate(plan.layers)}
    for name in layers:
        written.get_submodule(name).register_forward_hook(lambda m, a, out: states.append(out))
    ids = (torch.arange(24)[None] * 7) % 250
    with torch.no_grad():
        written(input_ids=ids, use_cache=False)
    activations = streamed.embed([ids])
    found = []
    for name in streamed.decoder_layers:
        with streamed.loaded(name):
            if name not in layers:
                streamed.run(name, activations)
                continue
            index = layers[name]
            with standing_in(streamed, plan.layers[index], run.layer(index), smaller):
                streamed.run(name, activations)
            found.append(activations.states[0])
    for mine, theirs in zip(found, states, strict=True):
        theirs = theirs[0] if isinstance(theirs, tuple) else theirs
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)


def test_a_block_gives_back_what_it_was_built_of(made: tuple[Path, Path, Plan, RunFolder]) -> None:
    """The compressed layer's tensors -> the smaller block's parameters -> the same tensors."""
    source, _, plan, run = made
    streamed, entry, tensors = StreamedModel(str(source)), plan.layers[0], run.layer(0)
    smaller = Smaller(streamed, plan)
    with streamed.loaded(entry.layer.decoder_layer) as dense:
        block = SmallBlock(entry, smaller.decoder_layer(entry, dense, tensors))
    again, routers = block.result({name: p.detach() for name, p in block.trained.items()})
    named = {f"{entry.layer.name}.{name}": t for name, t in again.items()} | routers
    assert {*tensors} <= {*named}
    assert all(torch.equal(named[name], tensor.float()) for name, tensor in tensors.items())


# -- what training gains -------------------------------------------------------------------------------------------


def test_training_brings_the_layer_nearer() -> None:
    """A block of two experts under a softmax, of which one knows nothing: what it should do and when is learned."""
    generator = torch.Generator().manual_seed(0)
    teacher, inputs = Pair(generator), torch.randn(3000, 6, generator=generator)
    with torch.no_grad():
        wanted = teacher(inputs)
    start = CompressedExperts(LAYER, {}, {name: p.detach() * 0.8 for name, p in teacher.trained.items()})
    tokens = BlockTokens(inputs, teacher, lambda tensors: Pair(generator, tensors))
    gradient = torch.diag(torch.tensor([1.0, 1, 1, 0, 0, 0]))
    better = refine_block(start, tokens, gradient, steps=100, seed=0, rate=0.02)

    def error(tensors: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            return (Pair(generator, tensors)(inputs) - wanted).square().mean(0)

    before, after = error(start.tensors), error(better.tensors | better.routers)
    assert after[:3].sum() < 0.1 * before[:3].sum()
    assert after[3:].sum() > after[:3].sum()  # where the loss does not look
    assert better.routers.keys() == {"router"}
    assert "refine" in better.curves
    few = replace(tokens, inputs=inputs[:70])
    assert refine_block(start, few, gradient, steps=5, seed=0, rate=0.02) is start
    assert refine_block(start, tokens, gradient, steps=30, seed=0, rate=1e3) is start  # never worse


class Pair(nn.Module):
    """A MoE block: two linear experts, weighed by a softmax."""

    def __init__(self, generator: torch.Generator, tensors: dict[str, Tensor] | None = None):
        super().__init__()
        shapes = {"router": (2, 6), "experts": (2, 6, 6)}
        tensors = tensors or {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        self.trained = {name: nn.Parameter(tensors[name].clone()) for name in shapes}

    def forward(self, inputs: Tensor) -> Tensor:
        share = (inputs @ self.trained["router"].T).softmax(-1)
        return torch.einsum("te,eij,tj->ti", share, self.trained["experts"], inputs)

    def result(self, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return {"experts": state["experts"]}, {"router": state["router"]}


def test_nothing_is_trained_without_text(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """By weights alone, the experts that stay are the source's own, as many as the budget holds."""
    out = moefactor.compress(
        str(tiny_model("qwen3_moe")), "biaxial", 0.5, tmp_path / "out", form="standard", data_free=True,
        width_multiple=24,
    )  # fmt: skip
    stored, original = on_disk(out), on_disk(tiny_model("qwen3_moe"))
    kept = json.loads((out / "plan.json").read_text())["layers"][0]["kept"]
    assert len(kept) == 4
    for place, expert in enumerate(kept):
        name = "model.layers.0.mlp.experts.{}.up_proj.weight"
        assert torch.equal(stored[name.format(place)], original[name.format(expert)])
    assert torch.equal(stored["model.layers.0.mlp.gate.weight"], original["model.layers.0.mlp.gate.weight"][kept])


def test_a_model_that_can_be_neither_is_refused(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    streamed = StreamedModel(str(tiny_model("qwen3_moe")))
    streamed.experts = [replace(e, fixed_count=True, fixed_width=True) for e in streamed.experts]
    recipe = Recipe.of("biaxial", {"form": "standard"}, ratio=0.4)
    with pytest.raises(UserError, match=r"no ordinary checkpoint holds them. Use --form fast"):
        Run(streamed, recipe, RunFolder(tmp_path / "run")).check()
