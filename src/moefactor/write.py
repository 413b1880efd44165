"""Stage 4: the checkpoint, out of the journal's layers and all the rest of the model as it lies on disk.

Whatever is not a compressed expert is kept, name, shape, dtype and bytes: towers of wrappers, buffers, layers of
multi-token prediction that transformers does not build. A plan whose result is an ordinary, smaller MoE is written as
one; then prediction layers, which the same config.json speaks of, are cut like the others.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from .checkpoint import CheckpointWriter
from .discover import auto_class
from .errors import UserError, required
from .experts import ExpertLayer, ExpertWeights
from .fields import shapes
from .methods import Method
from .plan import LayerPlan, Plan
from .prediction import Prediction
from .run_folder import RunFolder
from .runtime.format import checkpoint_config, loader_stub, model_card, smaller
from .streaming import StreamedModel


def check_method(model: StreamedModel, method: Method, options: dict, *, drop_mtp: bool = False) -> None:
    """Raises UserError, before anything is run, where no plan of this method could be written for this model."""
    prediction = Prediction.of(model)
    if drop_mtp and not prediction.names and not prediction.promised:
        raise UserError(f"{model.name}: has no multi-token-prediction layers; leave --drop-mtp out.")
    smaller = method.standard(options)
    if smaller == "count" and any(layer.fixed_count for layer in model.experts):
        raise UserError(
            f"{model.name} ({model.config.model_type}): its experts can't be dropped. Its router has more outputs than "
            "experts, or names them in a table, or no field of config.json counts them alone. Keep the router whole "
            "(reap --intercept), or choose a method that keeps every expert."
        )
    narrows = smaller == "width" and not model.experts[0].fixed_width
    if (smaller == "count" or narrows) and not drop_mtp:
        prediction.check_readable()


def write_checkpoint(
    model: StreamedModel, plan: Plan, run: RunFolder, output: Path, command: str, *, drop_mtp: bool = False
) -> None:
    """Puts the journal's layers and the rest of the model together; the output appears whole or not at all.

    Args:
        drop_mtp: leave out the multi-token-prediction layers, and let config.json say that there are none.
    """
    standard, prediction = plan.standard(), Prediction.of(model)
    if standard is None and any(entry.kept is not None for entry in plan.layers):
        raise UserError(
            f"{model.name}: the plan drops experts, which only an ordinary, smaller MoE can hold: as many in every "
            "layer, where config.json can say so. Plan again."
        )
    config = checkpoint_config(
        model.folder, plan, model.config.model_type, model.fields, auto_class(model.config).__name__,
        without=prediction.promised if drop_mtp else (), own_code=model.own_code,
    )  # fmt: skip
    if standard:
        check_config(model, plan)
    ours = {name for layer in model.experts for name in expert_names(layer)}
    targets = model.reader.targets
    gone = {name for name, found in targets.items() if ours & set(found)}
    cuts = router_cuts(model, plan) if standard else {}
    with CheckpointWriter(output) as writer:
        for index, entry in enumerate(plan.layers):
            if standard:
                writer.add(model.reader.disk_layout(_standard_layer(entry, run.layer(index))))
            else:
                writer.adopt(run.layer_file(index))
        if drop_mtp:
            gone |= prediction.names
        elif standard and standard != (plan.layers[-1].layer.experts, plan.layers[-1].layer.intermediate):
            for block in prediction.blocks:
                writer.add(prediction.cut(block, plan.layers[-1]))
                gone |= block.names.keys()

        def change(name: str, tensor: Tensor) -> Tensor:
            axis, kept = cuts.get(name, (0, None))
            return tensor if kept is None else tensor.index_select(axis, torch.tensor(kept))

        rest = [name for name in model.reader.checkpoint.files if name not in gone]
        reader = model.reader
        writer.copy_plain(
            reader.checkpoint, rest, source=reader.source, change=change, checked=reader.parameters
        )  # fmt: skip
        writer.companions(model.folder)
        writer.text("config.json", config)
        writer.text("plan.json", plan.dumps())
        writer.text("compression.json", json.dumps(run.report(), indent=1) + "\n")
        if not standard and not model.own_code:
            for name, content in loader_stub(auto_class(model.config).__name__).items():
                writer.text(name, content)
        writer.text("README.md", model_card(plan, command, auto_class(model.config).__name__))


def expert_names(layer: ExpertLayer) -> list[str]:
    """The model's names of what is compressed; other tensors may live in the same module (a norm behind them)."""
    names = [layer.first_name, "down_proj"]
    biases = [name + "_bias" for name in names] if layer.biased else []
    return [f"{layer.name}.{name}" for name in names + biases]


