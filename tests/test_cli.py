"""The stages on the command line, one after the other and all at once."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import moefactor
from models import load, on_disk
from moefactor.cli import app, method_options
from moefactor.errors import UserError
from moefactor.methods import METHODS
from tiny import tokenizer

COMMANDS = sorted(c.name or c.callback.__name__ for c in app.registered_commands)


@pytest.fixture
def ok(command: Callable) -> Callable[..., str]:
    """Runs a command that must succeed; returns its output."""

    def run(*arguments: object) -> str:
        code, out, err = command(*arguments)
        assert code == 0, err
        return out

    return run


def plain(shown: str) -> str:
    """Without colours, which typer's help has whatever the environment says."""
    return re.sub(r"\x1b\[[\d;]*m", "", shown)


@pytest.fixture
def source(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("qwen3_moe")


def test_the_commands_there_are() -> None:
    assert {
        "inspect",
        "methods",
        "compress",
        "calibrate",
        "plan",
        "factorise",
        "evaluate",
        "generate",
        "export",
        "heal",
        "serve",
        "chat",
    } <= set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_help(name: str, ok: Callable) -> None:
    shown = plain(ok(name, "--help"))
    assert re.search(rf"Usage: .* {name}\b", shown)


def test_no_command_shows_the_help(command: Callable) -> None:
    _, out, err = command()
    assert "Usage: " in plain(out + err)


def test_methods_and_their_options(ok: Callable) -> None:
    listed = ok("methods")
    for name, method in METHODS.items():
        assert name in listed
        shown = ok("methods", name)
        assert all(f"--{option.replace('_', '-')}" in shown for option in method.options)


def test_options_of_a_method_as_flags() -> None:
    words = ["--group-size", "8", "--no-joint", "--xi=0.5", "--whitened", "--low", "-3"]
    assert method_options(words) == {
        "group_size": "8", "joint": "false", "xi": "0.5", "whitened": "true", "low": "-3",
    }  # fmt: skip
    with pytest.raises(UserError, match="Unexpected argument 'word'"):
        method_options(["word"])


def test_inspect_counts(source: Path, ok: Callable) -> None:
    shown = ok("inspect", source, "--ratio", 0.5)
    model = load(source)
    total = sum(p.numel() for p in model.parameters())
    experts = 2 * 3 * 8 * 24 * 32
    assert f"{total:,}, {experts / total:.0%} of them" in shown
    assert f"{total - experts // 2:,} parameters left" in shown


STAGES = {
    "svd": [],
    "biaxial": ["--refine-steps", 2, "--channel-share", 0.2],
    "rfid": ["--group-size", 2],
    "whitened_svd": [],
    "shared_basis": ["--groups", 2, "--no-joint"],
}


@pytest.mark.parametrize("method", STAGES)
def test_the_stages_give_what_compress_gives(
    method: str, source: Path, text_file: Path, ok: Callable, tmp_path: Path
) -> None:
    run, text = tmp_path / "run", ["--calibration", text_file, "--samples", 4, "--seqlen", 16]
    text = [] if method == "svd" else text  # which reads none
    ok("calibrate", source, "--run", run, "-m", method, *STAGES[method], *text)
    ok("plan", source, "--run", run, "-m", method, "--ratio", 0.5, *STAGES[method])
    ok("factorise", source, "--run", run, "-o", tmp_path / "stages", *text)
    ok("compress", source, "-o", tmp_path / "once", "-m", method, "--ratio", 0.5, *STAGES[method], *text)
    stages, once = on_disk(tmp_path / "stages"), on_disk(tmp_path / "once")
    assert stages.keys() == once.keys()
    assert all(torch.equal(tensor, once[name]) for name, tensor in stages.items())
    assert json.loads((tmp_path / "stages" / "plan.json").read_text())["ratio"] == 0.5
    assert not (tmp_path / "once.run").exists()


@pytest.mark.parametrize("method", ["whitened_svd", "shared_basis"])
def test_not_sequential_is_from_the_dense_models_statistics(
    method: str, source: Path, text_file: Path, ok: Callable, tmp_path: Path
) -> None:
    text = ["--calibration", text_file, "--samples", 4, "--seqlen", 16]
    run = tmp_path / "run"
    ok("calibrate", source, "--run", run, "-m", method, *text)
    ok("plan", source, "--run", run, "-m", method)
    ok("factorise", source, "--run", run, "-o", tmp_path / "stages", "--no-sequential")
    ok("compress", source, "-o", tmp_path / "once", "-m", method, "--no-sequential", *text)
    ok("compress", source, "-o", tmp_path / "live", "-m", method, *text)
    stages, once, live = (on_disk(tmp_path / name) for name in ("stages", "once", "live"))
    assert all(torch.equal(tensor, once[name]) for name, tensor in stages.items())
    first, second = (next(n for n in sorted(once) if f"layers.{i}.mlp.experts.down_private" in n) for i in (0, 1))
    # Nothing precedes the first layer; the second is observed behind it.
    torch.testing.assert_close(live[first], once[first], atol=1e-4, rtol=1e-3)
    assert not torch.allclose(live[second], once[second], atol=1e-3)


def test_a_plan_to_look_at_writes_nothing(source: Path, ok: Callable, tmp_path: Path) -> None:
    shown = ok("plan", source, "--run", tmp_path / "run", "-m", "svd", "--dry-run")
    assert "low_rank" in shown
    assert not (tmp_path / "run").exists()


def test_edited_ranks_are_what_is_made(source: Path, ok: Callable, tmp_path: Path) -> None:
    run = tmp_path / "run"
    ok("plan", source, "--run", run, "-m", "svd")
    plan = json.loads((run / "plan.json").read_text())
    plan["layers"][1]["stacks"]["down"]["ranks"] = [1, 2, 3, 1, 2, 3, 1, 2]
    (run / "plan.json").write_text(json.dumps(plan))
    ok("factorise", source, "--run", run, "-o", tmp_path / "out")
    shapes = {
        name: tuple(t.shape) for name, t in on_disk(tmp_path / "out").items() if "layers.1.mlp.experts.down" in name
    }
    assert shapes == {
        f"model.layers.1.mlp.experts.down_{part}_r{rank}": (count, rank, size)
        for rank, count in ((1, 3), (2, 3), (3, 2))
        for part, size in (("basis", 32), ("private", 24))
    }


def test_evaluate_compares_and_writes_json(
    source: Path, compressed: Callable, text_file: Path, ok: Callable, tmp_path: Path
) -> None:
    out, figures = compressed("qwen3_moe", "svd"), tmp_path / "figures.json"
    shown = ok(
        "evaluate", out, "--against", source, "--text", text_file, "--window", 32, "--max-windows", 4, "--json", figures
    )
    assert "second / first" in shown
    before, after = json.loads(figures.read_text())
    assert before["expert_parameters"] == 2 * 3 * 8 * 24 * 32
    assert after["expert_parameters"] <= 0.6 * before["expert_parameters"]
    assert after["expert_bytes"] == 4 * after["expert_parameters"]
    assert before["parameters"] - after["parameters"] == before["expert_parameters"] - after["expert_parameters"]
    for figure, folder in ((before, source), (after, out)):
        assert figure["disk_bytes"] == sum(p.stat().st_size for p in folder.glob("*.safetensors"))
        assert list(figure["perplexity"].values()) == [pytest.approx(perplexity(folder, text_file), rel=1e-4)]


@torch.no_grad()
def perplexity(folder: Path, text: Path) -> float:
    """transformers' own loss over the first four windows of 32 bytes."""
    ids = torch.tensor(tokenizer()(text.read_text())["input_ids"][: 4 * 32]).view(4, 32)
    return float(load(folder)(input_ids=ids, labels=ids).loss.exp())


def test_the_reference_model_gets_worse_by_little(reference_moe: Path, ok: Callable, tmp_path: Path) -> None:
    """A trained model: a fifth of the experts' parameters cost some perplexity, but it is not thrown away."""
    out, figures = tmp_path / "out", tmp_path / "figures.json"
    ok("compress", reference_moe, "-o", out, "-m", "whitened_svd", "--ratio", 0.2, "--samples", 16, "--seqlen", 64)
    ok("evaluate", out, "--against", reference_moe, "--window", 64, "--max-windows", 16, "--json", figures)
    before, after = (next(iter(f["perplexity"].values())) for f in json.loads(figures.read_text()))
    assert before < after < 3 * before


def test_generate_goes_on_from_the_prompt(compressed: Callable, ok: Callable) -> None:
    shown = ok("generate", compressed("qwen3_moe", "svd"), "Once upon", "--tokens", 4)
    assert shown.startswith("Once upon")
    assert len(shown) > len("Once upon\n")


def test_export(source: Path, compressed: Callable, ok: Callable, command: Callable, tmp_path: Path) -> None:
    folder = compressed("qwen3_moe", "svd")
    ok("export", folder, "--dense", "-o", tmp_path / "dense")
    assert on_disk(tmp_path / "dense").keys() == on_disk(source).keys()
    code, _, err = command("export", folder, "-o", tmp_path / "nothing")
    assert code == 2
    assert "--dense" in err


def test_the_library_does_what_the_command_does(source: Path, text_file: Path, ok: Callable, tmp_path: Path) -> None:
    options = {"calibration": str(text_file), "samples": 4, "seqlen": 16}
    moefactor.compress(str(source), "rfid", 0.4, tmp_path / "library", group_size=2, residual=0, **options)
    flags = [word for name, value in options.items() for word in (f"--{name}", value)]
    ok("compress", source, "-o", tmp_path / "command", "-m", "rfid", "--group-size", 2, "--residual=0", *flags)
    library, line = on_disk(tmp_path / "library"), on_disk(tmp_path / "command")
    assert library.keys() == line.keys()
    assert all(torch.equal(tensor, line[name]) for name, tensor in library.items())


def test_how_forms_would_be_run(source: Path, text_file: Path, ok: Callable, command: Callable, tmp_path: Path) -> None:
    text = ["--calibration", text_file, "--samples", 4, "--seqlen", 16]
    ok("compress", source, "-o", tmp_path / "ragged", "-m", "channels", *text)
    ok("compress", source, "-o", tmp_path / "svd", "-m", "svd")
    assert "a loop over experts" in ok("methods", "--kernels", tmp_path / "ragged")
    assert "uneven" in ok("methods", "--kernels", tmp_path / "ragged")
    assert "does not take float64" not in ok("methods", "--kernels", tmp_path / "svd", "--dtype", "float32")
    code, _, said = command("methods", "--kernels", source)
    assert code == 2
    assert "holds no factors of moefactor's" in said
