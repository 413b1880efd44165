"""A run folder whose parts were lost, edited or made for another question is refused by name, not read."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import moefactor
from models import load, logits
from moefactor.comparison import Contender, compare
from moefactor.errors import NotFinite, UserError
from moefactor.factorise import factorise
from moefactor.plan import Plan
from moefactor.run_folder import RunFolder
from moefactor.stages import Recipe, Run
from moefactor.streaming import StreamedModel
from moefactor.text import load_tokenizer, write_windows
from tiny import build


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return build("qwen3_moe", tmp_path / "model")


@pytest.fixture
def calibrated(source: Path, text_file: Path, tmp_path: Path) -> Run:
    """A run of the dense model's statistics alone, so that factors are made from the stored ones."""
    return run_of(source, text_file, tmp_path / "run")


def run_of(source: Path, text_file: Path, folder: Path, method: str = "whitened_svd") -> Run:
    how = {"calibration": str(text_file), "samples": 4, "seqlen": 16, "sequential": False}
    run = Run(StreamedModel(str(source), "cpu"), Recipe.of(method, {}, ratio=0.4, **how), RunFolder(folder))
    run.calibrate()
    return run


def planned(run: Run) -> Plan:
    plan = run.plan()
    run.folder.write_plan(plan)
    return plan


