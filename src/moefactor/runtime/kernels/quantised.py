"""Quantised forms: the inner form's own kernel, given numbers that last as long as the call.

Rows of channels, which are most of a layer, stay packed where they can: on a CPU they are numbers expert by expert, in
one room in the cache; elsewhere, where a loop would wait for the host, those of every pair's expert if pairs are few.
Otherwise, and for gradients, a stack is dequantised whole: that takes 16 or 32 bits a number until the product is done.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from itertools import accumulate
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...forms import Quantised
from ...forms.base import Factors
from ...forms.packing import values
from ...routing import Routing
from .base import Kernel
from .basis_mixture import BasisMixtureKernel
from .composed import LatentKernel
from .dense import RaggedKernel
from .dequantise import Dequantiser
from .setting import Setting


class QuantisedKernel(Kernel[Quantised]):
    """Every tensor dequantised whole, once a call."""

    def __init__(self, form: Quantised, setting: Setting, inner: Kernel):
        super().__init__(form, setting, inner.linear)
        self.inner = inner
        self._places: dict[torch.device, list[tuple[int, Tensor]]] = {}

    def read(self, factors: Factors, tokens: Tensor, routing: Routing) -> Tensor:
        kernel, numbers = self._opened(factors, routing)
        return kernel.read(numbers, tokens, routing)

    def write(self, factors: Factors, activations: Tensor, routing: Routing) -> Tensor:
        kernel, numbers = self._opened(factors, routing)
        return kernel.write(numbers, activations, routing)

    def write_combined(self, factors: Factors, activations: Tensor, routing: Routing) -> Tensor:
        kernel, numbers = self._opened(factors, routing)
        return kernel.write_combined(numbers, activations, routing)

    def _opened(self, factors: Factors, routing: Routing) -> tuple[Kernel, Factors]:
        """What runs the inner form in this call, and its tensors."""
        if not self.form.channels:
            return self.inner, self.form.rounded(factors)
        device = next(iter(factors.values())).device
        if device not in self._places:
            self._places[device] = [(bits, rows.to(device)) for bits, rows in self.form.places()]
        return self.inner, self.form.rounded(factors, self._places[device])


class QuantisedRowsKernel(QuantisedKernel):
    """Rows of channels stay packed until those are known that have tokens."""

    def __init__(self, form: Quantised, setting: Setting, inner: Kernel, rows: type[PackedRowsKernel]):
        super().__init__(form, setting, inner)
        self.rows = rows(form, setting)
        self.around_rows = _around_rows(inner, self.rows)

    def _opened(self, factors: Factors, routing: Routing) -> tuple[Kernel, Factors]:
        if torch.is_grad_enabled() or not self.rows.serves(len(routing.expert)):
            return super()._opened(factors, routing)
        form, name = self.form, self.form.channel_tensor
        endings = [(bits, f"_b{bits}") for bits, _ in form.channels] or [(form.precision(name), "")]
        parts = [
            Part(bits, factors[f"{name}_codes{end}"].flatten(0, -2), factors[f"{name}_scale{end}"].flatten(0, -2))
            for bits, end in endings
        ]
        numbers = {other: form.tensor(other, factors) for other in form.inner.tensors() if other != name}
        rows = cast(Tensor, PackedRows(tuple(parts)))  # which PackedRowsKernel alone looks into
        return self.around_rows, {**numbers, name: rows}


class Part(NamedTuple):
    """Rows of one precision: codes (rows, words), scale (rows, groups)."""

    bits: int
    codes: Tensor
    scale: Tensor


class PackedRows(NamedTuple):
    """Stands for a tensor that is not to be numbers all at once."""

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
        # Part by part: channels of each expert, where its rows begin, and how many channels it has in more bits.
        self.widths = tuple(widths for _, widths in form.channels) or (rows.widths,)
        self.firsts = tuple(tuple(accumulate((rows.halves * w for w in each), initial=0))[:-1] for each in self.widths)
        sums = accumulate(
            self.widths, lambda a, b: tuple(map(sum, zip(a, b, strict=True))), initial=(0,) * rows.experts
        )
        self.before = tuple(sums)[:-1]

    def serves(self, pairs: int) -> bool:
        return True


class RowsByExpert(PackedRowsKernel):
    """A loop over the experts hit, a few rows of each at a time."""

    def read_rows(self, factors: Factors, rows: Tensor, routing: Routing) -> Tensor:
        form, packed, out = self.form, cast(PackedRows, factors["weight"]), []
        room = Dequantiser(form.hidden, self.group)
        for expert, own in _own(rows, routing, packed.dtype):
            met = own.new_empty(len(own), form.halves * form.widths[expert])
            for window, numbers in self._numbers(packed, expert, room, own.dtype):
                torch.mm(own, numbers.T, out=met[:, window])
            if form.halves > 1:  # part by part -> half by half
                counts = [form.halves * widths[expert] for widths in self.widths]
                parts = [part.unflatten(1, (form.halves, -1)) for part in met.split(counts, 1) if part.numel()]
                met = torch.cat(parts, 2) if parts else met
            out.append(self._widen(met.to(packed.dtype), form.widths[expert]))
        return torch.cat(out) if out else rows.new_zeros(0, form.width)

    def write(self, factors: Factors, activations: Tensor, routing: Routing) -> Tensor:
        form, packed, out = self.form, cast(PackedRows, factors["weight"]), []
        room = Dequantiser(form.hidden, self.group)
        for expert, own in _own(activations, routing, packed.dtype):
            total = own.new_zeros(len(own), form.hidden)
            for window, numbers in self._numbers(packed, expert, room, own.dtype):
                total.addmm_(own[:, window], numbers)
            out.append(total.to(packed.dtype))
        return torch.cat(out) if out else activations.new_zeros(0, form.hidden)

    def _numbers(
        self, packed: PackedRows, expert: int, room: Dequantiser, dtype: torch.dtype
    ) -> Iterator[tuple[slice, Tensor]]:
        """(which of an expert's rows, part after part; these as numbers until the next are asked for)."""
        done = 0
        for place, part in enumerate(packed.parts):
            start = self.firsts[place][expert]
            end = start + self.form.halves * self.widths[place][expert]
            while start < end:
                rows = slice(start, min(start + room.left, end))
                room.put(part.codes[rows], part.scale[rows], part.bits)
                start = rows.stop
                if not room.left:
                    yield slice(done, done + room.rows), room.take(dtype)
                    done += room.rows
        if room.filled:
            yield slice(done, done + room.filled), room.take(dtype)


class RowsByPair(PackedRowsKernel):
    """Every pair has its expert's rows, padded to the widest, gathered and dequantised for it: shapes depend on the
    number of pairs alone, so nothing waits for a GPU. For few pairs, as in decoding."""

    def __init__(self, form: Quantised, setting: Setting):
        super().__init__(form, setting)
        self._maps: dict[torch.device, Tensor] = {}

    def serves(self, pairs: int) -> bool:
        """Whether it is less work than dequantising all rows."""
        return 2 * pairs * sum(map(max, self.widths)) <= sum(self.form.widths)

    def read_rows(self, factors: Factors, rows: Tensor, routing: Routing) -> Tensor:
        form, packed = self.form, cast(PackedRows, factors["weight"])
        rows = rows.to(packed.dtype)
        out = rows.new_zeros(len(rows), form.halves, form.channels + 1)  # one for what is padded
        for part, at, channels in self._gathered(packed, routing):
            numbers = self._numbers(part, at)  # (pairs, halves · most, H)
            met = torch.bmm(numbers, rows.unsqueeze(2)).view(at.shape)
            out.scatter_(2, channels.unsqueeze(1).expand_as(at), met)
        return out[:, :, :-1].flatten(1)

    def write(self, factors: Factors, activations: Tensor, routing: Routing) -> Tensor:
        form, packed = self.form, cast(PackedRows, factors["weight"])
        padded = pad(activations.to(packed.dtype), (0, 1))
        total = padded.new_zeros(len(padded), form.hidden)
        for part, at, channels in self._gathered(packed, routing):
            total += torch.bmm(padded.gather(1, channels).unsqueeze(1), self._numbers(part, at)).squeeze(1)
        return total

    def _gathered(self, packed: PackedRows, routing: Routing) -> Iterator[tuple[Part, Tensor, Tensor]]:
        """Of each part its rows (pairs, halves, most) that the pairs meet, and their channels (pairs, most), the last
        but one for rows that are padded."""
        form, device = self.form, routing.expert.device
        if device not in self._maps:
            self._maps[device] = torch.tensor((self.widths, self.firsts, self.before), device=device)
        of_pairs = self._maps[device][:, :, routing.expert].unsqueeze(3)  # (3, parts, pairs, 1)
        for place, part in enumerate(packed.parts):
            width, first, before = of_pairs[:, place]
            channel = torch.arange(max(self.widths[place]), device=device)
            real = channel < width  # (pairs, most)
            half = torch.arange(form.halves, device=device).view(1, -1, 1)
            at = first.unsqueeze(1) + half * width.unsqueeze(1) + channel
            if at.numel():
                yield part, at.where(real.unsqueeze(1), 0), torch.where(real, before + channel, form.channels)

    def _numbers(self, part: Part, at: Tensor) -> Tensor:
        """(pairs, halves · most, H)."""
        codes, scale = part.codes[at.flatten(1)], part.scale[at.flatten(1)]
        return values(codes, scale, part.bits, self.form.hidden, self.group)


def _own(rows: Tensor, routing: Routing, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """(expert, its rows in the type that its product is done in) of each expert that has rows."""
    for expert, (start, end) in enumerate(routing.bounds):
        if end > start:  # one row of 16 bits is multiplied faster once it is float32
            yield expert, rows[start:end].to(torch.float32 if end - start == 1 else dtype)


def _around_rows(kernel: Kernel, rows: PackedRowsKernel) -> Kernel:
    """A kernel around the one that runs its rows, with another in that one's place."""
    if isinstance(kernel, LatentKernel):
        outer = copy(kernel)
        outer.inner = _around_rows(kernel.inner, rows)
        return outer
    if isinstance(kernel, BasisMixtureKernel):
        mixture = copy(kernel)
        mixture.ragged = rows
        return mixture
    return rows
