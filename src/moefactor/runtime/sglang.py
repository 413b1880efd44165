"""The SGLang plug-in, experimental: `sglang.launch_server --model-path OUT`, by the entry point `sglang.srt.plugins`.

Written against SGLang 0.5.23. It has run inside SGLang's engine on a CPU (tests/engines/test_sglang.py), never on a
GPU, where SGLang takes other ways: CUDA graphs, other attention, all-reduces of its own.

As in the vLLM plug-in, what SGLang takes for a quantisation method keeps a layer's routed experts as factors and runs
them by our kernels, between SGLang's router and its all-reduce; factors are taken out of the stream of weights, and
each layer reads its own from the folder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from sglang.srt.layers.linear import LinearBase
from sglang.srt.layers.moe import get_moe_a2a_backend
from sglang.srt.layers.moe.fused_moe_triton.layer import FusedMoE
from sglang.srt.layers.moe.token_dispatcher import CombineInput, DispatchOutput, StandardCombineInput
from sglang.srt.layers.moe.topk import TopKOutputChecker
from sglang.srt.layers.quantization import CPU_QUANTIZATION_METHODS, QUANTIZATION_METHODS
from sglang.srt.layers.quantization.base_config import FusedMoEMethodBase, QuantizationConfig, QuantizeMethodBase
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from sglang.srt.runtime_context import get_flags, get_server_args
from sglang.srt.utils import is_cuda
from torch import Tensor

from ..errors import UserError
from ..plan import LayerPlan
from . import engine
from .engine import Activation, EngineExperts
from .format import QUANT_METHOD, Rest
from .parallel import Share

LOADING = "sglang.srt.model_loader.loader.DefaultModelLoader.load_weights_only"
CHOOSING = "sglang.srt.model_loader.utils.get_model_architecture"


def register() -> None:
    """Called by SGLang in every one of its processes, once."""
    QUANTIZATION_METHODS[QUANT_METHOD] = CPU_QUANTIZATION_METHODS[QUANT_METHOD] = MoefactorConfig
    HookRegistry.register(LOADING, load_weights, HookType.AROUND)
    HookRegistry.register(CHOOSING, choose_model, HookType.AROUND)


class MoefactorConfig(engine.FolderConfig, QuantizationConfig):
    """`quantization_config` of a compressed folder."""

    def get_scaled_act_names(self) -> list[str]:
        return []

    def can_fuse_shared_expert(self) -> bool:
        """Asked by DeepSeek's models, which else take the shared expert for one more routed one."""
        return False

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        if isinstance(layer, LinearBase):
            return UnquantizedLinearMethod()
        # Layers of multi-token prediction, which are a draft model's, keep their experts.
        if not isinstance(layer, FusedMoE) or layer.is_draft or layer.layer_id not in self.plans:
            return None
        return FactorisedMoEMethod(layer, self.plans[layer.layer_id])


class FactorisedMoEMethod(FusedMoEMethodBase):
    """A layer's experts as factors, run by moefactor's kernels. Having no runner, it is given top-k ids and weights,
    the ids among the rank's own experts and -1 for those elsewhere."""

    def __init__(self, layer: FusedMoE, plan: LayerPlan):
        self.plan = replace(plan, layer=replace(plan.layer, biased=layer.with_bias))
        config, name = layer.moe_runner_config, plan.layer.name
        self.activation = _activation(layer, name)
        if config.apply_router_weight_on_input or config.no_combine:
            raise UserError(f"{name}: routers that weigh the experts' inputs are not served by SGLang yet.")
        if layer.num_fused_shared_experts:
            raise UserError(f"{name}: shared experts can't be among factorised ones; --disable-shared-experts-fusion.")
        if not get_moe_a2a_backend().is_none():
            raise UserError(f"{name}: factorised experts take no all-to-all; leave --moe-a2a-backend out.")

    def create_weights(
        self, layer: FusedMoE, num_experts: int, hidden_size: int, intermediate_size_per_partition: int,
        params_dtype: torch.dtype, **extra_weight_attrs: object,
    ) -> None:  # fmt: skip
        """No weights yet: what would stand here empty, a loader that misses a name would leave so."""
        engine.check_layer(self.plan, layer.num_experts, hidden_size)
        self.dtype, self.device = params_dtype, torch.empty(0).device  # a model is built under its device

    def create_moe_runner(self, layer: FusedMoE, moe_runner_config: object) -> None:
        """None of SGLang's."""

    def process_weights_after_loading(self, layer: FusedMoE) -> None:
        """Reads the layer's factors, and keeps this rank's part."""
        first = layer.moe_ep_rank * layer.num_local_experts
        held = range(first, first + layer.num_local_experts)
        share = Share.of_experts(self.plan, held, layer.moe_tp_rank, layer.moe_tp_size)
        layer.factorised = EngineExperts.holding(
            self.plan, self._read(), share, self.dtype, self.device, self.activation
        )
        self.key = engine.announce(get_server_args().model_path, layer.layer_name, layer.factorised)

    def _read(self) -> dict[str, Tensor]:
        server = get_server_args()
        if server.load_format == "dummy":
            return engine.zeros(self.plan, self.dtype)
        return engine.read_layer(
            engine.checkpoint_of(server.model_path, server.revision, server.download_dir), self.plan
        )

    def apply(self, layer: FusedMoE, dispatch_output: DispatchOutput) -> CombineInput:
        topk = dispatch_output.topk_output
        if not TopKOutputChecker.format_is_standard(topk):
            raise UserError(f"{self.plan.layer.name}: the router is inside a kernel; leave --moe-runner-backend out.")
        x = dispatch_output.hidden_states
        out = torch.ops.moefactor.experts(x, topk.topk_weights, topk.topk_ids, self.key)
        factor = layer.moe_runner_config.routed_scaling_factor
        if factor is not None and is_cuda():  # elsewhere models multiply by it themselves
            out = out * factor
        return StandardCombineInput(hidden_states=out)


