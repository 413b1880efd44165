"""A file or a folder -> documents. Every kind of file is read as what it is; none as raw text but text."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from ..errors import UserError
from .rows import COLUMNS, EXPECTED, documents_of
from .tokenizer import Tokenizer

PLAIN = (".txt", ".md", ".rst")
# What a folder that `Dataset.save_to_disk` wrote holds.
SAVED = ("dataset_dict.json", "state.json")
NAMED = 5  # files at most in a message


def read_file(path: Path, column: str | None, tokenizer: Tokenizer | None) -> list[str]:
    """The documents of one file: one of a text, one a row of a table."""
    rows = TABLES.get(path.suffix.lower())
    if rows is None:
        return [_text(path)]
    return documents_of(rows(path, column), str(path), column, tokenizer)


def read_folder(folder: Path, split: str, column: str | None, tokenizer: Tokenizer | None) -> list[str]:
    """The documents of every file of a kind that is read, in the order of their names; the others are named."""
    if any((folder / name).is_file() for name in SAVED):
        from .hub import saved_rows

        return documents_of(saved_rows(folder, split), str(folder), column, tokenizer)
    files = [f for f in sorted(folder.rglob("*")) if f.is_file() and not _hidden(f.relative_to(folder))]
    known = [f for f in files if f.suffix.lower() in KINDS]
    others = [str(f.relative_to(folder)) for f in files if f.suffix.lower() not in KINDS]
    left_out = ", ".join(others[:NAMED]) + (f" and {len(others) - NAMED} more" if len(others) > NAMED else "")
    if not known:
        found = f"; not read: {left_out}" if others else ""
        raise UserError(f"{folder}: no text files in this folder ({', '.join(KINDS)}){found}.")
    if others:
        warnings.warn(f"{folder}: not read, of another kind than {', '.join(KINDS)}: {left_out}.", stacklevel=2)
    return [document for f in known for document in read_file(f, column, tokenizer)]


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _text(path: Path) -> str:
    """A file's text, without the mark that some editors put before it. UserError for what is none, by name."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: can't be read ({error.strerror}).") from None
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{path}: not UTF-8 text but UTF-16; save it as UTF-8.")
    if b"\0" in data:
        raise UserError(
            f"{path}: a binary file (a NUL at byte {data.index(0)}), not text; {', '.join(KINDS)} are read."
        )
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}).") from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _json(path: Path, column: str | None) -> Iterable[object]:
    """A value a line, or one value over many lines, whatever the file is called."""
    text = _text(path)
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError) as error:
        return _lines(path, text, error)
    rows = isinstance(whole, list) and all(isinstance(row, dict) for row in whole)
    return _table(whole, column) if rows or path.suffix.lower() == ".json" else _lines(path, text)


def _lines(path: Path, text: str, whole: Exception | None = None) -> Iterator[object]:
    # Not splitlines(): it also splits at U+2028, U+0085 and form feeds, which JSON has inside strings.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            yield json.loads(line)
        except (ValueError, RecursionError) as error:
            at: int = number
            wrong: Exception = error
            if isinstance(whole, json.JSONDecodeError) and path.suffix.lower() == ".json" and number == 1:
                at, wrong = whole.lineno, whole  # one value over many lines
            why = getattr(wrong, "msg", None) or str(wrong)
            raise UserError(f"{path}, line {at}: not valid JSON ({why}); expected objects with {EXPECTED}.") from None


def _table(value: object, column: str | None) -> Iterable[object]:
    """The rows of a JSON value: of a list, of an object of columns, of one that holds a single list, or one row."""
    if isinstance(value, list):
        return value
    if not isinstance(value, dict):
        return [value]
    wanted = (column,) if column else COLUMNS
    if not any(name in value for name in wanted):
        lists = [part for part in value.values() if isinstance(part, list)]
        return lists[0] if len(lists) == 1 else [value]
    columns = [name for name in wanted if isinstance(value.get(name), list)]
    texts = [name for name in columns if all(isinstance(part, str | None) for part in value[name])]
    chats = [name for name in columns if all(isinstance(part, list) for part in value[name])]
    if texts or chats:
        names = texts + chats
        return [dict(zip(names, row, strict=False)) for row in zip(*(value[name] for name in names), strict=False)]
    return [value]


def _parquet(path: Path, column: str | None) -> Iterator[object]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise UserError(f"{path}: reading it needs pyarrow (pip install datasets).") from None
    try:
        file = parquet.ParquetFile(path)
        names = file.schema_arrow.names
        wanted = {*((column,) if column else COLUMNS), "tools"}
        read = [name for name in names if name in wanted]
        for batch in file.iter_batches(columns=read if {*read} - {"tools"} else names):
            yield from batch.to_pylist()
    except (ArrowException, OSError) as error:
        raise UserError(f"{path}: not a Parquet file that can be read ({str(error).splitlines()[0]}).") from None


def _separated(path: Path, column: str | None) -> Iterable[object]:
    try:
        import pandas
    except ImportError:
        raise UserError(f"{path}: reading it needs pandas (pip install datasets).") from None
    _text(path)  # binary files are refused as everywhere
    mark = "\t" if path.suffix.lower() == ".tsv" else ","
    try:
        return pandas.read_csv(path, sep=mark, dtype=str, keep_default_na=False, encoding="utf-8-sig").to_dict(
            "records"
        )
    except ValueError as error:
        raise UserError(f"{path}: not a table that can be read ({str(error).splitlines()[0]}).") from None


TABLES: dict[str, Callable[[Path, str | None], Iterable[object]]] = {
    ".jsonl": _json, ".ndjson": _json, ".json": _json, ".parquet": _parquet, ".csv": _separated, ".tsv": _separated,
}  # fmt: skip
KINDS = (*PLAIN, *TABLES)
