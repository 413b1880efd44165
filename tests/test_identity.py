"""A run knows what it is a run of: other weights, options, text or mathematics are refused, and so is a second run."""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import moefactor
from models import digests
from moefactor import calibrate as calibrate_module
from moefactor import factorise as factorise_module
from moefactor import planning as planning_module
from moefactor import run_folder as run_folder_module
from moefactor.errors import UserError
from moefactor.files import differences, locked
from moefactor.identity import FACTORS, SourceRecord, maths_version
from moefactor.methods import METHODS
from moefactor.run_folder import RunFolder
from moefactor.stats import LayerStats
from tiny import build


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return build("qwen3_moe", tmp_path / "model")


def job(source: Path, text_file: Path, tmp_path: Path, method: str = "whitened_svd", **changes: object) -> dict:
    return {
        "model": str(source), "method": method, "ratio": 0.4, "output": tmp_path / "out", "run": tmp_path / "run",
        "calibration": str(text_file), "samples": 4, "seqlen": 16, **changes,
    }  # fmt: skip


def change_one_number(folder: Path, part: str = "experts.3.up_proj") -> str:
    """In the middle of a shard, which stays as long as it was; returns the tensor's name."""
    for path in sorted(folder.glob("*.safetensors")):
        tensors = load_file(path)
        name = next((n for n in tensors if part in n), None)
        if name is not None:
            tensors[name].view(-1)[5] += 1e-3
            save_file(tensors, path, metadata={"format": "pt"})
            return name
    raise AssertionError(part)


@pytest.mark.parametrize("method", ["whitened_svd", "rfid", "channels", "svd"])
def test_one_number_changed_in_the_source_is_noticed(
    method: str, source: Path, text_file: Path, tmp_path: Path
) -> None:
    """Also in a layer that the journal has already, which nothing would read again."""
    how = job(source, text_file, tmp_path, method)
    if method == "svd":
        how = {name: value for name, value in how.items() if name not in ("calibration", "samples", "seqlen")}
    moefactor.compress(**how)
    name = change_one_number(source)
    before = digests(tmp_path / "out")
    with pytest.raises(UserError, match=f"a run of other weights .*{name} has other values"):
        moefactor.compress(**how | {"output": tmp_path / "two"})
    assert not (tmp_path / "two").exists()
    assert digests(tmp_path / "out") == before


def test_another_model_of_the_same_shape_is_noticed(source: Path, text_file: Path, tmp_path: Path) -> None:
    other = build("qwen3_moe", tmp_path / "other", seed=1)
    moefactor.compress(**job(source, text_file, tmp_path))
    with pytest.raises(UserError, match="a run of other weights than"):
        moefactor.compress(**job(other, text_file, tmp_path, output=tmp_path / "two"))


@pytest.mark.parametrize("change", [{"rms_norm_eps": 1e-3}, {"rope_theta": 1.0}])
def test_another_config_is_noticed(change: dict, source: Path, text_file: Path, tmp_path: Path) -> None:
    moefactor.compress(**job(source, text_file, tmp_path))
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=r"a run of other weights .*config"):
        moefactor.compress(**job(source, text_file, tmp_path, output=tmp_path / "two"))


def test_the_same_weights_elsewhere_are_the_same(source: Path, text_file: Path, tmp_path: Path) -> None:
    """A folder that was copied has other times, and is hashed again rather than refused."""
    moefactor.compress(**job(source, text_file, tmp_path))
    moved = tmp_path / "moved"
    shutil.copytree(source, moved)
    shutil.rmtree(source)
    stages: list[str] = []
    how = job(moved, text_file, tmp_path, output=tmp_path / "two")
    moefactor.compress(**how, progress=lambda stage, *rest: stages.append(stage))
    assert calibrate_module.STAGE not in stages
    assert factorise_module.STAGE not in stages
    weights = [name for name in digests(tmp_path / "out") if name.endswith("safetensors")]
    assert all(digests(tmp_path / "out")[name] == digests(tmp_path / "two")[name] for name in weights)