def edit(path: Path, change: Callable[[dict], object]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def test_statistics_that_are_gone_or_edited(calibrated: Run, source: Path, text_file: Path, tmp_path: Path) -> None:
    plan = planned(calibrated)
    file = tmp_path / "run" / "stats" / "00001.safetensors"
    whole = file.read_bytes()
    tensors = load_file(file)
    name = next(n for n, t in tensors.items() if t.is_floating_point())
    save_file(tensors | {name: tensors[name] * 1.01}, file)
    again = run_of(source, text_file, tmp_path / "run")  # another process: this one has checked already
    with pytest.raises(UserError, match=r"00001\.safetensors: is not what calibration wrote"):
        again.factorise(plan)
    file.unlink()
    with pytest.raises(UserError, match=r"00001\.safetensors: is gone"):
        again.factorise(plan)
    run_of(source, text_file, tmp_path / "run")  # calibrates anew what is missing
    assert load_file(file).keys() == tensors.keys()
    assert file.read_bytes() == whole


def test_statistics_of_another_layer(calibrated: Run, tmp_path: Path) -> None:
    file = tmp_path / "run" / "stats" / "00000.safetensors"
    tensors = load_file(file)
    layer = calibrated.model.experts[0]
    for name, tensor in tensors.items():
        if tensor.dim():
            with pytest.raises(UserError, match=f"{name} is not of {layer.name}'s shape"):
                moefactor.stats.LayerStats.of(tensors | {name: tensor[..., :-1]}, str(file), layer)
    assert moefactor.stats.LayerStats.of(tensors, str(file), layer).tensors().keys() == tensors.keys()


@pytest.mark.parametrize("record", [None, "{}", '{"structure": 1}', '{"tensors": {"x": "y"}}', "[]"])
def test_a_run_that_does_not_know_its_source(
    record: str | None, calibrated: Run, source: Path, text_file: Path, tmp_path: Path
) -> None:
    known = tmp_path / "run" / "source.json"
    known.unlink() if record is None else known.write_text(record)
    with pytest.raises(UserError, match=r"no source\.json|a run of other weights|source\.json"):
        run_of(source, text_file, tmp_path / "run")
    assert (tmp_path / "run" / "calibration.json").is_file()


def test_a_plan_made_for_something_else(calibrated: Run, source: Path, text_file: Path, tmp_path: Path) -> None:
    plan = planned(calibrated)
    assert {"weights", "dtype", "maths", "calibration"} <= plan.made_for.keys()
    for key in plan.made_for:
        edit(calibrated.folder.plan, lambda data, key=key: data["made_for"].update({key: "other"}))
        other = Plan.read(calibrated.folder.plan, calibrated.model.experts)
        with pytest.raises(UserError, match=rf"plan\.json: was made for something else \({key}"):
            factorise(calibrated.model, other, calibrated.recipe.method, calibrated.folder, sequential=False)
        calibrated.folder.write_plan(plan)
    edit(calibrated.folder.plan, lambda data: data.pop("made_for"))  # written by hand: nobody promises anything
    written = Plan.read(calibrated.folder.plan, calibrated.model.experts)
    assert written.digest() == plan.digest()
    calibrated.factorise(written)


def test_a_plan_of_other_statistics(source: Path, text_file: Path, tmp_path: Path) -> None:
    """Calibrated again on more text after planning by it."""
    calibrated = run_of(source, text_file, tmp_path / "run", "rfid")
    plan = planned(calibrated)
    more = Recipe.of("rfid", {}, ratio=0.4, calibration=str(text_file), samples=5, seqlen=16, sequential=False)
    again = Run(calibrated.model, more, RunFolder(tmp_path / "run"))
    again.calibrate()
    with pytest.raises(UserError, match=r"was made for something else \(calibration"):
        again.factorise(plan)
    again.factorise(planned(again))


def test_another_text_than_the_calibrations(source: Path, text_file: Path, tmp_path: Path) -> None:
    """A method that reads both what was calibrated and the text itself must read one text."""
    run = run_of(source, text_file, tmp_path / "run", "d2moe")
    plan = planned(run)
    model, method = run.model, run.recipe.method
    other = Recipe.of("d2moe", {}, ratio=0.4, calibration=str(text_file), samples=5, seqlen=16)
    text = Run(model, other, RunFolder(tmp_path / "other")).text
    with pytest.raises(UserError, match=r"was calibrated on another text \(.*Give the same text"):
        factorise(model, plan, method, run.folder, calibration=text)


def test_factors_that_are_not_the_plans(calibrated: Run) -> None:
    """A method of one's own that makes another number or shape of tensors is told so, where."""
    plan, method = planned(calibrated), calibrated.recipe.method

    def narrower(*args: object, seed: int, joint: bool, projections: tuple) -> object:
        result = method.factorise(*args, seed=seed, joint=joint, projections=projections)
        name = next(iter(result.tensors))
        return replace(result, tensors=result.tensors | {name: result.tensors[name][..., :-1]})

    with pytest.raises(UserError, match=r"model\.layers\.0.*(gate|up|down)"):
        factorise(calibrated.model, plan, replace(method, factorise=narrower), calibrated.folder, sequential=False)


def test_an_intercept_added_by_hand(calibrated: Run) -> None:
    """Which the method does not make."""
    planned(calibrated)
    edit(calibrated.folder.plan, lambda data: data["layers"][0].update(intercept=[0]))
    with pytest.raises(UserError, match=r"intercept|parameters"):
        calibrated.factorise(Plan.read(calibrated.folder.plan, calibrated.model.experts))


@pytest.mark.parametrize(
    ("key", "value"), [("method", 3), ("seed", -1), ("seed", 1 << 64), ("made_for", []), ("expected_loss", "x")]
)
def test_a_plan_of_wrong_types(key: str, value: object, calibrated: Run) -> None:
    planned(calibrated)
    edit(calibrated.folder.plan, lambda data: data.update({key: value}))
    with pytest.raises(UserError, match=rf"plan\.json: '{key}' is {re.escape(repr(value))}"):
        Plan.read(calibrated.folder.plan, calibrated.model.experts)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"about": 1, "priced": null}'])
def test_damaged_prices_are_made_again(content: str, calibrated: Run, tmp_path: Path) -> None:
    plan = calibrated.plan()
    prices = sorted((tmp_path / "run" / "pricing").iterdir())
    assert prices
    before = [path.read_bytes() for path in prices]
    for path in prices:
        path.write_text(content)
    assert calibrated.plan() == plan
    assert [path.read_bytes() for path in prices] == before


