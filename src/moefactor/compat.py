"""What differs between the versions of transformers that moefactor works with, from 5.16.1, which engines pin, on.

Each part says from which version on it may go. None asks for the version: what is there is looked at.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers.quantizers import HfQuantizer

from .errors import UserError, required

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.core_model_loading import WeightTransform


def has_post_expert_norm(module: object) -> bool:
    """Whether the experts norm each expert's output. Until 5.20, which has the first such models, none does;
    FactorisedExperts says so itself."""
    return getattr(module, "has_post_expert_norm", False)


def replace_operation(conversions: list[WeightTransform], old: type, new: object) -> list[WeightTransform]:
    """The conversions with `new` for each step of class `old`.

    From 5.21 on a quantizer's get_load_operations chooses the step; until then update_weight_conversions wrote its
    own into every conversion. Both hand on conversions whose steps can be exchanged.
    """
    for conversion in conversions:
        if hasattr(conversion, "operations"):
            conversion.operations = [new if type(step) is old else step for step in conversion.operations]
    return conversions


def show_parallel_plans(quantizer: HfQuantizer, model: PreTrainedModel) -> None:
    """Until 5.21 transformers does not call update_parallel_plan. The plans are the model's at that point too."""
    if not hasattr(HfQuantizer, "update_parallel_plan"):
        for plan in (model._tp_plan, model._ep_plan):
            quantizer.update_parallel_plan(model, required(plan, "a parallel plan"))


def check_shapes(module: nn.Module, prefix: str, expected: dict[str, torch.Size]) -> None:
    """Until 5.23 transformers does not compare shapes where a quantizer reads, and takes what the file has."""
    for name, parameter in module.named_parameters(prefix):
        if name in expected and parameter.shape != expected[name]:
            raise UserError(
                f"{name}: has shape {tuple(parameter.shape)} in the checkpoint, the model expects "
                f"{tuple(expected[name])}."
            )


def mend_dtypes(model: PreTrainedModel, expected: dict[str, torch.dtype]) -> None:
    """Until 5.21 what a quantizer reads under another name than the model's keeps the dtype that it has on disk.

    `expected` is what the model's state had before loading; what is put off to disk is on the meta device.
    """
    if hasattr(HfQuantizer, "get_new_dtype"):
        return
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name in expected and tensor.is_floating_point() and tensor.device.type != "meta":
            # Some tensors, routers' corrections above all, are to stay in float32 whatever the model's dtype.
            kept = any(re.search(part.replace("*", ".*"), name) for part in model._get_dtype_plan(expected[name]))
            tensor.data = tensor.data.to(torch.float32 if kept else expected[name])
