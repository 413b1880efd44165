"""Methods side by side, and what dynamic and static pruning of d2moe's base save."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from layers import random_stats, random_weights
from models import IDS, load, logits
from moefactor import comparison as module
from moefactor.comparison import Contender, compare, mark_front
from moefactor.errors import UserError
from moefactor.methods import METHODS
from moefactor.stages import Run

CONTENDERS = [
    Contender("svd", "svd", {}),
    Contender("whitened, jointly", "whitened_svd", {"joint": True}),
    Contender("gate only", "svd", {"projections": ("gate",)}),  # which can't reach 0.5
]
RATIOS = [0.3, 0.5]


def asked(source: Path, output: Path, text_file: Path, **changes: object) -> list[dict]:
    how = {
        "texts": [str(text_file)], "calibration": str(text_file), "samples": 4, "seqlen": 16, "window": 32,
        "max_windows": 4, "device": "cpu",
    }  # fmt: skip
    return compare(str(source), CONTENDERS, RATIOS, output, **(how | changes))


@pytest.fixture(scope="module")
def source(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("qwen3_moe")


@pytest.fixture(scope="module")
def output(source: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare") / "out"
    asked(source, folder, text_file)
    return folder


@pytest.fixture(scope="module")
def rows(output: Path) -> list[dict]:
    return json.loads((output / "results.json").read_text())["rows"]


def test_a_row_for_every_run(rows: list[dict], source: Path) -> None:
    assert [(r["label"], r["ratio"]) for r in rows] == [
        ("dense", 0.0), *((c.label, ratio) for ratio in RATIOS for c in CONTENDERS)
    ]  # fmt: skip
    dense, whole = rows[0], sum(p.numel() for p in load(source).parameters())
    assert dense["parameters"] == whole
    for row in rows[1:]:
        if "error" not in row:
            assert row["expert_parameters"] <= (1 - row["ratio"]) * dense["expert_parameters"]
            assert row["expert_parameters"] > (1 - row["ratio"]) * dense["expert_parameters"] - 2000
            assert row["parameters"] - row["expert_parameters"] == whole - dense["expert_parameters"]
            assert row["mean_perplexity"] == pytest.approx(next(iter(row["perplexity"].values())))
            assert min(row["seconds"], row["tokens_per_second"], row["disk_bytes"]) > 0


def test_a_ratio_out_of_reach_is_a_row_that_says_why(rows: list[dict]) -> None:
    for row in rows:
        assert ("error" in row) == (row["label"] == "gate only" and row["ratio"] == 0.5)
    (lost,) = (r for r in rows if "error" in r)
    assert "This ratio can't be reached" in lost["error"]
    assert lost["front"] is False
    assert "mean_perplexity" not in lost


def test_what_was_measured_is_the_compressed_model(rows: list[dict], source: Path, text_file: Path, tmp_path: Path):
    """The same numbers from `compress` and `evaluate` by themselves."""
    import moefactor

    how = {"calibration": str(text_file), "samples": 4, "seqlen": 16}
    out = moefactor.compress(str(source), "whitened_svd", 0.5, tmp_path / "out", joint=True, **how)
    found = moefactor.evaluate(str(out), [str(text_file)], window=32, max_windows=4)
    row = next(r for r in rows if r["label"] == "whitened, jointly" and r["ratio"] == 0.5)
    assert row["mean_perplexity"] == pytest.approx(found.mean_perplexity, rel=1e-6)
    assert row["parameters"] == found.parameters
    contrast = moefactor.evaluate_against(str(out), str(source), [str(text_file)], window=32, max_windows=4)
    assert row["kl"] == pytest.approx(contrast.overall.kl.value, rel=1e-4)
    assert row["agreement"] == pytest.approx(contrast.overall.agreement.value)
    assert row["kl"] > 0


def test_nothing_is_left_but_results_and_calibration(output: Path) -> None:
    models = output / "models"
    assert not models.exists() or not list(models.iterdir())
    kept = {"results.json", "source.json", "baseline.safetensors", "calibration", "models"}
    assert {p.name for p in output.iterdir()} <= kept


def test_a_second_call_runs_nothing(
    output: Path, source: Path, text_file: Path, rows: list[dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("ran again")

    monkeypatch.setattr(Run, "all", refuse)
    monkeypatch.setattr(module.Measurement, "baseline", refuse)
    monkeypatch.setattr(module.Measurement, "contrast", refuse)
    seen: list[dict] = []
    assert asked(source, output, text_file, on_row=seen.append) == rows
    assert [r["label"] for r in seen] == [r["label"] for r in rows]


def test_a_stopped_comparison_goes_on(
    source: Path, text_file: Path, tmp_path: Path, rows: list[dict], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the third run: the finished two stay, only the rest is made."""
    stages, made = Run.all, []

    def counted(run: Run, *args: object) -> object:
        made.append(run.recipe.method.name)
        if len(made) == 3:
            raise KeyboardInterrupt
        return stages(run, *args)

    monkeypatch.setattr(Run, "all", counted)
    with pytest.raises(KeyboardInterrupt):
        asked(source, tmp_path / "out", text_file)
    assert len(json.loads((tmp_path / "out" / "results.json").read_text())["rows"]) == 3  # the dense model's too
    found = asked(source, tmp_path / "out", text_file)
    assert len(made) == 3 + 4
    timeless = [{k: v for k, v in r.items() if "second" not in k and k != "model"} for r in found]
    expected = [{k: v for k, v in r.items() if "second" not in k and k != "model"} for r in rows]
    assert [r["label"] for r in timeless] == [r["label"] for r in expected]
    for ours, theirs in zip(timeless, expected, strict=True):
        assert ours.get("error") == theirs.get("error")
        assert ours.get("mean_perplexity", 0) == pytest.approx(theirs.get("mean_perplexity", 0), rel=1e-6)


