"""Loading models and looking into them, as several tests do it."""

from __future__ import annotations

import copy
import hashlib
import re
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from moefactor.discover import find_experts
from moefactor.experts import CompressedExperts
from moefactor.plan import Plan

IDS = (torch.arange(2 * 24).view(2, 24) * 7) % 256  # two windows of tokens


def load(folder: Path, **how: object) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, **how).eval()


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    return model(input_ids=ids, use_cache=False).logits


def on_disk(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder's safetensors files."""
    tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def digests(folder: Path) -> dict[str, str]:
    """File -> SHA-256; of the report, all but the seconds that each layer took."""
    found = {p.name: p.read_bytes() for p in sorted(folder.iterdir())}
    if "compression.json" in found:
        found["compression.json"] = re.sub(rb'"seconds": [\d.e-]+', b"", found["compression.json"])
    return {name: hashlib.sha256(data).hexdigest() for name, data in found.items()}


def read_plan(folder: Path, dense: PreTrainedModel) -> Plan:
    return Plan.read(folder / "plan.json", find_experts(dense, "tiny"))


def rebuilt(dense: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The dense model with what the factors in `folder` stand for written into transformers' own experts."""
    model, stored = copy.deepcopy(dense), on_disk(folder)
    for layer_plan in read_plan(folder, dense).layers:
        prefix = layer_plan.layer.name + "."
        tensors = {
            k.removeprefix(prefix): v.float() if v.is_floating_point() else v
            for k, v in stored.items()
            if k.startswith(prefix)
        }
        experts = CompressedExperts(layer_plan.layer, layer_plan.forms, tensors).dense().to_model_layout()
        module = model.get_submodule(layer_plan.layer.name)
        for name, tensor in experts.items():
            getattr(module, name).data.copy_(tensor)
    return model
