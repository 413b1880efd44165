"""The documents behind a name: a file, a folder, a dataset, or what every Python brings."""

from __future__ import annotations

from pathlib import Path

from ..errors import UserError
from .files import KINDS, read_file, read_folder
from .hub import DATASETS, LINES, named_rows
from .rows import documents_of
from .sources import OWN
from .tokenizer import Tokenizer

BUILT_IN = "pydoc_data.topics"  # the text that every Python has


def read_documents(
    source: str | None, *, split: str = "train", column: str | None = None, tokenizer: Tokenizer | None = None
) -> list[str]:
    """The documents behind a name.

    Args:
        source: a file (text; or rows of .jsonl, .json, .parquet, .csv), a folder of such files or one that
            `Dataset.save_to_disk` wrote, a name of DATASETS or of the hub's datasets; None for the language reference
            that every Python has (`pydoc_data.topics`).
        split: of a dataset.
        column: of rows, but for DATASETS'; None for `text`, `messages`, or `prompt` with `completion`.
        tokenizer: whose chat template writes `messages`.

    A text is one document, as are wikitext2 and ptb, whose rows are lines.
    """
    if source is None:
        from pydoc_data.topics import topics

        return ["\n\n".join(topics[name] for name in sorted(topics))]
    try:
        path = Path(source).expanduser()
        folder, file = path.is_dir(), path.is_file()
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"{source!r}: not a name that a file can have ({error}).") from None
    if folder:
        documents = read_folder(path, split, column, tokenizer)
    elif file:
        documents = read_file(path, column, tokenizer)
    elif source == OWN:
        raise UserError(f"{OWN}: what the model writes itself is no text to measure on.")
    elif source in DATASETS or (source.count("/") <= 1 and path.suffix.lower() not in KINDS):
        documents = _dataset(source, split, column, tokenizer)
    else:
        raise UserError(f"{source}: no such text file or folder.")
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise UserError(f"{source}: the text is empty.")
    return documents


def _dataset(name: str, split: str, column: str | None, tokenizer: Tokenizer | None) -> list[str]:
    rows = named_rows(name, split)
    column = DATASETS[name][2] if name in DATASETS else column
    if name not in LINES:
        return documents_of(rows, name, column, tokenizer)
    return [LINES[name].join(row[column] for row in rows)]


def read_text(source: str | None, *, split: str = "train", column: str | None = None) -> str:
    """The documents behind a name as one text, a blank line between them."""
    return "\n\n".join(read_documents(source, split=split, column=column))
