"""Dense stacks, and ragged ones: experts that kept their own number of channels."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from ...forms import Dense, Ragged
from ...forms.base import Factors
from ...routing import Routing
from .base import Kernel


class DenseKernel(Kernel[Dense]):
    """One product an expert."""

    def read(self, factors: Factors, tokens: Tensor, routing: Routing) -> Tensor:
        rows = tokens.index_select(0, routing.token)
        return self.linear(rows, factors["weight"].transpose(1, 2), routing.offsets)

    def write(self, factors: Factors, activations: Tensor, routing: Routing) -> Tensor:
        return self.linear(activations, factors["weight"], routing.offsets)


class RaggedKernel(Kernel[Ragged]):
    """One width for all experts goes through a grouped product; uneven ones are gone through one by one."""

    def read(self, factors: Factors, tokens: Tensor, routing: Routing) -> Tensor:
        return self.read_rows(factors, tokens.index_select(0, routing.token), routing)

    def read_rows(self, factors: Factors, rows: Tensor, routing: Routing) -> Tensor:
        """`read` of rows that differ from expert to expert already: (pairs, H) -> (pairs, width)."""
        form, weight, common = self.form, factors["weight"], self.form.common_width
        if common:
            matrices = weight.view(form.experts, form.halves * common, form.hidden).transpose(1, 2)
            return self._widen(self.linear(rows, matrices, routing.offsets), common)
        parts = [
            self._widen(own.to(weight.dtype) @ matrix.T, len(matrix) // form.halves)
            for own, matrix in self._hit(rows, weight, routing)
        ]
        return torch.cat(parts) if parts else rows.new_zeros(0, form.width)

    def write(self, factors: Factors, activations: Tensor, routing: Routing) -> Tensor:
        form, weight, common = self.form, factors["weight"], self.form.common_width
        if common:
            matrices = weight.view(form.experts, common, form.hidden)
            return self.linear(activations[:, :common], matrices, routing.offsets)
        parts = [
            own[:, : len(matrix)].to(weight.dtype) @ matrix for own, matrix in self._hit(activations, weight, routing)
        ]
        return torch.cat(parts) if parts else activations.new_zeros(0, form.hidden)

    def _hit(self, rows: Tensor, weight: Tensor, routing: Routing) -> Iterator[tuple[Tensor, Tensor]]:
        """(its rows, its matrix) of each expert that has rows."""
        if torch.is_grad_enabled():
            pairs = zip(routing.split(rows), self.form.expert_rows(weight), strict=True)
            yield from ((own, matrix) for own, matrix in pairs if len(own))
            return
        for (start, end), first, width in zip(routing.bounds, self._starts, self.form.widths, strict=True):
            if end > start:
                yield rows[start:end], weight[first : first + self.form.halves * width]

    @cached_property
    def _starts(self) -> tuple[int, ...]:
        """Row of the weight where each expert begins."""
        return tuple(accumulate((self.form.halves * width for width in self.form.widths), initial=0))[:-1]

    def _widen(self, out: Tensor, width: int) -> Tensor:
        """(n, halves · width) -> (n, halves · I), zeros for the channels that are gone."""
        missing = self.form.channels - width
        return torch.nn.functional.pad(out.view(len(out), self.form.halves, width), (0, missing)).flatten(1)
