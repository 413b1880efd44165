"""A row of a table or one JSON object -> the text of a document."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable
from typing import Any

from ..errors import UserError
from .tokenizer import Tokenizer, write_chat

# The columns that are looked for, in this order; --text-column names another.
CHATS = ("messages", "conversations")
PAIR = ("prompt", "completion")
COLUMNS = ("text", *CHATS, *PAIR)
EXPECTED = "a field 'text', 'messages', or 'prompt' and 'completion' (--text-column names another)"
# ShareGPT's names for roles.
ROLES = {"human": "user", "gpt": "assistant", "bing": "assistant", "chatgpt": "assistant"}


def documents_of(rows: Iterable[object], where: str, column: str | None, tokenizer: Tokenizer | None) -> list[str]:
    """The documents of a file's rows, those without text left out.

    Args:
        where: the file's name, for messages.
        column: that holds the text or the conversation; None for the first of COLUMNS that is there.
        tokenizer: whose chat template writes conversations; None for their bare contents.
    """
    found = (_document(row, f"{where}, row {number}", column, tokenizer) for number, row in enumerate(rows, 1))
    return [text for text in found if text]


def _document(row: object, where: str, column: str | None, tokenizer: Tokenizer | None) -> str:
    if isinstance(row, str) and column is None:
        return _clean(row)  # a list of texts
    if not isinstance(row, dict):
        raise UserError(f"{where}: not a JSON object with {EXPECTED}.")
    if column is None and not any(name in row for name in COLUMNS):
        raise UserError(f"{where}: expected {EXPECTED}, found {_names(row)}.")
    if column is not None and column not in row:
        raise UserError(f"{where}: there is no column {column!r}; it has {_names(row)}.")
    chosen = column or next((name for name in COLUMNS if row.get(name) is not None), COLUMNS[0])
    both = column is None and chosen in PAIR
    return _written(_pair(row, where) if both else row.get(chosen), row, chosen, where, tokenizer)


def _written(value: object, row: dict, column: str, where: str, tokenizer: Tokenizer | None) -> str:
    """The value of a column: text as it is, a conversation through the chat template."""
    if value is None:
        return ""
    value = _unpacked(value) if column in CHATS else value
    if isinstance(value, str):
        return _clean(value)
    if isinstance(value, list) and all(isinstance(part, dict) for part in value):
        return _clean(_conversation(value, row.get("tools"), where, tokenizer))
    raise UserError(
        f"{where}: the field {column!r} is neither text nor messages ({type(value).__name__}); expected {EXPECTED}."
    )


def _unpacked(value: object) -> object:
    """Messages, also where a table keeps them as the JSON of a list."""
    try:
        found = json.loads(value) if isinstance(value, str) else value
    except ValueError:
        return value
    return found if isinstance(found, list) else value


def _pair(row: dict, where: str) -> object:
    """Prompt and completion: two texts joined as they are, or two parts of one conversation."""
    parts = [row[name] for name in PAIR if row.get(name) is not None]
    if all(isinstance(part, str) for part in parts):
        return "".join(parts)
    if all(isinstance(part, list) for part in parts):
        return [message for part in parts for message in part]
    raise UserError(f"{where}: 'prompt' and 'completion' must both be text or both messages.")


def _conversation(messages: list[dict], tools: object, where: str, tokenizer: Tokenizer | None) -> str:
    messages = [_message(message, where) for message in messages]
    if tokenizer is None or not getattr(tokenizer, "chat_template", None):
        if tokenizer is not None:
            warnings.warn(
                f"{tokenizer.name_or_path}: its tokenizer has no chat template, so messages are read as bare text, "
                "one after the other.",
                stacklevel=2,
            )
        return "\n\n".join(message["content"] for message in messages if message["content"])
    extra: dict[str, Any] = {"tools": tools} if isinstance(tools, list) and tools else {}
    return write_chat(tokenizer, messages, where, **extra)


def _message(message: dict, where: str) -> dict:
    """`role` and `content`, also from ShareGPT's `from` and `value`; content in parts becomes their text.

    Tables fill what a message lacks with nulls, which templates would take for values.
    """
    message = {name: value for name, value in message.items() if value is not None}
    role = message.pop("from", None)
    if role is not None and "role" not in message:
        message["role"] = ROLES.get(role, role)
    if "value" in message and "content" not in message:
        message["content"] = message.pop("value")
    if not isinstance(message.get("role"), str):
        raise UserError(f"{where}: a message without a 'role' (it has {_names(message)}).")
    content = message.get("content", "")
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else part for part in content]  # None: an image, say
        content = "".join(part for part in parts if part is not None) if _texts(parts) else content
    if not isinstance(content, str):
        raise UserError(f"{where}: the content of a message is {type(content).__name__}, not text.")
    return {**message, "content": content}


def _texts(parts: list[object]) -> bool:
    return all(isinstance(part, str | None) for part in parts)


def _clean(text: str) -> str:
    """Halves of surrogate pairs, which JSON can write and no tokenizer reads, as U+FFFD; two as what they are."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _names(row: dict) -> str:
    return ", ".join(map(repr, row)) or "nothing"
