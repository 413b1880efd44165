"""compressed-tensors' formats: what llm-compressor writes, and vLLM and transformers read by themselves.

Codes, packing and names are the library's own, so that a folder is what its readers expect; scales are chosen here.
It is imported when something is written: the tables take no library.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from .errors import UserError, unknown

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationScheme

GROUP_SIZES = (128, 64, 32, 16)  # the first that divides every row is taken; vLLM's Marlin does not take 16
# Of a group's largest weight: where codes are few, cutting it off pays for finer steps.
CLIPS = (1.05, 1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
CACHED = 1 << 16  # weights at a time, so that what is worked out stays in a processor's cache


@dataclass(frozen=True)
class Scheme:
    """How a matrix (rows, columns) is stored. Hashable, without the library.

    Args:
        name: llm-compressor's.
        kind: of a code; int counts steps of the scale, float is E4M3 in 8 bits and E2M1 in 4.
        bits: of a code.
        group_size: weights of a row that share a scale; None where a row or a block shares one.
        symmetric: no zero point.
        block: rows and columns that share a scale.
    """

    name: str
    kind: Literal["int", "float"]
    bits: int
    group_size: int | None = None
    symmetric: bool = True
    block: tuple[int, int] | None = None

    @property
    def format(self) -> str:
        """compressed-tensors' name of the layout."""
        if self.kind == "int":
            return "pack-quantized"
        return "float-quantized" if self.bits == 8 else f"{self.name[:-3].lower()}-pack-quantized"

    @property
    def strategy(self) -> str:
        """compressed-tensors' name of what shares a scale."""
        if self.block or not self.group_size:
            return "block" if self.block else "channel"
        return "tensor_group" if self.name == "NVFP4A16" else "group"

    @property
    def scale_dtype(self) -> torch.dtype | None:
        """What the format stores scales in; None: what the weights had."""
        return {"NVFP4A16": torch.float8_e4m3fn, "MXFP4A16": torch.uint8}.get(self.name)

    def divides(self, shape: tuple[int, ...]) -> bool:
        """Whether groups and blocks divide a matrix (rows, columns)."""
        rows, columns = self.block or (1, self.group_size or 1)
        return shape[0] % rows == shape[1] % columns == 0

    def fitted(self, shapes: Iterable[tuple[int, ...]], what: str, group_size: int | None = None) -> Scheme:
        """The same, with the largest groups that divide all matrices (rows, columns), or with `group_size`.

        Raises UserError where nothing divides them; `what` are these matrices.
        """
        if group_size is not None and (self.kind == "float" or group_size not in GROUP_SIZES):
            raise UserError(
                f"--group-size {group_size}: {self.name} says itself what shares a scale; leave it out."
                if self.kind == "float"
                else f"--group-size {group_size}: one of {', '.join(map(str, GROUP_SIZES))}."
            )
        found = sorted(set(shapes))
        every = [replace(self, group_size=size) for size in GROUP_SIZES] if self.kind == "int" else [self]
        fitting = [scheme for scheme in every if all(map(scheme.divides, found))]
        wanted = [scheme for scheme in fitting if group_size in (None, scheme.group_size)]
        if wanted:
            return wanted[0]
        said = self.block or group_size or self.group_size
        instead = f"--group-size {' or '.join(str(s.group_size) for s in fitting)} does. " if fitting else ""
        raise UserError(
            f"{what}: {' and '.join(f'{rows} × {columns}' for rows, columns in found)} weights don't divide into "
            f"{self.name}'s {'blocks' if self.block else 'groups'} of {said}. {instead}FP8_DYNAMIC takes any; a "
            "compressed model's experts get widths that divide with --width-multiple."
        )

    def described(self, targets: list[str]) -> dict[str, Any]:
        """A group of the quantization_config."""
        weights: dict[str, Any] = {
            "num_bits": self.bits, "type": self.kind, "symmetric": self.symmetric, "strategy": self.strategy,
            "dynamic": False,
        }  # fmt: skip
        if self.group_size:
            weights["group_size"] = self.group_size
        if self.block:
            weights["block_structure"] = list(self.block)
        if self.scale_dtype:
            weights["scale_dtype"] = str(self.scale_dtype)
        inputs = None
        if self.kind == "float" and self.bits == 8:  # rounded while it runs, for FP8 products
            inputs = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": True}
            inputs |= {"strategy": "group", "group_size": self.block[1]} if self.block else {"strategy": "token"}
        return {
            "targets": targets, "weights": weights, "input_activations": inputs, "output_activations": None,
            "format": self.format,
        }  # fmt: skip


SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme("W4A16", "int", 4, 128),
        Scheme("W4A16_ASYM", "int", 4, 128, symmetric=False),
        Scheme("W8A16", "int", 8, 128),
        Scheme("FP8_DYNAMIC", "float", 8),
        Scheme("FP8_BLOCK", "float", 8, block=(128, 128)),
        Scheme("NVFP4A16", "float", 4, 16),
        Scheme("MXFP4A16", "float", 4, 32),
    )
}
# What people call them. llm-compressor's FP8, NVFP4 and MXFP4 round activations too, by scales that take calibration.
ALSO = {
    "INT4": "W4A16", "INT8": "W8A16", "FP8": "FP8_DYNAMIC", "NVFP4": "NVFP4A16", "MXFP4": "MXFP4A16",
}  # fmt: skip


def scheme_of(name: str) -> Scheme:
    """By its name in any case, or another name for it. UserError for one that there is not."""
    found = SCHEMES.get(ALSO.get(name.upper(), name.upper()))
    if found is None:
        raise unknown("quantisation scheme", name, [*SCHEMES, *(n.lower() for n in ALSO)])
    return found


def rest_of(scheme: Scheme, bits: int) -> Scheme | None:
    """What other layers are stored in beside experts in `scheme`; None for as they are."""
    if bits not in (16, 8, 4):
        raise UserError(f"--rest-bits {bits}: 16, 8 or 4.")
    if bits in (16, scheme.bits):
        return scheme if bits == scheme.bits else None
    return SCHEMES["W4A16" if bits == 4 else "W8A16" if scheme.kind == "int" else "FP8_DYNAMIC"]


