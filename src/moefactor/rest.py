"""What is not a compressed expert in fewer bits: which tensors, how many bytes, and rounding them.

Rounded to nearest, in groups of GROUP neighbours along the input axis, when the checkpoint is written.
"""

from __future__ import annotations

import re
from collections.abc import Set
from math import prod

import torch
from torch import Tensor, nn

from .checkpoint import FLOATS, Change, Checkpoint, Slice, item_size, renamed
from .errors import UserError
from .experts import ExpertLayer, check_finite
from .fitting.rounding import round_to_nearest
from .forms.packing import groups, words
from .fp8 import SCALE
from .runtime.format import Rest
from .runtime.linear import can_be_packed
from .streaming import StreamedModel

CHOICES = (16, 8, 4)  # of --rest-bits; 16: as it is
GROUP = 64
LEAST = 64  # rows and columns of what is worth it
MULTIPLE = 32  # of columns: so many codes fill words, whatever their bits
EMBEDDING_BITS = 8  # at least, of embeddings and the head
ROUTER = re.compile(r"(^|_)(gate|wg)$|router")  # last part of a module's name, where config.json's fields don't tell


def check_bits(bits: int) -> None:
    if bits not in CHOICES:
        raise UserError(f"--rest-bits must be one of {', '.join(map(str, CHOICES))}, found {bits}.")


# -- which ---------------------------------------------------------------------------------------------------------


def rest_tensors(model: StreamedModel) -> dict[str, bool]:
    """Name on disk -> whether it is an embedding or the head, of every tensor that fewer bits are for.

    Weights of linear layers and embeddings in the language model, at least LEAST on a side. Not routers, nor what the
    architecture keeps in float32, nor towers; not what passes through a conversion on its way into the model (a fused
    q, k, v), and not what the model has no place for (layers of multi-token prediction).
    """
    reader, skeleton = model.reader, model.model
    chosen = _meant(model)
    for pair in skeleton.all_tied_weights_keys.items():
        if len(chosen.keys() & pair) == 1:  # what it is tied to can't be packed, so neither can it
            chosen.pop(pair[0] if pair[0] in chosen else pair[1])
    state = skeleton.state_dict()
    places = renamed(skeleton, list(reader.checkpoint.files), state)  # FP8's conversions are not what a reader has
    plain = {name: target for name, (target, pattern) in places.items() if pattern is None and target in chosen}
    # What is written in their place must find its way into the model too.
    wanted = {name + part: target + part for name, target in plain.items() for part in ("_codes", "_scale")}
    found = renamed(skeleton, list(wanted), state | dict.fromkeys(wanted.values(), torch.empty(0)))
    lost = {name.rpartition("_")[0] for name, target in wanted.items() if found.get(name) != (target, None)}
    with reader.checkpoint.slices(sorted(plain.keys() - lost)) as slices:
        return {
            name: chosen[plain[name]]
            for name, view in slices.items()
            if _is_large(view.get_shape()) and _stored_as(model, name, view)
        }


def _meant(model: StreamedModel) -> dict[str, bool]:
    """The model's name of a weight -> whether it is an embedding or the head."""
    skeleton = model.model
    decoder = skeleton.get_decoder()
    language = next(path for path, module in skeleton.named_modules() if module is decoder)
    head = skeleton.get_output_embeddings()
    routers = {name for layer in model.experts for name, _ in layer.router}
    exact = [*(skeleton._keep_in_fp32_modules or ()), *(skeleton._keep_in_fp32_modules_strict or ())]
    found = {}
    for path, module in skeleton.named_modules():
        weight = f"{path}.weight"
        inside = not language or path.startswith(f"{language}.") or module is head
        router = weight in routers or ROUTER.search(path.rpartition(".")[2])
        precise = any(re.search(part.replace("*", ".*"), weight) for part in exact)
        if can_be_packed(module) and inside and not router and not precise:
            found[weight] = isinstance(module, nn.Embedding) or module is head
    return found


def _is_large(shape: list[int]) -> bool:
    return len(shape) == 2 and min(shape) >= LEAST and shape[1] % MULTIPLE == 0


def _stored_as(model: StreamedModel, name: str, view: Slice) -> str:
    """safetensors' name of the dtype that a copy has: FP8 is undone. "" for one of no ordinary numbers."""
    if model.reader.source is not None and name + SCALE in model.reader.checkpoint.files:
        return "BF16"
    return view.get_dtype() if view.get_dtype() in FLOATS else ""


def rest_bits(model: StreamedModel, bits: int) -> dict[str, int]:
    """Name on disk -> bits of every tensor that `--rest-bits` makes smaller."""
    check_bits(bits)
    if bits == 16:
        return {}
    return {name: max(bits, EMBEDDING_BITS) if outer else bits for name, outer in rest_tensors(model).items()}


def describe_rest(model: StreamedModel, bits: dict[str, int]) -> Rest:
    return Rest.of(bits, model.reader.checkpoint.files, GROUP)


def expert_tensors(model: StreamedModel) -> set[str]:
    """Names on disk of what is compressed."""
    ours = {name for layer in model.experts for name in expert_names(layer)}
    return {name for name, found in model.reader.targets.items() if ours & set(found)}


def expert_names(layer: ExpertLayer) -> list[str]:
    """The model's names of what is compressed; other tensors may live in the same module (a norm behind them)."""
    names = [layer.first_name, "down_proj"]
    biases = [name + "_bias" for name in names] if layer.biased else []
    return [f"{layer.name}.{name}" for name in names + biases]


def rest_bytes(model: StreamedModel, bits: int, without: Set[str] = frozenset()) -> int:
    """Bytes of the tensors of everything that is not a compressed expert as it is written, from the headers alone.

    without: names on disk of what is left out (layers of multi-token prediction).
    """
    chosen, gone, total = rest_bits(model, bits), expert_tensors(model).union(without), 0
    checkpoint = model.reader.checkpoint
    names = [n for n in checkpoint.files if n not in gone and not (model.reader.source and n.endswith(SCALE))]
    with checkpoint.slices(names) as slices:
        for name, view in slices.items():
            shape, size = view.get_shape(), item_size(_stored_as(model, name, view) or view.get_dtype())
            if name in chosen:
                rows, columns = shape
                total += rows * (4 * words(columns, chosen[name]) + size * groups(columns, GROUP))
            else:
                total += prod(shape) * size
    return total


# -- rounding ------------------------------------------------------------------------------------------------------


def packing(model: StreamedModel, bits: dict[str, int]) -> Change:
    """What CheckpointWriter.copy_plain writes in the place of a tensor, in so many bits."""

    def change(name: str, tensor: Tensor) -> dict[str, Tensor]:
        if name not in bits:
            return {name: tensor}
        check_finite(model.reader.checkpoint.folder.name, {name: tensor})
        codes, scale = round_to_nearest(tensor, bits[name], GROUP)
        return {f"{name}_codes": codes, f"{name}_scale": scale}

    return change


def unpacking(checkpoint: Checkpoint, quantisation: dict) -> Change:
    """The way back, of a compressed folder with that `quantization_config`."""
    rest = Rest.from_json(quantisation)

    def change(name: str, tensor: Tensor) -> dict[str, Tensor]:
        weight, _, part = name.rpartition("_")
        if part not in ("codes", "scale") or not rest.bits(weight):
            return {name: tensor}
        if part == "scale":
            return {}
        with checkpoint.slices([f"{weight}_scale"]) as slices:
            return {weight: rest.numbers(weight, tensor, slices[f"{weight}_scale"][:])}

    return change
