"""What the plug-ins of engines share: a layer's factors read from the folder, every tensor or an error, a rank's share
of them, and their experts behind the engine's router, activation and all-reduce."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache, partial
from pathlib import Path
from weakref import WeakValueDictionary

import torch
from huggingface_hub import snapshot_download
from torch import Tensor
from torch.nn.functional import gelu, relu, silu

from ..checkpoint import Checkpoint
from ..errors import UserError
from ..plan import LayerPlan
from ..prediction import NAMED
from .format import QUANT_METHOD, Rest, described_layers
from .module import FactorisedExperts
from .parallel import Share, share_of_layer

Activation = Callable[[Tensor], Tensor]  # (pairs, 2I), gate then up as we keep them, or (pairs, I) -> (pairs, I)


class EngineExperts(FactorisedExperts):
    """FactorisedExperts behind an engine's activation instead of a transformers module's."""

    def __init__(self, plan: LayerPlan, dtype: torch.dtype, activation: Activation):
        super().__init__(plan, dtype)
        self.activation = activation

    @classmethod
    def holding(
        cls, plan: LayerPlan, tensors: Mapping[str, Tensor], share: Share, dtype: torch.dtype,
        device: torch.device | str, activation: Activation,
    ) -> EngineExperts:  # fmt: skip
        """A rank's share of a layer on its device, laid out for its kernels.

        tensors: all of the layer's, named as in `plan.tensors()`. Raises UserError for another shape than planned.
        """
        local, parts = share_of_layer(plan, tensors, share)
        module = cls(local, dtype, activation)
        module.load_state_dict(
            {name: t.to(device, dtype if t.is_floating_point() else t.dtype) for name, t in parts.items()}, assign=True
        )
        module.requires_grad_(False).lay_out()
        return module

    def activate(self, first: Tensor) -> Tensor:
        return self.activation(first)


# What the operation below runs, by name: an operation takes no modules.
_EXPERTS: WeakValueDictionary[str, EngineExperts] = WeakValueDictionary()


def announce(model: str, name: str, experts: EngineExperts) -> str:
    """A key for the layer `name` of a model, the same in every process: compiled graphs have it, and stay on disk."""
    key = f"{model}:{name}:{next(experts.parameters()).dtype}"
    _EXPERTS[key] = experts
    return key


@torch.library.custom_op("moefactor::experts", mutates_args=())
def _experts(x: Tensor, weights: Tensor, ids: Tensor, key: str) -> Tensor:
    """One operation to torch.compile, whatever a form's kernel does inside.

    x: (tokens, H). weights, ids: (tokens, top k), ids among the rank's own experts, negative for one elsewhere.
    """
    experts = _EXPERTS[key]
    # One past the last is what Routing skips.
    return experts(x, torch.where(ids < 0, experts.layer.experts, ids), weights)


@_experts.register_fake
def _(x: Tensor, weights: Tensor, ids: Tensor, key: str) -> Tensor:
    return torch.empty_like(x)


def layer_index(name: str) -> int | None:
    """3 of `model.layers.3.mlp.experts`; None for layers of multi-token prediction, which keep their experts."""
    if NAMED.search(name):
        return None
    found = re.search(r"\.(\d+)(\.|$)", name)
    return int(found[1]) if found else None


def plans_by_index(config: dict) -> dict[int, LayerPlan]:
    """The plans of a `quantization_config`. By index, since engines name layers in their own ways."""
    plans = {layer_index(plan.layer.name): plan for plan in described_layers(config)}
    return {index: plan for index, plan in plans.items() if index is not None}


class FolderConfig:
    """What engines ask a quantisation method's configuration; stands before their own base class."""

    def __init__(self, config: dict):
        super().__init__()
        self.plans = plans_by_index(config)
        self.rest = Rest.from_json(config)

    @classmethod
    def from_config(cls, config: dict) -> FolderConfig:
        return cls(config)

    def get_name(self) -> str:
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 70

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []  # it is in config.json


