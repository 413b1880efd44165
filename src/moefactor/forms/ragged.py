"""Ragged: experts that kept their own number of channels, stored without padding."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from torch import Tensor

from .base import Factors, Form, TensorSpec, listed
from .fields import Fields


@dataclass(frozen=True)
class Ragged(Form):
    """`weight` (halves · Σ widths, H): expert by expert, its gate rows then its up rows (or the rows of downᵀ).

    Args:
        widths: channels that each expert kept, 0 … I. A width of 0 is an expert that gives nothing.
        halves: 2 for gate and up together, 1 for one projection.

    Activations keep the full width, zero where a channel is gone: only weights and products shrink.
    """

    widths: tuple[int, ...]
    halves: int = 1

    name = "ragged"
    channel_tensor = "weight"

    @property
    def channels(self) -> int:
        """I, the channels of an uncut expert."""
        return self.width // self.halves

    @property
    def kept_widths(self) -> tuple[int, ...]:
        return self.widths

    @property
    def common_width(self) -> int:
        """The width of all experts where they have one; else 0."""
        return self.widths[0] if len(set(self.widths)) == 1 else 0

    def rows(self) -> Ragged:
        return self

    def ordinary_widths(self) -> frozenset[int]:
        return frozenset(self.widths)

    def expert_rows(self, weight: Tensor) -> tuple[Tensor, ...]:
        """(halves · w_e, H) of each expert. All at once: a slice apiece would cost a backward pass as many gradients
        of the whole."""
        return weight.split([self.halves * width for width in self.widths])

    def tensors(self) -> dict[str, TensorSpec]:
        return {"weight": TensorSpec((self.halves * sum(self.widths), self.hidden))}

    def dense(self, factors: Factors, expert: int) -> Tensor:
        """Channels that are gone are zero, and those that are left come first."""
        rows = self.expert_rows(factors["weight"])[expert]
        full = rows.new_zeros(self.halves, self.channels, self.hidden)
        full[:, : self.widths[expert]] = rows.view(self.halves, self.widths[expert], self.hidden)
        return full.flatten(0, 1)

    def units(self) -> tuple[int, ...]:
        return self.widths

    def with_units(self, units: Iterable[int]) -> Ragged:
        return replace(self, widths=tuple(units))

    def summary(self) -> str:
        return listed(f"{self.name}, widths", self.widths)

    def to_json(self) -> dict:
        return {"form": "ragged", "widths": list(self.widths), "halves": self.halves}

    @classmethod
    def from_json(cls, data: Fields, *, experts: int, width: int, hidden: int) -> Ragged:
        halves = data.whole("halves", 1, 2, default=1)
        if width % halves:
            raise data.error(f"halves {halves!r} does not fit; it is 2 for gate and up together, else 1.")
        form = cls(experts, width, hidden, widths=data.list("widths"), halves=halves)
        if len(form.widths) != experts:
            raise data.error(f"{len(form.widths)} widths for {experts} experts.")
        for expert, kept in enumerate(form.widths):
            if not isinstance(kept, int) or isinstance(kept, bool) or not 0 <= kept <= form.channels:
                raise data.error(f"width {kept!r} of expert {expert} must be from 0 to {form.channels}.")
        return form
