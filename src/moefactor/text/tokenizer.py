"""A model's tokenizer: opened without a question, and what of its tokens begins, ends and parts documents."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

from ..discover import own_code_refused, read_config
from ..errors import UserError

Tokenizer = PreTrainedTokenizerBase
# What ends a document where a chat model's eos_token ends a turn: Qwen and gpt-oss, Llama 3, Kimi.
DOCUMENT_ENDS = ("<|endoftext|>", "<|end_of_text|>", "[EOS]")


def load_tokenizer(folder: Path | str, trust_remote_code: bool = False) -> Tokenizer:
    """The tokenizer of a model's folder. One with code of its own only if that is trusted; nothing is asked."""
    folder = Path(folder)
    own = _own_class(folder)
    refused = own_code_refused(str(folder), f"Its tokenizer ({own})")
    # tokenizer.json is a whole tokenizer in the library's own format, whatever class wraps it.
    if own and not trust_remote_code and not (folder / "tokenizer.json").is_file():
        raise refused
    trusted = bool(own) and trust_remote_code
    # Read here, since of a config with code of its own only what transformers lacks is wanted.
    config = read_config(folder, str(folder), True) if trusted and (folder / "config.json").is_file() else None
    try:
        return AutoTokenizer.from_pretrained(folder, config=config, trust_remote_code=trusted)
    except Exception as error:  # the library and a repository's own code raise what they like
        if own and not trusted and "trust_remote_code" in str(error):
            raise refused from None
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{folder}: no tokenizer that transformers can load: {reason}") from None


def names_own_code(folder: Path) -> bool:
    """Whether the tokenizer comes with code of the repository's own, though transformers may have its class too."""
    return bool(_settings(folder).get("auto_map"))


def _own_class(folder: Path) -> str | None:
    """The class of a tokenizer that is the repository's own, not one of transformers'."""
    config = _settings(folder)
    named = config.get("auto_map")
    named = named.get("AutoTokenizer") if isinstance(named, dict) else named  # older ones are a list alone
    if not named:
        return None
    ordinary = config.get("tokenizer_class")
    if ordinary and (tokenizer_class_from_name(ordinary) or tokenizer_class_from_name(f"{ordinary}Fast")):
        return None
    return next((str(name) for name in ([named] if isinstance(named, str) else named) if name), None)


def _settings(folder: Path) -> dict:
    """tokenizer_config.json, or nothing."""
    path = folder / "tokenizer_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}).") from None
    return config if isinstance(config, dict) else {}


def start_token(tokenizer: Tokenizer) -> int | None:
    """What a text begins after: the first token of a document, or the last of the one before."""
    return tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id


def prompt_ids(tokenizer: Tokenizer, prompt: str) -> Tensor:
    """(tokens,) at least one: an empty prompt is where the model's texts begin."""
    ids = torch.tensor(tokenizer(_utf8(prompt))["input_ids"] if prompt else [], dtype=torch.long)
    if len(ids):
        return ids
    start = start_token(tokenizer)
    if start is None:
        raise UserError(
            "The prompt is empty, and this model's tokenizer has no token that begins a text; say something."
        )
    return torch.tensor([start])


def chat_ids(tokenizer: Tokenizer, messages: list[dict]) -> Tensor:
    """(tokens,) of a conversation up to where the next reply begins, by the chat template."""
    text = write_chat(tokenizer, messages, "the conversation", add_generation_prompt=True)
    return torch.tensor(tokenizer(_utf8(text), add_special_tokens=False)["input_ids"], dtype=torch.long)


def write_chat(tokenizer: Tokenizer, messages: list[dict], where: str, **extra: Any) -> str:
    """A conversation as the chat template writes it; UserError, with `where` it is, for one that it does not take."""
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, **extra)
    except Exception as error:  # a template is a program: it raises what it likes
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{where}: the chat template of {tokenizer.name_or_path} does not take these messages: {reason}"
        ) from None
    assert isinstance(text, str)  # one conversation, not tokenised
    return text


def _utf8(prompt: str) -> str:
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"The prompt is not UTF-8 text (character {error.start + 1}).") from None
    return prompt


def separator(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """What the model was trained to see at the end of a document, and at the beginning of the next; [] where nothing.

    The end is eos_token, unless there is one for documents beside that for turns. The beginning is what the tokenizer
    puts before every text by itself.
    """
    added = tokenizer.get_added_vocab()
    end = next((added[name] for name in DOCUMENT_ENDS if name in added), tokenizer.eos_token_id)
    begin = tokenizer.bos_token_id
    begins = begin is not None and tokenizer("a", verbose=False)["input_ids"][:1] == [begin]
    return [end] if end is not None else [], [begin] if begins and begin != end else []


def check_vocabulary(ids: Tensor, tokenizer: Tokenizer, vocabulary: int) -> Tensor:
    """The ids, all below `vocabulary`, the rows of the model's embedding; UserError with the first that is not."""
    if len(ids) and int(ids.max()) >= vocabulary:
        beyond = int(ids[ids >= vocabulary][0])
        token = tokenizer.convert_ids_to_tokens(beyond)
        raise UserError(
            f"{tokenizer.name_or_path}: its tokenizer makes token {beyond} ({token!r}), but the model's embedding ends "
            f"at {vocabulary - 1}. Resize it (model.resize_token_embeddings), or take the added tokens out of the "
            "tokenizer."
        )
    return ids
