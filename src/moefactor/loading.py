"""A model, dense or compressed, whole on one device: how the verbs load what they run."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from .checkpoint import quiet, resolve


def load(name: str, *, device: torch.device | str, dtype: torch.dtype | str = "auto") -> PreTrainedModel:
    """In eval mode; `dtype="auto"` is the checkpoint's own."""
    with quiet():
        return AutoModelForCausalLM.from_pretrained(resolve(name), dtype=dtype, device_map=str(device)).eval()
