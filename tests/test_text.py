"""Text in, windows of tokens out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from moefactor.calibrate import Calibration, own_share
from moefactor.errors import UserError
from moefactor.evaluation import window_losses
from moefactor.files import read_tensors, write_tensors
from moefactor.loading import load
from moefactor.methods import METHODS
from moefactor.streaming import FITS, StreamedModel
from moefactor.text import (
    kept_windows,
    load_tokenizer,
    model_length,
    read_text,
    sample_windows,
    sources,
    tokenise,
    windows,
    with_own,
    write_windows,
)
from tiny import tokenizer

REFERENCE = Path(__file__).resolve().parents[1] / "assets" / "reference-moe"


def config(most: int) -> SimpleNamespace:
    return SimpleNamespace(get_text_config=lambda: SimpleNamespace(max_position_embeddings=most))


def test_windows_follow_each_other_and_the_rest_is_dropped() -> None:
    assert windows(torch.arange(11), 4, "x").tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    with pytest.raises(UserError, match=r"notes\.txt: 3 tokens are too few for one window of 4"):
        windows(torch.arange(3), 4, "notes.txt")


def test_samples_are_windows_drawn_by_the_seed() -> None:
    ids = torch.arange(400)
    first = sample_windows(ids, 4, 10, 0, "x")
    assert first.shape == (10, 4)
    assert all(row[0] % 4 == 0 and row.tolist() == list(range(row[0], row[0] + 4)) for row in first)
    assert first[:, 0].tolist() == sorted(set(first[:, 0].tolist()))
    assert torch.equal(first, sample_windows(ids, 4, 10, 0, "x"))
    assert not torch.equal(first, sample_windows(ids, 4, 10, 1, "x"))
    assert len(sample_windows(ids, 4, 1000, 0, "x")) == 100  # all there are
    state = torch.get_rng_state()
    sample_windows(ids, 4, 10, 2, "x")
    assert torch.equal(state, torch.get_rng_state())


def test_a_window_is_as_long_as_asked_or_2048_or_what_the_model_takes() -> None:
    assert model_length(config(4096), 100) == 100
    assert model_length(config(4096), None) == 2048
    assert model_length(config(512), None) == 512
    with pytest.raises(UserError, match="Windows of 600 tokens: this model takes 512"):
        model_length(config(512), 600)


def test_tokens_are_the_bytes_and_nothing_is_added() -> None:
    ids = tokenise(tokenizer(), "abc " * 5000)  # longer than any model: no warning, no cut
    assert ids.shape == (20_000,)
    assert ids.dtype == torch.long
    assert tokenizer().decode(ids[:8]) == "abc abc "


def test_files_folders_and_json_lines(tmp_path: Path) -> None:
    (tmp_path / "b.md").write_text("second")
    (tmp_path / "a.txt").write_text("first")
    (tmp_path / "image.png").write_bytes(b"\xff\x00")
    (tmp_path / "sub").mkdir()
    lines = [{"text": "third"}, {"text": "fourth", "id": 4}]
    (tmp_path / "sub" / "c.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    assert read_text(str(tmp_path / "a.txt")) == "first"
    assert read_text(str(tmp_path / "sub" / "c.jsonl")) == "third\n\nfourth"
    assert read_text(str(tmp_path)) == "first\n\nsecond\n\nthird\n\nfourth"


def test_the_default_text_is_there_without_a_network() -> None:
    assert "The assignment statement" in read_text(None) or "assignment" in read_text(None)
    assert len(read_text(None)) > 100_000


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("latin.txt", "caf\xe9".encode("latin-1"), "not UTF-8 text"),
        ("empty.txt", b" \n", "the text is empty"),
        ("bad.jsonl", b"{}\n", "field 'text'"),
        ("bad.jsonl", b"not json\n", "field 'text'"),
        ("bad.jsonl", b'["text"]\n', "field 'text'"),
        ("bad.jsonl", b'{"text": 3}\n', "field 'text'"),
    ],
)
def test_files_that_are_no_text(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name}.*{message}"):
        read_text(str(tmp_path / name))


def test_a_missing_file_and_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such text file or folder"):
        read_text(str(tmp_path / "gone.txt"))
    with pytest.raises(UserError, match="no text files in this folder"):
        read_text(str(tmp_path))


def test_a_folder_without_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no tokenizer"):
        load_tokenizer(tmp_path)


def test_what_the_model_writes_itself() -> None:
    """Whole windows, the same for the same seed, and likelier to the model than random tokens."""
    tokenizer = load_tokenizer(REFERENCE)
    model = load(str(REFERENCE), device="cpu", dtype=torch.float32)
    ask = (model, tokenizer, 3, 24)
    first, again, other = (write_windows(*ask, seed) for seed in (0, 0, 1))
    assert first.shape == (3, 24)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    random = torch.randint(0, len(tokenizer), (3, 24), generator=torch.Generator().manual_seed(0))
    assert window_losses(model, first).mean() < window_losses(model, random).mean() - 1


@pytest.mark.parametrize(
    ("name", "expected"),
    [(None, (None, False)), ("self", (None, True)), ("a.txt", ("a.txt", False)), ("a.txt,self", ("a.txt", True))],
)
def test_sources(name: str | None, expected: tuple[str | None, bool]) -> None:
    assert sources(name) == expected


@pytest.mark.parametrize(
    ("source", "own", "read"), [("{},self", 0.0, 3), ("{}", 0.25, 4), ("{}", 0.99, 1), ("{}", 0.0, 6), ("self", 0.0, 0)]
)
def test_a_share_of_the_windows_is_the_models_own(source: str, own: float, read: int, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The company said that it would pay its dividend. " * 200)
    model = StreamedModel(str(REFERENCE))
    found = Calibration.read(model, source.format(text), samples=6, seqlen=16, own=own)
    every = tokenise(load_tokenizer(REFERENCE), text.read_text())
    windows_of_text = {tuple(row) for row in windows(every, 16, "").tolist()}
    known = [tuple(row) in windows_of_text for batch in found.batches for row in batch.tolist()]
    assert known == [True] * read + [False] * (6 - read)
    alone = Calibration.read(model, str(text), samples=6, seqlen=16)
    assert (found.description["sha256"] == alone.description["sha256"]) == (read == 6)


@pytest.mark.parametrize(
    ("name", "expected"), [(None, "self"), ("a.txt", "a.txt,self"), ("self", "self"), ("a.txt,self", "a.txt,self")]
)
def test_with_own(name: str | None, expected: str) -> None:
    assert with_own(name) == expected


def test_writing_reports_every_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few windows at a time where they are long."""
    monkeypatch.setattr("moefactor.text.own.WRITTEN_TOKENS", 50)
    model, seen = load(str(REFERENCE), device="cpu"), []
    given = write_windows(
        model, load_tokenizer(REFERENCE), 3, 24, 0, lambda stage, done, total, detail="": seen.append((done, total))
    )
    assert given.shape == (3, 24)
    assert seen == [(n, 48) for n in range(49)]


