"""The expert stacks of a model, found on its skeleton: no architecture has code of its own.

transformers 5 stores the experts of nearly every MoE in one fused layout and marks the class with
`@use_experts_implementation`, which sets `is_concatenated`, `is_transposed`, `has_bias` and `has_gate` on the module.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeGuard

import torch
import transformers
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

from . import models  # noqa: F401 (registers what transformers lacks)
from .errors import UserError
from .experts import ExpertLayer

if TYPE_CHECKING:
    from transformers.models.auto.auto_factory import _BaseAutoModelClass

# A causal model is looked for first; wrappers (vision, audio) have a class of their own.
AUTO_CLASSES = ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM")
TOP_K = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k_experts")
# Known not to follow the fused layout; each would need its own reader.
SPECIAL = ("llama4", "llama4_text", "longcat_flash", "dbrx", "jetmoe", "step3p7")


def own_code_refused(name: str, what: str) -> UserError:
    """For a repository that brings code of its own to run. transformers would ask on the terminal."""
    return UserError(
        f"{name}: {what} needs code of its own from the model's repository. Read that code, and run it with "
        "--trust-remote-code (trust_remote_code=True in Python) if you trust it."
    )


@contextmanager
def running_own_code(name: str, own: bool) -> Iterator[None]:
    """Around what runs a repository's code, which raises what it likes: UserError says whose fault it was."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not own:
            raise
        reason = (str(error).strip().splitlines() or [""])[0]
        raise UserError(f"{name}: the code in its repository fails ({type(error).__name__}): {reason}") from error


def read_config(folder: Path, name: str, trust_remote_code: bool = False) -> PretrainedConfig:
    """The model's config; UserError when the folder holds no model that transformers knows, or one that only its own
    code knows and that is not trusted. What transformers has itself is never taken from a repository."""
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{name}: no config.json there, so it is not a model in Hugging Face format.")
    try:
        data = json.loads(path.read_text())
        # Released before transformers had them under their own names; same architecture as DeepSeek-V3.
        if data.get("model_type") == "kimi_k2":
            return AutoConfig.for_model("deepseek_v3", **{k: v for k, v in data.items() if k != "model_type"})
        own = data.get("model_type") not in CONFIG_MAPPING and "AutoConfig" in (data.get("auto_map") or {})
        if own and not trust_remote_code:
            raise own_code_refused(name, f"Its architecture ({data.get('model_type')})")
        with running_own_code(name, own):
            return AutoConfig.from_pretrained(folder, trust_remote_code=own)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not valid JSON at line {error.lineno}: {error.msg}.") from None
    except UserError:
        raise
    except (ValueError, KeyError, AttributeError, ImportError) as error:
        raise UserError(f"{name}: transformers can't read its config: {str(error).splitlines()[0]}") from None


def own_model(config: PretrainedConfig, name: str, trust_remote_code: bool) -> bool:
    """Whether the model's class is the repository's own; UserError where it must be and is not trusted."""
    known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING and MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    # A class of a repository's that was loaded earlier in this process is registered like transformers' own.
    theirs = not known or getattr(known, "__module__", "").startswith("transformers_modules.")
    own = theirs and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if own and not trust_remote_code:
        raise own_code_refused(name, f"Its architecture ({config.model_type})")
    return own


def read_fields(folder: Path) -> dict:
    """config.json as a dictionary, infinities decoded."""
    return PretrainedConfig.get_config_dict(folder)[0]


def auto_class(config: PretrainedConfig) -> type[_BaseAutoModelClass]:
    """The Auto class that loads this folder whole: the one whose model config.json names (`architectures`), or the
    first that knows the config. A wrapper's text model alone would leave its towers behind."""
    found = dict(_model_classes(config))
    named = config.architectures[0] if config.architectures else None
    chosen = next((auto for auto, model in found.items() if model == named), next(iter(found), AUTO_CLASSES[0]))
    return getattr(transformers, chosen)