def check_config(model: StreamedModel, plan: Plan) -> None:
    """Raises UserError where the model that config.json will describe would not take what is about to be written."""
    wanted = {name: tuple(t.shape) for name, t in model.model.state_dict().items()}
    for entry in plan.layers:
        for name, tensor in _standard_shapes(entry).items():
            wanted[name] = tensor
        if entry.kept is not None:
            for name, axis in entry.layer.router:
                wanted[name] = (*wanted[name][:axis], len(entry.kept), *wanted[name][axis + 1 :])
    found = shapes(model.config, smaller(model.config_json, plan, model.fields))
    wrong = next((n for n in sorted(wanted.keys() | found.keys()) if wanted.get(n) != found.get(n)), None)
    if wrong:
        raise UserError(
            f"{model.name}: config.json can't describe the smaller model: {wrong} would be {found.get(wrong)}, "
            f"written is {wanted.get(wrong)}. Choose another ratio or method."
        )


def _standard_shapes(entry: LayerPlan) -> dict[str, tuple[int, ...]]:
    experts, width = required(entry.standard(), "the shape of an ordinary MoE")
    layer = replace(entry.layer, experts=experts, intermediate=width)
    stacks: dict[str, Tensor | None] = {"gate": None, "gate_bias": None, "up_bias": None, "down_bias": None}
    up = torch.empty(experts, width, layer.hidden, device="meta")
    if layer.gated:
        stacks["gate"] = up
    if layer.biased:
        stacks["up_bias"], stacks["down_bias"] = up[:, :, 0], up[:, 0]
        stacks["gate_bias"] = up[:, :, 0] if layer.gated else None
    weights = ExpertWeights(layer, up=up, down=up.transpose(1, 2), **stacks)
    return {f"{layer.name}.{name}": tuple(t.shape) for name, t in weights.to_model_layout().items()}


def _standard_layer(entry: LayerPlan, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """One layer's experts under the model's own names, as few and as narrow as they are now."""
    experts, width = required(entry.standard(), "the shape of an ordinary MoE")
    layer = replace(entry.layer, experts=experts, intermediate=width)
    prefix = layer.name + "."
    tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    first = tensors[f"{layer.first_stack}_weight"].view(experts, -1, layer.hidden)
    gate, up = first.chunk(2, dim=1) if layer.gated else (None, first)
    biases: dict[str, Tensor | None] = {}
    if layer.biased:
        halves = tensors["first_bias"].view(experts, -1, entry.layer.intermediate)[:, :, :width]
        biases["up_bias"], biases["down_bias"] = halves[:, -1], tensors["down_bias"]
        biases["gate_bias"] = halves[:, 0] if layer.gated else None
    down = tensors["down_weight"].view(experts, width, layer.hidden).transpose(1, 2)
    weights = ExpertWeights(layer, gate=gate, up=up, down=down, **biases)
    return {prefix + name: tensor for name, tensor in weights.to_model_layout().items()}


def router_cuts(model: StreamedModel, plan: Plan) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Name on disk -> (axis, entries that stay), for every router tensor of a layer that loses experts."""
    on_disk: dict[str, list[str]] = {}
    for name, targets in model.reader.targets.items():
        for target in targets:
            on_disk.setdefault(target, []).append(name)
    state = model.model.state_dict()
    cuts: dict[str, tuple[int, tuple[int, ...]]] = {}
    for entry in plan.layers:
        if entry.kept is None:
            continue
        for target, axis in entry.layer.router:
            for name in on_disk.get(target, []):
                with model.reader.checkpoint.slices([name]) as slices:
                    shape = tuple(slices[name].get_shape())
                if shape != tuple(state[target].shape):
                    raise UserError(f"{name}: the router has another shape on disk than in the model; can't cut it.")
                cuts[name] = (axis, entry.kept)
    return cuts
