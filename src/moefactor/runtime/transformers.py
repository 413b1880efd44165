"""The transformers plug-in: `import moefactor`, then plain `from_pretrained` loads a compressed folder.

A quantizer replaces each fused experts module by FactorisedExperts before weights are loaded. Importing this module
registers it.
"""

from __future__ import annotations

import warnings
from collections.abc import Container, Mapping

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from .. import models  # noqa: F401 (registers what transformers lacks)
from ..compat import check_shapes, mend_dtypes, show_parallel_plans
from ..errors import UserError
from .format import QUANT_METHOD, Rest, layer_plans
from .linear import Packed, pack_module
from .module import FactorisedExperts


@register_quantization_config(QUANT_METHOD)
class MoefactorConfig(QuantizationConfigMixin):
    """`quantization_config` of a compressed checkpoint: format_version, method, and the forms of every layer."""

    def __init__(self, layers: list[dict] | None = None, format_version: int | None = None, **about: object):
        about.pop("quant_method", None)
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]  # an enum of transformers' own methods
        self.format_version = format_version
        self.layers = layers or []
        for name, value in about.items():
            setattr(self, name, value)


@register_quantizer(QUANT_METHOD)
class MoefactorQuantizer(HfQuantizer):
    """Swaps the experts modules in; loading, saving, device maps and dtypes are transformers' own."""

    requires_calibration = True  # only compressed checkpoints are loaded; compressing is `moefactor compress`

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: object) -> None:
        from ..discover import find_experts  # which may be what is importing transformers right now

        layers = find_experts(model, model.config.name_or_path or type(model).__name__)
        for plan in layer_plans(vars(self.quantization_config), layers):
            parent_name, _, leaf = plan.layer.name.rpartition(".")
            parent = model.get_submodule(parent_name)
            setattr(parent, leaf, FactorisedExperts.replacing(getattr(parent, leaf), plan))
            _stand_in(getattr(parent, leaf))
        self.rest = _pack_rest(model, Rest.from_json(vars(self.quantization_config)))
        self.shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        self.dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}
        show_parallel_plans(self, model)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: object) -> PreTrainedModel:
        for module in model.modules():
            if isinstance(module, FactorisedExperts):
                for name in WEIGHTS:
                    vars(module).pop(name, None)
        # transformers fills what a file lacks with whatever was in memory; only what it loaded carries this flag.
        # Parameters on the meta device are those that accelerate has put off to disk or host memory.
        unfilled = [
            name
            for name, parameter in model.named_parameters()
            if parameter.device.type != "meta" and not getattr(parameter, "_is_hf_initialized", False)
        ]
        ours = {name for name, module in model.named_modules() if isinstance(module, FactorisedExperts | Packed)}
        lost = [name for name in unfilled if name.rpartition(".")[0] in ours]
        if lost:
            raise UserError(f"{lost[0]}: missing from the checkpoint ({len(lost)} such tensors). Download it again.")
        check_shapes(model, "", self.shapes)
        mend_dtypes(model, self.dtypes)
        # Saved again by save_pretrained, so that a copy too is refused by readers without the package; the stub file
        # is not copied along, so neither is its entry.
        model.config.experts_implementation = QUANT_METHOD
        if hasattr(model.config, "auto_map"):
            del model.config.auto_map
        hindrances: dict[str, None] = {}
        for module in model.modules():
            if isinstance(module, FactorisedExperts):
                module.lay_out()
                hindrances |= dict.fromkeys(module.hindrances())
        if hindrances and model.device.type == "cuda":
            warnings.warn(f"Experts run slower than they could: {'; '.join(hindrances)}.", stacklevel=2)
        return model

    def update_parallel_plan(self, model: PreTrainedModel, plan: dict[str, str]) -> None:
        """Drops the rules for the experts, or tensor parallelism would all-reduce their output twice; and all of them
        where other matrices are packed too, since words of several codes can't be cut anywhere: every rank has all."""
        if self.rest:
            plan.clear()
        for rule in [name for name in plan if ".experts" in name]:
            del plan[rule]

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True


def _pack_rest(model: PreTrainedModel, rest: Rest) -> list[str]:
    """Modules of packed weights for what the folder has packed outside the experts; returns their paths."""
    from ..checkpoint import renamed

    state, tied = model.state_dict(), dict(model.all_tied_weights_keys)
    numbers = [int(part) for name in state for part in name.split(".") if part.isdigit()]
    # On disk they may count otherwise: blocks instead of layers, from one on.
    names = rest.names(2 * max(numbers, default=0) + 2)
    bits = {target: rest.bits(name) for name, (target, _) in renamed(model, names, state).items()}
    for pair in tied.items():
        for one, other in (pair, pair[::-1]):
            if one in bits:
                bits.setdefault(other, bits[one])
    paths = [name.removesuffix(".weight") for name in bits]
    for path in paths:
        pack_module(model, path, bits[f"{path}.weight"], rest.group)
    for prefix, part in model.named_modules():
        if isinstance(part, PreTrainedModel) and (ties := part.get_expanded_tied_weights_keys()):
            start = f"{prefix}." if prefix else ""
            part._tied_weights_keys = _packed_ties(ties, {n.removeprefix(start) for n in bits if n.startswith(start)})
    model.all_tied_weights_keys = _packed_ties(tied, bits)
    return paths


def _packed_ties(ties: Mapping[str, str], packed: Container[str]) -> dict[str, str]:
    """What is tied to what, codes to codes and scales to scales."""
    parts = {target: ("_codes", "_scale") if target in packed else ("",) for target in ties}
    return {target + part: source + part for target, source in ties.items() for part in parts[target]}


WEIGHTS = ("gate_up_proj", "up_proj", "down_proj")


def _stand_in(module: FactorisedExperts) -> None:
    """While weights are loaded, an architecture may initialise its experts' tensors by name; these take it and are
    gone afterwards."""
    for name in WEIGHTS:
        empty = torch.empty(0)
        empty._is_hf_initialized = True  # type: ignore[attr-defined]  # transformers' mark
        vars(module)[name] = empty


def _only_factorised(module: nn.Module, *args: object, **kwargs: object) -> torch.Tensor:
    raise UserError(
        f"experts_implementation is 'moefactor', but {type(module).__name__} holds dense experts. "
        "Load the compressed folder with from_pretrained, or choose another implementation."
    )


# Makes the name in config.json valid once the package is imported; FactorisedExperts does not dispatch through it.
ALL_EXPERTS_FUNCTIONS.register(QUANT_METHOD, _only_factorised)
