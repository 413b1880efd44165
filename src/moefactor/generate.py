"""A few words from a model, dense or compressed: the quickest look at whether it still works."""

from __future__ import annotations

import torch

from .checkpoint import resolve
from .loading import load
from .streaming import checked_device
from .text import load_tokenizer


def generate(name: str, prompt: str, *, tokens: int = 50, device: torch.device | str | None = None) -> str:
    """The prompt continued by up to `tokens` tokens, greedily."""
    tokenizer = load_tokenizer(resolve(name))
    model = load(name, device=checked_device(device))
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    inputs.pop("token_type_ids", None)
    out = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    return tokenizer.decode(out[0], skip_special_tokens=True)
