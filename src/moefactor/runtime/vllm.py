"""The vLLM plug-in: `vllm serve OUT` of a compressed folder, found by the entry point `vllm.general_plugins`.

What vLLM takes for a quantisation method keeps a layer's routed experts as factors and runs them by our kernels, behind
vLLM's router and before its all-reduce. Factors do not pass through the models' own loading code, which differs from
model to model and drops names that it does not know: they are taken out of the stream of weights, and each layer
reads its own from the folder, every tensor or an error, of each only the part that is this GPU's.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor
from torch.nn.functional import gelu, relu, silu
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.models.utils import WeightsMapper, extract_layer_index

from ..checkpoint import Checkpoint
from ..errors import UserError
from ..plan import LayerPlan
from .format import QUANT_METHOD, described_layers
from .module import FactorisedExperts
from .parallel import Share, share_of_layer

LOAD_FORMATS = ("auto", "hf", "safetensors")  # those that vLLM's default loader reads


def register() -> None:
    """Called by vLLM in every one of its processes; again does no harm."""
    register_quantization_config(QUANT_METHOD)(MoefactorConfig)
    log = logging.getLogger(register_model_loader.__module__)
    level = log.level
    log.setLevel(logging.ERROR)  # that a loader takes another's place is what is wanted
    for name in LOAD_FORMATS:
        register_model_loader(name)(StrictLoader)
    log.setLevel(level)


class MoefactorConfig(QuantizationConfig):
    """`quantization_config` of a compressed folder. vLLM pickles it on its way to the engine's processes."""

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        self.config = config
        self.plans = {extract_layer_index(plan.layer.name): plan for plan in described_layers(config)}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> MoefactorConfig:
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

    def get_checkpoint_weight_mapper(self) -> WeightsMapper:
        """Drops factors from the stream of weights; see the module's docstring."""
        names = {name for plan in self.plans.values() for name in _stored(plan)}
        ours = re.compile(rf"\.experts\.({'|'.join(map(re.escape, sorted(names)))})$")
        return super().get_checkpoint_weight_mapper() | WeightsMapper(orig_to_new_regex={ours: None})

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        if isinstance(layer, LinearBase):
            return UnquantizedLinearMethod()
        if not isinstance(layer, RoutedExperts):
            return None
        plan = self.plans.get(extract_layer_index(prefix))
        # Layers of multi-token prediction keep their experts.
        return FactorisedMoEMethod(layer, plan) if plan is not None else None


class FactorisedMoEMethod(FusedMoEMethodBase):
    """A layer's experts as factors, run by moefactor's kernels."""

    def __init__(self, layer: RoutedExperts, plan: LayerPlan):
        super().__init__(layer.moe_config)
        biased = layer.moe_config.has_bias
        self.plan = replace(plan, layer=replace(plan.layer, biased=biased))
        self.engine = get_current_vllm_config()
        self.activation = _activation(layer)
        if layer.apply_router_weight_on_input:
            raise UserError(f"{plan.layer.name}: routers that weigh the experts' inputs are not served by vLLM yet.")

    def create_weights(
        self, layer: RoutedExperts, num_experts: int, hidden_size: int, intermediate_size_per_partition: int,
        params_dtype: torch.dtype, **extra_weight_attrs: object,
    ) -> None:  # fmt: skip
        """No weights yet: what would stand here empty, a loader that misses a name would leave so."""
        ours, found = self.plan.layer, (self.moe.num_experts, hidden_size)
        if (ours.experts, ours.hidden) != found:
            raise UserError(
                f"{ours.name}: config.json speaks of {found[0]} experts of hidden size {found[1]}, its "
                f"quantization_config of {ours.experts} of {ours.hidden}. Download the folder again."
            )
        self.dtype = params_dtype

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        """Reads the layer's factors, and keeps this GPU's part."""
        parallel = self.moe.moe_parallel_config
        if parallel.use_ep:
            local = [] if layer._expert_map is None else layer._expert_map.cpu()
            held = [e for e in range(self.plan.layer.experts) if layer._expert_map is None or local[e] >= 0]
            share = Share.of_experts(self.plan, held)
        else:
            share = Share.of_channels(self.plan, parallel.tp_rank, parallel.tp_size)
        plan, tensors = share_of_layer(self.plan, self._read(), share)
        module = _Experts(plan, self.dtype, self.activation)
        device = self.engine.device_config.device
        module.load_state_dict(
            {name: t.to(device, self.dtype if t.is_floating_point() else t.dtype) for name, t in tensors.items()},
            assign=True,
        )
        module.requires_grad_(False).lay_out()
        layer.factorised = module
        self.key = _announce(layer)

    def _read(self) -> dict[str, Tensor]:
        """Name behind the layer's -> tensor, all that the plan speaks of. UserError for one that is missing."""
        if self.engine.load_config.load_format == "dummy":
            specs = self.plan.tensors()
            return {
                name: torch.zeros(spec.shape, dtype=torch.int32 if spec.dtype == "int32" else self.dtype)
                for name, spec in specs.items()
            }
        prefix = self.plan.layer.name + "."
        with _checkpoint(self.engine).slices([prefix + name for name in _stored(self.plan)]) as slices:
            return {name.removeprefix(prefix): view[:] for name, view in slices.items()}

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> None:
        return None

    def apply(
        self, layer: RoutedExperts, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, shared_experts: object,
        shared_experts_input: Tensor | None,
    ) -> Tensor:  # fmt: skip
        return torch.ops.moefactor.experts(x, topk_weights, topk_ids, self.key)