@pytest.mark.parametrize("change", [{"window": 16}, {"samples": 3}, {"max_windows": 2}, {"seed": 1}])
def test_another_question_in_the_same_folder(
    change: dict, output: Path, source: Path, text_file: Path, rows: list[dict]
) -> None:
    with pytest.raises(UserError, match=r"holds another comparison|another"):
        asked(source, output, text_file, **change)
    assert json.loads((output / "results.json").read_text())["rows"] == rows


def test_a_ratio_that_is_none_is_refused_first(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="between 0 and 1"):
        compare(str(source), CONTENDERS, [0.3, 1.5], tmp_path / "out", texts=[None])
    with pytest.raises(UserError, match="Unknown method"):
        compare(str(source), [Contender("x", "svdd", {})], [0.3], tmp_path / "out", texts=[None])
    assert not (tmp_path / "out").exists()


def test_the_front_by_brute_force(rows: list[dict]) -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(0, 12, (60, 2), generator=generator).tolist()
    made = [{"parameters": a, "mean_perplexity": float(b)} for a, b in drawn] + [{"error": "no"}]
    mark_front(made)
    for some in (made, rows):
        good = [r for r in some if "error" not in r]
        for row in some:
            beaten = "error" in row
            for other in good:
                if not beaten:
                    at_least = other["parameters"] <= row["parameters"]
                    at_least = at_least and other["mean_perplexity"] <= row["mean_perplexity"]
                    better = other["parameters"] < row["parameters"]
                    better = better or other["mean_perplexity"] < row["mean_perplexity"]
                    beaten = at_least and better
            assert row["front"] == (not beaten)


# -- d2moe's base ---------------------------------------------------------------------------------------------------


def flops(folder: Path) -> int:
    model = load(folder)
    with FlopCounterMode(display=False) as counter:
        logits(model)
    return counter.get_total_flops()


def test_dynamic_pruning_saves_multiply_adds(compressed: Callable[..., Path]) -> None:
    """Measured, and what the columns left out come to: the base works once a token on each projection."""
    counted = [flops(compressed("qwen3_moe", "d2moe", dynamic=share, base="mean")) for share in (0.0, 0.25, 0.5)]
    tokens, hidden, width = IDS.numel(), 32, 24
    for share, found in zip((0.0, 0.25, 0.5), counted, strict=True):
        gone = 2 * width * int(share * hidden) + hidden * int(share * width)
        assert counted[0] - found == 2 * 2 * tokens * gone  # two layers; a multiplication and an addition


