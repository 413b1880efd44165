"""Results that are an ordinary MoE, only smaller: under the model's own names, and at work while the rest of the model
is still being compressed.

The smaller model's skeleton is built from the config.json that will be written. So what later layers are calibrated
through, router and all, is what a plain from_pretrained will run.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from .checkpoint import FLOATS
from .errors import UserError, required
from .experts import ExpertLayer, ExpertWeights
from .fields import skeleton_of
from .plan import LayerPlan, Plan
from .runtime.format import smaller
from .streaming import OBSERVED, StreamedModel


class Smaller:
    """The smaller model, without weights.

    Raises UserError where the model that config.json will describe would not take what is about to be written.
    """

    def __init__(self, model: StreamedModel, plan: Plan):
        self.skeleton = skeleton_of(model.config, smaller(model.config_json, plan, model.fields))
        self.skeleton.set_experts_implementation(OBSERVED)
        wanted = {name: tuple(t.shape) for name, t in model.model.state_dict().items()}
        for entry in plan.layers:
            wanted |= expert_shapes(entry)
            if entry.kept is not None:
                for name, axis in entry.layer.router:
                    wanted[name] = (*wanted[name][:axis], len(entry.kept), *wanted[name][axis + 1 :])
        found = {name: tuple(t.shape) for name, t in self.skeleton.state_dict().items()}
        wrong = next((n for n in sorted(wanted.keys() | found.keys()) if wanted.get(n) != found.get(n)), None)
        if wrong:
            raise UserError(
                f"{model.name}: config.json can't describe the smaller model: {wrong} would be {found.get(wrong)}, "
                f"written is {wanted.get(wrong)}. Choose another ratio or method."
            )

    def decoder_layer(self, entry: LayerPlan, dense: nn.Module, tensors: dict[str, Tensor]) -> nn.Module:
        """The smaller model's, with weights.

        Args:
            dense: the decoder layer as it was, loaded; what is not cut is shared with it.
            tensors: the compressed layer's, by their names in the journal.
        """
        prefix = entry.layer.decoder_layer + "."
        state = {prefix + name: tensor for name, tensor in dense.state_dict().items()}
        place = next(t for t in state.values() if t.is_floating_point())
        cut = ordinary_experts(entry, tensors) | routers_of(entry, state, tensors)
        state |= {name: tensor.to(place.device, state[name].dtype) for name, tensor in cut.items()}
        layer = copy.deepcopy(self.skeleton.get_submodule(entry.layer.decoder_layer))
        for name, buffer in dense.named_buffers():
            if prefix + name not in state:  # not on disk: tables that are made anew
                owner, _, leaf = name.rpartition(".")
                layer.get_submodule(owner)._buffers[leaf] = buffer
        layer.load_state_dict({name.removeprefix(prefix): t for name, t in state.items()}, assign=True)
        return layer.requires_grad_(False)


class SmallBlock(nn.Module):
    """The MoE block of a smaller decoder layer, a copy in float32 whose experts and router can be trained.

    Args:
        layer: from Smaller.decoder_layer.
    """

    def __init__(self, entry: LayerPlan, layer: nn.Module):
        super().__init__()
        self.entry = entry
        prefix = entry.layer.decoder_layer + "."
        path = block_of(entry.layer)
        self.block = copy.deepcopy(layer.get_submodule(path.removeprefix(prefix))).float()
        routers = {name for name, _ in entry.layer.router}
        experts = entry.layer.name + "."
        self.trained: dict[str, nn.Parameter] = {}
        for name, parameter in self.block.named_parameters():
            whole = f"{path}.{name}"
            own = whole.startswith(experts) and "." not in whole.removeprefix(experts)
            if own or whole in routers:
                parameter.requires_grad = True
                self.trained[whole] = parameter

    def forward(self, inputs: Tensor) -> Tensor:
        """(n, H) -> (n, H); a block works on each token alone."""
        return block_output(self.block, inputs)

    def result(self, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The compressed layer's tensors and the router's, of values of what is trained."""
        layer = self.entry.layer
        prefix = layer.name + "."
        own = {name.removeprefix(prefix): t.detach() for name, t in state.items() if name.startswith(prefix)}
        experts, width = required(self.entry.standard(), "the shape of an ordinary MoE")
        small = replace(layer, experts=experts, intermediate=width)
        weights = ExpertWeights.from_model_layout(small, own)
        tensors = {f"{stack}_weight": weights.stack(stack).flatten(0, 1) for stack in (layer.first_stack, "down")}
        for name, bias in weights.biases().items():
            if name == "first_bias":
                halves = bias.view(experts, -1, width)
                bias = nn.functional.pad(halves, (0, layer.intermediate - width)).flatten(1)
            tensors[name] = bias
        return tensors, {name: t.detach() for name, t in state.items() if not name.startswith(prefix)}


def block_of(layer: ExpertLayer) -> str:
    """Path of the module that routes tokens and adds up what the experts give, where it is not the decoder layer."""
    return layer.name.rpartition(".")[0]


def block_output(block: nn.Module, inputs: Tensor) -> Tensor:
    """(n, H) -> (n, H)."""
    out = block(inputs.unsqueeze(0))
    return (out[0] if isinstance(out, tuple) else out).view_as(inputs)


def ordinary_experts(entry: LayerPlan, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
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


def expert_shapes(entry: LayerPlan) -> dict[str, tuple[int, ...]]:
    """Of what `ordinary_experts` gives."""
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


def routers_of(entry: LayerPlan, dense: dict[str, Tensor], given: dict[str, Tensor]) -> dict[str, Tensor]:
    """The router's tensors by the model's names: those that the layer was given, the others cut from the dense ones."""
    found = {}
    for name, axis in entry.layer.router:
        if name in given:
            found[name] = given[name]
        elif entry.kept is not None:
            found[name] = dense[name].index_select(axis, torch.tensor(entry.kept, device=dense[name].device))
    return found


def new_routers(
    model: StreamedModel, entry: LayerPlan, given: dict[str, Tensor]
) -> dict[str, Callable[[Tensor], Tensor]]:
    """Name on disk -> what the layer's plan, and the router that it was given, make of the tensor that is there."""
    changes: dict[str, Callable[[Tensor], Tensor]] = {}
    for name, axis in entry.layer.router:
        for disk in routers_on_disk(model, name):
            if name in given:
                changes[disk] = partial(_instead, given[name])
            elif entry.kept is not None:
                changes[disk] = partial(torch.index_select, dim=axis, index=torch.tensor(entry.kept))
    return changes


def _instead(new: Tensor, old: Tensor) -> Tensor:
    return new.to(old.dtype)


def routers_on_disk(model: StreamedModel, name: str) -> list[str]:
    """The names on disk of a router's tensor. Raises UserError where it is of another shape there."""
    names = [disk for disk, targets in model.reader.targets.items() if name in targets]
    shape = tuple(model.model.state_dict()[name].shape)
    with model.reader.checkpoint.slices(names) as slices:
        for disk in names:
            if tuple(slices[disk].get_shape()) != shape:
                raise UserError(f"{disk}: the router has another shape on disk than in the model; can't change it.")
    return names


def stored_routers(model: StreamedModel, routers: dict[str, Tensor]) -> dict[str, Tensor]:
    """New router tensors in the dtypes that they have on disk."""
    stored = {}
    for name, tensor in routers.items():
        disk = routers_on_disk(model, name)[0]
        with model.reader.checkpoint.slices([disk]) as slices:
            kind = slices[disk].get_dtype()
        stored[name] = tensor.to(FLOATS[kind]).contiguous()
    return stored
