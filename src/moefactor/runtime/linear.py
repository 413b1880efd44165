"""Linear layers and embeddings outside the experts, kept as codes and scales and dequantised in the product."""

from __future__ import annotations

from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from ..errors import UserError
from ..forms.packing import groups, values, words

# Entries of a weight that are numbers at a time: on a CPU as many as a cache holds, up to 14 times as fast as all.
PART = {"cpu": 1 << 20}
MOST = 1 << 26


class Packed(nn.Module):
    """A weight (rows, columns) of a few bits: `weight_codes` (rows, words) int32 and `weight_scale` (rows, groups), see
    forms/packing.py. Built on the meta device."""

    def __init__(self, rows: int, columns: int, bits: int, group: int, dtype: torch.dtype):
        super().__init__()
        self.rows, self.columns, self.bits, self.group = rows, columns, bits, group
        codes = torch.empty(rows, words(columns, bits), dtype=torch.int32, device="meta")
        scale = torch.empty(rows, groups(columns, group), dtype=dtype, device="meta")
        self.weight_codes = nn.Parameter(codes, requires_grad=False)
        self.weight_scale = nn.Parameter(scale)

    @property
    def weight(self) -> Tensor:
        """(rows, columns) as numbers, made anew: some models' code reads it."""
        return self.numbers(slice(None))

    def numbers(self, which: slice | Tensor) -> Tensor:
        """(…, columns): some of the rows as numbers."""
        return values(self.weight_codes[which], self.weight_scale[which], self.bits, self.columns, self.group)

    def extra_repr(self) -> str:
        return f"{self.rows}, {self.columns}, bits={self.bits}, group={self.group}"


class QuantisedLinear(Packed):
    """nn.Linear, its weight a few bits a number."""

    bias: nn.Parameter | None

    def __init__(self, original: nn.Linear, bits: int, group: int):
        rows, columns = original.weight.shape
        super().__init__(rows, columns, bits, group, original.weight.dtype)
        self.in_features, self.out_features = original.in_features, original.out_features
        self.register_parameter("bias", original.bias)

    def forward(self, input: Tensor) -> Tensor:
        step = max(1, PART.get(input.device.type, MOST) // self.columns)
        parts = [linear(input, self.numbers(slice(start, start + step))) for start in range(0, self.rows, step)]
        out = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
        return out if self.bias is None else out + self.bias


class QuantisedEmbedding(Packed):
    """nn.Embedding, its rows a few bits a number."""

    def __init__(self, original: nn.Embedding, bits: int, group: int):
        rows, columns = original.weight.shape
        super().__init__(rows, columns, bits, group, original.weight.dtype)
        self.num_embeddings, self.embedding_dim = original.num_embeddings, original.embedding_dim
        self.padding_idx = original.padding_idx

    def forward(self, input: Tensor) -> Tensor:
        return self.numbers(input)


def can_be_packed(module: nn.Module) -> TypeGuard[nn.Linear | nn.Embedding]:
    """Whether one of the two can stand in for it: no subclass, which may do more than its parent."""
    return type(module) is nn.Linear or (type(module) is nn.Embedding and module.max_norm is None)


def pack_module(model: nn.Module, path: str, bits: int, group: int) -> None:
    """Puts a module of that many bits where an nn.Linear or nn.Embedding stands."""
    original = model.get_submodule(path)
    if not can_be_packed(original):
        raise UserError(
            f"{path}: is packed in the folder, and this transformers has a {type(original).__name__} there, which "
            "can't be. Install the version that the folder was made with."
        )
    if isinstance(original, nn.Linear):
        made: Packed = QuantisedLinear(original, bits, group)
    else:
        made = QuantisedEmbedding(original, bits, group)
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, made.train(original.training))