def test_folders_that_cannot_be(source: Path, text_file: Path, tmp_path: Path) -> None:
    def compress(method: str = "svd", **how: object) -> object:
        return moefactor.compress(str(source), method, 0.4, tmp_path / "out", **how)

    for place in ("out", "out/run", "out/../out/run"):
        with pytest.raises(UserError, match="can't lie in the output"):
            compress(run=tmp_path / place)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file: is a file"):
        compress(run=tmp_path / "file")
    (tmp_path / "out").symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="out: exists already"):
        compress()


def test_healing_after_compressing(source: Path, text_file: Path, tmp_path: Path) -> None:
    """It trains factors, and reads text where the method itself does not."""
    how = {"calibration": str(text_file), "seqlen": 16, "heal": 1}
    with pytest.raises(UserError, match="--heal trains factors"):
        moefactor.compress(str(source), "reap", 0.4, tmp_path / "pruned", samples=4, **how)
    with pytest.raises(UserError, match="leave --calibration out"):
        moefactor.compress(str(source), "svd", 0.4, tmp_path / "out", **how | {"heal": 0})
    with pytest.raises(UserError, match="leave --no-sequential out"):
        moefactor.compress(str(source), "svd", 0.4, tmp_path / "out", sequential=False)
    assert (moefactor.compress(str(source), "svd", 0.4, tmp_path / "out", **how) / "config.json").is_file()


def test_another_teacher_is_told(source: Path, text_file: Path, tmp_path: Path) -> None:
    student = moefactor.compress(str(source), "svd", 0.4, tmp_path / "out")
    other = build("qwen3_moe", tmp_path / "other", seed=1)
    how = {"steps": 1, "text": str(text_file), "seqlen": 16}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        moefactor.heal(student, teacher=str(source), output=tmp_path / "one", **how)
    edit(other / "config.json", lambda data: data.update(rope_theta=1234.0))
    with pytest.warns(UserWarning, match="is not the model that"):
        moefactor.heal(student, teacher=str(other), output=tmp_path / "two", **how)


def test_own_text_of_a_broken_model(source: Path) -> None:
    model = load(source)
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(NotFinite, match="what the model says of the next token"):
        write_windows(model, load_tokenizer(source), 1, 4, 0)


def test_a_comparison_of_what_has_changed(source: Path, text_file: Path, tmp_path: Path) -> None:
    """Weights or a text changed in their place since: rows of the one and of the other are no comparison."""
    text = tmp_path / "text.txt"
    text.write_text(text_file.read_text())

    def asked(ratio: float) -> list[dict]:
        return compare(
            str(source), [Contender("svd", "svd", {})], [ratio], tmp_path / "table", texts=[str(text)], window=32,
            max_windows=2, device="cpu",
        )  # fmt: skip

    assert len(asked(0.3)) == 2
    results = tmp_path / "table" / "results.json"
    before = results.read_bytes()
    text.write_text(text_file.read_text()[100:])
    with pytest.raises(UserError, match="holds another comparison"):
        asked(0.4)
    text.write_text(text_file.read_text())
    shard = next(source.glob("*.safetensors"))
    tensors = load_file(shard)
    name = next(n for n in tensors if "q_proj" in n)
    tensors[name].view(-1)[0] += 1
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(UserError, match=f"{name} has other values"):
        asked(0.4)
    assert results.read_bytes() == before


def test_a_loaded_model_is_pickled(compressed: Callable[..., Path], tmp_path: Path) -> None:
    """By torch.save, and by what copies models to other processes."""
    for kind in ("qwen3_moe", "gpt_oss"):
        model = load(compressed(kind, "svd"))
        torch.save(model, tmp_path / kind)
        assert torch.equal(logits(torch.load(tmp_path / kind, weights_only=False)), logits(model))
