"""A few words from a model, dense or compressed: the quickest look at whether it still works."""

from __future__ import annotations

import torch
from torch import Tensor

from .checkpoint import resolve
from .errors import UserError
from .loading import load
from .streaming import checked_device
from .text import (
    Tokenizer,
    check_vocabulary,
    continue_text,
    generation_settings,
    load_tokenizer,
    start_token,
    vocabulary_of,
)


def generate(
    name: str, prompt: str, *, tokens: int = 50, device: torch.device | str | None = None,
    trust_remote_code: bool = False,
) -> str:  # fmt: skip
    """The prompt continued by up to `tokens` tokens, greedily; an empty one from where the model's texts begin.

    Of the model's generation_config: what ends a text, and which tokens it is kept from saying.
    """
    folder = resolve(name)
    tokenizer = load_tokenizer(folder, trust_remote_code)
    ids = _prompt_ids(tokenizer, prompt)
    model = load(name, device=checked_device(device), trust_remote_code=trust_remote_code)
    check_vocabulary(ids, tokenizer, vocabulary_of(model))
    out = continue_text(model, tokenizer, ids.unsqueeze(0).to(model.device), tokens, generation_settings(folder))
    text = tokenizer.decode(out[0], skip_special_tokens=True)
    assert isinstance(text, str)  # one row of tokens
    return text


def _prompt_ids(tokenizer: Tokenizer, prompt: str) -> Tensor:
    """(tokens,) at least one."""
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"The prompt is not UTF-8 text (character {error.start + 1}).") from None
    ids = torch.tensor(tokenizer(prompt)["input_ids"] if prompt else [], dtype=torch.long)
    if len(ids):
        return ids
    start = start_token(tokenizer)
    if start is None:
        raise UserError(
            "The prompt is empty, and this model's tokenizer has no token that begins a text; say something."
        )
    return torch.tensor([start])
