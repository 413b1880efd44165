"""Ragged: experts that kept their own number of channels, stored without padding."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor

from ..errors import UserError
from .base import Factors, Form, Routing, grouped_linear


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

    @property
    def channels(self) -> int:
        """I, the channels of an uncut expert."""
        return self.width // self.halves

    @cached_property
    def _rows(self) -> list[slice]:
        ends = [0]
        for width in self.widths:
            ends.append(ends[-1] + self.halves * width)
        return [slice(a, b) for a, b in pairwise(ends)]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {"weight": (self.halves * sum(self.widths), self.hidden)}

    def pack(self, rows: list[Tensor]) -> Factors:
        """rows: of each expert, (halves · width_e, H)."""
        return {"weight": torch.cat(rows)}

    def dense(self, factors: Factors, expert: int) -> Tensor:
        """Channels that are gone are zero, and those that are left come first."""
        rows = factors["weight"][self._rows[expert]]
        full = rows.new_zeros(self.halves, self.channels, self.hidden)
        full[:, : self.widths[expert]] = rows.view(self.halves, -1, self.hidden)
        return full.flatten(0, 1)

    def read(self, factors: Factors, tokens: Tensor, routing: Routing) -> Tensor:
        weight, common = factors["weight"], self._common
        rows = tokens[routing.token]
        if common:
            matrices = weight.view(self.experts, self.halves * common, self.hidden).transpose(1, 2)
            return self._widen(grouped_linear(rows, matrices, routing.offsets), common)
        parts = []
        for expert, (start, end) in enumerate(routing.bounds):
            if end > start:
                out = rows[start:end].to(weight.dtype) @ weight[self._rows[expert]].T
                parts.append(self._widen(out, self.widths[expert]))
        return torch.cat(parts) if parts else tokens.new_zeros(0, self.width)

    def write(self, factors: Factors, activations: Tensor, routing: Routing) -> Tensor:
        weight, common = factors["weight"], self._common
        if common:
            matrices = weight.view(self.experts, common, self.hidden)
            return grouped_linear(activations[:, :common], matrices, routing.offsets)
        parts = []
        for expert, (start, end) in enumerate(routing.bounds):
            if end > start:
                width = self.widths[expert]
                parts.append(activations[start:end, :width].to(weight.dtype) @ weight[self._rows[expert]])
        return torch.cat(parts) if parts else activations.new_zeros(0, self.hidden)

    @property
    def _common(self) -> int:
        """The width of all experts where they have one, for a single grouped GEMM; else 0."""
        return self.widths[0] if len(set(self.widths)) == 1 else 0

    def _widen(self, out: Tensor, width: int) -> Tensor:
        """(n, halves · width) -> (n, halves · I), zeros for the channels that are gone."""
        missing = self.channels - width
        return torch.nn.functional.pad(out.view(len(out), self.halves, width), (0, missing)).flatten(1)

    def to_json(self) -> dict:
        return {"form": "ragged", "widths": list(self.widths), "halves": self.halves}

    @classmethod
    def from_json(cls, data: dict, *, experts: int, width: int, hidden: int, where: str) -> Ragged:
        form = cls(experts, width, hidden, widths=tuple(data["widths"]), halves=data.get("halves", 1))
        if len(form.widths) != experts:
            raise UserError(f"{where}: {len(form.widths)} widths for {experts} experts.")
        for expert, kept in enumerate(form.widths):
            if not isinstance(kept, int) or not 0 <= kept <= form.channels:
                raise UserError(f"{where}: width {kept!r} of expert {expert} must be from 0 to {form.channels}.")
        return form
