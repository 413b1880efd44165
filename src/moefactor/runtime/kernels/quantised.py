"""Quantised forms: the inner form's own kernel, given numbers that last as long as the call.

On a CPU the rows of channels, which are most of a layer, are numbers a few at a time: of the experts hit, one by one,
in one room in the cache. Elsewhere, and for gradients, a stack is dequantised whole: that takes its 16 or 32 bits a
number in memory until the product is done, but waits for nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from itertools import accumulate
from typing import NamedTuple, cast

import torch
from torch import Tensor

from ...forms import Quantised
from ...forms.base import Factors
from ...routing import Routing
from .base import Kernel
from .basis_mixture import BasisMixtureKernel
from .composed import LatentKernel
from .dense import RaggedKernel
from .dequantise import Dequantiser
from .setting import Setting

FEW = 8  # rows an expert: fewer of 16 bits are multiplied faster once they are float32


class QuantisedKernel(Kernel[Quantised]):
    """Every tensor dequantised whole, once a call."""

    def __init__(self, form: Quantised, setting: Setting, inner: Kernel):
        super().__init__(form, setting, inner.linear)
        self.inner = inner
        self._order: dict[torch.device, Tensor] = {}

    def read(self, factors: Factors, tokens: Tensor, routing: Routing) -> Tensor:
        return self.inner.read(self._numbers(factors), tokens, routing)

    def write(self, factors: Factors, activations: Tensor, routing: Routing) -> Tensor:
        return self.inner.write(self._numbers(factors), activations, routing)

    def write_combined(self, factors: Factors, activations: Tensor, routing: Routing) -> Tensor:
        return self.inner.write_combined(self._numbers(factors), activations, routing)

    def _numbers(self, factors: Factors) -> Factors:
        """The inner form's tensors."""
        if not self.form.channels:
            return self.form.rounded(factors)
        device = next(iter(factors.values())).device
        if device not in self._order:
            self._order[device] = self.form.order().to(device)
        return self.form.rounded(factors, self._order[device])


class QuantisedByExpert(QuantisedKernel):
    """Rows of channels stay packed until the expert whose they are has tokens. Gradients are the parent's."""

    def __init__(self, form: Quantised, setting: Setting, inner: Kernel):
        super().__init__(form, setting, inner)
        self.by_expert = _over_packed_rows(inner, PackedRowsKernel(form, setting))

    def read(self, factors: Factors, tokens: Tensor, routing: Routing) -> Tensor:
        if torch.is_grad_enabled():
            return super().read(factors, tokens, routing)
        return self.by_expert.read(self._packed(factors), tokens, routing)

    def write(self, factors: Factors, activations: Tensor, routing: Routing) -> Tensor:
        if torch.is_grad_enabled():
            return super().write(factors, activations, routing)
        return self.by_expert.write(self._packed(factors), activations, routing)

    def write_combined(self, factors: Factors, activations: Tensor, routing: Routing) -> Tensor:
        if torch.is_grad_enabled():
            return super().write_combined(factors, activations, routing)
        return self.by_expert.write_combined(self._packed(factors), activations, routing)

    def _packed(self, factors: Factors) -> Factors:
        """The inner form's tensors, but PackedRows for the one that has a row for each channel."""
        form, name = self.form, self.form.channel_tensor
        endings = [(bits, f"_b{bits}") for bits, _ in form.channels] or [(form.precision(name), "")]
        rows = PackedRows(
            tuple(
                Part(bits, factors[f"{name}_codes{end}"].flatten(0, -2), factors[f"{name}_scale{end}"].flatten(0, -2))
                for bits, end in endings
            )
        )
        numbers = {other: form.tensor(other, factors) for other in form.inner.tensors() if other != name}
        return {**numbers, name: cast(Tensor, rows)}  # which PackedRowsKernel alone looks into


class Part(NamedTuple):
    """Rows of one precision: codes (rows, words), scale (rows, groups)."""

    bits: int
    codes: Tensor
    scale: Tensor


class PackedRows(NamedTuple):
    """Stands for a tensor that is never to be numbers all at once."""

    parts: tuple[Part, ...]

    @property
    def dtype(self) -> torch.dtype:
        return self.parts[0].scale.dtype


class PackedRowsKernel(RaggedKernel):
    """Ragged experts, or dense ones, whose `weight` is PackedRows."""

    def __init__(self, form: Quantised, setting: Setting):
        rows = form.rows()
        super().__init__(rows, setting)
        self.group = form.group
        self.widths = tuple(widths for _, widths in form.channels) or (rows.widths,)  # part by part
        self.firsts = tuple(tuple(accumulate((rows.halves * w for w in each), initial=0)) for each in self.widths)

    def read_rows(self, factors: Factors, rows: Tensor, routing: Routing) -> Tensor:
        form, packed, out = self.form, cast(PackedRows, factors["weight"]), []
        room = Dequantiser(form.hidden, self.group)
        for expert, own in _own(rows, routing, packed.dtype):
            met = []
            for place, part in enumerate(packed.parts):
                width = self.widths[place][expert]
                through = own.new_empty(len(own), form.halves * width)
                for window, numbers in self._numbers(place, part, expert, room, own.dtype):
                    torch.mm(own, numbers.T, out=through[:, window])
                met.append(through.view(len(own), form.halves, width))
            out.append(self._widen(torch.cat(met, 2).to(packed.dtype), form.widths[expert]))
        return torch.cat(out) if out else rows.new_zeros(0, form.width)

    def write(self, factors: Factors, activations: Tensor, routing: Routing) -> Tensor:
        form, packed, out = self.form, cast(PackedRows, factors["weight"]), []
        room = Dequantiser(form.hidden, self.group)
        for expert, own in _own(activations, routing, packed.dtype):
            total = own.new_zeros(len(own), form.hidden)
            first = 0
            for place, part in enumerate(packed.parts):
                for window, numbers in self._numbers(place, part, expert, room, own.dtype):
                    total.addmm_(own[:, first + window.start : first + window.stop], numbers)
                first += self.widths[place][expert]
            out.append(total.to(packed.dtype))
        return torch.cat(out) if out else activations.new_zeros(0, form.hidden)

    def _numbers(
        self, place: int, part: Part, expert: int, room: Dequantiser, dtype: torch.dtype
    ) -> Iterator[tuple[slice, Tensor]]:
        """(which of an expert's rows in a part, these as numbers until the next are asked for)."""
        first, count = self.firsts[place][expert], self.form.halves * self.widths[place][expert]
        for start in range(0, count, room.rows):
            stop = min(start + room.rows, count)
            rows = slice(first + start, first + stop)
            yield slice(start, stop), room(part.codes[rows], part.scale[rows], part.bits, dtype)


def _own(rows: Tensor, routing: Routing, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """(expert, its rows in the type that its product is done in) of each expert that has rows."""
    for expert, (start, end) in enumerate(routing.bounds):
        if end > start:
            yield expert, rows[start:end].to(torch.float32 if end - start < FEW and dtype.itemsize < 4 else dtype)


def _over_packed_rows(kernel: Kernel, rows: PackedRowsKernel) -> Kernel:
    """A kernel around the one that runs its rows, with another in that one's place."""
    if isinstance(kernel, LatentKernel):
        outer = copy(kernel)
        outer.inner = _over_packed_rows(kernel.inner, rows)
        return outer
    if isinstance(kernel, BasisMixtureKernel):
        mixture = copy(kernel)
        mixture.ragged = rows
        return mixture
    return rows
