"""An independent reader of compressed-tensors' folders: by config.json and the library alone."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import dequantize
from safetensors.torch import load_file
from torch import Tensor

from moefactor.checkpoint import CheckpointWriter


def on_disk(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def described(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def group_of(module: str, config: dict) -> dict | None:
    """As engines match a module with the patterns of config.json, by the library's own rule."""
    for group in config["config_groups"].values():
        if any(re.match(target.removeprefix("re:"), module) for target in group["targets"]):
            ignored = any(re.match(pattern.removeprefix("re:"), module) for pattern in config["ignore"])
            return None if ignored else group
    return None


def rebuilt(folder: Path, out: Path) -> Path:
    """The ordinary checkpoint that a folder stands for, its quantised matrices in float32."""
    config, stored = described(folder), on_disk(folder)
    modules: dict[str, dict[str, Tensor]] = {}
    for name, tensor in stored.items():
        module, _, leaf = name.rpartition(".")
        modules.setdefault(module, {})[leaf] = tensor
    plain: dict[str, Tensor] = {}
    for module, tensors in modules.items():
        group = group_of(module, config)
        if group and "weight_scale" in tensors:
            bias = {"bias": tensors.pop("bias")} if "bias" in tensors else {}
            tensors = {"weight": _decompressed(tensors, group), **bias}
        assert not {*tensors} & {"weight_packed", "weight_scale"}, module
        plain |= {f"{module}.{leaf}": tensor for leaf, tensor in tensors.items()}
    with CheckpointWriter(out) as writer:
        writer.add(plain)
        writer.companions(folder)
        content = json.loads((folder / "config.json").read_text())
        content.pop("quantization_config")
        writer.text("config.json", json.dumps(content))
    return out


def _decompressed(tensors: dict[str, Tensor], group: dict) -> Tensor:
    scheme = QuantizationScheme.model_validate(group)
    if tensors["weight_scale"].dtype == torch.bfloat16:  # or the products would be rounded to it
        tensors = {**tensors, "weight_scale": tensors["weight_scale"].float()}
    if group["weights"]["strategy"] == "block":  # the library takes a column of blocks for one of rows
        return dequantize(tensors["weight"], tensors["weight_scale"], args=scheme.weights)
    return BaseCompressor.get_value_from_registry(group["format"]).decompress(tensors, scheme)["weight"].float()
