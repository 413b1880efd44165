"""Stage 4: the journal's layers and the rest of the model put together into a checkpoint."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from .checkpoint import CheckpointWriter
from .errors import UserError
from .experts import ExpertWeights
from .plan import LayerPlan, Plan
from .run_folder import RunFolder
from .runtime.format import checkpoint_config, loader_stub, model_card
from .streaming import StreamedModel


def write_checkpoint(model: StreamedModel, plan: Plan, run: RunFolder, output: Path, command: str) -> None:
    """Puts the journal's layers and the rest of the model together; the output appears whole or not at all.

    A plan whose result is an ordinary, smaller MoE (experts dropped, or all cut to one width) is written as one.
    """
    prefixes = tuple(layer.name + "." for layer in model.experts)
    rest = [name for name, target in model.reader.targets.items() if not target.startswith(prefixes)]
    standard = plan.standard()
    with CheckpointWriter(output) as writer:
        for index, entry in enumerate(plan.layers):
            if standard:
                writer.add(model.reader.disk_layout(_standard_layer(entry, run.layer(index))))
            else:
                writer.adopt(run.layer_file(index))
        cuts = _router_cuts(model, plan) if standard else {}

        def change(name: str, tensor: Tensor) -> Tensor:
            if name not in cuts:
                return tensor
            rows = list(cuts[name])
            return tensor[:, rows] if len(tensor) == 1 else tensor[rows]  # ernie's correction is (1, E)

        writer.copy_plain(model.reader.checkpoint, rest, source=model.reader.source, change=change)
        writer.companions(model.folder)
        writer.text("config.json", checkpoint_config(model.folder, plan, model.config.model_type, model.own_code))
        writer.text("plan.json", plan.dumps())
        writer.text("compression.json", json.dumps(run.report(), indent=1) + "\n")
        if not standard and not model.own_code:
            for name, content in loader_stub().items():
                writer.text(name, content)
        writer.text("README.md", model_card(plan, command))


def _standard_layer(entry: LayerPlan, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """One layer's experts under the model's own names, as few and as narrow as they are now."""
    experts, width = entry.standard()
    layer = replace(entry.layer, experts=experts, intermediate=width)
    prefix = layer.name + "."
    tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    first = tensors[f"{layer.first_stack}_weight"].view(experts, -1, layer.hidden)
    gate, up = first.chunk(2, dim=1) if layer.gated else (None, first)
    biases = {}
    if layer.biased:
        halves = tensors["first_bias"].view(experts, -1, entry.layer.intermediate)[:, :, :width]
        biases["up_bias"], biases["down_bias"] = halves[:, -1], tensors["down_bias"]
        biases["gate_bias"] = halves[:, 0] if layer.gated else None
    down = tensors["down_weight"].view(experts, width, layer.hidden).transpose(1, 2)
    weights = ExpertWeights(layer, gate=gate, up=up, down=down, **biases)
    return {prefix + name: tensor for name, tensor in weights.to_model_layout().items()}


def _router_cuts(model: StreamedModel, plan: Plan) -> dict[str, tuple[int, ...]]:
    """Name on disk -> rows that stay, for every router tensor of a layer that loses experts.

    A router tensor is one beside the experts, not a shared expert's, with a row (or entry) for each expert.
    """
    state, cuts = model.model.state_dict(), {}
    for entry in plan.layers:
        if entry.kept is None:
            continue
        block = entry.layer.name.rpartition(".")[0] + "."
        found = {
            name: entry.kept
            for name, target in model.reader.targets.items()
            if target.startswith(block)
            and not target.startswith(entry.layer.name + ".")
            and "shared" not in target.removeprefix(block)
            and (state[target].shape[:1] == (entry.layer.experts,) or state[target].numel() == entry.layer.experts)
        }
        if not found:
            raise UserError(f"{block[:-1]}: no router found beside the experts, so none can be dropped here.")
        cuts |= found
    return cuts