def load_weights(
    load: Callable, model: torch.nn.Module, weights: Iterable[tuple[str, Tensor]], target_device: torch.device
) -> None:  # fmt: skip
    """Around SGLang's own, whose models drop names that they do not know and leave parameters as they were that no
    name was for: keeps factors away from them, and looks whether every parameter was there."""
    methods = [getattr(module, "quant_method", None) for module in model.modules()]
    plans = [method.plan for method in methods if isinstance(method, FactorisedMoEMethod)]
    ours = {name for plan in plans for name in engine.stored_names(plan)}
    if not ours:
        _check_unfactorised(model)
        return load(model, weights, target_device)
    parameters = {
        name: p.data
        for name, p in model.named_parameters()
        if p.is_floating_point() and not p.is_meta and ".factorised." not in name
    }
    for values in parameters.values():
        values.fill_(torch.nan)
    rest = next((config.rest for config in _configs(model)), Rest())
    dtype = next(iter(parameters.values())).dtype
    load(model, engine.unpacked(_without(ours, weights), rest, dtype), target_device)
    if lost := [name for name, values in parameters.items() if values.isnan().any()]:
        more = f" (and {len(lost) - 1} more)" if len(lost) > 1 else ""
        raise UserError(f"{lost[0]}{more}: what SGLang builds it from is missing in the folder. Download it again.")
    return None


def choose_model(choose: Callable, model_config: Any) -> Any:
    """Around SGLang's own, which for quantisation methods that it does not know has a Mixtral without fused experts."""
    if model_config.quantization != QUANT_METHOD:
        return choose(model_config)
    model_config.quantization = None
    try:
        return choose(model_config)
    finally:
        model_config.quantization = QUANT_METHOD


def _configs(model: torch.nn.Module) -> list[MoefactorConfig]:
    every = [getattr(module, "quant_config", None) for module in model.modules()]
    return [config for config in every if isinstance(config, MoefactorConfig)]


def _check_unfactorised(model: torch.nn.Module) -> None:
    """UserError for a model of a compressed folder that has built none of its experts so. A draft model has none."""
    if _configs(model) and not get_flags().moe.in_speculative_scope:
        raise UserError(f"SGLang's {type(model).__name__} builds experts of its own, which can't be factorised ones.")


def _without(names: set[str], weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    return ((name, tensor) for name, tensor in weights if name not in names)


def _activation(layer: FusedMoE, name: str) -> Activation:
    """What SGLang's own runner for Triton does, of gate then up as we keep them, whatever its layout."""
    config = layer.moe_runner_config
    kind, alpha, clamp = config.activation, config.gemm1_alpha, config.gemm1_clamp_limit
    found = None
    if not config.is_gated:
        found = engine.alone(kind)
    elif alpha is None and clamp is None:
        found = engine.gated(kind, config.swiglu_limit)
    elif kind == "silu" and alpha is not None and clamp is not None:
        found = engine.swiglu_oai(alpha, 1.0, clamp)
    if found is None:
        raise UserError(f"{name}: the activation {kind} is not served by moefactor's SGLang plug-in yet.")
    return found
