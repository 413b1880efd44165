"""Documents -> token ids -> windows."""

from __future__ import annotations

import re

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from ..errors import UserError
from .documents import read_documents
from .tokenizer import Tokenizer, check_vocabulary, separator

PIECE = 1 << 16  # characters tokenised at a time
LINE_END = re.compile(r"(?<=\S\n)(?=\S)")


def vocabulary_of(model: PreTrainedModel) -> int:
    """Token ids that a model knows: rows of its embedding."""
    rows = model.get_input_embeddings().weight
    assert isinstance(rows, Tensor)
    return len(rows)


def model_length(config: PretrainedConfig, wanted: int | None, default: int = 2048) -> int:
    """Tokens a window: what was asked for, or 2048, or the most the model takes."""
    most = getattr(config.get_text_config(), "max_position_embeddings", None) or default
    if wanted is not None and wanted < 2:
        raise UserError(f"Windows of {wanted} tokens: at least 2 are needed.")
    if wanted is not None and wanted > most:
        raise UserError(f"Windows of {wanted} tokens: this model takes {most} at most.")
    return wanted or min(default, most)


def tokenise(tokenizer: Tokenizer, text: str) -> Tensor:
    """(tokens,) ids of a text, whatever its length; special tokens that are written out in it are those tokens.

    In pieces that end with a line, before one that begins with a word, since the tokenizer's own bookkeeping takes
    fifty bytes a character.
    """
    parts, start = [torch.zeros(0, dtype=torch.long)], 0
    while start < len(text):
        line = LINE_END.search(text, start + PIECE)
        end = line.end() if line else len(text)
        ids = tokenizer(text[start:end], add_special_tokens=False, verbose=False)["input_ids"]
        parts.append(torch.tensor(ids, dtype=torch.long))
        start = end
    return torch.cat(parts)


def tokenise_documents(tokenizer: Tokenizer, documents: list[str]) -> Tensor:
    """(tokens,) ids of documents one after the other, with what the model was trained to see between two; a blank line
    where its tokenizer has no such token.

    What a document brings of that itself, a chat template's end for instance, is not put there again.
    """
    end, begin = separator(tokenizer) if len(documents) > 1 else ([], [])
    if not end and not begin:
        return tokenise(tokenizer, "\n\n".join(documents))
    parts: list[Tensor] = []
    for document in documents:
        ids = tokenise(tokenizer, document)
        if not len(ids):
            continue
        if parts:
            parts.append(torch.tensor(_between(parts[-1], ids, end, begin), dtype=torch.long))
        parts.append(ids)
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.long)


def _between(before: Tensor, after: Tensor, end: list[int], begin: list[int]) -> list[int]:
    ended = bool(end) and before[-len(end) :].tolist() == end
    begun = bool(begin) and after[: len(begin)].tolist() == begin
    return ([] if ended else end) + ([] if begun else begin)


def read_ids(
    source: str | None, tokenizer: Tokenizer, vocabulary: int, *, split: str = "train", column: str | None = None
) -> Tensor:
    """(tokens,) ids of all that stands behind a name, see read_documents. `vocabulary`: rows of the model's embedding.

    UserError for a token beyond them.
    """
    documents = read_documents(source, split=split, column=column, tokenizer=tokenizer)
    return check_vocabulary(tokenise_documents(tokenizer, documents), tokenizer, vocabulary)


def windows(ids: Tensor, length: int, what: str) -> Tensor:
    """(n, length): the text cut into consecutive windows, the rest dropped, as the papers measure."""
    count = len(ids) // length
    if count == 0:
        raise UserError(f"{what}: {len(ids)} tokens are too few for one window of {length}.")
    return ids[: count * length].view(count, length)


def sample_windows(ids: Tensor, length: int, samples: int, seed: int, what: str) -> Tensor:
    """(≤ samples, length): a random choice of the text's windows, in the text's order."""
    every = windows(ids, length, what)
    chosen = torch.randperm(len(every), generator=torch.Generator().manual_seed(seed))[:samples]
    return every[chosen.sort().values]
