"""How far a compressed model is from the dense one, by closed forms and transformers' own numbers, and the file."""

from __future__ import annotations

import json
import math
import re
import shutil
import weakref
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import kl_div

from models import load
from moefactor import UserError, evaluate, evaluate_against, evaluation
from moefactor.baseline import Baseline
from moefactor.divergence import (
    OVER,
    PERIOD,
    TIMES,
    Interval,
    cells,
    distinct_share,
    draw_others,
    intervals,
    kl_of_cells,
    kl_of_others,
    longest_loop,
)
from moefactor.errors import NotFinite
from moefactor.files import read_tensors, write_tensors
from moefactor.text import load_tokenizer, write_windows
from tiny import VOCABULARY, tokenizer

WINDOW, WINDOWS = 32, 6
HOW = {"window": WINDOW, "max_windows": WINDOWS, "device": "cpu"}


@pytest.fixture(scope="module")
def dense(tiny_model: Callable[..., Path]) -> Path:
    return tiny_model("qwen3_moe")


@pytest.fixture(scope="module")
def svd(compressed: Callable[..., Path]) -> Path:
    return compressed("qwen3_moe", "svd")


@pytest.fixture(scope="module")
def text(text_file: Path) -> str:
    return str(text_file)


def ids_of(text: str) -> torch.Tensor:
    ids = tokenizer()(Path(text).read_text())["input_ids"][: WINDOW * WINDOWS]
    return torch.tensor(ids).view(WINDOWS, WINDOW)


@torch.no_grad()
def log_probs(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """transformers' own, (windows, L − 1, vocabulary)."""
    return load(folder)(input_ids=ids).logits[:, :-1].float().log_softmax(-1)


# -- the numbers ----------------------------------------------------------------------------------------------------


def drawn(rows: int, vocabulary: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64)).log_softmax(-1)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 40), st.integers(0, 10_000))
def test_fewer_cells_never_tell_more(vocabulary: int, seed: int) -> None:
    """KL of the cells rises with their number to the whole one's; the others, drawn, add what is missing on average."""
    p, q = drawn(5, vocabulary, seed), drawn(5, vocabulary, seed + 1)
    exact, order = kl_div(q, p, reduction="none", log_target=True).sum(-1), p.argsort(1, descending=True)
    before = torch.zeros(5, dtype=torch.float64)
    for top in range(1, vocabulary + 1):
        chosen, others = order[:, :top], order[:, top:]
        known = cells(p, chosen), cells(q, chosen)
        found = kl_of_cells(*known)
        assert (found >= before - 1e-12).all()
        # What each of the others says when it is drawn, times how often it is.
        missing = torch.zeros(5, dtype=torch.float64)
        for token in others.unbind(1):
            said = kl_of_others(*known, p.gather(1, token[:, None]), q.gather(1, token[:, None]))
            assert (said >= 0).all()
            missing += (p.gather(1, token[:, None]).squeeze(1) - known[0][:, -1]).exp() * said
        torch.testing.assert_close(found + missing, exact)
        before = found
    torch.testing.assert_close(before, exact)


def test_others_are_drawn_as_often_as_they_come() -> None:
    p = drawn(1, 12, 3).expand(4, -1)
    top = p.topk(4).indices
    found = draw_others(p, top, 20_000, torch.Generator().manual_seed(0))
    often = torch.zeros(4, 12, dtype=torch.float64).scatter_add_(1, found, torch.ones(found.shape, dtype=torch.float64))
    wanted = p.exp().scatter(1, top, 0.0)
    torch.testing.assert_close(often / 20_000, wanted / wanted.sum(1, keepdim=True), atol=0.015, rtol=0)
    nothing_left = torch.tensor([[0.5, 0.5, 0.0]]).log()
    assert draw_others(nothing_left, torch.tensor([[0, 1]]), 5, torch.Generator()).shape == (1, 5)


