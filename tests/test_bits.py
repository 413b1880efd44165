"""Few bits: what rounding costs, sizes that users ask for, plans that spend bits, and folders that come of it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import moefactor
from layers import LAYERS, random_stats, random_weights
from models import load, logits, on_disk
from moefactor.allocate import Budget, Rounding, Storage, TooSmall
from moefactor.errors import UserError
from moefactor.fitting.linalg import weighted_least_squares
from moefactor.fitting.metrics import Metrics
from moefactor.fitting.mixture import Problem
from moefactor.fitting.rounding import Grid, Straight, packed, relative_noise, search_scales
from moefactor.forms import Quantised, Ragged
from moefactor.forms.packing import BITS, values
from moefactor.methods import METHODS
from moefactor.methods.biaxial.precision import Precisions, plan_precisions, precisions
from moefactor.size import GROUP, Size

# -- rounding ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
def test_a_bit_more_is_a_quarter_of_the_noise(bits: int) -> None:
    """And of Gaussian numbers it is that of the best uniform levels (Max 1960, table II) but for what scales in groups
    of 64, each from its own largest number, do better or worse."""
    noise = relative_noise(torch.randn(512, 256, generator=torch.Generator().manual_seed(0)), 64)[bits]
    best = {2: 0.1188, 3: 0.03744, 4: 0.01154, 5: 0.003495, 6: 0.001041, 8: 0.0000866}[bits]
    assert 0.4 * best < noise < 1.1 * best


def test_searched_scales_are_no_worse_than_any_other() -> None:
    x = torch.randn(20, 64, generator=torch.Generator().manual_seed(0)) ** 3
    grid = Grid(3, 32)
    found = (grid.rounded(x, grid.scales(x)) - x).square().view(40, 32).sum(1)
    largest = x.view(40, 32).abs().amax(1) / 3.5
    for share in (0.4, 0.6, 0.8, 1.0):
        other = (grid.rounded(x, (share * largest).view(20, 2)) - x).square().view(40, 32).sum(1)
        assert (found <= 1.02 * other).all()


def test_what_is_packed_is_what_was_rounded() -> None:
    """Rows of several precisions among them, gate and up of an expert side by side."""
    inner = Ragged(3, 2 * 16, 40, widths=(4, 0, 6), halves=2)
    form = Quantised(3, 32, 40, inner=inner, group=16, channels=((5, (1, 0, 2)), (2, (3, 0, 4))))
    weight = torch.randn(20, 40, generator=torch.Generator().manual_seed(0))
    stored = packed(form, {"weight": weight})
    assert {name: tuple(t.shape) for name, t in stored.items()} == form.shapes()
    again = form.rounded(stored)["weight"]
    of_five = torch.tensor([0, 4, 8, 9, 14, 15])
    assert torch.equal(again[of_five], Grid(5, 16).rounded(weight[of_five], search_scales(weight[of_five], 5, 16)))
    error = (again - weight).square().mean(1)
    others = torch.ones(20, dtype=torch.bool).index_fill(0, of_five, False)
    assert error[of_five].max() < error[others].min()


def test_a_group_of_zeros_stays_zero() -> None:
    weight = torch.zeros(4, 32)
    weight[0, 20:] = 1.0
    grid = Grid(2, 16)
    stored = packed(
        Quantised(4, 4, 32, inner=Ragged(4, 1, 32, widths=(1,) * 4), group=16, tensor_bits=(("weight", 2),)),
        {"weight": weight},
    )
    assert not values(stored["weight_codes"], stored["weight_scale"], 2, 32, 16)[1:].any()
    assert grid.rounded(weight, grid.scales(weight)).isfinite().all()


def test_gradients_of_what_is_rounded() -> None:
    """Straight through to the numbers within the levels; to a scale, what its level and its rounding error weigh."""
    x = torch.tensor([[0.2, -0.9, 5.0, 0.6]], requires_grad=True)
    scale = torch.tensor([[1.0]], requires_grad=True)
    out = Straight.apply(x, scale, torch.tensor(1.5), 4)
    assert torch.equal(out, torch.tensor([[0.5, -0.5, 1.5, 0.5]]))
    out.backward(torch.tensor([[1.0, 10.0, 100.0, 1000.0]]))
    assert torch.equal(x.grad, torch.tensor([[1.0, 10.0, 0.0, 1000.0]]))
    assert float(scale.grad) == pytest.approx(1 * (0.5 - 0.2) + 10 * (-0.5 + 0.9) + 100 * 1.5 + 1000 * (0.5 - 0.6))


# -- what rounding costs the loss --------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["first", "down"])
def test_energies_are_what_even_noise_costs_on_average(side: str) -> None:
    weights = random_weights()
    metrics = Metrics(weights, random_stats(weights), 0.1)
    energies = metrics.row_energies(side, 8, [0])[0][1]
    generator = torch.Generator().manual_seed(0)
    expert = 1
    rows = (metrics.first if side == "first" else metrics.down).weights[expert].double()
    deviation = rows.unflatten(1, (-1, 8)).square().mean(2, keepdim=True).sqrt().expand(-1, -1, 8).flatten(1)
    costs = []
    for _ in range(2000):
        change = deviation * torch.randn(rows.shape, generator=generator, dtype=torch.float64)
        if side == "first":
            costs.append(metrics.first_cost(expert, torch.arange(len(rows)), change))
        else:
            costs.append(metrics.down_cost(expert, change))
    assert float(energies[expert].sum()) == pytest.approx(sum(costs) / len(costs), rel=0.05)


def test_a_basis_loses_what_is_beyond_it() -> None:
    """Of rows whose expert sees what the layer sees, no less with fewer directions, and nothing with all."""
    weights = random_weights()
    metrics = Metrics(weights, random_stats(weights), 0.1)
    found = metrics.row_energies("first", 8, [0, 8, 16, 24])
    lost = [float(found[rank][0].sum()) for rank in (8, 16, 24)]
    assert lost[0] > lost[1] > lost[2] == pytest.approx(0.0, abs=1e-9)
    assert not found[0][0].any()


def test_a_fit_that_knows_of_the_noise_loses_least_with_it() -> None:
    """The loss is what rounded factors lose on average, and the private factors are its minimum."""
    generator = torch.Generator().manual_seed(0)
    weights, bases = torch.randn(2, 5, 12, generator=generator), torch.randn(2, 4, 12, generator=generator)
    root = torch.randn(2, 12, 12, generator=generator)
    left = torch.rand(2, 5, generator=generator) + 0.5
    problem = Problem(weights, "identity", right=root @ root.mT, left=left, noise=0.05)
    private = problem.private(bases)
    quiet = Problem(weights, "identity", right=problem.right, left=left)
    losses = [
        float(quiet.loss(private * (1 + 0.05**0.5 * torch.randn(private.shape, generator=generator)), bases))
        for _ in range(3000)
    ]
    assert float(problem.loss(private, bases)) == pytest.approx(sum(losses) / len(losses), rel=0.05)
    for _ in range(20):
        other = private * (1 + 0.02 * torch.randn(private.shape, generator=generator))
        assert problem.loss(private, bases) <= problem.loss(other, bases)
    moment = (root @ root.mT)[0].double()
    alone = weighted_least_squares(weights[0].double(), bases[0].double(), moment, 0.05)
    assert torch.allclose(alone, private[0].double(), rtol=1e-3, atol=1e-4)


# -- sizes -------------------------------------------------------------------------------------------------------------


def test_what_is_not_said_is_filled_in() -> None:
    assert Size.of() == Size(ratio=0.4)
    assert Size.of(bits=4) == Size(ratio=0.0, bits=4)
    assert Size.of(bits=16) == Size(ratio=0.4)
    assert Size.of(bpw=2.8) == Size(bpw=2.8, bits=0)
    assert Size.of(target_gb=24, bits=3) == Size(target_gb=24, bits=3)
    assert Size.of(ratio=0.2, bits="5", group=32) == Size(ratio=0.2, bits=5, group=32)
    assert Size.of(bpw=9, bits=16) == Size(bpw=9)
    assert Size.of(bits=4, group=32).told() == "--ratio 0.0 --bits 4 --bits-group 32"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"ratio": 0.4, "bpw": 3}, "--ratio and --bpw"),
        ({"bits": 7}, "--bits must be one of"),
        ({"bits": "mixed"}, "--bpw or --target-gb"),
        ({"bits": "mixed", "ratio": 0.4}, "--bpw or --target-gb"),
        ({"ratio": 0.0}, "between 0 and 1"),
        ({"bpw": 0}, "--bpw"),
        ({"bpw": math.nan}, "--bpw"),
        ({"target_gb": -1}, "--target-gb"),
        ({"group": 32}, "--bits-group"),
        ({"bits": 4, "group": 48}, "power of two"),
    ],
)
def test_sizes_that_make_no_sense(given: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Size.of(**given)


# -- plans -------------------------------------------------------------------------------------------------------------


def layer_precisions(block: int = 1) -> Precisions:
    weights = random_weights()
    found = precisions(Metrics(weights, random_stats(weights), 0.1), block, 16, 1)
    return Precisions.from_json(weights.layer, json.loads(json.dumps(found.to_json())))


def in_bits(size: float, bits: int = 0) -> Budget:
    count = LAYERS["gated"].parameter_count
    return Budget(count, 0.0, storage=Storage(Rounding(bits, 16), in_bits=True), bits=int(size * count))


@pytest.mark.parametrize("block", [1, 4])
def test_more_bits_lose_less_and_the_budget_is_kept(block: int) -> None:
    table = layer_precisions(block)
    losses = []
    for size in (0.5, 1.5, 2.5, 4, 7):
        planned = plan_precisions([table, table], in_bits(size * 2))
        stored = sum(layer.bits() for layer in planned.layers)
        assert 0.9 * size < stored / (2 * LAYERS["gated"].parameter_count) <= size
        losses.append(planned.loss)
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_bits_by_channel_lose_no_more_than_one_number_for_all(bits: int) -> None:
    table = layer_precisions()
    for size in (0.6, 1.0):
        budget = in_bits(size * (bits + 1), bits)
        alone, mixed = plan_precisions([table], budget), plan_precisions([table], in_bits(size * (bits + 1)))
        assert mixed.loss <= alone.loss * 1.001
        assert all(each == bits for form in alone.layers[0].forms.values() for each, _ in form.channels)


def test_with_room_for_everything_nothing_goes() -> None:
    (layer,) = plan_precisions([layer_precisions()], in_bits(12)).layers
    assert layer.forms["down"].kept_widths == (16,) * 8
    assert [bits for bits, _ in layer.forms["down"].channels] == [8]


def test_too_little_room_is_said() -> None:
    weights = random_weights(LAYERS["biased"])
    table = precisions(Metrics(weights, random_stats(weights), 0.1), 1, 16, 1)
    with pytest.raises(TooSmall):
        plan_precisions([table], in_bits(0.01))


@pytest.mark.parametrize("bits", [2, 4])
def test_with_room_for_every_number_nothing_goes_however_few_the_bits(bits: int) -> None:
    count = LAYERS["gated"].parameter_count
    budget = Budget(count, 0.0, storage=Storage(Rounding(bits, 16)))
    (layer,) = plan_precisions([layer_precisions()], budget).layers
    assert layer.parameter_count() == count


# -- folders -----------------------------------------------------------------------------------------------------------

TEXT = {"samples": 4, "seqlen": 32, "own_text": 0}
ARCHITECTURES = ("qwen3_moe", "mixtral", "deepseek_v3", "glm4_moe", "gpt_oss", "nemotron_h")


def stored_bits(folder: Path) -> int:
    return 8 * sum(t.nbytes for name, t in on_disk(folder).items() if ".experts." in name and "router" not in name)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_bits_a_parameter(kind: str, tiny_model: Callable[..., Path], text_file: Path, tmp_path: Path) -> None:
    source = tiny_model(kind)
    out = moefactor.compress(
        str(source), bpw=5.0, output=tmp_path / "out", bits_group=16, calibration=str(text_file), **TEXT
    )
    plan = json.loads((out / "plan.json").read_text())
    assert 0.97 * plan["budget"] < stored_bits(out) <= plan["budget"]
    assert plan["budget"] == int(5.0 * plan["expert_parameters"]["before"])
    dense = moefactor.export_dense(str(out), tmp_path / "dense")
    assert torch.allclose(logits(load(out)), logits(load(dense)), atol=1e-4)


@pytest.mark.parametrize("kind", ARCHITECTURES[:5])
@pytest.mark.parametrize("rest_bits", [16, 8])
def test_gigabytes(kind: str, rest_bits: int, tiny_model: Callable[..., Path], text_file: Path, tmp_path: Path) -> None:
    """All tensors of the checkpoint, within a hundredth below what was asked for."""
    source = tiny_model(kind, torch.bfloat16)
    dense = {name: t.nbytes for name, t in on_disk(source).items()}
    size = (sum(dense.values()) - 0.75 * sum(n for name, n in dense.items() if ".experts." in name)) / 1e9
    out = moefactor.compress(
        str(source), target_gb=size, rest_bits=rest_bits, output=tmp_path / "out", bits_group=16,
        calibration=str(text_file), **TEXT,
    )  # fmt: skip
    stored = sum(t.nbytes for t in on_disk(out).values())
    assert 0.99 * size <= stored / 1e9 <= size


def test_a_size_below_the_rest_names_the_least(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"all but the routed experts takes \d\.\d+e-05 GB.*--rest-bits"):
        moefactor.compress(str(tiny_model("qwen3_moe")), target_gb=1e-6, output=tmp_path / "out", **TEXT)


LEAST = {"mobe": (0.05, {"rank": 8}), "slbf": (0.15, {"rank": 16})}  # what else they reach on so small a layer


@pytest.mark.parametrize("name", METHODS)
def test_every_method_in_eight_bits(
    name: str, tiny_model: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    """About half of the bytes, and a model that says what it says in 16 bits."""
    source, method = tiny_model("qwen3_moe", torch.bfloat16, moe_intermediate_size=32), METHODS[name]
    ratio, options = LEAST.get(name, (0.3, {}))
    complete = method.complete(options)
    reads = method.plan_needs(complete) or method.factorise_needs(complete)
    text = {"calibration": str(text_file), **TEXT} if reads else {}
    whole, few = (
        moefactor.compress(str(source), name, ratio, tmp_path / f"{bits}", bits=bits, **options, **text)
        for bits in (16, 8)
    )
    if method.standard(complete):
        config = json.loads((few / "config.json").read_text())["quantization_config"]
        assert config["quant_method"] == "compressed-tensors"
        return
    assert stored_bits(few) < 0.75 * stored_bits(whole)
    if method.rounds(complete):
        return  # another plan
    ours, theirs = logits(load(few)).float(), logits(load(whole)).float()
    assert (ours - theirs).square().mean() < 0.1 * theirs.square().mean()


def test_training_while_rounded_gains(reference_moe: Path, text_file: Path, tmp_path: Path) -> None:
    """On the model that is trained: at two bits the layers' own tokens win back a good part of what rounding costs."""
    text = {"calibration": str(text_file), "samples": 16, "seqlen": 64, "own_text": 0, "bits": 2}
    kept = [
        moefactor.compress(
            str(reference_moe), output=tmp_path / str(steps), refine_steps=0, rounded_steps=steps, **text
        )
        for steps in (0, 60)
    ]
    losses = [
        math.log(moefactor.evaluate(str(out), [str(text_file)], window=128, max_windows=8).mean_perplexity)
        for out in kept
    ]
    assert losses[1] < losses[0] - 0.02


