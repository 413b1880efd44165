"""Quantised: another form whose tensors are kept in a few bits."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import FLOAT, INT32, Factors, Form, TensorSpec
from .fields import Fields
from .packing import BITS, groups, values, words
from .ragged import Ragged

MOST_GROUP = 1024


@dataclass(frozen=True)
class Quantised(Form):
    """The tensors of `inner`, some of them as codes and scales (packing.py), the others as they are.

    A tensor of `tensor_bits` is stored as `{name}_codes` (…, words) int32 and `{name}_scale` (…, groups). The tensor
    that has a row for each channel (Form.channel_tensor) can have channels of several precisions: of every expert the
    first so many of its channels in the most bits, the next in fewer. Then there is `{name}_codes_b{b}` and
    `{name}_scale_b{b}` for each number of bits b, with the rows of b bits, expert by expert, its gate rows and then
    its up rows.

    Args:
        group: neighbours along the last axis that share a scale; the last group of a row may be shorter.
        tensor_bits: (tensor of the inner form, its bits), by name.
        channels: (bits, channels of each expert that have them), the most bits first; () for a form whose channels have
            one precision, if any, under `tensor_bits`.
    """

    inner: Form
    group: int
    tensor_bits: tuple[tuple[str, int], ...] = ()
    channels: tuple[tuple[int, tuple[int, ...]], ...] = ()

    name = "quantised"

    def precision(self, tensor: str) -> int:
        """Bits of one of the inner form's tensors; 0 where it is kept as it is, or has rows of several precisions."""
        return dict(self.tensor_bits).get(tensor, 0)

    def tensors(self) -> dict[str, TensorSpec]:
        specs = {}
        for name, spec in self.inner.tensors().items():
            *outer, count = spec.shape
            bits = self.precision(name)
            if bits:
                specs[f"{name}_codes"] = TensorSpec((*outer, words(count, bits)), INT32)
                specs[f"{name}_scale"] = TensorSpec((*outer, groups(count, self.group)), FLOAT)
            elif name == self.inner.channel_tensor and self.channels:
                for each, widths in self.channels:
                    rows = self.rows().halves * sum(widths)
                    specs[f"{name}_codes_b{each}"] = TensorSpec((rows, words(count, each)), INT32)
                    specs[f"{name}_scale_b{each}"] = TensorSpec((rows, groups(count, self.group)), FLOAT)
            else:
                specs[name] = spec
        return specs

    def places(self) -> list[tuple[int, Tensor]]:
        """(bits, rows of the channels' tensor that have them, in the order in which they are stored)."""
        ragged = self.rows()
        found: dict[int, list[Tensor]] = {bits: [] for bits, _ in self.channels}
        first = 0
        for expert, width in enumerate(ragged.widths):
            for half in range(ragged.halves):
                start = first + half * width
                for bits, widths in self.channels:
                    found[bits].append(torch.arange(start, start + widths[expert]))
                    start += widths[expert]
            first += ragged.halves * width
        return [(bits, torch.cat(rows)) for bits, rows in found.items()]

    def tensor(self, name: str, factors: Factors, places: Iterable[tuple[int, Tensor]] | None = None) -> Tensor:
        """One of the inner form's tensors, as numbers again.

        places: what `places` gives, where it is at hand on the factors' device.
        """
        count, bits = self.inner.tensors()[name].shape[-1], self.precision(name)
        if bits:
            return values(factors[f"{name}_codes"], factors[f"{name}_scale"], bits, count, self.group)
        if name != self.inner.channel_tensor or not self.channels:
            return factors[name]
        whole = factors[f"{name}_scale_b{self.channels[0][0]}"].new_empty(self.inner.tensors()[name].shape)
        for each, rows in self.places() if places is None else places:
            part = values(factors[f"{name}_codes_b{each}"], factors[f"{name}_scale_b{each}"], each, count, self.group)
            whole.index_copy_(0, rows.to(whole.device), part)
        return whole

    def rounded(self, factors: Factors, places: Iterable[tuple[int, Tensor]] | None = None) -> Factors:
        """All of the inner form's tensors, as numbers again."""
        return {name: self.tensor(name, factors, places) for name in self.inner.tensors()}

    def expanded(self, factors: Factors) -> tuple[Form, Factors]:
        return self.inner, self.rounded(factors)

    def dense(self, factors: Factors, expert: int) -> Tensor:
        return self.inner.dense(self.rounded(factors), expert)

    def parameter_count(self) -> int:
        """Of the inner form: numbers, however many bits they take."""
        return self.inner.parameter_count()

    @property
    def mixes_bases(self) -> bool:
        return self.inner.mixes_bases

    @property
    def kept_widths(self) -> tuple[int, ...] | None:
        return self.inner.kept_widths

    @property
    def channel_tensor(self) -> str:
        return self.inner.channel_tensor

    def rows(self) -> Ragged:
        return self.inner.rows()

    def summary(self) -> str:
        own = [f"{name} {bits}" for name, bits in self.tensor_bits]
        total = sum(sum(widths) for _, widths in self.channels)
        own += [f"{sum(widths) / max(1, total):.0%} of channels {bits}" for bits, widths in self.channels]
        return f"{self.inner.summary()}; bits: {', '.join(own)}, in groups of {self.group}"

    def to_json(self) -> dict:
        data = {"form": "quantised", "group": self.group, "bits": dict(self.tensor_bits), "inner": self.inner.to_json()}
        if self.channels:
            data["channels"] = {str(bits): list(widths) for bits, widths in self.channels}
        return data

    @classmethod
    def from_json(cls, data: Fields, *, experts: int, width: int, hidden: int) -> Quantised:
        inner = data.inner("inner")
        tensors, bits = inner.tensors(), data.get("bits", dict)
        for name, each in bits.items():
            if name not in tensors or tensors[name].dtype != FLOAT:
                raise data.error(f"'bits' names {name!r}, which is none of the numbers that {inner.name} stores.")
            _checked_bits(data, each, name)
        channels = []
        for key, widths in data.get("channels", dict, {}).items():
            each = _checked_bits(data, next((b for b in BITS if str(b) == key), key), "'channels'")
            counts = isinstance(widths, list) and all(type(w) is int and w >= 0 for w in widths)
            if not counts or len(widths) != experts:
                raise data.error(f"'channels' of {key} bits must have a number of channels for each expert.")
            channels.append((each, tuple(widths)))
        channels.sort(reverse=True)
        if channels:
            kept = inner.kept_widths
            if kept is None or not inner.channel_tensor or inner.channel_tensor in bits:
                raise data.error(
                    "'channels' is for forms that are cut channel by channel, and whose rows have no 'bits'."
                )
            if tuple(map(sum, zip(*(widths for _, widths in channels), strict=True))) != tuple(kept):
                raise data.error("'channels' of all precisions must add up to the experts' widths.")
        group = data.whole("group", 8, MOST_GROUP)
        if group % 8:
            raise data.error(f"'group' must be a multiple of 8, found {group}.")
        return cls(
            experts,
            width,
            hidden,
            inner=inner,
            group=group,
            tensor_bits=tuple(sorted(bits.items())),
            channels=tuple(channels),
        )


def _checked_bits(data: Fields, bits: object, what: str) -> int:
    if type(bits) is not int or bits not in BITS:
        raise data.error(f"{what}: bits must be one of {', '.join(map(str, BITS))}, found {bits!r}.")
    return bits
