"""The vLLM plug-in: `vllm serve OUT` of a compressed folder, found by the entry point `vllm.general_plugins`.

What vLLM takes for a quantisation method keeps a layer's routed experts as factors and runs them by our kernels, behind
vLLM's router and before its all-reduce. Factors do not pass through the models' own loading code, which differs from
model to model and drops names that it does not know: they are taken out of the stream of weights, and each layer
reads its own from the folder, every tensor or an error, and keeps only the part that is this GPU's.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe.activation import MoEActivation
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader
from vllm.model_executor.models.utils import WeightsMapper

from ..errors import UserError
from ..plan import LayerPlan
from . import engine
from .engine import Activation, EngineExperts
from .format import QUANT_METHOD, Rest
from .parallel import Share

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


class MoefactorConfig(engine.FolderConfig, QuantizationConfig):
    """`quantization_config` of a compressed folder. vLLM pickles it on its way to the engine's processes."""

    def get_checkpoint_weight_mapper(self) -> WeightsMapper:
        """Drops factors from the stream of weights; see the module's docstring."""
        names = {name for plan in self.plans.values() for name in plan.tensors()}
        ours = re.compile(rf"\.experts\.({'|'.join(map(re.escape, sorted(names)))})$")
        return super().get_checkpoint_weight_mapper() | WeightsMapper(orig_to_new_regex={ours: None})

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        if isinstance(layer, LinearBase):
            return UnquantizedLinearMethod()
        if not isinstance(layer, RoutedExperts):
            return None
        index = engine.layer_index(prefix)
        # Layers of multi-token prediction keep their experts.
        return FactorisedMoEMethod(layer, self.plans[index]) if index in self.plans else None


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
        engine.check_layer(self.plan, self.moe.num_experts, hidden_size)
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
        layer.factorised = EngineExperts.holding(
            self.plan, self._read(), share, self.dtype, self.engine.device_config.device, self.activation
        )
        self.key = engine.announce(self.engine.model_config.model, layer.layer_name, layer.factorised)

    def _read(self) -> dict[str, Tensor]:
        model, load = self.engine.model_config, self.engine.load_config
        if load.load_format == "dummy":
            return engine.zeros(self.plan, self.dtype)
        return engine.read_layer(engine.checkpoint_of(model.model, model.revision, load.download_dir), self.plan)

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> None:
        return None

    def apply(
        self, layer: RoutedExperts, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, shared_experts: object,
        shared_experts_input: Tensor | None,
    ) -> Tensor:  # fmt: skip
        if layer._expert_map is not None:
            topk_ids = layer._expert_map[topk_ids.long()]
        return torch.ops.moefactor.experts(x, topk_weights, topk_ids, self.key)


class StrictLoader(DefaultModelLoader):
    """vLLM's own, which for anything that it takes for quantised does not look whether every weight was there. It gives
    what is packed outside the experts as numbers, and vLLM keeps these."""

    def get_all_weights(self, model_config: Any, model: torch.nn.Module) -> Iterator[tuple[str, Tensor]]:
        weights = super().get_all_weights(model_config, model)
        if model_config.quantization != QUANT_METHOD:
            return weights
        rest = Rest.from_json(model_config.hf_config.quantization_config)
        return engine.unpacked(weights, rest, model_config.dtype)

    def load_weights(self, model: torch.nn.Module, model_config: Any) -> None:
        if model_config.quantization == QUANT_METHOD:
            self.enable_weights_track = True
        super().load_weights(model, model_config)


def _activation(layer: RoutedExperts) -> Activation:
    """Of gate then up as we keep them, whatever vLLM's own layout."""
    kind, config = layer.activation, layer.moe_config
    limit = layer.swiglu_limit if layer.swiglu_limit is not None else config.swiglu_limit
    found = engine.gated(kind.value, limit)
    if kind.value.endswith("_no_mul"):
        found = engine.alone(kind.value.removesuffix("_no_mul"))
    elif kind == MoEActivation.SWIGLUOAI:
        found = engine.swiglu_oai(1.702, 1.0, 7.0 if limit is None else limit)
    elif kind == MoEActivation.SWIGLUOAI_UNINTERLEAVE and limit is not None:
        found = engine.swiglu_oai(config.swiglu_alpha or 1.0, config.swiglu_beta or 0.0, limit)
    if found is None:
        raise UserError(f"{layer.layer_name}: the activation {kind.value} is not served by moefactor's vLLM plug-in.")
    return found
