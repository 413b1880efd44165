"""An ordinary MoE checkpoint, dense or smaller, with its matrices quantised: engines read it without anything of ours.

What is quantised is told from the model's skeleton, and named in config.json by patterns: routers, embeddings, head,
norms, towers and layers of multi-token prediction stay as they are.
"""

from __future__ import annotations

import json
import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .checkpoint import COPY_LIMIT, CheckpointWriter, refuse_existing, resolve
from .compressed_tensors import Rounding, Scheme, need_library, pack, quantization_config, rest_of, scheme_of
from .discover import read_fields
from .errors import UserError
from .experts import check_finite
from .fp8 import SCALE
from .progress import Progress, Steps, silent
from .runtime.format import QUANT_METHOD
from .streaming import StreamedModel

ONE_EXPERT = re.compile(r"\.\d+\.[^.]+\.weight$")  # an expert's matrix by itself
LAYER = re.compile(r".*?\.\d+\.")  # up to its number
NUMBER = re.compile(r"(?<=\\\.)\d+(?=\\\.)")  # between escaped dots
ROWS = 32  # that packed kernels take a multiple of
Groups = dict[str, tuple[Scheme, list[str]]]  # `experts` and `rest` -> how, and which tensors on disk


def export_quantised(
    name: str, output: str | Path, scheme: str | Scheme, *, group_size: int | None = None, rest_bits: int = 16,
    rounding: Rounding | None = None, trust_remote_code: bool = False, progress: Progress = silent,
) -> Path:  # fmt: skip
    """Writes an ordinary MoE checkpoint in compressed-tensors' format; a gigabyte of it is held at a time.

    Args:
        scheme: of the experts, by its name in compressed_tensors.SCHEMES, or another name for one ("int4").
        group_size: weights of a row that share a scale; by default the most, up to 128, that divides every row.
        rest_bits: 16, 8 or 4, of the other linear layers: attention, shared experts, dense MLPs.
        rounding: for the name on disk and the weights (rows, columns) of a matrix gives what is stored: integers, for
            which `group_size` is better given, or weights to round to nearest. By default the weights themselves.

    Raises:
        UserError: the model is factorised or quantised already, has experts in one tensor, or groups don't divide it.
    """
    output = Path(output).expanduser()
    refuse_existing(output)
    chosen = scheme_of(scheme) if isinstance(scheme, str) else scheme
    if isinstance(scheme, Scheme) and scheme.kind == "int":
        group_size = group_size or scheme.group_size
    rest = rest_of(chosen, rest_bits)
    need_library()
    _refuse_factorised(name)
    model = StreamedModel(name, trust_remote_code=trust_remote_code)
    checkpoint, source = model.reader.checkpoint, model.reader.source
    groups = _groups(model, chosen, rest, group_size)
    schemes = {disk: scheme for scheme, names in groups.values() for disk in names}
    fused: dict[str, list[str]] = {}  # what an engine puts into one matrix has one parent: an expert, an attention
    for disk in schemes:
        fused.setdefault(disk.rsplit(".", 2)[0], []).append(disk)
    steps = Steps(progress, "export", len(fused))
    with CheckpointWriter(output) as writer:
        ready: dict[str, Tensor] = {}
        for steps.detail, names in fused.items():
            weights = checkpoint.read(names, source)
            check_finite(checkpoint.folder.name, weights)
            given = {disk: rounding(disk, weight) if rounding else weight for disk, weight in weights.items()}
            largest = max((w.abs().max().item() for w in given.values() if isinstance(w, Tensor)), default=0.0)
            for disk, weight in given.items():
                stored = pack(weight, schemes[disk], weights[disk].dtype, largest)
                ready |= {f"{disk.rpartition('.')[0]}.{key}": tensor for key, tensor in stored.items()}
            if sum(tensor.nbytes for tensor in ready.values()) > COPY_LIMIT:
                writer.add(ready)
                ready = {}
            steps.tick()
        if ready:
            writer.add(ready)
        left = [disk for disk in checkpoint.files if disk not in schemes]
        writer.copy_plain(checkpoint, left, source=source, checked=model.reader.parameters)
        writer.companions(model.folder)
        writer.text("config.json", json.dumps(_config(model, groups), indent=2) + "\n")
    return output


