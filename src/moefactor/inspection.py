"""What is in a model and what it would shrink to, from its config and file headers alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .checkpoint import Checkpoint, resolve
from .discover import build_skeleton, find_experts, read_config
from .errors import UserError
from .experts import ExpertLayer
from .files import read_json
from .runtime.format import QUANT_METHOD, described_layers
from .runtime.kernels import Setting, way, why_not
from .streaming import checked_device


@dataclass(frozen=True)
class Inspection:
    """parameters: all of the model's; expert_parameters: the routed experts'; bytes: on disk."""

    name: str
    model_type: str
    layers: list[ExpertLayer]
    parameters: int
    bytes: int
    dtype: str

    @property
    def expert_parameters(self) -> int:
        return sum(layer.parameter_count for layer in self.layers)

    def shrunk(self, ratio: float) -> tuple[int, float]:
        """The model's parameters once `ratio` of the experts' are removed, and the fraction of the model that is."""
        removed = int(ratio * self.expert_parameters)
        return self.parameters - removed, removed / self.parameters


def inspect(name: str, *, trust_remote_code: bool = False) -> Inspection:
    """Reads config.json and the safetensors headers; no weights."""
    folder = resolve(name)
    config = read_config(folder, name, trust_remote_code)
    stated = config.dtype  # building may set it
    model = build_skeleton(config, name, trust_remote_code=trust_remote_code)
    layers = find_experts(model, name)
    checkpoint = Checkpoint(folder)
    return Inspection(
        name,
        config.model_type,
        layers,
        # Tied weights are one tensor, though the skeleton has a place for each.
        parameters=sum(p.numel() for n, p in model.named_parameters() if n not in model.all_tied_weights_keys),
        bytes=checkpoint.bytes(),
        dtype=str(stated or checkpoint.dtype).removeprefix("torch."),
    )


@dataclass(frozen=True)
class KernelChoice:
    """How stacks of one form are run.  stacks: how many of the model's.  slower_because: (way, why it can't be) of
    those that would be faster."""

    stack: str
    form: str
    stacks: int
    kernel: str
    slower_because: tuple[tuple[str, str], ...]


def kernels_of(name: str, *, device: str | None = None, dtype: torch.dtype | None = None) -> list[KernelChoice]:
    """Which kernels would run a compressed folder on a device, from its config.json alone.

    Args:
        dtype: None for the one that the config names, or float32.
    """
    config = read_json(resolve(name) / "config.json") or {}
    quantisation = config.get("quantization_config") or {}
    if quantisation.get("quant_method") != QUANT_METHOD:
        raise UserError(f"{name}: holds no factors of moefactor's; its experts are run by transformers or the engine.")
    named = config.get("dtype") or config.get("torch_dtype") or "float32"
    setting = Setting.at(checked_device(device), dtype or getattr(torch, named))
    found: dict[tuple, KernelChoice] = {}
    for plan in described_layers(quantisation):
        for stack, form in plan.forms.items():
            chosen, reasons = way(form, setting).name, tuple(dict.fromkeys(why_not(form, setting)))
            key = (stack, form.name, chosen, reasons)
            count = found[key].stacks + 1 if key in found else 1
            found[key] = KernelChoice(stack, form.name, count, chosen, reasons)
    return list(found.values())
