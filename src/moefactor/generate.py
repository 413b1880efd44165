"""A few words from a model, dense or compressed: the quickest look at whether it still works."""

from __future__ import annotations

import torch

from .checkpoint import resolve
from .loading import load
from .streaming import checked_device
from .text import (
    check_vocabulary,
    continue_text,
    generation_settings,
    load_tokenizer,
    prompt_ids,
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
    ids = prompt_ids(tokenizer, prompt)
    model = load(name, device=checked_device(device), trust_remote_code=trust_remote_code)
    check_vocabulary(ids, tokenizer, vocabulary_of(model))
    out = continue_text(model, tokenizer, ids.unsqueeze(0).to(model.device), tokens, generation_settings(folder))
    text = tokenizer.decode(out[0], skip_special_tokens=True)
    assert isinstance(text, str)  # one row of tokens
    return text
