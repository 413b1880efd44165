"""plan.json: written, read again, and refused with the field's name when it is wrong."""

from __future__ import annotations

import copy
import json
import os
import re
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from layers import LAYERS
from moefactor.errors import UserError
from moefactor.forms import Dense, SharedBasis, SparseResidual, low_rank
from moefactor.plan import LayerPlan, Plan

LAYER = LAYERS["gated"]  # 8 experts, 16 × 24
SECOND = replace(LAYER, name="model.layers.1.mlp.experts", decoder_layer="model.layers.1")


def made(ratio: float | None = None) -> Plan:
    shared = SharedBasis(8, 16, 24, groups=((0, 2, 5, 7), (1, 3, 4, 6)), ranks=(9, 4))
    caught = SparseResidual(8, 16, 24, inner=shared, groups=shared.groups, sizes=(40, 30), seed=3)
    layers = (
        LayerPlan(LAYER, {"gate": caught, "up": shared, "down": Dense(8, 16, 24)}),
        LayerPlan(SECOND, {"gate_up": low_rank(8, 32, 24, (3,) * 8), "down": low_rank(8, 16, 24, (2,) * 8)}),
    )
    return Plan("some/model", "rfid", ratio, 7, layers, {"xi": 0.8, "projections": ["gate", "up"]})


def read(path: Path, data: object) -> Plan:
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return Plan.read(path, [LAYER, SECOND])


def test_round_trip_through_a_file(tmp_path: Path) -> None:
    plan = made(0.1)
    (tmp_path / "plan.json").write_text(plan.dumps())
    again = Plan.read(tmp_path / "plan.json", [LAYER, SECOND])
    assert again.to_json() == plan.to_json()
    assert again.digest() == plan.digest()
    for ours, theirs in zip(plan.layers, again.layers, strict=True):
        assert {k: f.shapes() for k, f in ours.forms.items()} == {k: f.shapes() for k, f in theirs.forms.items()}


def test_counts_by_hand() -> None:
    plan = made()
    shared = 2 * 24 * 0 + (9 + 4) * 24 + 4 * (9 + 4) * 16
    first = (shared + 70) + shared + 8 * 16 * 24
    second = 8 * 3 * (32 + 24) + 8 * 2 * (16 + 24)
    assert plan.parameter_count() == first + second
    assert plan.original_count == 2 * 3 * 8 * 16 * 24
    assert plan.achieved_ratio() == pytest.approx(1 - (first + second) / (2 * 3 * 8 * 16 * 24))


def test_ranks_stay_on_one_line_to_be_edited() -> None:
    assert re.search(r'"ranks": \[ ?3(, 3){7} ?\]', made().dumps())


def test_digest_is_of_what_decides_the_result(tmp_path: Path) -> None:
    plan = made()
    data = plan.to_json()
    spaced = read(tmp_path / "p.json", json.dumps(data | {"expert_parameters": {}, "model": "elsewhere"}, indent=7))
    assert spaced.digest() == plan.digest()
    for change in ({"seed": 8}, {"method": "svd"}, {"options": {"xi": 0.7}}, {"ratio": 0.1}):
        assert read(tmp_path / "p.json", data | change).digest() != plan.digest()
    data["layers"][0]["stacks"]["up"]["ranks"] = [9, 5]
    assert read(tmp_path / "p.json", data).digest() != plan.digest()


def stacks(data: dict, layer: int = 0) -> dict:
    return data["layers"][layer]["stacks"]


def put(*path: str | int, value: object) -> Callable[[dict], None]:
    def change(data: dict) -> None:
        for key in path[:-1]:
            data = data[key]
        data[path[-1]] = value

    return change


def forms(stack: str, field: str, value: object, layer: int = 0) -> Callable[[dict], None]:
    return put("layers", layer, "stacks", stack, field, value=value)


