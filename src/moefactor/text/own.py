"""Text that a model writes itself: the one text that is sure to be of the kind that it was trained on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    GenerationMixin,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
    TextStreamer,
)

from ..errors import NotFinite, UserError
from ..files import read_tensors, write_tensors
from ..progress import Progress, Steps, silent
from .tokenizer import Tokenizer, check_vocabulary, start_token
from .windows import vocabulary_of

WRITTEN_AT_ONCE = 64  # windows at most, and
WRITTEN_TOKENS = 1 << 15  # of all of them: what the model keeps of each token can come to more than its weights


def write_windows(
    model: PreTrainedModel, tokenizer: Tokenizer, count: int, length: int, seed: int, progress: Progress = silent
) -> Tensor:
    """(count, length) token ids that the model writes itself, sampled from its distribution, whatever its
    generation_config says."""
    start = start_token(tokenizer)
    name = model.config.name_or_path
    if start is None:
        raise UserError(f"{name}: its tokenizer has no token that begins a text, so it can't write any.")
    check_vocabulary(torch.tensor([start]), tokenizer, vocabulary_of(model))
    at_once = max(1, min(WRITTEN_AT_ONCE, WRITTEN_TOKENS // length))
    steps = Steps(progress, "own text", -(-count // at_once) * length)

    def written_one(ids: Tensor, scores: Tensor, **_: object) -> Tensor:
        steps.tick()
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)  # none of them is done

    def sound(ids: Tensor, scores: Tensor) -> Tensor:
        if scores.isnan().any() or scores.amax(-1).isinf().any():
            raise NotFinite("what the model says of the next token", str(name))
        return scores

    # No end token: a document that ends goes on with another, where stopping would leave padding.
    plain = GenerationConfig(
        max_new_tokens=length, min_new_tokens=length, do_sample=True, temperature=1.0, top_k=0, top_p=1.0
    )
    parts = []
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), without_generation_config(model):
        torch.manual_seed(seed)
        for first in range(0, count, at_once):
            prompt = torch.full((min(at_once, count - first), 1), start, device=model.device)
            # Not model.generate: a repository can put its own in that place.
            written = GenerationMixin.generate(
                model, prompt, attention_mask=torch.ones_like(prompt), generation_config=plain,
                stopping_criteria=StoppingCriteriaList([written_one]), logits_processor=LogitsProcessorList([sound]),
            )  # fmt: skip
            parts.append(written[:, -length:].cpu())
    return torch.cat(parts)


# What a look at a model takes from its generation_config: what ends a text, and what its authors keep it from saying.
# How it samples, how many texts it gives and in what form is the caller's to say.
FOLLOWED = (
    "eos_token_id", "pad_token_id", "bos_token_id", "stop_strings", "suppress_tokens", "begin_suppress_tokens",
    "bad_words_ids", "repetition_penalty", "no_repeat_ngram_size",
)  # fmt: skip


# How its authors would have it drawn from, which a conversation follows.
SAMPLED = ("do_sample", "temperature", "top_k", "top_p", "min_p")


def generation_settings(folder: Path, names: tuple[str, ...] = FOLLOWED) -> dict[str, object]:
    """Those settings, as generation_config.json has them, or config.json where there is no such file."""
    for name in ("generation_config.json", "config.json"):
        try:
            found = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(found, dict):
            return {key: found[key] for key in names if found.get(key) not in (None, [], [""], "")}
    return {}


def continue_text(
    model: PreTrainedModel, tokenizer: Tokenizer, ids: Tensor, tokens: int, settings: dict, *, seed: int = 0,
    tell: Callable[[str], None] | None = None,
) -> Tensor:  # fmt: skip
    """(rows, n) -> (rows, ≤ n + tokens): the likeliest next token, again and again, until the text ends; rows that end
    before others are padded.

    Args:
        settings: of generation_settings; with do_sample among them tokens are drawn, by `seed`.
        tell: is given the text as it comes, a word or more at a time.
    """
    ends = settings.get("eos_token_id", tokenizer.eos_token_id)
    pad = settings.get("pad_token_id", ends[0] if isinstance(ends, list) else ends)  # or transformers says it takes it
    more: dict[str, Any] = {"tokenizer": tokenizer} if "stop_strings" in settings else {}
    if tell is not None:
        more["streamer"] = _Told(tokenizer, tell)
    devices = [model.device] if model.device.type == "cuda" else []
    try:
        plain = GenerationConfig(
            **{"do_sample": False, **settings, "eos_token_id": ends, "pad_token_id": pad}, max_new_tokens=tokens
        )
        with torch.random.fork_rng(devices=devices), without_generation_config(model):
            torch.manual_seed(seed)
            return GenerationMixin.generate(
                model, ids, attention_mask=torch.ones_like(ids), generation_config=plain, **more
            )
    except (ValueError, TypeError) as error:  # what transformers raises for a setting that it does not take
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{model.config.name_or_path}: its generation_config.json does not fit it: {reason}") from error


class _Told(TextStreamer):
    """Hands the text on that TextStreamer would print."""

    def __init__(self, tokenizer: Tokenizer, tell: Callable[[str], None]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.tell = tell

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.tell(text)


@contextmanager
def without_generation_config(model: PreTrainedModel) -> Iterator[None]:
    """The model with an empty generation_config: transformers fills every setting that a call leaves open from it."""
    kept, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = kept


def kept_windows(file: Path | None, about: tuple, shape: tuple[int, int], write: Callable[[], Tensor]) -> Tensor:
    """What `write` gives, of that shape, from `file` where an earlier run has left the same; kept there otherwise.

    Writing takes long, and a resumed run must read the same text even where sampling can't be repeated bit for bit.
    """
    name = hashlib.sha256(repr(about).encode()).hexdigest()
    if file is not None and file.is_file():
        found = read_tensors(file)
        if name in found and found[name].dtype == torch.long and found[name].shape == shape:
            return found[name]
    written = write()
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(file, {name: written})
    return written