def test_weights_are_hashed_once(source: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Once a run, when they have just been read; a stage that reads them again does not."""
    hashed: list[str] = []
    digest = SourceRecord._digests

    def noted(self: SourceRecord, names: list[str]) -> dict[str, str]:
        hashed.extend(names)
        return digest(self, names)

    monkeypatch.setattr(SourceRecord, "_digests", noted)
    moefactor.compress(**job(source, text_file, tmp_path))
    assert len(hashed) == len(set(hashed)) > 50
    moefactor.compress(**job(source, text_file, tmp_path, output=tmp_path / "two"))
    assert len(hashed) == len(set(hashed))
    hashed.clear()
    rivals = [moefactor.Contender(name, name, {}) for name in ("svd", "rfid", "whitened_svd")]
    moefactor.compare(
        str(source), rivals, [0.3, 0.4], tmp_path / "compared", texts=[str(text_file)], window=16, max_windows=1,
        calibration=str(text_file), samples=4, seqlen=16,
    )  # fmt: skip
    assert len(hashed) == len(set(hashed)) > 50


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, "plan|calibration.s"), ({"samples": 3}, "calibration.samples"), ({"ratio": 0.5}, "plan"),
        ({"joint": True}, "plan"), ({"sequential": False}, "sequential"),
    ],
)  # fmt: skip
def test_what_differs_is_named(change: dict, named: str, source: Path, text_file: Path, tmp_path: Path) -> None:
    moefactor.compress(**job(source, text_file, tmp_path))
    with pytest.raises(UserError, match=f"holds layers made from another .*({named})"):
        moefactor.compress(**job(source, text_file, tmp_path, output=tmp_path / "two", **change))


def test_another_version_of_the_mathematics_is_noticed(
    source: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moefactor.compress(**job(source, text_file, tmp_path))
    monkeypatch.setattr(run_folder_module, "maths_version", lambda *rooms: "another")
    with pytest.raises(UserError, match="maths"):
        moefactor.compress(**job(source, text_file, tmp_path, output=tmp_path / "two"))
    monkeypatch.undo()
    made: list[str] = []
    monkeypatch.setattr(run_folder_module, "maths_version", lambda *rooms: "another")
    how = job(source, text_file, tmp_path, "channels", run=tmp_path / "run2", output=tmp_path / "out2")
    moefactor.compress(**how)
    monkeypatch.undo()
    with pytest.raises(UserError, match=r"statistics\.maths"):  # calibrated anew, so its layers are others too
        moefactor.compress(**how | {"output": tmp_path / "three"}, progress=lambda stage, *rest: made.append(stage))
    assert calibrate_module.STAGE in made


def test_the_version_of_the_mathematics_is_its_source(tmp_path: Path) -> None:
    assert maths_version(*FACTORS) == maths_version(*FACTORS)
    assert len({maths_version(room) for room in (*FACTORS, "nowhere")}) == len(FACTORS) + 1
    root = Path(moefactor.__file__).parent
    rooms = {path.relative_to(root).parts[0].removesuffix(".py") for path in root.rglob("*.py")}
    assert {room.split("/")[0] for room in FACTORS} <= rooms  # a room that is renamed must be renamed there too


HOLDS = """
import sys, time
from pathlib import Path
from moefactor.files import locked
with locked(Path(sys.argv[1]), "it"):
    print("held", flush=True)
    time.sleep(60)
"""


def held(path: Path) -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, "-c", HOLDS, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline().strip() == "held"
    return process


@pytest.mark.parametrize("where", ["run", "output"])
def test_a_second_run_at_once_is_refused_and_a_killed_one_is_not_in_the_way(
    where: str, source: Path, text_file: Path, tmp_path: Path
) -> None:
    path = tmp_path / "run" / ".lock" if where == "run" else tmp_path / ".out.lock"
    other = held(path)
    try:
        with pytest.raises(UserError, match="another moefactor is at work"):
            moefactor.compress(**job(source, text_file, tmp_path))
        assert not (tmp_path / "out").exists()
    finally:
        other.kill()
        other.wait()
    moefactor.compress(**job(source, text_file, tmp_path))
    assert (tmp_path / "out" / "config.json").is_file()
    assert not list(tmp_path.glob("**/*.lock"))


def test_a_lock_is_for_one(tmp_path: Path) -> None:
    with (
        locked(tmp_path / "lock", "it"),
        pytest.raises(UserError, match="another moefactor"),
        locked(tmp_path / "lock", "it"),
    ):
        pass
    with locked(tmp_path / "lock", "it"):
        pass


def test_differences_are_named_by_their_place() -> None:
    found = differences({"a": 1, "b": {"c": [1]}, "d": None}, {"a": 1, "b": {"c": [2]}, "e": 3})
    assert found == ["b.c: [2], now [1]", "e: 3, now null"]


# -- calibration and planning go on where they were ------------------------------------------------------------------


class Stop(BaseException):
    """As a kill: nothing catches it."""


@pytest.mark.parametrize("method", ["whitened_svd", "channels", "d2moe"])
@pytest.mark.parametrize("after", [1, 3, 5])
def test_an_interrupted_calibration_goes_on(
    method: str, after: int, source: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward or backward, with the same bytes as in one go."""
    how = job(source, text_file, tmp_path, method, sequential=False)
    straight = moefactor.compress(**how | {"run": tmp_path / "straight", "output": tmp_path / "straight.out"})
    write, count = RunFolder.write_calibrating, [0]

    def and_stop(self: RunFolder, data: dict) -> None:
        write(self, data)
        count[0] += 1
        if count[0] == after:
            raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "write_calibrating", and_stop)
        stopped = False
        try:
            moefactor.compress(**how)
        except Stop:
            stopped = True
    if stopped:
        steps: list[int] = []
        out = moefactor.compress(
            **how, progress=lambda stage, done, *rest: steps.append(done) if stage == calibrate_module.STAGE else None
        )
        assert next(done for done in steps if done) > after  # batches: what was done was not done again
        weights = [n for n in digests(straight) if n.endswith(".safetensors")]
        assert {n: digests(out)[n] for n in weights} == {n: digests(straight)[n] for n in weights}
    else:  # fewer steps than that: two layers forward, or forward and backward
        assert count[0] < after
    assert not (tmp_path / "run" / "states").exists()
    assert not (tmp_path / "run" / "calibrating.json").exists()


