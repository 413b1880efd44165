"""Compressed folders with their factors in a few bits, in precisions that no plan would give, for tests."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import save_file

from models import on_disk
from moefactor.checkpoint import INDEX
from moefactor.fitting.rounding import packed
from moefactor.forms import FLOAT, Form, Quantised, form_from_json


def in_bits(form: Form, bits: int, group: int = 16) -> Quantised:
    """All of a form's numbers in as many bits; mixing weights, which are few, in 8."""
    floats = [name for name, spec in form.tensors().items() if spec.dtype == FLOAT]
    each = tuple((name, 8 if name == "mix" else bits) for name in sorted(floats))
    return Quantised(form.experts, form.width, form.hidden, form, group, each)


def mixed(form: Form, group: int = 16) -> Quantised:
    """Half of every expert's channels in 6 bits, a quarter in 4, the others in 3; bases and the like in 8."""
    most = tuple(width // 2 for width in form.kept_widths)
    next_ = tuple((width + 1) // 4 for width in form.kept_widths)
    rest = tuple(w - a - b for w, a, b in zip(form.kept_widths, most, next_, strict=True))
    others = [name for name, spec in form.tensors().items() if spec.dtype == FLOAT and name != form.channel_tensor]
    return Quantised(
        form.experts, form.width, form.hidden, form, group, tuple((name, 8) for name in sorted(others)),
        ((6, most), (4, next_), (3, rest)),
    )  # fmt: skip


def folder_in_bits(source: Path, out: Path, wrap: Callable[[Form], Quantised]) -> Path:
    """A compressed folder with every stack wrapped, in one file."""
    shutil.copytree(source, out, ignore=shutil.ignore_patterns("*.safetensors", INDEX))
    tensors = on_disk(source)
    config, plan = (json.loads((source / name).read_text()) for name in ("config.json", "plan.json"))
    for layer in config["quantization_config"]["layers"]:
        for stack, data in layer["stacks"].items():
            halves = 2 if stack == "gate_up" else 1
            form = form_from_json(
                data, experts=layer["experts"], width=halves * layer["intermediate"], hidden=layer["hidden"], where="",
            )  # fmt: skip
            prefix, wrapped = f"{layer['name']}.{stack}_", wrap(form)
            factors = {name: tensors.pop(prefix + name) for name in form.tensors()}
            tensors |= {prefix + name: tensor for name, tensor in packed(wrapped, factors).items()}
            layer["stacks"][stack] = wrapped.to_json()
    plan["layers"] = config["quantization_config"]["layers"]
    (out / "config.json").write_text(json.dumps(config))
    (out / "plan.json").write_text(json.dumps(plan))
    save_file({name: t.contiguous() for name, t in tensors.items()}, out / "model.safetensors", {"format": "pt"})
    return out