def quantization_config(groups: Mapping[str, tuple[Scheme, list[str]]], ignore: list[str]) -> dict[str, Any]:
    """What config.json says.

    Args:
        groups: name -> the scheme, and patterns of the modules that have it.
        ignore: patterns of modules that are as they were though a pattern of a group matches.
    """
    formats = {scheme.format for scheme, _ in groups.values()}
    return {
        "quant_method": "compressed-tensors",
        "version": version("compressed-tensors"),
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": {name: scheme.described(targets) for name, (scheme, targets) in groups.items()},
        "ignore": ignore,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


@dataclass(frozen=True)
class Rounded:
    """A matrix rounded to integers already: weight = (codes − zero) · scale.

    codes: (rows, columns), from −2^(bits−1) to 2^(bits−1) − 1. scale, zero: (rows, columns / group size).
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None = None


Rounding = Callable[[str, Tensor], Rounded | Tensor]  # name and weights (rows, columns) -> rounded, or other weights


def pack(weight: Tensor | Rounded, scheme: Scheme, dtype: torch.dtype, largest: float) -> dict[str, Tensor]:
    """The tensors stored in place of a matrix: their names behind the module's -> tensor.

    Args:
        weight: (rows, columns); rounded to nearest by scales with the least squared error, where it isn't yet.
        dtype: of scales, where the format leaves it open.
        largest: magnitude in this matrix and those that an engine fuses it with, which share NVFP4's second scale.
    """
    need_library()
    from compressed_tensors.compressors import BaseCompressor

    library = _library_scheme(scheme)
    tensors: dict[str, Tensor] = {}
    if isinstance(weight, Rounded):
        if scheme.kind != "int":
            raise UserError(f"{scheme.name}: its codes are chosen here; give weights instead of codes.")
        scale, zero = weight.scale.to(dtype), weight.zero
        moved = weight.codes.float() if zero is None else _spread(weight.codes.float(), zero, torch.sub)
        weight = _spread(moved, scale.float(), torch.mul)
    else:
        weight = weight.float()
        if scheme.name == "NVFP4A16":
            tensors["weight_global_scale"] = torch.tensor([448.0 * 6.0 / max(largest, 1e-30)])
        scale, zero = _nearest(weight, scheme, dtype, tensors.get("weight_global_scale"))
    tensors |= {"weight": weight, "weight_scale": scale}
    if not scheme.symmetric:
        assert zero is not None  # as calculate_qparams gives, and Rounded must
        tensors["weight_zero_point"] = zero.to(torch.int8)
    return dict(BaseCompressor.get_value_from_registry(scheme.format).compress(tensors, library))


def unpack(tensors: Mapping[str, Tensor], scheme: Scheme) -> Tensor:
    """The matrix (rows, columns) that `pack`'s tensors stand for, in float32."""
    need_library()
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    library = _library_scheme(scheme)
    stored = dict(tensors)
    if scheme.scale_dtype is None:  # or the product would be rounded to the scale's sixteen bits
        stored["weight_scale"] = stored["weight_scale"].float()
    if scheme.block:  # which the library guesses from shapes
        return dequantize(stored["weight"], stored["weight_scale"], args=library.weights)
    return BaseCompressor.get_value_from_registry(scheme.format).decompress(stored, library)["weight"].float()


def _spread(values: Tensor, by: Tensor, combine: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Every group of a row of `values` with its own number of `by`."""
    return combine(values.unflatten(1, (by.shape[1], -1)), by.float().unsqueeze(2)).flatten(1)


def _nearest(
    weight: Tensor, scheme: Scheme, dtype: torch.dtype, global_scale: Tensor | None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Scales and zero points with the least squared error, among CLIPS for each."""
    cells = _cells(weight, scheme)
    parts = cells.flatten(0, 1).split(max(1, CACHED // cells.shape[2]))
    scales, zeros = zip(*(_nearest_of(part, scheme, dtype, global_scale) for part in parts), strict=True)
    return torch.cat(scales).view(cells.shape[:2]), torch.cat(zeros).view(cells.shape[:2])


def _nearest_of(
    cells: Tensor, scheme: Scheme, dtype: torch.dtype, global_scale: Tensor | None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(n, weights that share a scale) -> n scales and zero points."""
    from compressed_tensors.quantization import QuantizationStrategy
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    args: Any = _library_scheme(scheme).weights
    by_row = args.model_copy(update={"strategy": QuantizationStrategy.CHANNEL, "group_size": None})
    low, high = cells.aminmax(dim=1)
    found: list[Tensor] = []
    for clip in CLIPS if scheme.bits < 8 else (1.0,):
        scale, zero = calculate_qparams(low * clip, high * clip, args, global_scale=global_scale)
        scale = scale if scheme.scale_dtype else scale.to(dtype)
        rounded = fake_quantize(
            cells, scale.float().unsqueeze(1), zero.unsqueeze(1), by_row, global_scale=global_scale
        )  # fmt: skip
        new = [(cells - rounded).square().sum(1), scale, zero]
        better = new[0] < found[0] if found else torch.ones_like(low, dtype=torch.bool)
        found = [torch.where(better, n, o) for n, o in zip(new, found or new, strict=True)]
    return found[1], found[2]


def _cells(weight: Tensor, scheme: Scheme) -> Tensor:
    """(rows, columns) -> (rows of scales, columns of scales, weights that share one); zeros fill up the last ones."""
    rows, columns = scheme.block or (1, scheme.group_size or weight.shape[1])
    padded = nn.functional.pad(weight, (0, -weight.shape[1] % columns, 0, -weight.shape[0] % rows))
    cells = padded.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
    return cells.transpose(1, 2).flatten(2)


@cache
def _library_scheme(scheme: Scheme) -> QuantizationScheme:
    from compressed_tensors.quantization import QuantizationScheme

    return QuantizationScheme.model_validate(scheme.described(["Linear"]))


def check_loads(name: str, described: object) -> None:
    """Raises UserError for a quantization_config whose experts transformers does not read.

    Up to 5.24 it decompresses them from a weight, a scale and a shape: NVFP4's second scale is left out without a word,
    and experts are thousands of times too large; zero points and blocks end in an error.
    """
    if not isinstance(described, dict) or described.get("quant_method") != "compressed-tensors":
        return
    need_library()
    weights = [group.get("weights") or {} for group in described.get("config_groups", {}).values()]
    unread = {"tensor_group": "NVFP4's second scale", "asymmetric": "zero points", "block": "blocks"}
    found = [str(w.get("strategy")) if w.get("symmetric", True) else "asymmetric" for w in weights]
    for what in [unread[strategy] for strategy in found if strategy in unread]:
        raise UserError(
            f"{name}: transformers does not read {what} of experts; vLLM does. For transformers, export to W4A16, "
            "W8A16, FP8_DYNAMIC or MXFP4A16."
        )


def need_library() -> None:
    """Raises UserError where compressed-tensors is not installed."""
    if find_spec("compressed_tensors") is None:
        raise UserError("Quantised checkpoints need compressed-tensors: pip install 'moefactor[quant]'")
