"""A killed run goes on where it was and ends with the same bytes; nothing half done is ever at the output."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import moefactor
from models import digests
from moefactor import factorise as factorise_module
from moefactor.checkpoint import CheckpointWriter
from moefactor.errors import UserError
from moefactor.methods.biaxial import mixtures as biaxial_mixture
from moefactor.run_folder import RunFolder

# Dies the moment the journal has its second layer, as a power cut would: no exception, no clean-up.
KILLED = """
import json, os, sys
import torch
import moefactor
torch.set_num_threads(1)  # as in the process that goes on: sums may differ in the last bit with more
from moefactor.run_folder import RunFolder
enter = RunFolder.enter
def and_die(self, digest, entries):
    enter(self, digest, entries)
    if len(entries) == 2:
        os._exit(9)
RunFolder.enter = and_die
moefactor.compress(**json.loads(sys.argv[1]))
"""


@pytest.fixture(scope="module")
def source(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("qwen3_moe", num_hidden_layers=4)


@pytest.fixture
def job(source: Path, text_file: Path, tmp_path: Path) -> dict:
    """Arguments of compress."""
    return {
        "model": str(source), "method": "whitened_svd", "ratio": 0.4, "output": str(tmp_path / "out"),
        "calibration": str(text_file), "samples": 4, "seqlen": 16,
    }  # fmt: skip


def check_resumed(job: dict, tmp_path: Path) -> None:
    """Goes on after two of four layers, makes neither anew, and ends as a run in one go does."""
    out, run = tmp_path / "out", RunFolder(tmp_path / "out.run")
    assert not out.exists()
    kept = {index: run.layer_file(index).stat().st_mtime_ns for index in (0, 1)}
    assert not run.layer_file(2).exists()
    stages: set[str] = set()

    def progress(stage: str, done: int, total: int, detail: str = "") -> None:
        stages.add(stage)
        if stage == "factorise":
            assert {i: run.layer_file(i).stat().st_mtime_ns for i in (0, 1)} == kept

    moefactor.compress(**job, progress=progress)
    assert "factorise" in stages
    assert not run.folder.exists()
    straight = moefactor.compress(**job | {"output": str(tmp_path / "elsewhere" / "out")})
    assert digests(out) == digests(straight)


def test_killed_and_started_again_gives_the_same_bytes(job: dict, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, json.dumps(job)], capture_output=True, text=True, check=False)
    assert done.returncode == 9, done.stderr
    check_resumed(job, tmp_path)


METHODS = [
    {"method": "rfid"},
    {"method": "shared_basis"},
    {"method": "biaxial", "form": "tight", "steps": 5, "refine_steps": 3, "samples": 16},
    {"method": "biaxial", "form": "standard", "refine_steps": 30, "samples": 32},
]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: " ".join(map(str, method.values())))
def test_interrupted_and_started_again_gives_the_same_bytes(
    method: dict, job: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(biaxial_mixture, "STEPS", 3)  # or planning is most of the test
    enter, job = RunFolder.enter, job | method

    def and_stop(self: RunFolder, digest: str, entries: dict) -> None:
        enter(self, digest, entries)
        if len(entries) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "enter", and_stop)
        with pytest.raises(KeyboardInterrupt):
            moefactor.compress(**job)
    check_resumed(job, tmp_path)


def keep_run(job: dict, tmp_path: Path) -> RunFolder:
    """A finished run whose folder stays."""
    moefactor.compress(**job, run=tmp_path / "run")
    return RunFolder(tmp_path / "run")


@pytest.mark.parametrize("damage", ["cut", "changed", "gone"])
def test_a_damaged_layer_is_made_again(damage: str, source: Path, tmp_path: Path) -> None:
    job = {"model": str(source), "method": "svd", "ratio": 0.4, "output": str(tmp_path / "out")}
    run = keep_run(job, tmp_path)
    before, path = digests(tmp_path / "out"), run.layer_file(1)
    data = path.read_bytes()
    path.unlink()  # not written in place: the output may share the file
    if damage != "gone":
        path.write_bytes(data[:-8] if damage == "cut" else data[:-8] + b"\0" * 8)
    moefactor.compress(**job | {"output": str(tmp_path / "again" / "out")}, run=run.folder)
    assert digests(tmp_path / "again" / "out") == before
    assert path.read_bytes() == data


@pytest.mark.parametrize("change", [{"ratio": 0.5}, {"seed": 1}, {"joint": True}, {"method": "whitened_svd"}])
def test_layers_of_another_plan_are_refused(change: dict, source: Path, text_file: Path, tmp_path: Path) -> None:
    job = {"model": str(source), "method": "svd", "ratio": 0.4, "output": str(tmp_path / "out"), "samples": 4}
    change = change | ({"calibration": str(text_file)} if "method" in change else {})
    run = keep_run(job, tmp_path)
    kept = run.layer_file(0).read_bytes()
    with pytest.raises(UserError, match="holds layers made from another"):
        moefactor.compress(**job | change | {"output": str(tmp_path / "other")}, run=run.folder)
    assert run.layer_file(0).read_bytes() == kept
    assert not (tmp_path / "other").exists()


def test_layers_of_another_text_are_refused(source: Path, text_file: Path, tmp_path: Path) -> None:
    job = {
        "model": str(source), "method": "whitened_svd", "ratio": 0.4, "output": str(tmp_path / "out"), "samples": 4,
        "seqlen": 16, "calibration": str(text_file),
    }  # fmt: skip
    run = keep_run(job, tmp_path)
    other = tmp_path / "other.txt"
    other.write_text(text_file.read_text()[5000:])
    with pytest.raises(UserError, match="holds layers made from another"):
        moefactor.compress(**job | {"output": str(tmp_path / "other"), "calibration": str(other)}, run=run.folder)


@pytest.mark.parametrize("where", ["copy_plain", "companions", "_finish"])
def test_an_error_while_writing_leaves_nothing(
    where: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError("No space left on device")

    job = {"model": str(source), "method": "svd", "ratio": 0.4, "output": str(tmp_path / "out")}
    with monkeypatch.context() as patch:
        patch.setattr(CheckpointWriter, where, full)
        with pytest.raises(OSError, match="No space left"):
            moefactor.compress(**job)
    assert [p.name for p in tmp_path.iterdir()] == ["out.run"]  # which a second try goes on from
    moefactor.compress(**job)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_an_interrupted_write_of_a_layer_is_not_taken_for_one(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the tensors and their rename: `.partial` stays behind and is written over."""
    job = {"model": str(source), "method": "svd", "ratio": 0.4, "output": str(tmp_path / "out")}

    def die(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", die)
        with pytest.raises(KeyboardInterrupt):
            moefactor.compress(**job)
    run = RunFolder(tmp_path / "out.run")
    assert not (tmp_path / "out").exists()
    assert not run.layer_file(0).exists()
    assert run.journal({}) == {}
    moefactor.compress(**job)
    assert not [name for name in digests(tmp_path / "out") if "partial" in name]


def test_a_finished_calibration_is_not_run_again(
    source: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = {
        "model": str(source), "method": "rfid", "ratio": 0.4, "output": str(tmp_path / "out"), "samples": 4,
        "seqlen": 16, "calibration": str(text_file), "run": tmp_path / "run",
    }  # fmt: skip
    moefactor.compress(**job)
    stages: list[str] = []
    moefactor.compress(**job | {"output": str(tmp_path / "two")}, progress=lambda stage, *a: stages.append(stage))
    assert "calibrate" not in stages
    assert factorise_module.STAGE not in stages  # nor any layer
    assert digests(tmp_path / "out").keys() == digests(tmp_path / "two").keys()
