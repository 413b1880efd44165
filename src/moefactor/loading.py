"""A model, dense or compressed, whole on one device: how the verbs load what they run."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from .checkpoint import quiet, resolve
from .discover import own_model, read_config, running_own_code


def load(
    name: str, *, device: torch.device | str, dtype: torch.dtype | str = "auto", trust_remote_code: bool = False
) -> PreTrainedModel:
    """In eval mode; `dtype="auto"` is the checkpoint's own. The model's own code runs only where transformers lacks the
    architecture and it is trusted; nothing is asked. Its generation_config stays behind: text/own.py reads what is
    wanted of it, and for a setting that it finds odd transformers loads no model at all."""
    folder = resolve(name)
    config = read_config(folder, name, trust_remote_code)
    own = own_model(config, name, trust_remote_code)
    with running_own_code(name, own), quiet():
        return AutoModelForCausalLM.from_pretrained(
            folder, config=config, dtype=dtype, device_map=str(device), trust_remote_code=own,
            generation_config=GenerationConfig(),
        ).eval()  # fmt: skip