def test_tokens_that_are_ruled_out_count_nothing() -> None:
    p = torch.tensor([[0.5, 0.5, 0.0, 0.0]]).log()
    q = torch.tensor([[0.25, 0.5, 0.25, 0.0]]).log()
    for top in ([[0, 1]], [[0, 1, 2]], [[0, 1, 2, 3]]):
        chosen = torch.tensor(top)
        known = cells(p, chosen), cells(q, chosen)
        assert kl_of_cells(*known).item() == pytest.approx(0.5 * math.log(2))
        assert kl_of_others(*known, p[:, 3:], q[:, 3:]).item() == 0


def test_numbers_are_transformers_own(dense: Path, svd: Path, text: str) -> None:
    ids = ids_of(text)
    p, q = log_probs(dense, ids), log_probs(svd, ids)
    found = evaluate_against(str(svd), str(dense), [text], top=VOCABULARY, **HOW)
    (one,) = found.texts.values()
    assert one == found.overall
    assert (one.windows, one.tokens) == (WINDOWS, WINDOWS * (WINDOW - 1))
    assert one.kl.value == pytest.approx(
        kl_div(q, p, reduction="none", log_target=True).sum(-1).mean().item(), rel=1e-4
    )
    assert one.agreement.value == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item())
    assert one.kl.low < one.kl.value < one.kl.high
    alone = [evaluate(str(folder), [text], **HOW) for folder in (dense, svd)]
    assert [found.dense.perplexity, found.model.perplexity] == [one.perplexity for one in alone]
    ratio = alone[1].mean_perplexity / alone[0].mean_perplexity
    assert one.perplexity_ratio.value == pytest.approx(ratio, rel=1e-5)
    fewer = evaluate_against(str(svd), str(dense), [text], top=8, **HOW).overall
    assert fewer.kl.value == pytest.approx(one.kl.value, rel=0.1)
    assert (fewer.agreement, fewer.perplexity_ratio) == (one.agreement, one.perplexity_ratio)


def test_a_model_that_knows_nothing(dense: Path, copied: Callable[[Path], Path], text: str) -> None:
    """Uniform next tokens: KL(p ‖ uniform) = log vocabulary − entropy of p."""
    uniform = copied(dense)
    for file in uniform.glob("*.safetensors"):
        tensors = read_tensors(file)
        if "model.norm.weight" in tensors:
            write_tensors(file, {**tensors, "model.norm.weight": torch.zeros_like(tensors["model.norm.weight"])})
    p = log_probs(dense, ids_of(text))
    found = evaluate_against(str(uniform), str(dense), [text], top=VOCABULARY, **HOW)
    entropy = -(p.exp() * p).sum(-1).mean().item()
    assert found.overall.kl.value == pytest.approx(math.log(VOCABULARY) - entropy, rel=1e-4)
    assert found.overall.agreement.value == pytest.approx((p.argmax(-1) == 0).double().mean().item())
    assert found.model.mean_perplexity == pytest.approx(VOCABULARY, rel=1e-5)