WRONG: dict[str, tuple[Callable[[dict], None], str]] = {
    "version": (put("format_version", value=99), "format_version 99"),
    "no seed": (lambda d: d.pop("seed"), "lacks seed"),
    "unknown form": (forms("up", "form", "shard_basis"), r"layers\.0.* up: .*Did you mean 'shared_basis'"),
    "no form": (lambda d: stacks(d)["up"].pop("form"), r"layers\.0.* up: .*'form'"),
    "no ranks": (lambda d: stacks(d)["up"].pop("ranks"), r"layers\.0.* up: .*ranks"),
    "rank 0": (forms("up", "ranks", [0, 4]), r"layers\.0.* up: rank 0 of group 0"),
    "rank too large": (forms("up", "ranks", [9, 25]), r"rank 25 of group 1 .* 24"),
    "low rank too large": (forms("down", "ranks", [17, *[2] * 7], 1), r"layers\.1.* down: rank 17 .* 16"),
    "rank of half": (forms("up", "ranks", [9, 4.5]), "rank 4.5"),
    "rank in words": (forms("up", "ranks", [9, "four"]), "rank 'four'"),
    "ranks not a list": (forms("up", "ranks", 9), r"layers\.0.* up: "),
    "a rank too few": (forms("up", "ranks", [9]), r"layers\.0.* up: .*ranks"),
    "groups too short": (forms("up", "groups", "0 1 0 1 1 0 1"), "names 7 experts, the layer has 8"),
    "group without expert": (forms("up", "groups", "0 2 0 2 2 0 2 0"), r"layers\.0.* up: "),
    "negative group": (forms("up", "groups", "0 1 0 1 1 0 1 -1"), r"layers\.0.* up: "),
    "groups in words": (forms("up", "groups", "0 1 0 x 1 0 1 0"), r"layers\.0.* up: "),
    "groups empty": (forms("up", "groups", ""), r"layers\.0.* up: "),
    "groups a number": (forms("up", "groups", 4), r"layers\.0.* up: "),
    "residual too long": (forms("gate", "sizes", [40, 10_000]), r"gate: size 10000 .* 1536"),
    "residual's groups": (forms("gate", "groups", "0 0 0 0 0 0 0 0"), "gate: 2 sizes are for the groups"),
    "seed in words": (forms("gate", "seed", "abc"), r"layers\.0.* gate: "),
    "dimension": (put("layers", 0, "hidden", value=32), r"layers\.0.* hidden = 32, the model has 24"),
    "a layer less": (lambda d: d["layers"].pop(), r"differ in \['model.layers.1.mlp.experts'\]"),
    "layers swapped": (lambda d: d["layers"].reverse(), "their order"),
    "layers not a list": (put("layers", value="all"), "layers"),
    "a stack less": (lambda d: stacks(d).pop("gate"), r"stacks \['down', 'up'\], expected"),
    "stack not an object": (put("layers", 0, "stacks", "up", value=[1, 2]), r"layers\.0.* up: "),
    "ratio in words": (put("ratio", value="less"), "ratio"),
    "seed of the plan": (put("seed", value=None), "seed"),
    "options not an object": (put("options", value=3), "options"),
    "over budget": (put("ratio", value=0.99), r"allows .*\"ratio\" in the plan to"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_plan_is_refused_by_name(case: str, tmp_path: Path) -> None:
    data = made().to_json()
    change, message = WRONG[case]
    change(data)
    with pytest.raises(UserError, match=message):
        read(tmp_path / "plan.json", data)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{\n 'a'", r"plan\.json: not valid JSON at line 2"), ("[]", r"plan\.json"), ("3", r"plan\.json")],
)
def test_what_is_no_plan_at_all(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        read(tmp_path / "plan.json", text)


def test_no_plan_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Run `moefactor plan` first"):
        Plan.read(tmp_path / "plan.json", [LAYER])


def test_the_ratio_that_the_message_proposes_is_accepted(tmp_path: Path) -> None:
    data = made().to_json()
    with pytest.raises(UserError) as refused:
        read(tmp_path / "p.json", data | {"ratio": 0.9})
    proposed = float(str(refused.value).split("in the plan to ")[1].split()[0])
    read(tmp_path / "p.json", data | {"ratio": proposed})


ODD = [None, True, -1, 0, 1e308, 10**30, 3.5, "x", "0 1", [], {}, [[]], [None], {"form": "latent"}]


def places(data: object, path: tuple = ()) -> list[tuple]:
    """Of everything inside some JSON."""
    inner = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [p for key, value in inner for p in [(*path, key), *places(value, (*path, key))]]


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_a_plan_with_anything_in_it_is_read_or_refused(data: st.DataObject) -> None:
    """One to three fields gone or replaced by something odd: a UserError, or a plan that counts."""
    spoilt = json.loads(json.dumps(made(0.1).to_json()))
    for _ in range(data.draw(st.integers(1, 3))):
        *path, last = data.draw(st.sampled_from(places(spoilt)))
        place = spoilt
        for key in path:
            place = place[key]
        if isinstance(place, dict) and data.draw(st.booleans()):
            del place[last]
        else:
            place[last] = copy.deepcopy(data.draw(st.sampled_from(ODD)))
        if not places(spoilt):
            break
    path = Path(tempfile.gettempdir()) / f"moefactor-plan-{os.getpid()}.json"
    with suppress(UserError):
        assert read(path, spoilt).parameter_count() >= 0
    path.unlink()