def test_dynamic_pruning_saves_no_memory(compressed: Callable[..., Path]) -> None:
    sizes = [
        sum(p.numel() for p in load(compressed("qwen3_moe", "d2moe", dynamic=share, base="mean")).parameters())
        for share in (0.0, 0.5)
    ]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("shared", ["none", "v", "u"])
def test_static_pruning_saves_memory(shared: str) -> None:
    """At one rank: the columns that are gone, less the list of those that stayed."""
    weights, method = random_weights(), METHODS["d2moe"]
    stats, counts = random_stats(weights), {}
    for share in (0.0, 0.25, 0.5):
        options = method.complete({"base_pruning": share, "shared": shared, "base": "mean"})
        offers = method.price(weights, stats, None, seed=0, **options)
        plan = method.build(offers, [3] * len(offers.offers))
        result = method.factorise(weights, stats, plan, seed=0, **options)
        counts[share] = sum(t.numel() for t in result.tensors.values())
        assert counts[share] == plan.parameter_count()
    hidden, width = 24, 16
    for share in (0.25, 0.5):
        gone = 2 * width * int(share * hidden) + hidden * int(share * width)
        listed = 2 * int((1 - share) * hidden) + int((1 - share) * width)
        assert counts[0.0] - counts[share] == gone - listed


def test_what_static_pruning_saves_the_deltas_may_spend() -> None:
    """At one budget a pruned base leaves more rank."""
    weights, method, ranks = random_weights(), METHODS["d2moe"], {}
    for share in (0.0, 0.5):
        options = method.complete({"base_pruning": share, "base": "mean"})
        offers = method.price(weights, None, None, seed=0, **options)
        ranks[share] = (int(0.6 * weights.layer.parameter_count) - offers.fixed) / offers.offers[0].unit_cost
    assert ranks[0.5] > ranks[0.0] + 1


def test_a_method_is_measured_as_it_is_shipped(
    source: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """biaxial with text of its own, as `compress` does it; the others with the text as it is."""
    import moefactor
    from moefactor.methods.biaxial import mixtures, planning

    monkeypatch.setattr(mixtures, "STEPS", 3)
    monkeypatch.setattr(planning, "SHARES", (0.1, 0.3))
    how = {"calibration": str(text_file), "samples": 4, "seqlen": 16}
    options = {"form": "fast", "refine_steps": 2}
    contenders = [Contender("ours", "biaxial", options), Contender("rfid", "rfid", {})]

    def row(output: str, **changes: object) -> dict:
        rows = compare(
            str(source), contenders, [0.3], tmp_path / output, texts=[str(text_file)], window=32, max_windows=4,
            device="cpu", **how, **changes,
        )  # fmt: skip
        assert {p.name for p in (tmp_path / output).iterdir() if p.is_dir()} >= {"calibration"}
        return next(r for r in rows if r["label"] == "ours")

    out = moefactor.compress(str(source), "biaxial", 0.3, tmp_path / "shipped", **how, **options)
    shipped = moefactor.evaluate(str(out), [str(text_file)], window=32, max_windows=4)
    assert row("own")["mean_perplexity"] == pytest.approx(shipped.mean_perplexity, rel=1e-6)
    assert row("given", own_text=0.0)["mean_perplexity"] != pytest.approx(shipped.mean_perplexity, rel=1e-6)


def test_stale_folders_are_not_measured(source: Path, text_file: Path, tmp_path: Path) -> None:
    """results.json removed, the models left: they may be of another question, so they are made again."""
    asked(source, tmp_path / "out", text_file, keep=True)
    (tmp_path / "out" / "results.json").unlink()
    kept = sorted((tmp_path / "out" / "models").iterdir())
    assert kept
    for folder in kept:
        (folder / "model-00001-of-00003.safetensors").unlink(missing_ok=True)
    rows = asked(source, tmp_path / "out", text_file, keep=True)
    assert all("error" not in row for row in rows if row["label"] != "gate only")
    (tmp_path / "out" / "results.json").unlink()
    for folder in kept:
        shutil.rmtree(folder)
        folder.mkdir()
        (folder / "mine.txt").write_text("not a model of moefactor's")
    with pytest.raises(UserError, match="is not a model that moefactor made"):
        asked(source, tmp_path / "out", text_file)
    assert (kept[0] / "mine.txt").is_file()