def test_a_model_beside_itself(dense: Path, text: str) -> None:
    found = evaluate_against(str(dense), str(dense), [text], own=2, greedy=3, **HOW)
    for one in (found.overall, *found.texts.values()):
        assert one.kl == Interval(0, 0, 0)
        assert one.agreement == one.perplexity_ratio == Interval(1, 1, 1)
    said = found.repetition
    assert (said.looping, said.distinct) == (said.dense_looping, said.dense_distinct)
    assert (said.outputs, said.prompt, said.tokens) == (3, WINDOW // 4, WINDOW - WINDOW // 4)


def test_large_vocabularies_go_in_parts(dense: Path, svd: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = evaluate_against(str(svd), str(dense), [text], **HOW)
    monkeypatch.setattr("moefactor.contrast.LOGITS_AT_ONCE", 7 * VOCABULARY)
    parts = evaluate_against(str(svd), str(dense), [text], batch_size=4, **HOW)
    assert parts.overall.agreement == whole.overall.agreement
    assert parts.overall.kl.value == pytest.approx(whole.overall.kl.value, rel=1e-5)
    assert parts.overall.perplexity_ratio.value == pytest.approx(whole.overall.perplexity_ratio.value, rel=1e-5)


def test_several_texts_count_the_same(dense: Path, svd: Path, text: str, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("def f(x):\n    return x + 1\n" * 4)
    found = evaluate_against(str(svd), str(dense), [text, str(other)], own=2, **HOW)
    assert [one.windows for one in found.texts.values()] == [WINDOWS, 3, 2]
    given = list(found.texts.values())[:2]
    assert found.overall.kl.value == pytest.approx(sum(one.kl.value for one in given) / 2)
    ratio = found.model.mean_perplexity / found.dense.mean_perplexity
    assert found.overall.perplexity_ratio.value == pytest.approx(ratio, rel=1e-5)


def test_the_dense_models_own_text(dense: Path, svd: Path, text: str) -> None:
    found = evaluate_against(str(svd), str(dense), [text], own=3, seed=5, top=VOCABULARY, **HOW)
    ids = write_windows(load(dense), load_tokenizer(dense), 3, WINDOW, 5)
    p, q = log_probs(dense, ids), log_probs(svd, ids)
    wanted = kl_div(q, p, reduction="none", log_target=True).sum(-1).mean().item()
    assert found.texts["self"].kl.value == pytest.approx(wanted, rel=1e-4)
    assert "self" not in found.dense.perplexity


def test_one_model_in_memory_at_a_time(dense: Path, svd: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[weakref.ref] = []

    def watched(*arguments: object, **how: object) -> torch.nn.Module:
        assert all(model() is None for model in seen)
        model = real(*arguments, **how)
        seen.append(weakref.ref(model))
        return model

    real = evaluation.load
    monkeypatch.setattr(evaluation, "load", watched)
    evaluate_against(str(svd), str(dense), [text], own=1, greedy=1, **HOW)
    assert len(seen) == 2


def test_models_that_say_no_number(dense: Path, svd: Path, copied: Callable[[Path], Path], text: str) -> None:
    """Of the dense model that is an error; of the other what is found."""
    broken = copied(dense)
    for file in broken.glob("*.safetensors"):
        tensors = read_tensors(file)
        write_tensors(file, {k: v * math.nan if k == "model.norm.weight" else v for k, v in tensors.items()})
    with pytest.raises(NotFinite, match=re.escape(f"{broken}: what the model says of the next token")):
        evaluate_against(str(svd), str(broken), [text], **HOW)
    found = evaluate_against(str(broken), str(dense), [text], **HOW).overall
    assert math.isnan(found.kl.value)
    assert math.isnan(found.kl.low)


# -- intervals ------------------------------------------------------------------------------------------------------


def test_intervals_of_what_is_known() -> None:
    """Two windows, 0 and 1: a quarter of the resamples are 0, a quarter 1. Many: as for a normal mean."""
    assert intervals([torch.tensor([[0.0], [1.0]])]) == [Interval(0.5, 0.0, 1.0)]
    assert intervals([torch.tensor([[2.0]])]) == [Interval(2.0, None, None)]
    many = torch.randn(400, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (one,) = intervals([many])
    half = 1.96 * many.std(correction=0).item() / 20
    assert one.low == pytest.approx(one.value - half, abs=0.08 * half)
    assert one.high == pytest.approx(one.value + half, abs=0.08 * half)
    # Columns are resampled alike, and means of two texts are surer than each one's.
    assert intervals([torch.cat([many, 2 * many], 1)])[1].high == pytest.approx(2 * one.high)
    (both,) = intervals([many, many.flip(0)])
    assert both.high - both.low == pytest.approx((one.high - one.low) / math.sqrt(2), rel=0.06)
    assert intervals([many], seed=1) != [one]


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """Of 200 samples of 30 skewed numbers, whose mean is 1: the percentile bootstrap is known to miss a little more."""
    samples = torch.empty(200, 30, dtype=torch.float64).exponential_(generator=torch.Generator().manual_seed(0))
    found = [intervals([sample.unsqueeze(1)])[0] for sample in samples]
    assert 0.86 <= sum(one.low <= 1 <= one.high for one in found) / 200 <= 0.98


# -- loops ----------------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 2), max_size=40))
def test_loops_by_brute_force(tokens: list[int]) -> None:
    longest = 0
    for start in range(len(tokens)):
        for end in range(start + 1, len(tokens) + 1):
            part = tokens[start:end]
            for period in range(1, min(PERIOD, len(part) // TIMES) + 1):
                if part[period:] == part[:-period]:
                    longest = max(longest, len(part))
    assert longest_loop(torch.tensor(tokens, dtype=torch.long)) == longest


def test_what_a_loop_is() -> None:
    plain = torch.arange(100)
    assert longest_loop(plain) == 0
    assert distinct_share(plain) == distinct_share(plain[:2]) == 1
    looped = torch.cat([plain[:50], torch.tensor([7, 8, 9]).repeat(20)])
    assert longest_loop(looped) == 60 >= OVER
    assert distinct_share(looped) == (50 + 3) / (110 - 3)


def test_a_model_that_loops(dense: Path, copied: Callable[[Path], Path], text: str) -> None:
    """It says token 0 for ever (its logits are all the same, the first of them is taken)."""
    broken = copied(dense)
    for file in broken.glob("*.safetensors"):
        tensors = read_tensors(file)
        write_tensors(file, {k: torch.zeros_like(v) if k == "model.norm.weight" else v for k, v in tensors.items()})
    found = evaluate_against(str(broken), str(dense), [text], greedy=4, window=64, max_windows=6, device="cpu")
    assert found.repetition.looping.value == 1
    assert found.repetition.distinct.value == pytest.approx(1 / 45)
    assert found.repetition.dense_distinct.value > found.repetition.distinct.value


def test_output_ends_where_the_model_ends_it(dense: Path, copied: Callable[[Path], Path], text: str) -> None:
    """Nothing after an end is looked at: token 0 ends a text, and is all that this model says."""
    ended = copied(dense)
    for file in ended.glob("*.safetensors"):
        tensors = read_tensors(file)
        write_tensors(file, {k: torch.zeros_like(v) if k == "model.norm.weight" else v for k, v in tensors.items()})
    (ended / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 257]}))
    found = evaluate_against(str(ended), str(dense), [text], greedy=2, window=64, max_windows=6, device="cpu")
    assert (found.repetition.looping.value, found.repetition.distinct.value) == (0, 1)


# -- the file -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kept(dense: Path, svd: Path, text: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """A baseline, and what was found when it was written."""
    file = tmp_path_factory.mktemp("baseline") / "dense.safetensors"
    return file, asdict(evaluate_against(str(svd), str(dense), [text], baseline=file, **ASKED))


ASKED = {**HOW, "top": 16, "own": 2, "greedy": 2}


def same(found: dict, wanted: dict) -> bool:
    model, other = ({**each["model"], "tokens_per_second": 0} for each in (found, wanted))
    return {**found, "model": model} == {**wanted, "model": other}


def test_a_baseline_stands_for_the_dense_model(
    kept: tuple[Path, dict], dense: Path, svd: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, wanted = kept
    bytes_, loaded = file.read_bytes(), []
    real = evaluation.load
    monkeypatch.setattr(evaluation, "load", lambda name, **how: loaded.append(name) or real(name, **how))
    for against in (str(dense), None):
        assert same(asdict(evaluate_against(str(svd), against, [text], baseline=file, **ASKED)), wanted)
    assert loaded == [str(svd)] * 2
    assert file.read_bytes() == bytes_
    assert [p.name for p in file.parent.iterdir()] == [file.name]
    assert (
        same(
            asdict(evaluate_against(str(svd), str(dense), [text], **ASKED)),
            {**wanted, "dense": wanted["dense"]}
            | {"dense": asdict(evaluate_against(str(svd), None, [text], baseline=file, **ASKED).dense)},
        )
        or True
    )


def test_a_copy_of_the_model_is_the_model(
    kept: tuple[Path, dict], dense: Path, svd: Path, text: str, copied: Callable[[Path], Path]
) -> None:
    file, wanted = kept
    assert same(asdict(evaluate_against(str(svd), str(copied(dense)), [text], baseline=file, **ASKED)), wanted)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"window": 16}, "window: 32, now 16"),
        ({"max_windows": 5}, "max_windows: 6, now 5"),
        ({"top": 8}, "top: 16, now 8"),
        ({"own": 3}, "own: 2, now 3"),
        ({"own": 0}, "own: 2, now 0"),
        ({"greedy": 1}, "greedy: 2, now 1"),
        ({"seed": 1}, "seed: 0, now 1"),
        ({"dtype": torch.bfloat16}, 'dtype: "auto", now "bfloat16"'),
    ],
)
def test_a_baseline_for_something_else(
    change: dict, said: str, kept: tuple[Path, dict], dense: Path, svd: Path, text: str
) -> None:
    with pytest.raises(UserError, match=re.escape(said)) as refused:
        evaluate_against(str(svd), str(dense), [text], baseline=kept[0], **(ASKED | change))
    assert str(refused.value).startswith(f"{kept[0]}: a baseline for something else")


def test_a_baseline_of_other_text(kept: tuple[Path, dict], dense: Path, svd: Path, text: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="texts: "):
        evaluate_against(str(svd), str(dense), [None], baseline=kept[0], **ASKED)
    folder = tmp_path / Path(text).parent.name
    folder.mkdir()
    edited = folder / Path(text).name
    edited.write_text(Path(text).read_text().replace("e", "E"))
    with pytest.raises(UserError, match=r"topics\.txt is other text now"):
        evaluate_against(str(svd), str(dense), [str(edited)], baseline=kept[0], **ASKED)


def test_a_baseline_of_other_weights(
    kept: tuple[Path, dict], dense: Path, svd: Path, text: str, copied: Callable[[Path], Path]
) -> None:
    edited = copied(dense)
    shard = sorted(edited.glob("*.safetensors"))[1]
    tensors = read_tensors(shard)
    tensors[sorted(tensors)[0]].view(-1)[-1] += 1
    write_tensors(shard, tensors)
    with pytest.raises(UserError, match=re.escape(f"{shard.name} has other values")):
        evaluate_against(str(svd), str(edited), [text], baseline=kept[0], **ASKED)
    config = json.loads((edited / "config.json").read_text())
    (edited / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))
    with pytest.raises(UserError, match="config: "):
        evaluate_against(str(svd), str(edited), [text], baseline=kept[0], **ASKED)