def test_an_interrupted_plan_goes_on(
    source: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how = job(source, text_file, tmp_path, "rfid")
    write, written = RunFolder.write_pricing, []

    def and_stop(self: RunFolder, index: int, about: str, priced: dict) -> None:
        write(self, index, about, priced)
        written.append(index)
        if len(written) == 1:
            raise Stop

    monkeypatch.setattr(RunFolder, "write_pricing", and_stop)
    with pytest.raises(Stop):
        moefactor.compress(**how)
    out = moefactor.compress(**how)
    assert written == [0, 1]
    straight = moefactor.compress(**how | {"run": tmp_path / "straight", "output": tmp_path / "straight" / "out"})
    assert digests(out)["plan.json"] == digests(straight)["plan.json"]


def test_prices_of_another_question_are_not_taken(source: Path, text_file: Path, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.write_pricing(0, "one", {"x": 1})
    assert folder.pricing(0, "one") == {"x": 1}
    assert folder.pricing(0, "two") is None
    assert folder.pricing(1, "one") is None
    assert planning_module.STAGE == "plan"


# -- numbers that aren't ---------------------------------------------------------------------------------------------


def test_statistics_that_are_no_numbers_stop_the_run(
    source: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = LayerStats.add

    def spoilt(self: LayerStats, expert: int, x: torch.Tensor, *rest: torch.Tensor) -> None:
        add(self, expert, x, *rest)
        if expert == 2 and self.input_moment is not None:
            self.input_moment[2, 0, 0] = float("nan")

    monkeypatch.setattr(LayerStats, "add", spoilt)
    with pytest.raises(UserError, match=r"model\.layers\.0\.mlp\.experts: expert 2's input moment is not finite"):
        moefactor.compress(**job(source, text_file, tmp_path))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ["mobe", "rfid", "biaxial"])
def test_factors_that_are_no_numbers_stop_the_run(
    method: str, source: Path, text_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = METHODS[method].factorise

    @functools.wraps(made)
    def spoilt(*given: object, **options: object) -> object:
        result = made(*given, **options)
        name = next(n for n in result.tensors if n.startswith(("gate_private", "gate_up_weight")))
        result.tensors[name][-1] = float("inf")
        return result

    monkeypatch.setitem(METHODS, method, replace(METHODS[method], factorise=spoilt))
    how = job(source, text_file, tmp_path, method)
    if method == "mobe":
        how = {n: v for n, v in how.items() if n not in ("calibration", "samples", "seqlen")}
        how |= {"steps": 3, "ratio": 0.05}
    elif method == "biaxial":
        how |= {"own_text": 0.0}
    with pytest.raises(UserError, match=r"^model\.layers\.0\.mlp\.experts gate(_up)?: expert \d is not finite"):
        moefactor.compress(**how)
    assert not RunFolder(tmp_path / "run").layer_file(0).exists()


# -- a full disk, and what is said of it -----------------------------------------------------------------------------


@pytest.mark.parametrize("after", ["stats", "layers", "shard"])
def test_a_full_disk_is_one_sentence_and_the_run_goes_on(after: str, source: Path, text_file: Path, tmp_path: Path):
    """In a process whose files may not grow beyond some bytes: told with the file's name, and resumed with room."""
    how = job(source, text_file, tmp_path, "channels")
    limit = {"stats": 8_000, "layers": 40_000, "shard": 60_000}[after]
    code = """
import json, resource, sys
import torch
import moefactor
torch.set_num_threads(1)
how, limit = json.loads(sys.argv[1]), int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
try:
    moefactor.compress(**how)
except (moefactor.UserError, OSError) as error:
    print(type(error).__name__, error)
    sys.exit(7)
"""
    words = {key: str(value) if isinstance(value, Path) else value for key, value in how.items()}
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(words), str(limit)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 7, done.stderr
    assert "Traceback" not in done.stderr
    assert "too large" in done.stdout
    assert not (tmp_path / "out").exists()
    out = moefactor.compress(**how)
    straight = moefactor.compress(**how | {"run": tmp_path / "straight", "output": tmp_path / "straight.out"})
    weights = [name for name in digests(out) if name.endswith(".safetensors")]
    assert {n: digests(out)[n] for n in weights} == {n: digests(straight)[n] for n in weights}


def test_the_report_says_what_a_sequential_run_read(source: Path, text_file: Path, tmp_path: Path) -> None:
    out = moefactor.compress(**job(source, text_file, tmp_path))
    report = json.loads((out / "compression.json").read_text())
    assert report["calibration"]["source"] == str(text_file)
    assert report["calibration"]["samples"] == 4


# -- methods of other packages ---------------------------------------------------------------------------------------

THEIRS = """
from moefactor.methods.base import lift
from moefactor.methods.svd import factorise, offers

METHOD = lift("mine", "an SVD by another name", "nobody", offers, factorise, description="Mine.", joint=True)
NOTHING = 3
"""


def test_methods_of_other_packages(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Callable[..., tuple[int, str, str]]
) -> None:
    """Registered by an entry point; they run like ours, and what is none is refused by name."""
    package = tmp_path / "site"
    info = package / "theirs-1.0.dist-info"
    info.mkdir(parents=True)
    (package / "theirs.py").write_text(THEIRS)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    points = "[moefactor.methods]\nmine = theirs:METHOD\nnothing = theirs:NOTHING\ngone = theirs:GONE\n"
    (info / "entry_points.txt").write_text(points)
    monkeypatch.syspath_prepend(str(package))
    monkeypatch.setattr("moefactor.methods.METHODS", dict(METHODS))
    code, _, said = command("compress", source, "-m", "mine", "-r", 0.4, "-o", tmp_path / "out")
    assert code == 0, said
    assert json.loads((tmp_path / "out" / "plan.json").read_text())["method"] == "mine"
    assert (
        "theirs:NOTHING is a int, not a moefactor Method"
        in command("compress", source, "-m", "nothing", "-o", tmp_path / "no")[2]
    )
    assert "theirs:GONE, can't be loaded" in command("compress", source, "-m", "gone", "-o", tmp_path / "no")[2]
    assert "Did you mean 'mine'" in command("compress", source, "-m", "mien", "-o", tmp_path / "no")[2]
