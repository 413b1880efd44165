"""Layers of multi-token prediction: on disk and promised by config.json, though transformers does not build them.

They are looked for by name (`mtp.`, `nextn`, a layer behind the last one) and read through the last layer that has
experts, whose tensors have the same names behind the layer's own.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from .errors import UserError, required
from .experts import ExpertWeights
from .fields import walk
from .methods.reap import best_in_groups
from .plan import LayerPlan
from .streaming import StreamedModel

NAMED = re.compile(r"(^|\.)(mtp\w*|nextn\w*)\.")
EXPERTS = re.compile(r"(^|\.)experts?\.")
PROMISE = re.compile(r"mtp|nextn")


@dataclass(frozen=True)
class Block:
    """One prediction layer. names: on disk -> the last expert layer's name for the same tensor, experts and router."""

    prefix: str
    names: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Prediction:
    """A model's prediction layers.

    Args:
        names: all their tensors on disk.
        blocks: those with routed experts.
        unread: a tensor of experts that no tensor of the last expert layer is like, or None.
        promised: paths in config.json that say how many there are.
    """

    model: StreamedModel
    names: frozenset[str]
    blocks: tuple[Block, ...]
    unread: str | None
    promised: tuple[tuple[str, ...], ...]

    @classmethod
    def of(cls, model: StreamedModel) -> Prediction:
        unplaced = [name for name in model.reader.checkpoint.files if name not in model.reader.targets]
        names = frozenset(name for name in unplaced if NAMED.search(name) or _is_behind_the_last(model, name))
        tails = _tails(model)
        found: dict[str, Block] = {}
        unread: str | None = None
        for name in sorted(names):
            parts = name.split(".")
            split = next((i for i in range(1, len(parts)) if ".".join(parts[i:]) in tails), None)
            if split is not None:
                prefix = ".".join(parts[:split]) + "."
                found.setdefault(prefix, Block(prefix)).names[name] = tails[".".join(parts[split:])]
            elif EXPERTS.search(name) and "shared" not in name:
                unread = unread or name
        for block in found.values():
            lacking = set(tails.values()) - set(block.names.values())
            unread = unread or (min(block.names) if lacking else None)
        return cls(model, names, tuple(found.values()), unread, tuple(_promised(model)))

    def check_readable(self) -> None:
        if self.unread:
            raise UserError(
                f"{self.model.name}: its multi-token-prediction layers can't be cut like the others ({self.unread} is "
                "like none of the last layer's tensors). Leave them out with --drop-mtp."
            )

    @torch.no_grad()
    def cut(self, block: Block, entry: LayerPlan) -> dict[str, Tensor]:
        """Name on disk -> tensor: as many experts and as wide as `entry`, the last layer's plan, leaves.

        No text runs through a prediction layer, so what stays is chosen by weights: the experts with the largest
        ‖up‖·‖down‖, in every group of the router, and the channels with the largest ‖up_k‖·‖down_k‖.
        """
        self.check_readable()
        model, layer = self.model, entry.layer
        experts = {n: proto for n, proto in block.names.items() if proto not in _routers(model)}
        model.reader.load_as(experts, layer.name, model.device)
        module = model.model.get_submodule(layer.name)
        weights = ExpertWeights.from_model_layout(layer, dict(module.named_parameters(recurse=False)))
        count, width = required(entry.standard(), "the shape of an ordinary MoE")
        kept = best_in_groups(
            weights.up.flatten(1).norm(dim=1) * weights.down.flatten(1).norm(dim=1), layer.router_groups,
            count // layer.router_groups,
        )  # fmt: skip
        smaller = _narrowed(weights, torch.tensor(kept), width)
        tensors = {f"{layer.name}.{k}": v.to(model.stored_dtype).cpu() for k, v in smaller.to_model_layout().items()}
        model.reader.release(layer.name)
        tail = _tail_of(layer.decoder_layer)
        found = {block.prefix + tail(name): t for name, t in model.reader.disk_layout(tensors).items()}
        axes = dict(layer.router)
        for name, proto in block.names.items():
            if proto in _routers(model):
                with model.reader.checkpoint.slices([name]) as slices:
                    axis = axes[model.reader.targets[proto][0]]
                    found[name] = slices[name][:].index_select(axis, torch.tensor(kept)).contiguous()
        return found


def _narrowed(weights: ExpertWeights, kept: Tensor, width: int) -> ExpertWeights:
    """`kept` experts, in each the `width` channels with the largest weights."""
    score = weights.up.norm(dim=2) * weights.down.norm(dim=1)  # (E, I)
    kept = kept.to(score.device)
    channels = score[kept].topk(width, dim=1).indices.sort(dim=1).values  # (E', width)
    rows = channels.unsqueeze(2).expand(-1, -1, weights.layer.hidden)

    def pick(tensor: Tensor, index: Tensor, dim: int) -> Tensor:
        return tensor[kept].gather(dim, index)

    return replace(
        weights,
        layer=replace(weights.layer, experts=len(kept), intermediate=width),
        up=pick(weights.up, rows, 1),
        gate=None if weights.gate is None else pick(weights.gate, rows, 1),
        down=pick(weights.down, rows.transpose(1, 2), 2),
        gate_bias=None if weights.gate_bias is None else pick(weights.gate_bias, channels, 1),
        up_bias=None if weights.up_bias is None else pick(weights.up_bias, channels, 1),
        down_bias=None if weights.down_bias is None else weights.down_bias[kept],
    )


def _routers(model: StreamedModel) -> set[str]:
    """Names on disk of the last expert layer's router."""
    names = {name for name, _ in model.experts[-1].router}
    return {name for name, targets in model.reader.targets.items() if names & set(targets)}


def _tails(model: StreamedModel) -> dict[str, str]:
    """What follows the layer's own name -> the name on disk, for the last layer's experts and router."""
    layer = model.experts[-1]
    own = {f"{layer.name}.{name}" for name, _ in model.model.get_submodule(layer.name).named_parameters(recurse=False)}
    own |= {name for name, _ in layer.router}
    found = {name: name for name, targets in model.reader.targets.items() if own & set(targets)}
    tail = _tail_of(layer.decoder_layer)
    return {tail(name): name for name in found}


def _tail_of(decoder_layer: str) -> Callable[[str], str]:
    """A tensor's name -> what follows the decoder layer's number in it."""
    number = f".{decoder_layer.rpartition('.')[2]}."
    return lambda name: name.partition(number)[2] or name


def _is_behind_the_last(model: StreamedModel, name: str) -> bool:
    """Whether the tensor belongs to a decoder layer of a number that the model does not have."""
    numbers = [int(part) for part in name.split(".") if part.isdigit()]
    if not numbers or numbers[0] < len(model.decoder_layers):
        return False
    last = f".{len(model.decoder_layers) - 1}."
    lists = {n.partition(last)[0] for n in model.reader.targets if last in n}
    return name.partition(f".{numbers[0]}.")[0] in lists


def _promised(model: StreamedModel) -> list[tuple[str, ...]]:
    """Paths in config.json, or among its class's defaults, whose number (or yes) promises such layers."""
    paths: dict[tuple[str, ...], None] = {}
    for source in (model.config_json, model.config.to_dict()):
        for path, value in walk(source):
            if PROMISE.search(path[-1]) and (value is True or (isinstance(value, int) and value > 0)):
                paths[path] = None
    return list(paths)