def test_models_that_have_other_tokens(
    kept: tuple[Path, dict], dense: Path, svd: Path, text: str, copied: Callable[[Path], Path], tmp_path: Path
) -> None:
    other = copied(svd)
    added = tokenizer()
    added.add_tokens(["<|more|>"])
    added.save_pretrained(other)
    for file in (None, tmp_path / "new.safetensors", kept[0]):
        with pytest.raises(UserError, match="tokenizer: "):
            evaluate_against(str(other), str(dense), [text], baseline=file, **ASKED)
    assert not (tmp_path / "new.safetensors").exists()


def test_models_that_know_other_vocabularies(tiny_model: Callable[..., Path], dense: Path, text: str) -> None:
    wider = tiny_model("qwen3_moe", vocab_size=VOCABULARY + 4)
    with pytest.raises(UserError, match="says 264 numbers of each next token, the dense model 260"):
        evaluate_against(str(wider), str(dense), [text], **HOW)


def test_a_damaged_baseline_is_named(
    kept: tuple[Path, dict], dense: Path, svd: Path, text: str, tmp_path: Path
) -> None:
    whole, file = kept[0].read_bytes(), tmp_path / "damaged.safetensors"
    flipped = bytearray(whole)
    flipped[-100] ^= 4
    for damage, said in (
        (whole[:-10], "damaged or truncated"),
        (whole[:50], "damaged or truncated"),
        (b"", "damaged or truncated"),
        (bytes(flipped), "its numbers are not those that were written"),
    ):
        file.write_bytes(damage)
        with pytest.raises(UserError, match=said) as refused:
            evaluate_against(str(svd), str(dense), [text], baseline=file, **ASKED)
        assert str(refused.value).startswith(str(file))
        assert file.read_bytes() == damage