def _refuse_factorised(name: str) -> None:
    described = read_fields(resolve(name)).get("quantization_config") or {}
    if described.get("quant_method") == QUANT_METHOD:
        raise UserError(
            f"{name}: its experts are factors, which compressed-tensors has no place for. Compress with --bits to "
            "store factors in fewer bits. What is quantised here is an ordinary MoE: a dense original, or a result of "
            "--form standard, reap, channels --widths model."
        )


def _groups(model: StreamedModel, scheme: Scheme, rest: Scheme | None, group_size: int | None) -> Groups:
    """Raises UserError where the experts can't be stored like this. Other layers that can't stay as they are."""
    places = tuple(f"{layer.name}." for layer in model.experts)
    layers = tuple(f"{layer}." for layer in model.decoder_layers)
    routers = {name for layer in model.experts for name, _ in layer.router}
    linear = {f"{path}.weight" for path, module in model.model.named_modules() if isinstance(module, nn.Linear)}
    experts, others = list[str](), dict[str, list[str]]()
    for disk, found in model.reader.targets.items():
        if model.reader.source and disk.endswith(SCALE):
            continue  # of FP8, which reading undoes
        if any(target.startswith(places) for target in found):
            experts.append(disk)
        elif len(found) == 1 and found[0] in linear - routers and found[0].startswith(layers):
            others.setdefault(_pattern(model, disk.rsplit(".", 2)[0]), []).append(disk)
    with model.reader.checkpoint.slices([*experts, *(disk for names in others.values() for disk in names)]) as slices:
        shapes = {disk: tuple(view.get_shape()) for disk, view in slices.items()}
    unlike = next((disk for disk in experts if not ONE_EXPERT.search(disk) or len(shapes[disk]) != 2), None)
    if unlike:
        raise UserError(
            f"{model.name} ({model.config.model_type}): {unlike} is not the matrix of one expert, and "
            "compressed-tensors has names for no others. Not supported yet."
        )
    chosen = scheme.fitted((shapes[disk] for disk in experts), f"{model.name}: experts", group_size)
    if chosen != scheme and group_size is None:
        warnings.warn(f"{chosen.group_size} weights share a scale, the most that divides all rows.", stacklevel=3)
    groups = {"experts": (chosen, experts)}
    if rest is not None:
        if rest.kind == "int":
            rest = replace(
                rest, group_size=chosen.group_size if chosen.kind == "int" else group_size or rest.group_size
            )
        # What an engine fuses is quantised together or not at all.
        taken = [n for names in others.values() if all(_takes(rest, shapes[n]) for n in names) for n in names]
        if taken:
            groups["rest"] = rest, taken
    return groups


def _takes(scheme: Scheme, shape: tuple[int, ...]) -> bool:
    return shape[0] % ROWS == 0 and scheme.divides(shape)


def _pattern(model: StreamedModel, module: str) -> str:
    """A module's name in any decoder layer, from the list of these on; engines have other names before it."""
    owner = model.decoder_layers[0].rpartition(".")[0].rpartition(".")[2]
    _, found, behind = module.partition(f"{owner}.")
    return r"(.*\.)?" + NUMBER.sub(r"\\d+", re.escape(f"{owner}.{behind}" if found else module))


def _config(model: StreamedModel, groups: Groups) -> dict[str, Any]:
    """config.json."""
    targets = model.reader.targets
    described = {}
    for group, (scheme, names) in groups.items():
        modules = {disk.rpartition(".")[0] for disk in names}
        if group == "experts":
            # Engines ask for `experts.0.gate_proj`, whatever the model calls it.
            patterns = {_pattern(model, module.rpartition(".")[0] + ".") + ".+" for module in modules}
        else:
            modules |= {targets[disk][0].rpartition(".")[0] for disk in names}  # as transformers calls it
            patterns = {_pattern(model, module) + "$" for module in modules}
        described[group] = scheme, sorted(f"re:{pattern}" for pattern in patterns)
    every = re.compile("|".join(pattern.removeprefix("re:") for _, found in described.values() for pattern in found))
    unplaced = {disk.rpartition(".")[0] for disk in model.reader.checkpoint.files if disk not in targets}
    prediction = {layer[0] for module in unplaced if every.fullmatch(module) and (layer := LAYER.match(module))}
    config = json.loads((model.folder / "config.json").read_text())
    config["model_type"] = model.config.model_type  # as it was read
    config.pop("transformers_weights", None)  # the file that it names is not there any more
    ignore = ["lm_head", *(f"re:.*{re.escape(layer)}.*" for layer in sorted(prediction))]
    return config | {"quantization_config": quantization_config(described, ignore)}
