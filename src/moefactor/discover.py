"""The expert stacks of a model, found on its skeleton: no architecture has code of its own.

transformers 5 stores the experts of nearly every MoE in one fused layout and marks the class with
`@use_experts_implementation`, which sets `is_concatenated`, `is_transposed`, `has_bias` and `has_gate` on the module.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
import transformers
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from . import models  # noqa: F401 (registers what transformers lacks)
from .errors import UserError
from .experts import ExpertLayer

# A causal model is looked for first; wrappers (vision, audio) have a class of their own.
AUTO_CLASSES = ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM")
TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k_experts")
# Known not to follow the fused layout; each would need its own reader.
SPECIAL = ("llama4", "llama4_text", "longcat_flash", "dbrx", "jetmoe", "step3p7")


def read_config(folder: Path, name: str) -> PretrainedConfig:
    """The model's config; UserError when the folder holds no model that transformers knows."""
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{name}: no config.json there, so it is not a model in Hugging Face format.")
    try:
        data = json.loads(path.read_text())
        # Released before transformers had them under their own names; same architecture as DeepSeek-V3.
        if data.get("model_type") == "kimi_k2":
            return AutoConfig.for_model("deepseek_v3", **{k: v for k, v in data.items() if k != "model_type"})
        return AutoConfig.from_pretrained(folder)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not valid JSON at line {error.lineno}: {error.msg}.") from None
    except (ValueError, KeyError) as error:
        raise UserError(f"{name}: transformers can't read its config: {str(error).splitlines()[0]}") from None


def read_fields(folder: Path) -> dict:
    """config.json as a dictionary, infinities decoded."""
    return PretrainedConfig.get_config_dict(folder)[0]


def auto_class(config: PretrainedConfig) -> type:
    """The Auto class that loads this folder whole: the one whose model config.json names (`architectures`), or the
    first that knows the config. A wrapper's text model alone would leave its towers behind."""
    found = dict(_model_classes(config))
    named = (config.architectures or [None])[0]
    chosen = next((auto for auto, model in found.items() if model == named), next(iter(found), AUTO_CLASSES[0]))
    return getattr(transformers, chosen)


def _model_classes(config: PretrainedConfig) -> Iterator[tuple[str, str]]:
    """(Auto class, the model class that it would build) for every one that knows the config."""
    for auto in AUTO_CLASSES:
        mapping = getattr(getattr(transformers, auto, None), "_model_mapping", {})
        if type(config) in mapping:
            model = mapping[type(config)]
            yield auto, (model[0] if isinstance(model, tuple) else model).__name__


def build_skeleton(config: PretrainedConfig, name: str, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model with every parameter on the meta device and every buffer (rotary tables) real."""
    try:
        with init_empty_weights(include_buffers=False):
            model = auto_class(config).from_config(config, dtype=dtype or config.dtype or torch.float32)
    except ValueError as error:
        raise UserError(
            f"{name} ({config.model_type}): not a causal language model: {str(error).splitlines()[0]}"
        ) from None
    return model.eval()


def is_fused_experts(module: nn.Module) -> bool:
    down = getattr(module, "down_proj", None)
    return hasattr(module, "is_concatenated") and isinstance(down, nn.Parameter) and down.ndim == 3


def describe(
    name: str, module: nn.Module, decoder_layer: str, block: nn.Module, config: PretrainedConfig
) -> ExpertLayer:
    experts, rows, columns = module.down_proj.shape
    hidden, intermediate = (columns, rows) if module.is_transposed else (rows, columns)
    return ExpertLayer(
        name, decoder_layer, experts=experts, intermediate=intermediate, hidden=hidden, gated=module.has_gate,
        concatenated=module.is_concatenated, transposed=module.is_transposed, biased=module.has_bias,
        **_router_limits(block, config.get_text_config()),
    )  # fmt: skip


def _router_limits(block: nn.Module, text: PretrainedConfig) -> dict[str, int]:
    """What group-limited top-k routing asks of the experts that are left."""
    chosen_of = [getattr(text, n, None) for n in TOP_K] + [getattr(m, "top_k", None) for m in block.modules()]
    top_k = max((n for value in chosen_of for n in _numbers(value)), default=1)
    groups, chosen = getattr(text, "n_group", None) or 1, getattr(text, "topk_group", None) or 1
    # DeepSeek-V3 ranks groups by the sum of their two best experts.
    per_group = max(-(-top_k // chosen), 2 if groups > 1 else 1)
    return {"router_groups": groups, "fewest_experts": per_group * groups}


def _numbers(value: object) -> list[int]:
    """A number of the config, or one for every layer."""
    return [n for n in (value if isinstance(value, list | tuple) else [value]) if isinstance(n, int)]


def find_experts(model: nn.Module, name: str) -> list[ExpertLayer]:
    """Every fused experts module of the model, in order. UserError that says why when there is none."""
    lists = [path for path, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    found = []
    for path, module in model.named_modules():
        if is_fused_experts(module):
            owner = next((p for p in lists if path.startswith(p + ".")), None)
            if owner is None:
                raise UserError(f"{name}: experts at {path} are not inside a list of decoder layers.")
            decoder_layer = owner + "." + path.removeprefix(owner + ".").split(".")[0]
            block = model.get_submodule(path.rpartition(".")[0])
            found.append(describe(path, module, decoder_layer, block, model.config))
    if not found:
        raise UserError(_why_none(model, name))
    owners = sorted({layer.decoder_layer.rpartition(".")[0] for layer in found})
    if len(owners) > 1:
        raise UserError(f"{name}: has experts in several stacks of layers ({', '.join(owners)}). Not supported yet.")
    return found


def _why_none(model: nn.Module, name: str) -> str:
    kind = model.config.model_type
    own = sorted({type(m).__name__ for m in model.modules() if "Expert" in type(m).__name__})
    if kind in SPECIAL or own:
        return (
            f"{name} ({kind}): its experts ({', '.join(own) or 'in a layout of their own'}) do not follow the fused "
            "layout that moefactor reads (gate_up_proj, down_proj of @use_experts_implementation). Not supported yet."
        )
    return f"{name} ({kind}): a dense model, there are no routed experts to compress."


def decoder_layers(model: nn.Module, experts: list[ExpertLayer]) -> list[str]:
    """Paths of all decoder layers, dense ones too, in order."""
    owner = experts[0].decoder_layer.rpartition(".")[0]
    return [f"{owner}.{index}" for index in range(len(model.get_submodule(owner)))]
