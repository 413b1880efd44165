"""What is in a model and what it would shrink to, from its config and file headers alone."""

from __future__ import annotations

from dataclasses import dataclass

from .checkpoint import Checkpoint, resolve
from .discover import build_skeleton, find_experts, read_config
from .experts import ExpertLayer


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


def inspect(name: str) -> Inspection:
    """Reads config.json and the safetensors headers; no weights."""
    folder = resolve(name)
    config = read_config(folder, name)
    stated = config.dtype  # building may set it
    model = build_skeleton(config, name)
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