class StrictLoader(DefaultModelLoader):
    """vLLM's own, which for anything that it takes for quantised does not look whether every weight was there."""

    def load_weights(self, model: torch.nn.Module, model_config: Any) -> None:
        if model_config.quantization == QUANT_METHOD:
            self.enable_weights_track = True
        super().load_weights(model, model_config)


class _Experts(FactorisedExperts):
    """FactorisedExperts behind vLLM's activation instead of a transformers module's."""

    def __init__(self, plan: LayerPlan, dtype: torch.dtype, activation: Callable[[Tensor], Tensor]):
        super().__init__(plan, dtype)
        self.activation = activation

    def activate(self, first: Tensor) -> Tensor:
        return self.activation(first)


# What the operation below runs, by name: an operation takes no modules.
_LAYERS: dict[str, RoutedExperts] = {}


def _announce(layer: RoutedExperts) -> str:
    """A name for the layer, which two models in one process may both call the same."""
    key = f"{layer.layer_name}#{len(_LAYERS)}"
    _LAYERS[key] = layer
    return key


@torch.library.custom_op("moefactor::experts", mutates_args=())
def _experts(x: Tensor, weights: Tensor, ids: Tensor, key: str) -> Tensor:
    """One operation to torch.compile, whatever a form's kernel does inside."""
    layer = _LAYERS[key]
    if layer._expert_map is not None:
        ids = layer._expert_map[ids.long()]
    # Elsewhere, or nowhere: one past the last is what Routing skips.
    ids = torch.where(ids < 0, layer.factorised.layer.experts, ids)
    return layer.factorised(x, ids, weights)


@_experts.register_fake
def _(x: Tensor, weights: Tensor, ids: Tensor, key: str) -> Tensor:
    return torch.empty_like(x)


def _checkpoint(engine: VllmConfig) -> Checkpoint:
    """The folder that is being loaded, its headers read once for all layers."""
    model, load = engine.model_config, engine.load_config
    found = getattr(engine, "_moefactor_checkpoint", None)
    if found is None:
        folder = model.model
        if not Path(folder).is_dir():
            # vLLM has downloaded it by now, so this finds it.
            folder = snapshot_download(
                folder,
                revision=model.revision,
                cache_dir=load.download_dir,
                allow_patterns=["*.safetensors*", "*.json"],
            )
        found = engine._moefactor_checkpoint = Checkpoint(Path(folder))
    return found


def _stored(plan: LayerPlan) -> list[str]:
    return list(plan.tensors())


def _halves(first: Tensor) -> tuple[Tensor, Tensor]:
    gate, up = first.chunk(2, dim=-1)
    return gate, up


def _activation(layer: RoutedExperts) -> Callable[[Tensor], Tensor]:
    """(pairs, 2I), gate then up as we keep them whatever vLLM's own layout, or (pairs, I) -> (pairs, I)."""
    kind, config = layer.activation, layer.moe_config
    plain: dict[MoEActivation, Callable[[Tensor], Tensor]] = {
        MoEActivation.SILU: silu,
        MoEActivation.GELU: gelu,
        MoEActivation.GELU_TANH: partial(gelu, approximate="tanh"),
    }
    alone: dict[MoEActivation, Callable[[Tensor], Tensor]] = {
        MoEActivation.SILU_NO_MUL: silu,
        MoEActivation.GELU_NO_MUL: gelu,
        MoEActivation.GELU_TANH_NO_MUL: partial(gelu, approximate="tanh"),
        MoEActivation.RELU2_NO_MUL: _relu_squared,
    }
    if kind in alone:
        return alone[kind]
    limit = layer.swiglu_limit if layer.swiglu_limit is not None else config.swiglu_limit
    if kind in plain:
        return partial(_gated, plain[kind], limit)
    if kind == MoEActivation.SWIGLUOAI:
        return partial(_swiglu_oai, 1.702, 1.0, 7.0 if limit is None else limit)
    if kind == MoEActivation.SWIGLUOAI_UNINTERLEAVE and limit is not None:
        return partial(_swiglu_oai, config.swiglu_alpha or 1.0, config.swiglu_beta or 0.0, limit)
    raise UserError(f"{layer.layer_name}: the activation {kind.value} is not served by moefactor's vLLM plug-in.")


def _gated(activation: Callable[[Tensor], Tensor], limit: float | None, first: Tensor) -> Tensor:
    gate, up = _halves(first)
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return activation(gate) * up


def _swiglu_oai(alpha: float, beta: float, limit: float, first: Tensor) -> Tensor:
    """gpt-oss: gate · σ(α gate) · (up + β), both clamped."""
    gate, up = _halves(first)
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(alpha * gate) * (up + beta)


def _relu_squared(first: Tensor) -> Tensor:
    return relu(first).square()
