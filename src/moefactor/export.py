"""An ordinary MoE checkpoint again, for engines that know nothing of us: every expert rebuilt, layer by layer."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from .checkpoint import Checkpoint, CheckpointWriter, ModelReader, dtype_of, refuse_existing, resolve
from .discover import build_skeleton, find_experts, read_config
from .errors import UserError
from .experts import CompressedExperts
from .plan import LayerPlan
from .progress import Progress, Steps, silent
from .runtime.format import QUANT_METHOD, STUB, layer_plans
from .runtime.module import FactorisedExperts


def export_dense(
    name: str, output: str | Path, *, trust_remote_code: bool = False, progress: Progress = silent
) -> Path:
    """Writes the dense equivalent of a compressed folder, in the layout that its kind of model has on disk.

    The result has the size of the original model; what is lost in compression stays lost.
    """
    output = Path(output).expanduser()
    refuse_existing(output)
    folder = resolve(name)
    config = read_config(folder, name, trust_remote_code)
    quantisation = getattr(config, "quantization_config", None) or {}
    if quantisation.get("quant_method") != QUANT_METHOD:
        raise UserError(f"{name}: not a checkpoint of moefactor's; there is nothing to rebuild.")
    del config.quantization_config
    config.experts_implementation = None
    checkpoint = Checkpoint(folder)
    skeleton = build_skeleton(config, name, dtype_of(config, checkpoint), trust_remote_code)
    plans = layer_plans(quantisation, find_experts(skeleton, name))
    if any(plan.intercept for plan in plans):
        raise UserError(f"{name}: adds constants to experts' outputs (--intercept), which a dense MoE can't hold.")
    reader = ModelReader(checkpoint, skeleton)
    steps = Steps(progress, "export", len(plans))
    ours = {name for plan in plans for name in _factors(plan)}
    plain = json.loads((folder / "config.json").read_text())
    for key in ("quantization_config", "experts_implementation"):
        plain.pop(key, None)
    if STUB in str(plain.get("auto_map")):  # not the one of a model with code of its own
        plain.pop("auto_map")
    with CheckpointWriter(output) as writer:
        for plan in plans:
            steps.detail = plan.layer.decoder_layer
            writer.add(reader.disk_layout(_dense_layer(checkpoint, plan)))
            steps.tick()
        writer.copy_plain(checkpoint, [n for n in checkpoint.files if n not in ours], checked=reader.parameters)
        writer.companions(folder, skip=("plan.json", "compression.json", f"{STUB}.py"))
        writer.text("config.json", json.dumps(plain, indent=2) + "\n")
    return output


def _factors(plan: LayerPlan) -> list[str]:
    """Names in the folder of what a layer's forms are made of; other tensors may live in the same module."""
    made = FactorisedExperts(plan, torch.float32)
    return [f"{plan.layer.name}.{name}" for name, _ in made.named_parameters()]


def _dense_layer(checkpoint: Checkpoint, plan: LayerPlan) -> dict[str, Tensor]:
    """Model name -> dense tensor of one layer's experts, in the dtype of its factors."""
    prefix = plan.layer.name + "."
    with checkpoint.slices(_factors(plan)) as slices:
        stored = {name.removeprefix(prefix): view[:] for name, view in slices.items()}
    dtype = next(tensor.dtype for tensor in stored.values() if tensor.is_floating_point())
    # Products in float32, then rounded once.
    tensors = {key: tensor.to(torch.float32) for key, tensor in stored.items()}
    dense = CompressedExperts(plan.layer, plan.forms, tensors).dense().to_model_layout()
    return {prefix + key: tensor.to(dtype) for key, tensor in dense.items()}