def test_what_was_written_is_read_again(tmp_path: Path) -> None:
    """By a resumed run; not by one of another length."""
    file, written = tmp_path / "run" / "own.safetensors", []

    def write(number: int) -> Callable[[], torch.Tensor]:
        def wrote() -> torch.Tensor:
            written.append(number)
            return torch.full((2, 3), number)

        return wrote

    shape = (2, 3)
    assert (kept_windows(file, ("model", 3), shape, write(1)) == 1).all()
    assert (kept_windows(file, ("model", 3), shape, write(2)) == 1).all()
    assert (kept_windows(file, ("model", 4), shape, write(3)) == 3).all()
    assert (kept_windows(None, ("model", 4), shape, write(4)) == 4).all()
    assert written == [1, 3, 4]
    write_tensors(file, dict.fromkeys(read_tensors(file), torch.zeros(3, 2)))  # edited: not what was asked for
    assert (kept_windows(file, ("model", 4), shape, write(5)) == 5).all()
    file.write_bytes(b"")
    with pytest.raises(UserError, match=r"own\.safetensors: damaged"):
        kept_windows(file, ("model", 4), shape, write(6))


def test_who_writes_text_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """biaxial's models do, unless something hinders them or the user says otherwise."""
    model = StreamedModel(str(REFERENCE))
    ours, other = METHODS["biaxial"], METHODS["channels"]
    assert (own_share(ours, model, None, "a.txt"), own_share(ours, model, None)) == (0.5, 1.0)  # nothing else to read
    assert (own_share(ours, model, 0.0), own_share(other, model, None), own_share(other, model, 0.3)) == (0.0, 0.0, 0.3)
    assert (own_share(other, model, None, "self"), own_share(ours, model, None, "a.txt,self")) == (1.0, 0.5)
    for share in (-0.1, 1.5, float("nan")):
        with pytest.raises(UserError, match=f"from 0 to 1, found {share}"):
            own_share(ours, model, share)
    for source in ("self", "a.txt,self"):
        with pytest.raises(UserError, match="says already how much"):
            own_share(ours, model, 0.2, source)
    with pytest.raises(UserError, match=r"no window for a\.txt"):
        own_share(ours, model, 1.0, "a.txt")
    with monkeypatch.context() as patch:
        patch.setattr("moefactor.streaming.FITS", 1e-6)
        with pytest.warns(UserWarning, match="does not fit in memory"):
            assert own_share(ours, model, None) == 0
        assert own_share(other, model, None) == 0
        assert own_share(ours, model, None, "self") == 1  # asked for in so many words
    with monkeypatch.context() as patch:
        patch.setattr("moefactor.calibrate.start_token", lambda tokenizer: None)
        with pytest.warns(UserWarning, match="no token that begins a text"):
            assert own_share(ours, model, None) == 0
    monkeypatch.setattr(model.reader, "source", object())
    with pytest.warns(UserWarning, match="is quantised"):
        assert own_share(ours, model, None) == 0


def test_what_fits_in_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of the host's memory, or of what a container may have."""
    model = StreamedModel(str(REFERENCE), dtype=torch.float32)
    weights = 4 * sum(p.numel() for p in load(str(REFERENCE), device="cpu").parameters())
    limit = tmp_path / "memory.max"
    monkeypatch.setattr("moefactor.streaming.CONTAINER_LIMIT", limit)
    enough, little = round(weights / FITS * 1.01), round(weights / FITS * 0.99)
    for total, contained, fits in (
        (enough, None, True), (little, None, False), (enough, "max", True), (enough, little, False),
        (little, enough, False),
    ):  # fmt: skip
        monkeypatch.setattr("moefactor.streaming.installed_memory", lambda total=total: total)
        limit.unlink(missing_ok=True)
        if contained is not None:
            limit.write_text(f"{contained}\n")
        assert model.fits_in_memory() == fits
