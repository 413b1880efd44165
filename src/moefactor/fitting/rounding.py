"""Rounding to a few bits: scales, what it costs, and values that can be trained while they are rounded.

Levels are those of forms/packing.py: (c − (2^b − 1) / 2) · scale, c a whole number of b bits, a scale for every `group`
neighbours along the last axis. Scales are kept in bfloat16's precision, in which they are stored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..forms import Quantised
from ..forms.base import Factors
from ..forms.packing import BITS, pack

# Where the outermost level lies, over the largest number of a group: all are tried, and the least squared error kept.
CLIPS = torch.linspace(1.0, 0.35, 20).tolist()
PART = 1 << 18  # numbers whose scales are searched at a time: those that a cache holds, four times as fast as 2^22
CLIPPING = 64  # outermost level from which clipping pays no more: with 8 bits the largest number's own error is all
SAMPLE = 4096  # groups that say what rounding costs
SMALLEST = 1e-20  # of scales to divide by; that of a group of zeros is zero


def grouped(x: Tensor, group: int) -> Tensor:
    """(…, n) -> (…, groups, group), zeros behind the last."""
    return torch.nn.functional.pad(x, (0, -x.shape[-1] % group)).unflatten(-1, (-1, group))


def nearest(x: Tensor, scale: Tensor, top: Tensor) -> Tensor:
    """Levels, in scales, nearest to (…, groups, group); scale (…, groups, 1), top (2^bits − 1) / 2."""
    return ((x / scale.clamp(min=SMALLEST) - 0.5).round() + 0.5).clamp(-top, top)


def _top(bits: int, device: torch.device) -> Tensor:
    """The outermost level, in scales."""
    return torch.tensor((2**bits - 1) / 2, device=device)


def search_scales(x: Tensor, bits: int, group: int) -> Tensor:
    """(…, n) -> (…, groups), the scales of least squared error, float32 with bfloat16's precision."""
    parts = grouped(x.float(), group)
    flat, top = parts.flatten(0, -2), _top(bits, x.device)
    found = [_searched(part, top) for part in flat.split(max(1, PART // group))]
    return torch.cat(found).view(parts.shape[:-1]) if found else flat.new_zeros(parts.shape[:-1])


def _searched(parts: Tensor, top: Tensor) -> Tensor:
    """(n, group) -> (n,)"""
    largest = parts.abs().amax(-1, keepdim=True)
    best = scale = None
    for clip in CLIPS if top < CLIPPING else CLIPS[:1]:
        tried = (largest * clip / top).bfloat16().float()
        error = (nearest(parts, tried, top) * tried - parts).square().sum(-1, keepdim=True)
        if best is None or scale is None:
            best, scale = error, tried
        else:
            scale, best = torch.where(error < best, tried, scale), torch.minimum(error, best)
    assert scale is not None
    return scale.squeeze(-1)


def relative_noise(x: Tensor, group: int, seed: int = 0) -> dict[int, float]:
    """bits -> mean squared error of rounding over the mean square, of a sample of the groups of (…, n)."""
    rows = x.flatten(0, -2)
    chosen = torch.randint(len(rows), (min(SAMPLE, len(rows)),), generator=torch.Generator().manual_seed(seed))
    parts = grouped(rows[chosen.to(x.device)].float(), group).flatten(0, -2)
    energy = float(parts.square().sum().clamp(min=1e-30))
    found = {}
    for bits in BITS:
        scale, top = search_scales(parts, bits, group), _top(bits, x.device)
        found[bits] = float((nearest(parts, scale, top) * scale - parts).square().sum()) / energy
    return found


def _stored(scale: Tensor) -> Tensor:
    """A scale as it will be read; training must not take it through zero."""
    return scale.clamp(min=0).bfloat16().float()


class Straight(torch.autograd.Function):
    """Rounded on the way forward, let through on the way back (Bengio et al. 2013); a scale's gradient as in LSQ
    (Esser et al. 2020)."""

    @staticmethod
    def forward(ctx, x: Tensor, scale: Tensor, top: Tensor, group: int) -> Tensor:
        scale = _stored(scale).unsqueeze(-1)
        levels = grouped(x, group) / scale.clamp(min=SMALLEST)
        chosen = ((levels - 0.5).round() + 0.5).clamp(-top, top)
        ctx.save_for_backward(levels, chosen, top)
        ctx.count, ctx.group = x.shape[-1], group
        return (chosen * scale).flatten(-2)[..., : ctx.count]

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        levels, chosen, top = ctx.saved_tensors
        gradient = grouped(gradient, ctx.group)
        inside = levels.abs() < top + 0.5
        of_scale = (gradient * torch.where(inside, chosen - levels, chosen)).sum(-1)
        return (gradient * inside).flatten(-2)[..., : ctx.count], of_scale, None, None


@dataclass(frozen=True)
class Grid:
    """The levels of one tensor.  bits: of all of it, or (rows,) of each of its rows."""

    bits: int | Tensor
    group: int

    def scales(self, x: Tensor) -> Tensor:
        """(…, n) -> (…, groups)."""
        if isinstance(self.bits, int):
            return search_scales(x, self.bits, self.group)
        found = grouped(x.float(), self.group)[..., 0].clone()
        for bits in self.bits.unique().tolist():
            rows = (self.bits == bits).nonzero().flatten().to(x.device)
            found[rows] = search_scales(x[rows], bits, self.group)
        return found

    def top(self, device: torch.device) -> Tensor:
        """The outermost level, in scales; to go with (…, groups, group)."""
        if isinstance(self.bits, int):
            return _top(self.bits, device)
        return ((2.0**self.bits - 1) / 2).view(-1, 1, 1).to(device)

    def rounded(self, x: Tensor, scale: Tensor) -> Tensor:
        """(…, n) at its levels, float32; gradients go to both."""
        out: Tensor = Straight.apply(x.float(), scale, self.top(x.device), self.group)
        return out

    def codes(self, x: Tensor, scale: Tensor) -> Tensor:
        """(…, n) whole numbers; scale (…, groups) of bfloat16's precision."""
        top, count = self.top(x.device), x.shape[-1]
        levels = nearest(grouped(x.float(), self.group), scale.float().unsqueeze(-1), top)
        return (levels + top).flatten(-2)[..., :count].to(torch.uint8)


def round_to_nearest(x: Tensor, bits: int, group: int, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(…, n) -> its codes (…, words) and scales (…, groups), these in its dtype; a part at a time.

    Args:
        scale: where it is known; searched otherwise.
    """
    grid, outer = Grid(bits, group), x.shape[:-1]
    rows, codes, scales = max(1, PART // max(1, x.shape[-1])), [], []
    known = None if scale is None else scale.detach().reshape(-1, scale.shape[-1]).split(rows)
    for number, part in enumerate(x.reshape(-1, x.shape[-1]).split(rows)):
        own = _stored(grid.scales(part) if known is None else known[number])
        codes.append(pack(grid.codes(part, own), bits))
        scales.append(own.to(x.dtype))
    return torch.cat(codes).view(*outer, -1), torch.cat(scales).view(*outer, -1)


def grids(form: Quantised) -> dict[str, Grid]:
    """The inner form's tensors that are rounded -> their levels."""
    found = {name: Grid(bits, form.group) for name, bits in form.tensor_bits}
    if form.channels:
        places = form.places()
        bits = torch.zeros(sum(len(rows) for _, rows in places), dtype=torch.int64)
        for each, rows in places:
            bits[rows] = each
        found[form.channel_tensor] = Grid(bits, form.group)
    return found


def packed(form: Quantised, factors: Factors, scales: Mapping[str, Tensor] | None = None) -> Factors:
    """What `form` stores for the inner form's tensors.

    Args:
        scales: of those for which they are known; searched otherwise.
    """
    stored, bits = {}, dict(form.tensor_bits)
    for name, tensor in factors.items():
        known = None if scales is None else scales.get(name)
        if name in bits:
            codes, scale = round_to_nearest(tensor, bits[name], form.group, known)
            stored[f"{name}_codes"], stored[f"{name}_scale"] = codes, scale
        elif name == form.channel_tensor and form.channels:
            for each, rows in form.places():
                at = rows.to(tensor.device)
                codes, scale = round_to_nearest(tensor[at], each, form.group, None if known is None else known[at])
                stored[f"{name}_codes_b{each}"], stored[f"{name}_scale_b{each}"] = codes, scale
        else:
            stored[name] = tensor
    return stored
