"""Calibration text as people have it: kinds of files, rows, conversations, weights, and what parts documents."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest
import torch
from datasets import Dataset, DatasetDict
from pyarrow import parquet

from moefactor import UserError
from moefactor.calibrate import Calibration
from moefactor.evaluation import evaluate
from moefactor.healing import heal
from moefactor.streaming import StreamedModel
from moefactor.text import (
    Reading,
    all_windows,
    draw_windows,
    load_tokenizer,
    own_weight,
    parse_sources,
    read_documents,
    read_ids,
    read_text,
    separator,
    sources,
    tokenise,
    tokenise_documents,
    with_own,
)
from moefactor.text.sources import shares
from tiny import VOCABULARY, tokenizer

REFERENCE = Path(__file__).resolve().parents[1] / "assets" / "reference-moe"
END = 257  # the tiny tokenizer's eos
# What Qwen's kind has.
CHATML = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
CHAT = [{"role": "user", "content": "How is it?"}, {"role": "assistant", "content": "Well."}]
WRITTEN = "<|im_start|>user\nHow is it?<|im_end|>\n<|im_start|>assistant\nWell.<|im_end|>\n"
DOCUMENTS = ["The first one.", "The second one.", "The third one."]


def chatting() -> object:
    found = tokenizer()
    found.chat_template = CHATML
    return found


def lines(path: Path, rows: list[object], **how: object) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), **{"encoding": "utf-8", **how})
    return str(path)


# -- names and weights -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (None, []),
        ("self", [("self", 1)]),
        ("a.txt", [("a.txt", 1)]),
        ("a.txt,self", [("a.txt", 1), ("self", 1)]),
        ("a.jsonl:2,wikitext2:1,self", [("a.jsonl", 2), ("wikitext2", 1), ("self", 1)]),
        ("a.jsonl:0.5, self:.25", [("a.jsonl", 0.5), ("self", 0.25)]),
        ("C:\\text.txt", [("C:\\text.txt", 1)]),
        ("repository/name:3", [("repository/name", 3)]),
    ],
)
def test_names_and_weights(name: str | None, expected: list[tuple[str, float]]) -> None:
    assert [(source.name, source.weight) for source in parse_sources(name)] == expected


def test_names_on_disk_may_hold_commas_and_colons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a,b.txt", "c:2", "plain.txt"):
        (tmp_path / name).write_text("text")
    found = parse_sources("plain.txt,a,b.txt:3,c:2")
    assert [(s.name, s.weight) for s in found] == [("plain.txt", 1), ("a,b.txt", 3), ("c:2", 1)]


@pytest.mark.parametrize(
    "name", ["a.txt:0", "a.txt:-1", "a.txt,,b.txt", "", ",self", "self,self:2", "a.txt:2,a.txt", "a.txt,"]
)
def test_weights_and_names_that_are_none(name: str) -> None:
    with pytest.raises(UserError):
        parse_sources(name)


def test_shares_of_windows() -> None:
    assert shares(256, [2, 1]) == [171, 85]
    assert shares(3, [1, 1, 1000]) == [1, 1, 1]
    assert shares(10, [1, 1, 1]) == [4, 3, 3]
    assert sum(shares(257, [0.3, 0.1, 7])) == 257


def test_the_models_own_share() -> None:
    assert [own_weight(n) for n in (None, "a.txt", "a.txt,self", "self", "a:2,b:1,self")] == [0, 0, 0.5, 1, 0.25]
    assert sources("a:2,b,self") == ("a:2,b", True)
    assert (own_weight(with_own("a:2,b:1")), with_own("a:2,b,self")) == (0.5, "a:2,b,self")


# -- rows --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"text": "words"}, "words"),
        ({"id": 7, "text": "words", "messages": CHAT}, "words"),
        ({"prompt": "Two and two? ", "completion": "Four."}, "Two and two? Four."),
        ({"messages": CHAT}, WRITTEN),
        ({"messages": json.dumps(CHAT)}, WRITTEN),
        ({"prompt": "x", "messages": CHAT}, WRITTEN),
        ({"prompt": CHAT[:1], "completion": CHAT[1:]}, WRITTEN),
        ({"conversations": [{"from": "human", "value": "How is it?"}, {"from": "gpt", "value": "Well."}]}, WRITTEN),
        ({"messages": [CHAT[0] | {"tools": None}, CHAT[1] | {"content": [{"text": "Well."}]}]}, WRITTEN),
    ],
)  # fmt: skip
def test_columns(row: dict, expected: str, tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", [row])
    assert read_documents(path, tokenizer=chatting()) == [expected]


@pytest.mark.parametrize("column", ["body", "talk"])
def test_another_column(column: str, tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", [{"text": "other", "body": "words", "talk": CHAT}])
    expected = "words" if column == "body" else WRITTEN
    assert read_documents(path, column=column, tokenizer=chatting()) == [expected]
    with pytest.raises(UserError, match=r"a\.jsonl, row 1: there is no column 'gone'; it has 'text', 'body', 'talk'"):
        read_documents(path, column="gone")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"id": 1}, "found 'id'"),
        ({"text": ["in", "pieces"]}, "'text' is neither text nor messages"),
        ({"text": 3}, "'text' is neither text nor messages"),
        ({"messages": [{"content": "x"}]}, "without a 'role'"),
        ({"messages": [{"role": "user", "content": [1]}]}, "content of a message is list"),
        ({"prompt": "x", "completion": CHAT}, "both be text or both messages"),
        (["text"], "not a JSON object"),
        (None, "not a JSON object"),
    ],
)
def test_rows_that_hold_no_text(row: object, message: str, tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", [{"text": "words"}, row])
    with pytest.raises(UserError, match=rf"a\.jsonl, row 2.*{message}"):
        read_documents(path, tokenizer=chatting())


def test_empty_rows_are_left_out(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", [{"text": "words"}, {"text": None}, {"text": ""}, {"text": " \n"}])
    assert read_documents(path) == ["words"]
    with pytest.raises(UserError, match="the text is empty"):
        read_documents(lines(tmp_path / "b.jsonl", [{"text": None}]))


def test_a_chat_template_that_refuses_is_named(tmp_path: Path) -> None:
    strict = tokenizer()
    strict.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(UserError, match=r"a\.jsonl, row 1: the chat template.*roles must alternate"):
        read_documents(lines(tmp_path / "a.jsonl", [{"messages": CHAT}]), tokenizer=strict)


def test_messages_without_a_chat_template(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="no chat template"):
        found = read_documents(lines(tmp_path / "a.jsonl", [{"messages": CHAT}]), tokenizer=tokenizer())
    assert found == ["How is it?\n\nWell."]


def test_named_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    """wikitext2's and ptb's rows are lines of one text; c4's and others' are documents."""
    rows = {"wikitext2": ["", "One.\n", "Two.\n"], "ptb": ["one", "two"], "c4": ["One.", "Two."], "some/set": ["One."]}

    def named(name: str, split: str) -> list[dict]:
        return [{"sentence" if name == "ptb" else "text": row} for row in rows[name]]

    monkeypatch.setattr("moefactor.text.documents.named_rows", named)
    found = {name: read_documents(name) for name in rows}
    assert found == {
        "wikitext2": ["One.\nTwo.\n"], "ptb": ["one\n\ntwo"], "c4": ["One.", "Two."], "some/set": ["One."],
    }  # fmt: skip
    assert read_documents("wikitext2", column="body") == found["wikitext2"]  # its own column is known
    with pytest.raises(UserError, match=r"some/set, row 1: there is no column 'body'"):
        read_documents("some/set", column="body")


# -- files -------------------------------------------------------------------------------------------------------------

ROWS = [{"text": text, "id": number} for number, text in enumerate(DOCUMENTS)]


def as_parquet(path: Path) -> None:
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)


def splits(**rows: list[dict]) -> DatasetDict:
    return DatasetDict({name: Dataset.from_list(part) for name, part in rows.items()})


def as_array(path: Path) -> None:
    path.write_text(json.dumps(ROWS, indent=2))


KINDS: dict[str, Callable[[Path], object]] = {
    "a.parquet": as_parquet,
    "a.json": as_array,
    "lines.json": lambda path: lines(path, ROWS),
    "columns.json": lambda path: path.write_text(json.dumps({"text": DOCUMENTS})),
    "nested.json": lambda path: path.write_text(json.dumps({"version": 1, "data": ROWS})),
    "texts.json": lambda path: path.write_text(json.dumps(DOCUMENTS)),
    "a.jsonl": lambda path: lines(path, ROWS),
    "array.jsonl": as_array,
    "bom.jsonl": lambda path: lines(path, ROWS, encoding="utf-8-sig"),
    "a.ndjson": lambda path: lines(path, ROWS, newline="\r\n"),
    "a.csv": lambda path: path.write_text("id,text\n" + "".join(f'{n},"{text}"\n' for n, text in enumerate(DOCUMENTS))),
    "a.TSV": lambda path: path.write_text("text\tid\n" + "".join(f"{text}\t1\n" for text in DOCUMENTS)),
    "saved": lambda path: Dataset.from_list(ROWS).save_to_disk(path),
    "splits": lambda path: splits(train=ROWS, test=ROWS[:1]).save_to_disk(path),
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
def test_kinds_of_files(name: str, tmp_path: Path) -> None:
    KINDS[name](tmp_path / name)
    assert read_documents(str(tmp_path / name)) == DOCUMENTS


def test_conversations_in_parquet(tmp_path: Path) -> None:
    """Tables fill what a message lacks with nulls."""
    talk = [{**CHAT[0], "name": "Ann"}, CHAT[1]]
    parquet.write_table(pyarrow.Table.from_pylist([{"messages": talk}]), tmp_path / "a.parquet")
    assert read_documents(str(tmp_path / "a.parquet"), tokenizer=chatting()) == [WRITTEN]


def test_splits_of_saved_datasets(tmp_path: Path) -> None:
    KINDS["splits"](tmp_path / "d")
    assert read_documents(str(tmp_path / "d"), split="test") == DOCUMENTS[:1]
    splits(a=ROWS, b=ROWS).save_to_disk(tmp_path / "e")
    with pytest.raises(UserError, match=r"no split 'train'.*a, b"):
        read_documents(str(tmp_path / "e"))


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85", "\x0c", "\x0b", "\x1c", "\x1d", "\x1e"])
@pytest.mark.parametrize("escaped", [True, False])
def test_unusual_line_separators(character: str, escaped: bool, tmp_path: Path) -> None:
    text = f"before{character}after"
    row = json.dumps({"text": text}, ensure_ascii=escaped) + "\n"
    if not escaped and ord(character) < 32:
        pytest.skip("JSON has control characters only escaped")
    (tmp_path / "a.jsonl").write_text(row * 2, encoding="utf-8")
    assert read_documents(str(tmp_path / "a.jsonl")) == [text] * 2
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    assert read_documents(str(tmp_path / "a.txt")) == [text]
    assert tokenizer().decode(tokenise(tokenizer(), text)) == text


def test_marks_before_a_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("words", encoding="utf-8-sig")
    assert read_documents(str(tmp_path / "a.txt")) == ["words"]
    (tmp_path / "b.txt").write_text("words", encoding="utf-16")
    with pytest.raises(UserError, match=r"b\.txt: not UTF-8 text but UTF-16"):
        read_documents(str(tmp_path / "b.txt"))


def test_halves_of_characters(tmp_path: Path) -> None:
    """JSON can write a half of a surrogate pair, which no tokenizer takes."""
    (tmp_path / "a.jsonl").write_text('{"text": "a\\ud83d\\ude00b\\ud83dc"}\n')
    (found,) = read_documents(str(tmp_path / "a.jsonl"))
    assert found == "a\U0001f600b\ufffdc"
    tokenise(tokenizer(), found)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"words\0words", "a binary file"),
        ("a.jsonl", b'{"text": "x"}\n\0\0', "a binary file"),
        ("a.bin", b"\x80\x04\x95", "not UTF-8 text"),
        ("model.safetensors", b"\x08\0\0\0\0\0\0\0{}", "a binary file"),
        ("a.parquet", b"PAR1 but no more", "not a Parquet file"),
        ("a.json", b'{"text": "x"', "line 1: not valid JSON"),
        ("a.json", b'[\n{"text": "x"},\n{"text": }\n]', "line 3: not valid JSON"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "y"\n', "line 2: not valid JSON"),
        ("a.jsonl", b"[" * 100_000, "not valid JSON"),
        ("a.json", b"3", "not a JSON object"),
        ("a.csv", b"", "not a table"),
    ],
)
def test_files_that_are_not_what_they_are_called(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name}.*{message}"):
        read_documents(str(tmp_path / name))


def test_a_folder_is_read_whole(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "HEAD.txt").write_text("hidden")
    (tmp_path / "0.txt").write_text("plain")
    as_parquet(tmp_path / "sub" / "1.parquet")
    as_array(tmp_path / "sub" / "2.json")
    assert read_documents(str(tmp_path)) == ["plain", *DOCUMENTS, *DOCUMENTS]
    (tmp_path / "paper.pdf").write_bytes(b"%PDF")
    with pytest.warns(UserWarning, match=r"not read, of another kind than .*: paper\.pdf"):
        read_documents(str(tmp_path))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "paper.pdf").write_bytes(b"%PDF")
    with pytest.raises(UserError, match=r"no text files in this folder.*not read: paper\.pdf"):
        read_documents(str(tmp_path / "other"))


@pytest.mark.parametrize("name", ["gone.jsonl", "gone.parquet", "a\0b.txt", "x" * 5000 + ".txt"])
def test_names_that_are_not_there(name: str) -> None:
    with pytest.raises(UserError):
        read_documents(name)


# -- between documents -------------------------------------------------------------------------------------------------


def test_documents_are_parted_by_what_the_model_knows() -> None:
    ids = tokenise_documents(tokenizer(), ["ab", "cd", "ef<257>", "gh"])
    found = tokenizer().decode(ids)
    assert found == "ab<257>cd<257>ef<257>gh"  # once, also where the text has it
    assert (ids == END).sum() == 3


def test_one_text_is_read_as_it_is() -> None:
    text = "One line.\n\nAnother.\n" * 30
    for reading in (tokenizer(), load_tokenizer(REFERENCE)):
        assert torch.equal(tokenise_documents(reading, [text]), tokenise(reading, text))
    assert tokenise(load_tokenizer(REFERENCE), "a<|endoftext|>b").tolist().count(0) == 1


def test_without_a_separator_a_blank_line_parts() -> None:
    bare = tokenizer()
    bare.eos_token = None
    assert separator(bare) == ([], [])
    assert bare.decode(tokenise_documents(bare, ["ab", "cd"])) == "ab\n\ncd"


def test_a_chat_models_end_of_turn_is_no_end_of_documents() -> None:
    chat = tokenizer()
    chat.add_special_tokens({"additional_special_tokens": ["<|endoftext|>"]})
    assert separator(chat) == ([chat.convert_tokens_to_ids("<|endoftext|>")], [])


def test_what_begins_every_text_begins_every_document() -> None:
    from tokenizers.processors import TemplateProcessing

    begins = tokenizer()
    begins.add_special_tokens({"bos_token": "<256>"})
    begins.backend_tokenizer.post_processor = TemplateProcessing(single="<256> $A", special_tokens=[("<256>", 256)])
    assert separator(begins) == ([END], [256])
    found = begins.decode(tokenise_documents(begins, ["ab", "cd", "<256>ef"]))
    assert found == "ab<257><256>cd<257><256>ef"


def test_no_document_at_all() -> None:
    assert tokenise(tokenizer(), "").tolist() == tokenise_documents(tokenizer(), [""]).tolist() == []


# -- through the verbs -------------------------------------------------------------------------------------------------


@pytest.fixture
def mixed(tmp_path: Path) -> tuple[Path, Path]:
    """Two sources whose tokens tell them apart."""
    lines(tmp_path / "a.jsonl", [{"text": "a" * 100} for _ in range(40)])
    (tmp_path / "b.txt").write_text("b" * 4000)
    return tmp_path / "a.jsonl", tmp_path / "b.txt"


def of(ids: torch.Tensor, character: str) -> int:
    """Windows that hold a character."""
    return int((ids == tokenizer()(character)["input_ids"][0]).any(1).sum())


def test_windows_by_weight(mixed: tuple[Path, Path]) -> None:
    reading = Reading(tokenizer(), VOCABULARY, 16)
    drawn, counts = draw_windows(reading, "{}:3,{}".format(*mixed), 40, 0)
    assert (of(drawn, "a"), of(drawn, "b")) == (30, 10) == tuple(counts.values())
    every = all_windows(reading, "{},{}".format(*mixed))
    assert (of(every, "a"), of(every, "b")) == (252, 250)
    every = all_windows(reading, "{}:1,{}:2".format(*mixed))
    assert (of(every, "a"), of(every, "b")) == (125, 250)


def test_a_source_too_short_for_its_share(mixed: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("c" * 40)
    reading = Reading(tokenizer(), VOCABULARY, 16)
    with pytest.warns(UserWarning, match=r"short\.txt: has 2 windows of 16 tokens, 10 would be its share"):
        drawn, _ = draw_windows(reading, f"{tmp_path / 'short.txt'},{mixed[0]}", 20, 0)
    assert (of(drawn, "c"), of(drawn, "a")) == (2, 10)


def test_calibration_describes_what_it_read(tiny_model: Callable[..., Path], mixed: tuple[Path, Path]) -> None:
    model = StreamedModel(str(tiny_model("mixtral")))
    a, b = map(str, mixed)

    def read(source: str, **how: object) -> dict:
        return Calibration.read(model, source, samples=8, seqlen=16, **how).description

    found = read(f"{a}:2,{b}:1,self")
    assert (found["windows"], found["own"], found["samples"]) == ({a: 4, b: 2}, 2, 8)
    assert read(f"{a}:2,{b}:1", own=0.5)["windows"] == {a: 3, b: 1}
    every = [read(f"{a},{b}"), read(f"{a}:2,{b}"), read(a), read(b), read(a, seed=1), found]
    assert len({json.dumps(d) for d in every}) == len(every)
    json.dumps(every)  # it is written to a file


def test_every_verb_reads_rows(
    tiny_model: Callable[..., Path], compressed: Callable[..., Path], tmp_path: Path, command: Callable
) -> None:
    """The same text, in whichever way it is held, gives the same tokens."""
    rows = [{"body": text * 40} for text in DOCUMENTS]
    path, source = lines(tmp_path / "rows.jsonl", rows), tiny_model("mixtral")
    Dataset.from_list(rows).save_to_disk(tmp_path / "saved")
    (tmp_path / "plain.txt").write_text("<257>".join(row["body"] for row in rows))
    expected = evaluate(str(source), [str(tmp_path / "plain.txt")]).mean_perplexity
    for text in (path, str(tmp_path / "saved")):
        assert evaluate(str(source), [text], text_column="body").mean_perplexity == expected
        assert torch.equal(
            read_ids(text, tokenizer(), VOCABULARY, column="body"),
            read_ids(str(tmp_path / "plain.txt"), tokenizer(), VOCABULARY),
        )
    heal(compressed("mixtral"), str(source), tmp_path / "healed", steps=1, text=path, text_column="body", seqlen=16)
    short = ("--calibration", f"{path}:2,self", "--samples", 4, "--seqlen", 16, "--text-column", "body")
    for line in (
        ("compress", source, "-m", "whitened_svd", *short, "-o", tmp_path / "out"),
        ("calibrate", source, "-m", "whitened_svd", *short, "--run", tmp_path / "run"),
        ("evaluate", source, "--text", path, "--text-column", "body"),
    ):
        assert command(*line)[0] == 0, line
    with pytest.raises(UserError, match="no text to measure on"):
        evaluate(str(source), ["self"])


def test_the_text_of_rows(tmp_path: Path) -> None:
    as_array(tmp_path / "a.json")
    assert read_text(str(tmp_path / "a.json")) == "\n\n".join(DOCUMENTS)
