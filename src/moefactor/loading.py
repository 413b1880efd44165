"""A model, dense or compressed, whole on one device: how the verbs load what they run."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils import is_accelerate_available

from .checkpoint import quiet, resolve
from .compressed_tensors import check_loads
from .discover import auto_class, own_model, read_config, running_own_code

Model = PreTrainedModel  # what verbs, which do not import transformers, call it


def load(
    name: str, *, device: torch.device | str, dtype: torch.dtype | str = "auto", trust_remote_code: bool = False
) -> Model:
    """In eval mode; `dtype="auto"` is the checkpoint's own. The model's own code runs only where transformers lacks the
    architecture and it is trusted; nothing is asked. Its generation_config stays behind: text/own.py reads what is
    wanted of it, and for a setting that it finds odd transformers loads no model at all."""
    folder = resolve(name)
    config = read_config(folder, name, trust_remote_code)
    check_loads(name, getattr(config, "quantization_config", None))
    own = own_model(config, name, trust_remote_code)
    # Straight to a GPU takes accelerate; without it, by way of the host's memory.
    direct = {"device_map": str(device)} if is_accelerate_available() else {}
    with running_own_code(name, own), quiet():
        kind = AutoModelForCausalLM if own else auto_class(config)
        model = kind.from_pretrained(
            folder, config=config, dtype=dtype, trust_remote_code=own, generation_config=GenerationConfig(), **direct
        )
    return (model if direct else model.to(device)).eval()