@lru_cache(maxsize=1)
def checkpoint_of(model: str, revision: str | None = None, cache_dir: str | None = None) -> Checkpoint:
    """The folder that an engine is loading, its headers read once for all layers.

    model: a folder, or a repository's name: the engine has downloaded it by now, so this finds it.
    """
    if Path(model).is_dir():
        return Checkpoint(Path(model))
    patterns = ["*.safetensors*", "*.json"]
    return Checkpoint(Path(snapshot_download(model, revision=revision, cache_dir=cache_dir, allow_patterns=patterns)))


def stored_names(plan: LayerPlan) -> list[str]:
    """The layer's tensors by their names in the folder."""
    return [f"{plan.layer.name}.{name}" for name in plan.tensors()]


def read_layer(checkpoint: Checkpoint, plan: LayerPlan) -> dict[str, Tensor]:
    """Name behind the layer's -> tensor, all that the plan speaks of. UserError for one that is missing."""
    with checkpoint.slices(stored_names(plan)) as slices:
        return {name.removeprefix(f"{plan.layer.name}."): view[:] for name, view in slices.items()}


def unpacked(
    weights: Iterable[tuple[str, Tensor]], rest: Rest, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:  # fmt: skip
    """A folder's stream of weights with what is stored in a few bits outside the experts as numbers again."""
    waiting: dict[str, dict[str, Tensor]] = {}
    for name, tensor in weights:
        weight, _, part = name.rpartition("_")
        if part not in ("codes", "scale") or not rest.bits(weight):
            yield name, tensor
            continue
        parts = waiting.setdefault(weight, {})
        parts[part] = tensor if part == "codes" else tensor.to(dtype)
        if len(parts) == 2:
            yield weight, rest.numbers(weight, **waiting.pop(weight))
    if waiting:
        raise UserError(f"{min(waiting)}: its codes or its scales are missing in the folder. Download it again.")


def zeros(plan: LayerPlan, dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors as planned, for an engine that is asked for dummy weights."""
    return {
        name: torch.zeros(spec.shape, dtype=torch.int32 if spec.dtype == "int32" else dtype)
        for name, spec in plan.tensors().items()
    }


def check_layer(plan: LayerPlan, experts: int, hidden: int) -> None:
    """UserError where the engine, from config.json, has built a layer of another shape than planned."""
    ours = plan.layer
    if (ours.experts, ours.hidden) != (experts, hidden):
        raise UserError(
            f"{ours.name}: config.json speaks of {experts} experts of hidden size {hidden}, its quantization_config "
            f"of {ours.experts} of {ours.hidden}. Download the folder again."
        )


def alone(activation: str) -> Activation | None:
    """Of experts without a gate, by the name that engines give it."""
    return {"relu2": _relu_squared, **_PLAIN}.get(activation)


def gated(activation: str, limit: float | None = None) -> Activation | None:
    """f(gate) · up, both clamped where there is a limit."""
    plain = _PLAIN.get(activation)
    return None if plain is None else partial(_gated, plain, limit)


def swiglu_oai(alpha: float, beta: float, limit: float) -> Activation:
    """gpt-oss: gate · σ(α gate) · (up + β), both clamped."""
    return partial(_swiglu_oai, alpha, beta, limit)


_PLAIN: dict[str, Activation] = {"silu": silu, "gelu": gelu, "gelu_tanh": partial(gelu, approximate="tanh")}


def _clamped(first: Tensor, limit: float | None) -> tuple[Tensor, Tensor]:
    gate, up = first.chunk(2, dim=-1)
    return (gate, up) if limit is None else (gate.clamp(max=limit), up.clamp(-limit, limit))


def _gated(activation: Activation, limit: float | None, first: Tensor) -> Tensor:
    gate, up = _clamped(first, limit)
    return activation(gate) * up


def _swiglu_oai(alpha: float, beta: float, limit: float, first: Tensor) -> Tensor:
    gate, up = _clamped(first, limit)
    return gate * torch.sigmoid(alpha * gate) * (up + beta)


def _relu_squared(first: Tensor) -> Tensor:
    return relu(first).square()