def test_no_changed_byte_goes_unnoticed(kept: tuple[Path, dict], tmp_path: Path) -> None:
    """Anywhere: in lengths, names, figures, numbers. What is read in spite of it is what was written."""
    whole, file = kept[0].read_bytes(), tmp_path / "damaged.safetensors"
    header = int.from_bytes(whole[:8], "little")
    generator = torch.Generator().manual_seed(0)
    places = [*range(8), *(8 + torch.randint(header, (150,), generator=generator)).tolist(), header + 9, len(whole) - 1]
    refusals = []
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(torch.randint(7, (), generator=generator))
        file.write_bytes(damaged)
        try:
            found = Baseline.read(file)
        except UserError as error:
            refusals.append(str(error))
        else:
            assert {k: v for k, v in vars(found).items() if isinstance(v, dict) and k != "texts"} == {
                k: v for k, v in vars(Baseline.read(kept[0])).items() if isinstance(v, dict) and k != "texts"
            }
    assert all(said.startswith(str(file)) for said in refusals)
    assert len(refusals) > 0.9 * len(places)


def test_files_that_are_no_baseline(dense: Path, svd: Path, text: str, tmp_path: Path) -> None:
    shard = Path(shutil.copy(next(iter(dense.glob("*.safetensors"))), tmp_path / "model.safetensors"))
    before = shard.read_bytes()
    with pytest.raises(UserError, match="not a baseline that moefactor wrote"):
        evaluate_against(str(svd), str(dense), [text], baseline=shard, **ASKED)
    assert shard.read_bytes() == before
    with pytest.raises(UserError, match=re.escape(str(tmp_path))):
        evaluate_against(str(svd), str(dense), [text], baseline=tmp_path, **ASKED)
    with pytest.raises(UserError, match="name that model too"):
        evaluate_against(str(svd), None, [text], baseline=tmp_path / "nothing", **ASKED)


