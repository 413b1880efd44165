"""Rows of codes as numbers on a CPU, a few at a time, with no memory but what was there before: fresh pages would cost
as much as the arithmetic."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from ...forms.packing import groups, planes

NUMBERS = 1 << 20  # that are dequantised together; fewer cost calls, more do not stay in the cache


class Dequantiser:
    """Room for NUMBERS, and for their codes on the way. Rows are put in, of any precision, and taken together.

    Args:
        columns: of every row.
        group: neighbours that share a scale.
    """

    def __init__(self, columns: int, group: int):
        self.columns, self.group = columns, group
        self.rows, self.filled = max(1, NUMBERS // columns), 0
        most = self.rows * (columns + -columns % 32)
        self._first, self._second = torch.empty(2, most, dtype=torch.uint8)
        self._index = torch.empty(most // 4, dtype=torch.int32)
        self._codes = torch.empty(self.rows, columns, dtype=torch.int8)
        self._scale = torch.empty(self.rows, groups(columns, group))
        self._numbers = torch.empty(4 * self.rows * columns, dtype=torch.uint8)
        self._of_8_bits: list[slice] = []

    @property
    def left(self) -> int:
        """Rows that can still be put in."""
        return self.rows - self.filled

    def put(self, codes: Tensor, scale: Tensor, bits: int) -> None:
        """codes: (n, words), n at most `left`.  scale: (n, groups)."""
        at = slice(self.filled, self.filled + len(codes))
        if bits == 8:  # c − 128, of which 2 c − 255 is made when there is room for it
            bytes_ = codes.view(torch.uint8)[:, : self.columns]
            torch.bitwise_xor(bytes_, 128, out=self._codes[at].view(torch.uint8))
            self._of_8_bits.append(at)
        else:
            self._codes[at].copy_(self._doubled(codes, bits))
        self._scale[at].copy_(scale)
        self.filled = at.stop

    def take(self, dtype: torch.dtype) -> Tensor:
        """(rows put in, columns) as numbers of a type of at most 32 bits, until the next are taken."""
        out = self._numbers.view(dtype)[: self.filled * self.columns].view(-1, self.columns)
        out.copy_(self._codes[: self.filled])
        for at in self._of_8_bits:
            out[at].mul_(2).add_(1)
        scale, whole = (self._scale[: self.filled] / 2).to(dtype), self.columns // self.group
        out[:, : whole * self.group].unflatten(1, (whole, self.group)).mul_(scale[:, :whole].unsqueeze(2))
        if whole * self.group < self.columns:
            out[:, whole * self.group :].mul_(scale[:, whole:])
        self.filled, self._of_8_bits = 0, []
        return out

    def _doubled(self, codes: Tensor, bits: int) -> Tensor:
        """(n, columns) int8: 2 c − (2^bits − 1), twice what a code stands for.

        The plane of 4 bits is shifted apart in 16 bits. That of 2 or 1 is looked up a byte at a time, its place and
        what is taken off being in the table.
        """
        total, start, low = None, 0, 0
        for p in planes(bits):
            end = start + -(-self.columns * p // 32)
            plane = codes[:, start:end].view(torch.uint8)
            if p == 4:
                rooms = self._first, self._second
                wide, moved = (room.view(torch.int16)[: plane.numel()].view(plane.shape) for room in rooms)
                torch.bitwise_left_shift(wide.copy_(plane), 4, out=moved)
                own = wide.bitwise_or_(moved).bitwise_and_(0x0F0F).view(torch.int8).mul_(2)
                own = own if bits > 4 else own.sub_(15)
            else:
                entries = table(p, low, 0 if low + p < bits else 2**bits - 1)
                index = self._index[: plane.numel()].copy_(plane.reshape(-1))
                room = (self._first if total is None else self._second).view(entries.dtype)[: plane.numel()]
                own = torch.index_select(entries, 0, index, out=room).view(torch.int8).view(len(codes), -1)
            own = own[:, : self.columns]
            total = own if total is None else total.add_(own)
            start, low = end, low + p
        assert total is not None
        return total


@cache
def table(bits: int, low: int, less: int) -> Tensor:
    """(256,) of 8 / bits bytes each: of the codes c in a byte of a plane 2 c · 2^low − less, as int8."""
    codes = torch.arange(256).unsqueeze(1) >> torch.arange(0, 8, bits) & (1 << bits) - 1
    entries = ((codes << low + 1) - less).to(torch.int8)
    return entries.view({2: torch.int32, 1: torch.int64}[bits]).flatten()