def test_groups_are_what_was_asked_for(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    for group in (None, 16):
        out = moefactor.compress(
            str(tiny_model("qwen3_moe")), "svd", 0.3, tmp_path / f"out{group}", bits=4, bits_group=group
        )
        plan = json.loads((out / "plan.json").read_text())
        assert {s["group"] for layer in plan["layers"] for s in layer["stacks"].values()} == {group or GROUP}


def test_few_bits_are_healed(tiny_model: Callable[..., Path], text_file: Path, tmp_path: Path) -> None:
    """Codes stay; scales and all that is not rounded are trained, and what is written loads as it was measured."""
    text = {"calibration": str(text_file), **TEXT}
    plain = moefactor.compress(str(tiny_model("qwen3_moe")), bpw=3, output=tmp_path / "plain", bits_group=16, **text)
    healed = moefactor.heal(
        str(plain), str(tiny_model("qwen3_moe")), tmp_path / "healed", steps=3, text=str(text_file), seqlen=32
    )
    before, after = on_disk(plain), on_disk(tmp_path / "healed")
    codes = [name for name in before if "_codes" in name]
    assert codes
    assert all(torch.equal(before[name], after[name]) for name in codes)
    if healed.best_step:
        assert any(not torch.equal(before[name], after[name]) for name in before if "_scale" in name)
    assert json.loads((tmp_path / "healed" / "config.json").read_text())["quantization_config"]["layers"]


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("rfid", {"bpw": 3}, "one number of bits for all"),
        ("biaxial", {"bpw": 3, "form": "tight"}, "one number of bits for all"),
        ("biaxial", {"bpw": 3, "latent": True}, "one number of bits for all"),
        ("reap", {"bits": 3}, "4 or 8 bits"),
        ("biaxial", {"bpw": 0.01}, "allow"),
        ("biaxial", {"bpw": 0.01, "bits": 4, "form": "linear"}, "the least that the experts take"),
    ],
)
def test_what_can_not_be(
    method: str, options: dict, message: str, tiny_model: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        moefactor.compress(
            str(tiny_model("qwen3_moe")), method, output=tmp_path / "out", calibration=str(text_file),
            **{**TEXT, **options},
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("channels", {}),
        ("channels", {"widths": "layer", "ratio": 0.3}),
        ("reap", {"intercept": True}),
        ("biaxial", {"data_free": True}),
        ("biaxial", {"form": "linear", "ratio": 0.2}),
        ("biaxial", {"form": "tight", "ratio": 0.2, "sequential": False}),
    ],
)
def test_bits_are_never_left_out(
    method: str, options: dict, tiny_model: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    text = {} if options.get("data_free") else {"calibration": str(text_file), **TEXT}
    out = moefactor.compress(
        str(tiny_model("qwen3_moe", torch.bfloat16)), method, output=tmp_path / "out", bits=4, bits_group=16,
        **text, **options,
    )  # fmt: skip
    plan = json.loads((out / "plan.json").read_text())
    assert stored_bits(out) < 8 * plan["expert_parameters"]["before"]
    assert logits(load(out)).isfinite().all()


def test_stage_by_stage(tiny_model: Callable[..., Path], text_file: Path, tmp_path: Path, command: Callable) -> None:
    """The same bytes as in one command."""
    source, text = str(tiny_model("mixtral")), ["--calibration", str(text_file), "--samples", "4", "--seqlen", "32"]
    text += ["--own-text", "0"]
    one, run, two = tmp_path / "one", tmp_path / "run", tmp_path / "two"
    assert not command("compress", source, "--bpw", "4", "-o", str(one), *text)[0]
    assert not command("calibrate", source, "--run", str(run), *text)[0]
    assert not command("plan", source, "--run", str(run), "--bpw", "4")[0]
    assert not command("factorise", source, "--run", str(run), "-o", str(two), *text)[0]
    first, second = on_disk(one), on_disk(two)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
