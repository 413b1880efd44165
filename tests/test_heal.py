"""heal: what it trains, that it never ends worse, and that a killed run ends with the same bytes."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import moefactor
from models import digests, load, on_disk
from moefactor import compression
from moefactor import healing as heal_module
from moefactor.errors import UserError
from moefactor.healing import Healing, trainable
from moefactor.text import load_tokenizer, tokenise, windows
from tiny import tokenizer


class Killed(Exception):
    pass


SEQLEN = 16


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of 128 tokens, a look at every second one."""
    for name, value in {"BATCH": 128, "LOOK": 2, "WARMUP": 2}.items():
        monkeypatch.setattr(heal_module, name, value)


@pytest.fixture
def student(compressed: Callable[..., Path]) -> Path:
    return compressed("qwen3_moe", "svd", 0.6)


@pytest.fixture
def job(student: Path, tiny_model: Callable[..., Path], text_file: Path, tmp_path: Path) -> dict:
    """Arguments of heal."""
    return {
        "student": student, "teacher": str(tiny_model("qwen3_moe")), "output": tmp_path / "healed", "steps": 8,
        "text": str(text_file), "seqlen": SEQLEN,
    }  # fmt: skip


def held_out(text: Path, seed: int = 0) -> Tensor:
    """The windows that healing does not learn from: the first tenth, 32 at most, of a shuffle by the seed."""
    ids = torch.tensor(tokenizer()(text.read_text(), add_special_tokens=False)["input_ids"])
    every = ids[: len(ids) // SEQLEN * SEQLEN].view(-1, SEQLEN)
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(seed))
    return every[order[: min(32, len(every) // 10)]]


@torch.no_grad()
def divergence(dense: nn.Module, model: nn.Module, ids: Tensor) -> float:
    """Mean of Σ p (ln p − ln q), nats a token."""
    p, q = (m(input_ids=ids, use_cache=False).logits.double().softmax(-1) for m in (dense, model))
    return float((p * (p.log() - q.log())).sum(-1).mean())


def companions(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.suffix != ".safetensors"}


# What routes and what comes before it differ: biases, a correction, a group-limited choice, no gate projection.
@pytest.mark.parametrize(
    "kind", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "ernie4_5_moe", "granitemoe", "nemotron_h"]
)
@pytest.mark.parametrize("train", ["experts", "all"])
def test_what_is_written_is_nearer_to_the_dense_model(
    kind: str, train: str, compressed: Callable[..., Path], tiny_model: Callable[..., Path], text_file: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    source, student = tiny_model(kind), compressed(kind, "svd", 0.6)
    healing = moefactor.heal(
        student, str(source), tmp_path / "out", steps=6, text=str(text_file), seqlen=SEQLEN, rate=0.02, train=train
    )
    dense, ids = load(source), held_out(text_file)
    before, after = (divergence(dense, load(folder), ids) for folder in (student, tmp_path / "out"))
    assert after < before
    curve = dict(healing.validation)
    assert list(curve) == [0, 2, 4, 6]
    assert (curve[0], curve[healing.best_step]) == pytest.approx((before, after), rel=1e-4)
    assert curve[healing.best_step] == min(curve.values())
    # Nothing moved but what is trained, and all of that did, unless no token came to its expert.
    old, new = on_disk(student), on_disk(tmp_path / "out")
    assert old.keys() == new.keys()
    moved = {name for name, tensor in old.items() if not torch.equal(tensor, new[name])}
    if train == "all":
        assert len(moved) > 0.8 * sum(tensor.is_floating_point() for tensor in old.values())
        assert any("embed" in name for name in moved)
    else:
        assert 0.9 < len(moved) / len(trainable(load(student), ids[:1])) <= 1
        assert all(("experts" in n or "gate" in n or "router" in n or "norm" in n) and "shared" not in n for n in moved)
    assert companions(tmp_path / "out") >= companions(student) - {"README.md"} | {"heal.json"}
    written = json.loads((tmp_path / "out" / "heal.json").read_text())
    assert Healing(**written | {"validation": [tuple(entry) for entry in written["validation"]]}) == healing
    assert healing.tokens == 6 * 128


@pytest.fixture(scope="module")
def reference_student(reference_moe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return moefactor.compress(str(reference_moe), "svd", 0.5, tmp_path_factory.mktemp("reference") / "student")


def test_what_is_trained(reference_student: Path) -> None:
    """Every factor, the routers, and the norms before them; nothing of attention, the embedding or the last norm."""
    stored = on_disk(reference_student)
    routers = [f"model.layers.{n}.mlp.gate.weight" for n in range(4)]
    norms = [f"model.layers.{n}.post_attention_layernorm.weight" for n in range(4)]
    factors = [name for name in stored if ".mlp.experts." in name]
    found = trainable(load(reference_student), torch.arange(8)[None])
    assert sorted(found) == sorted(routers + norms + factors)
    assert len(factors) < len(stored) - 8


@pytest.mark.parametrize("pruned", [0.5, 0.75])  # with 0.75 there are as many columns left as experts
def test_indices_are_not_trained(
    pruned: float, tiny_model: Callable[..., Path], tmp_path: Path, text_file: Path
) -> None:
    """d2moe's columns that were kept: whole numbers have no gradient, and stay what they are."""
    source = tiny_model("qwen3_moe")
    calibration = {"calibration": str(text_file), "samples": 4, "seqlen": SEQLEN}
    out = moefactor.compress(str(source), "d2moe", 0.4, tmp_path / "out", base_pruning=pruned, **calibration)
    before = on_disk(out)
    assert any(tensor.dtype == torch.int32 for tensor in before.values())
    moefactor.heal(out, str(source), tmp_path / "healed", steps=2, text=str(text_file), seqlen=SEQLEN)
    after = on_disk(tmp_path / "healed")
    assert all(torch.equal(t, after[name]) for name, t in before.items() if not t.is_floating_point())


def test_bfloat16_is_no_worse_after_rounding(
    reference_moe: Path, reference_student: Path, text_file: Path, tmp_path: Path
) -> None:
    """The healing's figures are of float32, what is written is not."""
    healing = moefactor.heal(
        reference_student, str(reference_moe), tmp_path / "healed", steps=4, text=str(text_file), seqlen=32
    )
    every = windows(tokenise(load_tokenizer(reference_moe), text_file.read_text()), 32, "text")
    ids = every[torch.randperm(len(every), generator=torch.Generator().manual_seed(0))[: len(every) // 10]]
    folders = reference_moe, reference_student, tmp_path / "healed"
    dense, before, after = (load(folder, dtype=torch.float32) for folder in folders)
    found = divergence(dense, after, ids)
    assert found < 0.95 * divergence(dense, before, ids)
    assert found == pytest.approx(dict(healing.validation)[healing.best_step], rel=0.02)
    assert {t.dtype for t in on_disk(tmp_path / "healed").values()} == {torch.bfloat16}


@pytest.mark.parametrize("rate", [1e4, 1e30])
def test_a_healing_that_diverges_leaves_the_model_as_it_was(
    rate: float, reference_moe: Path, reference_student: Path, text_file: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """By too much, and to NaN; in the second half it stops when it has not become better for four looks."""
    healing = moefactor.heal(
        reference_student, str(reference_moe), tmp_path / "out", steps=24, rate=rate, text=str(text_file), seqlen=32
    )
    assert (healing.steps, healing.best_step, len(healing.validation)) == (20, 0, 11)
    assert not healing.validation[-1][1] <= healing.validation[0][1]
    before, after = on_disk(reference_student), on_disk(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


@pytest.mark.parametrize(("method", "share"), [("svd", 1.0), ("slbf", heal_module.MIXTURES)])
def test_mixtures_move_in_smaller_steps(
    method: str, share: float, compressed: Callable[..., Path], job: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what is not part of the experts' layers in smaller ones still."""
    given: list[tuple[nn.Parameter, float]] = []
    soap = heal_module.Soap

    def noted(rates: Iterable[tuple[nn.Parameter, float]]) -> heal_module.Soap:
        given.extend(rates)
        return soap(given)

    monkeypatch.setattr(heal_module, "Soap", noted)
    student = compressed("qwen3_moe", method, 0.15, **({"steps": 30} if method == "slbf" else {}))
    healing = moefactor.heal(**job | {"student": student, "steps": 1, "rate": 0.01})
    factors = share * 0.01 * healing.validation[0][1] ** 0.5
    floats = [p for p in load(student).parameters() if p.is_floating_point() and p.numel()]
    assert len(given) == len(floats)
    assert sorted({rate for _, rate in given}) == pytest.approx([heal_module.REST * factors, factors])
    model = load(student)
    trained = set(trainable(model, held_out(Path(job["text"]))[:1]))
    names = [name for name, p in model.named_parameters() if p.is_floating_point() and p.numel()]
    fast = {name for name, (_, rate) in zip(names, given, strict=True) if rate > 0.9 * factors}
    assert fast == trained


def test_many_steps_go_slower(job: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the square root of their number beyond MANY."""
    rates: dict[int, float] = {}
    for many in (8, 2):
        monkeypatch.setattr(heal_module, "MANY", many)
        monkeypatch.setattr(
            heal_module, "Soap", lambda given, n=many: rates.setdefault(n, max(r for _, r in given)) and stopped()
        )
        with pytest.raises(Killed):
            moefactor.heal(**job)
    assert rates[2] == pytest.approx(rates[8] / 2)


def stopped() -> None:
    raise Killed


@pytest.fixture
def training(
    student: Path, tiny_model: Callable[..., Path], tmp_path: Path
) -> Callable[[Tensor], heal_module._Healing]:
    """The training on some windows, before its first step."""

    def make(seen: Tensor) -> heal_module._Healing:
        model, dense = load(student), load(tiny_model("qwen3_moe"))
        return heal_module._Healing(model, dense, {}, seen, steps=100, labels=0.5, seed=3, run=tmp_path)

    return make


def at(training: heal_module._Healing, step: int) -> Tensor:
    training.step = step
    return training._windows()[1]


def test_the_first_pass_reads_the_text_as_it_is(training: Callable) -> None:
    seen = torch.arange(32 * SEQLEN).view(32, SEQLEN) % 96
    job = training(seen)
    read = torch.cat([at(job, step) for step in range(4)])
    assert sorted(read.tolist()) == sorted(seen.tolist())
    assert not torch.equal(read, seen)


def test_later_passes_read_it_elsewhere_and_in_part_redrawn(
    training: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = torch.randint(96, (32, SEQLEN), generator=torch.Generator().manual_seed(0))
    job = training(seen)
    second = [torch.cat([at(job, step) for step in steps]) for steps in (range(4, 8), range(4, 8), range(8, 12))]
    assert torch.equal(second[0], second[1])
    assert not torch.equal(second[0], second[2])
    with monkeypatch.context() as patch:
        patch.setattr(heal_module, "REDRAWN", 0.0)
        plain = torch.cat([at(job, step) for step in range(4, 8)])
    shifts = [shift for shift in range(SEQLEN) if as_set(seen.flatten().roll(shift).view_as(seen)) == as_set(plain)]
    assert len(shifts) == 1
    differ = (second[0] != plain).float().mean().item()  # a few are drawn as they were
    assert 0.2 < differ < heal_module.REDRAWN + 0.05


def as_set(windows: Tensor) -> set[tuple[int, ...]]:
    return {tuple(window) for window in windows.tolist()}


def test_redrawn_tokens_follow_the_dense_model(training: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """As often as it expects them after the tokens of the text, not after other redrawn ones."""
    monkeypatch.setattr(heal_module, "REDRAWN", 1.0)
    monkeypatch.setattr(heal_module, "BATCH", 4096 * 4)
    window = torch.tensor([[5, 17, 3, 60]])
    job = training(window.expand(4096, 4))
    drawn = job._redrawn(job.seen)
    assert (drawn[:, 0] == 5).all()
    probabilities = job.dense(input_ids=window, use_cache=False).logits[0, :-1].softmax(-1)
    for place, expected in enumerate(probabilities, start=1):
        counts = drawn[:, place].bincount(minlength=len(expected))
        chi = ((counts - 4096 * expected).square() / (4096 * expected)).sum()
        freedom = len(expected) - 1
        assert abs(chi - freedom) < 5 * (2 * freedom) ** 0.5


def test_the_texts_own_tokens_count_where_they_were_not_redrawn(training: Callable) -> None:
    job = training(torch.randint(96, (8, SEQLEN), generator=torch.Generator().manual_seed(0)))
    text, ids = job.seen[:2], job.seen[:2].clone()
    ids[0, 5] = (ids[0, 5] + 1) % 96
    with torch.no_grad():
        found = job._objective(text, ids, 0.5) - job._objective(text, ids, 0.0)
        chances = job.model(input_ids=ids, use_cache=False).logits.double().softmax(-1)
    expected = torch.zeros(2, SEQLEN, dtype=torch.float64)
    for window in range(2):
        for place in range(SEQLEN - 1):
            if (window, place + 1) != (0, 5):
                expected[window, place] = -0.5 * chances[window, place, ids[window, place + 1]].log()
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)


def test_labels_weigh_less_in_every_pass(training: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    job, weights = training(torch.zeros(32, SEQLEN, dtype=torch.long)), []
    job.optimiser = job.schedule = SimpleNamespace(zero_grad=lambda: None, step=lambda: None)

    def noted(text: Tensor, ids: Tensor, labels: float) -> Tensor:
        weights.append(labels)
        return torch.zeros(1, requires_grad=True)

    monkeypatch.setattr(job, "_objective", noted)
    for job.step in (0, 3, 4, 8):  # four steps a pass
        job._learn()
    assert weights == pytest.approx([0.5, 0.5, 0.25, 0.5 / 3])


@pytest.mark.parametrize("names", [("model.embed_tokens.weight",), ("lm_head.weight",), None])
def test_a_tied_head_stays_the_embedding(
    names: tuple[str, ...] | None, tiny_model: Callable[..., Path], job: dict, tmp_path: Path
) -> None:
    """Under whichever of its names the checkpoint has it, or under both."""
    source = str(tiny_model("qwen3_moe", tie_word_embeddings=True))
    student = moefactor.compress(source, "svd", 0.6, tmp_path / "student")
    index = json.loads((student / "model.safetensors.index.json").read_text())
    (shard,) = {
        index["weight_map"][n] for n in index["weight_map"] if n in ("model.embed_tokens.weight", "lm_head.weight")
    }
    tensors = load_file(student / shard)
    embedding = tensors.pop("model.embed_tokens.weight")
    for name in names or ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = embedding.clone()
    save_file(tensors, student / shard, metadata={"format": "pt"})
    map_of = {n: s for n, s in index["weight_map"].items() if s != shard} | dict.fromkeys(tensors, shard)
    (student / "model.safetensors.index.json").write_text(json.dumps(index | {"weight_map": map_of}))
    healing = moefactor.heal(**job | {"student": student, "teacher": source})
    assert healing.best_step > 0
    model = load(job["output"])
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    assert not torch.equal(model.lm_head.weight, embedding)
    found = divergence(load(Path(source)), model, held_out(Path(job["text"])))
    assert found == pytest.approx(dict(healing.validation)[healing.best_step], rel=1e-3)


@pytest.fixture
def hasty(job: dict) -> dict:
    """At a rate far too high."""
    return job | {"rate": 100.0, "steps": 24}


def test_a_rate_that_is_too_high_is_lowered(hasty: dict) -> None:
    healing = moefactor.heal(**hasty)
    (_, start), *looks = healing.validation
    assert max(value for _, value in looks) > heal_module.OVERSHOT * start
    assert min(value for _, value in looks) < 0.9 * start


def killed_after(steps: int) -> Callable:
    def progress(stage: str, done: int, total: int, detail: str = "") -> None:
        if stage == "heal" and done == steps:
            raise Killed

    return progress


def stop(job: dict, steps: int = 5) -> Path:
    """A healing killed after some steps; what it leaves of itself."""
    with pytest.raises(Killed):
        moefactor.heal(**job, progress=killed_after(steps))
    assert not job["output"].exists()
    left = job["output"].with_name(job["output"].name + ".heal")
    assert [file.name for file in left.iterdir()] == ["heal.pt"]
    return left / "heal.pt"


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Callable[[dict], dict[str, str]]:
    """The bytes of the same healing in one go, made once."""
    known: dict[str, dict[str, str]] = {}

    def run(job: dict) -> dict[str, str]:
        key = repr({name: value for name, value in job.items() if name != "output"})
        if key not in known:
            output = tmp_path_factory.mktemp("straight") / "out"
            moefactor.heal(**job | {"output": output})
            known[key] = digests(output)
        return known[key]

    return run


def test_killed_and_started_again_gives_the_same_bytes(job: dict, straight: Callable, tmp_path: Path) -> None:
    stop(job)
    steps: list[int] = []
    moefactor.heal(**job, progress=lambda stage, done, *rest: steps.append(done))
    assert set(steps) == {0, 5, 6, 7, 8}  # the fifth was lost, the first four were not
    assert digests(job["output"]) == straight(job)
    assert [path.name for path in tmp_path.iterdir()] == ["healed"]


def test_killed_after_its_rate_was_lowered(hasty: dict, straight: Callable) -> None:
    stop(hasty, steps=9)
    moefactor.heal(**hasty)
    assert digests(hasty["output"]) == straight(hasty)


def test_killed_while_its_state_is_written(
    job: dict, straight: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the file and its rename: the state before stays good."""

    def die(*args: object) -> None:
        raise Killed

    stop(job, steps=3)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", die)
        with pytest.raises(Killed):
            moefactor.heal(**job)
    moefactor.heal(**job)
    assert digests(job["output"]) == straight(job)
    assert [path.name for path in tmp_path.iterdir()] == ["healed"]


def test_killed_while_the_output_is_written(job: dict, straight: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(heal_module.CheckpointWriter, "companions", full)
        with pytest.raises(OSError, match="No space"):
            moefactor.heal(**job)
    assert not job["output"].exists()
    steps: list[int] = []
    moefactor.heal(**job, progress=lambda stage, done, *rest: steps.append(done))
    assert not any(steps)  # nothing was learned again
    assert digests(job["output"]) == straight(job)


@pytest.mark.parametrize(
    "change", [{"steps": 6}, {"rate": 0.03}, {"seed": 1}, {"seqlen": 24}, {"labels": 0.0}, {"train": "experts"}]
)
def test_the_state_of_another_healing_is_not_taken_for_this_one(change: dict, job: dict, tmp_path: Path) -> None:
    stop(job)
    steps: list[int] = []
    moefactor.heal(**job | change, progress=lambda stage, done, *rest: steps.append(done))
    assert steps[:3] == [0, 1, 2]
    assert [path.name for path in tmp_path.iterdir()] == ["healed"]


def test_the_state_of_another_student_is_not_taken_for_this_one(
    job: dict, compressed: Callable[..., Path], tiny_model: Callable[..., Path], text_file: Path, tmp_path: Path
) -> None:
    """The same plan, other factors: compressed again on another text."""
    source, made = str(tiny_model("qwen3_moe")), []
    for number in (0, 1):
        text = tmp_path / f"{number}.txt"
        text.write_text(text_file.read_text()[number * 9000 :][:9000])
        how = {"calibration": str(text), "samples": 8, "seqlen": 16}
        made.append(moefactor.compress(source, "whitened_svd", 0.6, tmp_path / f"student-{number}", **how))
    stop(job | {"student": made[0]})
    steps: list[int] = []
    moefactor.heal(**job | {"student": made[1]}, progress=lambda stage, done, *rest: steps.append(done))
    assert steps[:3] == [0, 1, 2]


def not_a_state(data: bytes) -> bytes:
    buffer = io.BytesIO()
    torch.save([1, 2], buffer)
    return buffer.getvalue()


DAMAGES = [
    lambda data: data[: len(data) // 2],
    lambda data: b"",
    lambda data: b"something else",
    not_a_state,
]


@pytest.mark.parametrize("damage", DAMAGES, ids=["cut", "empty", "text", "not a state"])
def test_a_damaged_state_is_named(damage: Callable[[bytes], bytes], straight: Callable, job: dict) -> None:
    state = stop(job, steps=3)
    state.write_bytes(damage(state.read_bytes()))
    with pytest.raises(UserError, match=r"healed\.heal/heal\.pt.*Remove it"):
        moefactor.heal(**job)
    assert not job["output"].exists()
    state.unlink()
    moefactor.heal(**job)
    assert digests(job["output"]) == straight(job)


def test_every_window_is_seen_before_one_is_seen_again(job: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each pass in an order of its own, none of it held out."""
    given: list[list[tuple[int, ...]]] = []
    drawn = heal_module._Healing._windows

    def noted(self: object) -> Tensor:
        found = drawn(self)
        given.append([tuple(row) for row in found[1].tolist()])
        return found

    text = Path(job["output"]).with_name("short.txt")
    text.write_text(Path(job["text"]).read_text()[: 16 * 36])  # 36 windows of 16 bytes, 3 of them held out
    monkeypatch.setattr(heal_module._Healing, "_windows", noted)
    moefactor.heal(**job | {"text": str(text)})
    assert all(len(batch) == 128 // SEQLEN for batch in given)
    first, second = ([row for batch in given[start : start + 4] for row in batch] for start in (0, 4))
    assert len(set(first)) == len(set(second)) == 32
    assert first != second
    assert not set(first + second) & {tuple(row) for row in held_out(text).tolist()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "at least one step, found 0"),
        ({"seqlen": 1}, "at least 2"),
        ({"seqlen": 4096}, "128 at most"),
        ({"labels": -0.1}, "labels must not be negative, found -0.1"),
        ({"labels": float("nan")}, "labels must not be negative, found nan"),
        ({"rate": 0.0}, r"rate must be above 0, found 0\.0"),
        ({"train": "expert"}, r"'expert'.*experts"),
        ({"text": "no-such.txt"}, r"no-such\.txt"),
    ],
)
def test_bad_options_are_refused(change: dict, message: str, job: dict, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        moefactor.heal(**job | change)
    assert list(tmp_path.iterdir()) == []


def test_too_little_text_is_refused(job: dict, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("x" * (9 * SEQLEN + 3))
    with pytest.raises(UserError, match=r"short\.txt: 9 windows of 16 tokens are too few"):
        moefactor.heal(**job | {"text": str(text)})
    text.write_text("x" * 10 * SEQLEN)
    assert moefactor.heal(**job | {"text": str(text)}).steps > 0


def test_an_output_that_exists_is_refused(job: dict) -> None:
    job["output"].mkdir()
    (job["output"] / "mine").write_text("")
    with pytest.raises(UserError, match="exists already"):
        moefactor.heal(**job)
    assert [path.name for path in job["output"].iterdir()] == ["mine"]


def test_what_has_no_factors_is_refused(
    job: dict, tiny_model: Callable[..., Path], compressed: Callable[..., Path], tmp_path: Path
) -> None:
    standard = compressed("qwen3_moe", "reap")
    for student in (standard, tiny_model("qwen3_moe")):
        with pytest.raises(UserError, match="ordinary experts"):
            moefactor.heal(**job | {"student": student})
    assert list(tmp_path.iterdir()) == []


def test_a_teacher_of_other_words_is_refused(job: dict, tiny_model: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match="another vocabulary"):
        moefactor.heal(**job | {"teacher": str(tiny_model("qwen3_moe", vocab_size=300))})


# -- compress(heal=...) and the command line ---------------------------------------------------------------------------


@pytest.fixture
def whole(tiny_model: Callable[..., Path], text_file: Path, tmp_path: Path) -> dict:
    """Arguments of compress."""
    return {
        "model": str(tiny_model("qwen3_moe")), "method": "whitened_svd", "ratio": 0.6, "output": tmp_path / "out",
        "calibration": str(text_file), "samples": 4, "seqlen": SEQLEN,
    }  # fmt: skip


def test_compress_can_heal(whole: dict, job: dict, tmp_path: Path) -> None:
    """And is both verbs after each other; nothing stays behind."""
    moefactor.compress(**whole, heal=8)
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    student = moefactor.compress(**whole | {"output": tmp_path / "student"})
    moefactor.heal(**job | {"student": student})
    found, expected = on_disk(tmp_path / "out"), on_disk(job["output"])
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    assert any(not torch.equal(tensor, expected[name]) for name, tensor in on_disk(student).items())


def test_compress_goes_on_where_its_healing_was(whole: dict, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        moefactor.compress(**whole, heal=8, progress=killed_after(5))
    assert {path.name for path in tmp_path.iterdir()} == {"out.run"}
    done: dict[str, list[int]] = {}
    moefactor.compress(**whole, heal=8, progress=lambda stage, now, *rest: done.setdefault(stage, []).append(now))
    assert set(done["heal"]) == {0, 5, 6, 7, 8}
    assert "calibrate" not in done
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    moefactor.compress(**whole | {"output": tmp_path / "other" / "out"}, heal=8)
    assert digests(tmp_path / "out") == digests(tmp_path / "other" / "out")


@pytest.mark.parametrize(("own_text", "suffix"), [(0.5, ",self"), (0.0, "")])
def test_compress_heals_on_text_of_the_models_own_too(
    own_text: float, suffix: str, whole: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it was compressed on some."""
    given: list[str] = []

    def noted(student: Path, teacher: str, output: Path, *, text: str, **how: object) -> None:
        given.append(text)

    monkeypatch.setattr(compression, "distil", noted)
    moefactor.compress(**whole, heal=1, own_text=own_text)
    assert given == [whole["calibration"] + suffix]


def test_own_windows_are_half_of_what_is_read(job: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []
    written = heal_module.write_windows

    def noted(teacher: str, tokenizer: object, count: int, *rest: object) -> Tensor:
        counts.append(count)
        return written(teacher, tokenizer, count, *rest)

    monkeypatch.setattr(heal_module, "write_windows", noted)
    for steps in (10, 2):  # 80 and 16 windows are read
        moefactor.heal(**job | {"text": "self", "steps": steps, "output": job["output"].with_name(f"out-{steps}")})
    assert counts == [40, heal_module.HELD_OUT]


def test_the_model_card_stays(job: dict) -> None:
    moefactor.heal(**job | {"steps": 1})
    assert (job["output"] / "README.md").is_file()


def test_a_named_run_folder_stays(whole: dict, tmp_path: Path) -> None:
    moefactor.compress(**whole, heal=2, run=tmp_path / "run")
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"plan.json", "journal.json", "layers"} <= names
    assert not names & {"unhealed", "heal.pt"}
    moefactor.compress(**whole | {"output": tmp_path / "again"}, heal=2, run=tmp_path / "run")
    assert digests(tmp_path / "again") == digests(tmp_path / "out")


def test_the_command_line(job: dict, whole: dict, command: Callable, tmp_path: Path) -> None:
    text = ["--calibration", job["text"], "--seqlen", SEQLEN]
    code, out, err = command(
        "heal", job["student"], "--teacher", job["teacher"], "-o", tmp_path / "command", "--steps", 8, *text
    )
    assert code == 0, err
    healing = moefactor.heal(**job)
    assert digests(tmp_path / "command") == digests(job["output"])
    starred = next(line for line in out.splitlines() if "★" in line)
    assert str(healing.best_step) in starred
    assert f"{dict(healing.validation)[healing.best_step]:.4f}" in starred
    assert f"the state after step {healing.best_step} of 8" in out
    flags = ["-m", "whitened_svd", "--ratio", 0.6, "--samples", 4, "--heal", 2, *text]
    code, _, err = command("compress", whole["model"], "-o", tmp_path / "line", *flags)
    assert code == 0, err
    moefactor.compress(**whole, heal=2)
    library, line = on_disk(tmp_path / "out"), on_disk(tmp_path / "line")
    assert all(torch.equal(tensor, line[name]) for name, tensor in library.items())
    code, _, err = command("heal", job["student"], "--teacher", job["teacher"], "-o", tmp_path / "command", *text)
    assert (code, "exists already" in err) == (2, True)
