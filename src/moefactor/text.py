"""Text to calibrate and measure on: files, folders, `datasets` names, what every Python brings, or a model's own."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, StoppingCriteriaList

from .checkpoint import read_tensors, write_tensors
from .errors import UserError
from .progress import Progress, Steps, silent

# Name -> (repository, configuration, text column); the splits are train to calibrate on and test to measure on.
DATASETS = {
    "wikitext2": ("Salesforce/wikitext", "wikitext-2-raw-v1", "text"),
    "c4": ("allenai/c4", "en", "text"),
    "ptb": ("ptb-text-only/ptb_text_only", "penn_treebank", "sentence"),
}
SUFFIXES = (".txt", ".md", ".rst", ".jsonl")
PIECE = 1 << 16  # characters tokenised at a time
LINE_END = re.compile(r"(?<=\S\n)(?=\S)")
OWN = "self"  # the name of the text that the model writes
WRITTEN_AT_ONCE = 64  # windows at most, and
WRITTEN_TOKENS = 1 << 15  # of all of them: what the model keeps of each token can come to more than its weights
STREAMED_DOCUMENTS = 20_000  # of c4 and other unbounded sets; more than any calibration reads


def read_text(source: str | None, *, split: str = "train") -> str:
    """The text behind a name.

    Args:
        source: a text file (.jsonl: the field `text` of each line), a folder of such files, a name of DATASETS or of
            the hub's datasets; None for the language reference that every Python has (`pydoc_data.topics`).
        split: of a dataset.
    """
    if source is None:
        from pydoc_data.topics import topics

        return "\n\n".join(topics[name] for name in sorted(topics))
    path = Path(source).expanduser()
    if path.is_dir():
        files = sorted(f for f in path.rglob("*") if f.suffix in SUFFIXES and f.is_file())
        if not files:
            raise UserError(f"{source}: no text files in this folder ({', '.join(SUFFIXES)}).")
        text = "\n\n".join(_read_file(f) for f in files)
    elif path.is_file():
        text = _read_file(path)
    elif source in DATASETS or (source.count("/") <= 1 and not path.suffix):
        text = _read_dataset(source, split)
    else:
        raise UserError(f"{source}: no such text file or folder.")
    if not text.strip():
        raise UserError(f"{source}: the text is empty.")
    return text


def _read_file(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}).") from None
    if path.suffix != ".jsonl":
        return text
    try:
        return "\n\n".join(json.loads(line)["text"] for line in text.splitlines() if line.strip())
    except (json.JSONDecodeError, KeyError, TypeError):
        raise UserError(f"{path}: every line must be a JSON object with a field 'text'.") from None


def _read_dataset(name: str, split: str) -> str:
    try:
        from datasets import load_dataset
    except ModuleNotFoundError:
        raise UserError(f"{name}: reading data sets takes the package datasets: pip install datasets") from None
    repository, configuration, column = DATASETS.get(name, (name, None, "text"))
    split = "validation" if name == "c4" and split == "test" else split
    try:
        rows = load_dataset(repository, configuration, split=split, streaming=True).take(STREAMED_DOCUMENTS)
        # wikitext's rows are lines of one text, the others' are documents.
        return ("" if name == "wikitext2" else "\n\n").join(row[column] for row in rows)
    except KeyError:
        raise UserError(f"{name}: this dataset has no column {column!r}.") from None
    except Exception as error:  # the library raises a different type for every way a download fails
        known = ", ".join(DATASETS)
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{name}: neither a text file here nor a dataset that can be loaded now ({reason}). Named ones: {known}."
        ) from None


def load_tokenizer(folder: Path) -> object:
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: no tokenizer that transformers can load: {str(error).splitlines()[0]}") from None


def model_length(config: object, wanted: int | None, default: int = 2048) -> int:
    """Tokens a window: what was asked for, or 2048, or the most the model takes."""
    most = getattr(config.get_text_config(), "max_position_embeddings", None) or default
    if wanted is not None and wanted < 2:
        raise UserError(f"Windows of {wanted} tokens: at least 2 are needed.")
    if wanted is not None and wanted > most:
        raise UserError(f"Windows of {wanted} tokens: this model takes {most} at most.")
    return wanted or min(default, most)


def tokenise(tokenizer: object, text: str) -> Tensor:
    """(tokens,) ids of a text, whatever its length.

    In pieces that end with a line, before one that begins with a word, since the tokenizer's own bookkeeping takes
    fifty bytes a character.
    """
    parts, start = [], 0
    while start < len(text):
        line = LINE_END.search(text, start + PIECE)
        end = line.end() if line else len(text)
        ids = tokenizer(text[start:end], add_special_tokens=False, verbose=False)["input_ids"]
        parts.append(torch.tensor(ids, dtype=torch.long))
        start = end
    return torch.cat(parts)


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


def sources(name: str | None) -> tuple[str | None, bool]:
    """`FILE`, `self` or `FILE,self` -> what to read, and whether the model writes (a part of) the text itself."""
    if name == OWN:
        return None, True
    return (name.removesuffix("," + OWN), name.endswith("," + OWN)) if name else (None, False)


def with_own(name: str | None) -> str:
    """The same source with text that the model writes beside it; that text alone where none was named."""
    if sources(name)[1]:
        return name
    return f"{name},{OWN}" if name else OWN


def start_token(tokenizer: object) -> int | None:
    """What a text begins after: the first token of a document, or the last of the one before."""
    return tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id


def write_windows(
    model: PreTrainedModel, tokenizer: object, count: int, length: int, seed: int, progress: Progress = silent
) -> Tensor:
    """(count, length) token ids that the model writes itself, sampled as it would say them (temperature 1).

    The one text that is sure to be of the kind that it was trained on.
    """
    start = start_token(tokenizer)
    if start is None:
        name = model.config.name_or_path
        raise UserError(f"{name}: its tokenizer has no token that begins a text, so it can't write any.")
    at_once = max(1, min(WRITTEN_AT_ONCE, WRITTEN_TOKENS // length))
    steps = Steps(progress, "own text", -(-count // at_once) * length)

    def written_one(ids: Tensor, scores: Tensor, **_: object) -> Tensor:
        steps.tick()
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)  # none of them is done

    parts = []
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        for first in range(0, count, at_once):
            prompt = torch.full((min(at_once, count - first), 1), start, device=model.device)
            # No end token: a document that ends goes on with another, where stopping would leave padding.
            written = model.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=length, min_new_tokens=length,
                do_sample=True, temperature=1.0, top_k=0, top_p=1.0, eos_token_id=None,
                stopping_criteria=StoppingCriteriaList([written_one]),
            )  # fmt: skip
            parts.append(written[:, -length:].cpu())
    return torch.cat(parts)


def kept_windows(file: Path | None, about: tuple, write: Callable[[], Tensor]) -> Tensor:
    """What `write` gives, from `file` where an earlier run has left the same; kept there otherwise.

    Writing takes long, and a resumed run must read the same text even where sampling can't be repeated bit for bit.
    """
    name = hashlib.sha256(repr(about).encode()).hexdigest()
    if file is not None and file.is_file():
        found = read_tensors(file)
        if name in found:
            return found[name]
    written = write()
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(file, {name: written})
    return written