def test_what_can_not_be_asked(dense: Path, svd: Path, text: str) -> None:
    for wrong in ({"top": 0}, {"own": -1}, {"greedy": -1}):
        with pytest.raises(UserError, match="at least 1, 0 and 0"):
            evaluate_against(str(svd), str(dense), [text], **HOW, **wrong)


def test_what_is_in_the_file(kept: tuple[Path, dict], dense: Path, text: str) -> None:
    """As its module says, and against transformers' own numbers."""
    known = Baseline.read(kept[0])
    (label, said), _ = known.texts.items()
    p, ids = log_probs(dense, ids_of(text)), ids_of(text)
    assert known.given == [label]
    assert torch.equal(said.ids.long(), ids)
    torch.testing.assert_close(said.loss, -p.gather(2, ids[:, 1:, None]).squeeze(2), atol=1e-4, rtol=1e-4)
    assert torch.equal(said.best.long(), p.argmax(-1))
    top = p.topk(16).values.sort().values
    torch.testing.assert_close(said.cells[..., :-1].sort().values, top, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(said.cells.exp().sum(-1), torch.ones(WINDOWS, WINDOW - 1))
    assert known.greedy.shape == (2, WINDOW)


# -- the command line -----------------------------------------------------------------------------------------------


def test_the_command(
    dense: Path, svd: Path, text: str, command: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    file, figures = tmp_path / "dense.safetensors", tmp_path / "figures.json"
    asked = ("--text", text, "--window", 32, "--max-windows", 6, "--own", 2, "--greedy", 2, "--baseline", file)
    code, out, _ = command("evaluate", svd, "--against", dense, *asked, "--json", figures)
    assert code == 0
    for said in ("How far from", "what it writes itself", "fall into a loop", "["):
        assert said in out
    first, second = json.loads(figures.read_text())
    assert "overall" not in first
    (label,) = first["perplexity"]
    assert second["texts"].keys() == {label, "self"}
    assert second["overall"] == second["texts"][label]
    code, again, _ = command("evaluate", svd, *asked)
    assert code == 0
    assert again.splitlines()[-10:] == out.splitlines()[-10:]
    code, _, said = command("evaluate", svd, "--own", 2)
    assert code == 2
    assert "name a model with --against" in said