def _model_classes(config: PretrainedConfig) -> Iterator[tuple[str, str]]:
    """(Auto class, the model class that it would build) for every one that knows the config."""
    for auto in AUTO_CLASSES:
        mapping = getattr(getattr(transformers, auto, None), "_model_mapping", {})
        if type(config) in mapping:
            model = mapping[type(config)]
            yield auto, (model[0] if isinstance(model, tuple) else model).__name__


def build_skeleton(
    config: PretrainedConfig, name: str, dtype: torch.dtype | None = None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The model with every parameter on the meta device and every buffer (rotary tables) real."""
    own = own_model(config, name, trust_remote_code)
    kind = AutoModelForCausalLM if own else auto_class(config)
    try:
        with running_own_code(name, own), parameters_on_meta():
            model = kind.from_config(config, dtype=dtype or config.dtype or torch.float32, trust_remote_code=own)
    except ValueError as error:
        raise UserError(
            f"{name} ({config.model_type}): not a causal language model: {str(error).splitlines()[0]}"
        ) from None
    return model.eval()


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Modules built inside keep the shapes of their parameters alone; their buffers are real.

    torch.device("meta") would take the buffers along: rotary tables, which no checkpoint holds.
    """

    def emptied(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter:
        empty = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        empty.__dict__.update(vars(parameter))  # transformers' marks
        return empty

    # torch registers what the hook returns, which its annotation leaves out.
    hook = register_module_parameter_registration_hook(emptied)  # type: ignore[arg-type]
    try:
        yield
    finally:
        hook.remove()


class FusedExperts(Protocol):
    """What every experts module of transformers has; the decorator puts the flags there."""

    down_proj: nn.Parameter
    is_concatenated: bool
    is_transposed: bool
    has_bias: bool
    has_gate: bool

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]: ...


def is_fused_experts(module: nn.Module) -> TypeGuard[FusedExperts]:
    down = getattr(module, "down_proj", None)
    return hasattr(module, "is_concatenated") and isinstance(down, nn.Parameter) and down.ndim == 3


def describe(
    name: str, module: FusedExperts, decoder_layer: str, block: nn.Module, config: PretrainedConfig
) -> ExpertLayer:
    experts, rows, columns = module.down_proj.shape
    hidden, intermediate = (columns, rows) if module.is_transposed else (rows, columns)
    router_groups, fewest = _router_limits(block, config.get_text_config())
    return ExpertLayer(
        name, decoder_layer, experts=experts, intermediate=intermediate, hidden=hidden, gated=module.has_gate,
        concatenated=module.is_concatenated, transposed=module.is_transposed, biased=module.has_bias,
        router_groups=router_groups, fewest_experts=fewest,
    )  # fmt: skip


def _router_limits(block: nn.Module, text: PretrainedConfig) -> tuple[int, int]:
    """What group-limited top-k routing asks of the experts that are left: its groups, and how many in all."""
    chosen_of = [getattr(text, n, None) for n in TOP_K] + [getattr(m, "top_k", None) for m in block.modules()]
    top_k = max((n for value in chosen_of for n in _numbers(value)), default=1)
    groups, chosen = getattr(text, "n_group", None) or 1, getattr(text, "topk_group", None) or 1
    # DeepSeek-V3 ranks groups by the sum of their two best experts.
    per_group = max(-(-top_k // chosen), 2 if groups > 1 else 1)
    return groups, per_group * groups


def _numbers(value: object) -> list[int]:
    """A number of the config, or one for every layer."""
    return [n for n in (value if isinstance(value, list | tuple) else [value]) if isinstance(n, int)]


def find_experts(model: PreTrainedModel, name: str) -> list[ExpertLayer]:
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


def _why_none(model: PreTrainedModel, name: str) -> str:
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
    layers = model.get_submodule(owner)
    assert isinstance(layers, nn.ModuleList)  # as find_experts saw
    return [f"{owner}.{index}" for index in range(len(layers))]
