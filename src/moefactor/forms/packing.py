"""Whole numbers of a few bits in 32-bit words, and what they stand for.

A row of n codes of b bits is stored plane by plane: b is written as a sum of powers of two (3 = 2 + 1), and the
planes follow each other, the one of the low bits first. In a plane of p bits a word holds 32 / p codes, the first in
its lowest bits; the last word of a plane is filled with zeros. With 8, 4 or 2 bits that is one plane, packed as
compressed-tensors' `pack-quantized` and vLLM's kernels have it.

A code c of b bits stands for (c − (2^b − 1) / 2) · scale: levels lie evenly around zero, and none of them is zero, so
that none of the few is wasted on a side. A scale is shared by `group` neighbours along the last axis.
"""

from __future__ import annotations

import torch
from torch import Tensor

BITS = (2, 3, 4, 5, 6, 8)


def planes(bits: int) -> tuple[int, ...]:
    """Widths of the planes, those of the low bits first: 3 -> (2, 1), 8 -> (8,)."""
    return tuple(p for p in (8, 4, 2, 1) if bits & p)


def words(count: int, bits: int) -> int:
    """32-bit words that a row of `count` codes takes."""
    return sum(-(-count * p // 32) for p in planes(bits))


def groups(count: int, group: int) -> int:
    """Scales that a row of `count` numbers takes."""
    return -(-count // group)


def pack(codes: Tensor, bits: int) -> Tensor:
    """(…, n) whole numbers from 0 to 2^bits − 1 -> (…, words(n, bits)) int32."""
    parts, low = [], 0
    for p in planes(bits):
        plane = (codes.long() >> low) & ((1 << p) - 1)
        plane = torch.nn.functional.pad(plane, (0, -plane.shape[-1] % (32 // p))).unflatten(-1, (-1, 32 // p))
        word = (plane << torch.arange(0, 32, p, device=codes.device)).sum(-1)
        parts.append(torch.where(word >= 1 << 31, word - (1 << 32), word).int())
        low += p
    return torch.cat(parts, -1)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack`: (…, words) int32 -> (…, count) uint8."""
    out, low, start = None, 0, 0
    for p in planes(bits):
        end = start + -(-count * p // 32)
        # Bytes, not words: shifts of words would be four times as much to move. Little-endian, like all of safetensors.
        plane = _spread(packed[..., start:end].contiguous().view(torch.uint8), p)[..., :count]
        out = plane if out is None else (plane << low).bitwise_or_(out)
        low, start = low + p, end
    assert out is not None
    return out


def _spread(plane: Tensor, bits: int) -> Tensor:
    """(…, n) bytes of 8 / bits codes -> (…, n · 8 / bits), in halvings: a byte in 16 bits has room to move its upper
    half into a byte of its own, the same shift for all. A shift an element would take fourteen times as long."""
    for half in (4, 2, 1):
        if half >= bits:
            wide = plane.to(torch.int16)
            plane = (wide << 8 - half).bitwise_or_(wide).bitwise_and_(((1 << half) - 1) * 257).view(torch.uint8)
    return plane


def values(packed: Tensor, scale: Tensor, bits: int, count: int, group: int) -> Tensor:
    """(…, count) in the scale's dtype: what codes (…, words) with scales (…, groups) stand for."""
    codes = unpack(packed, bits, count).to(scale.dtype).sub_(midpoint(bits))
    if count % group:
        return codes * scale.repeat_interleave(group, -1)[..., :count]
    codes, scale = codes.unflatten(-1, (-1, group)), scale.unsqueeze(-1)
    return (codes * scale if scale.requires_grad else codes.mul_(scale)).flatten(-2)


def midpoint(bits: int) -> float:
    """What is taken off a code before it is scaled."""
    return (2**bits - 1) / 2
