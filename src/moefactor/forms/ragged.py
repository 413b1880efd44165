"""Ragged: experts that kept their own number of channels, stored without padding."""

from __future__ import annotations

from dataclasses import dataclass

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

    @property
    def kept_widths(self) -> tuple[int, ...]:
        return self.widths

    def _experts(self, weight: Tensor) -> tuple[Tensor, ...]:
        """(halves · w_e, H) of each expert. All at once: a slice apiece would cost a backward pass as many gradients
        of the whole."""
        return weight.split([self.halves * width for width in self.widths])

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {"weight": (self.halves * sum(self.widths), self.hidden)}

    def pack(self, rows: list[Tensor]) -> Factors:
        """rows: of each expert, (halves · width_e, H)."""
        return {"weight": torch.cat(rows)}

    def dense(self, factors: Factors, expert: int) -> Tensor:
        """Channels that are gone are zero, and those that are left come first."""
        rows = self._experts(factors["weight"])[expert]
        full = rows.new_zeros(self.halves, self.channels, self.hidden)
        full[:, : self.widths[expert]] = rows.view(self.halves, -1, self.hidden)
        return full.flatten(0, 1)

    def read(self, factors: Factors, tokens: Tensor, routing: Routing) -> Tensor:
        return self.read_rows(factors, tokens.index_select(0, routing.token), routing)

    def read_rows(self, factors: Factors, rows: Tensor, routing: Routing) -> Tensor:
        """`read` of rows that differ from expert to expert already: (pairs, H) -> (pairs, width)."""
        weight, common = factors["weight"], self._common
        if common:
            matrices = weight.view(self.experts, self.halves * common, self.hidden).transpose(1, 2)
            return self._widen(grouped_linear(rows, matrices, routing.offsets), common)
        parts = []
        for expert, (own, matrix) in enumerate(zip(routing.split(rows), self._experts(weight), strict=True)):
            if len(own):
                parts.append(self._widen(own.to(weight.dtype) @ matrix.T, self.widths[expert]))
        return torch.cat(parts) if parts else rows.new_zeros(0, self.width)

    def write(self, factors: Factors, activations: Tensor, routing: Routing) -> Tensor:
        weight, common = factors["weight"], self._common
        if common:
            matrices = weight.view(self.experts, common, self.hidden)
            return grouped_linear(activations[:, :common], matrices, routing.offsets)
        parts = []
        for own, matrix in zip(routing.split(activations), self._experts(weight), strict=True):
            if len(own):
                parts.append(own[:, : len(matrix)].to(weight.dtype) @ matrix)
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
        halves = data.get("halves", 1)
        if halves not in (1, 2) or width % halves:
            raise UserError(f"{where}: halves {halves!r} does not fit; it is 2 for gate and up together, else 1.")
        form = cls(experts, width, hidden, widths=tuple(data["widths"]), halves=halves)
        if len(form.widths) != experts:
            raise UserError(f"{where}: {len(form.widths)} widths for {experts} experts.")
        for expert, kept in enumerate(form.widths):
            if not isinstance(kept, int) or not 0 <= kept <= form.channels:
                raise UserError(f"{where}: width {kept!r} of expert {expert} must be from 0 to {form.channels}.")
        return form
