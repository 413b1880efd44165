"""Ragged experts as atoms of one width: channels add up, so an expert of width w is w / a experts of width a that the
same tokens visit. One grouped GEMM serves any mix of widths, and nothing waits for a GPU."""

from __future__ import annotations

from functools import cached_property
from math import gcd

import torch
from torch import Tensor

from ...forms import Ragged
from ...forms.base import Factors
from ...routing import Routing
from .dense import RaggedKernel
from .grouped import Linear, grouped_linear
from .setting import Setting

LEAST_ATOM = 16  # channels; tokens are copied for every atom that they visit


def atom_of(form: Ragged) -> int:
    """The largest width that every expert's is a multiple of; 0 where none has channels."""
    return gcd(*form.widths)


def atom_hindrance(form: Ragged) -> str | None:
    """Why its experts can't be run as atoms, if they can't."""
    atom = atom_of(form)
    if atom < LEAST_ATOM:
        found = f"multiples of no more than {atom}" if atom else "all 0"
        return f"widths are {found}, and atoms want multiples of {LEAST_ATOM} (--width-multiple 64)"
    return None


class AtomsKernel(RaggedKernel):
    """`weight` as it lies is one matrix an atom: gate's and up's rows of an expert come in whole atoms.

    Shapes depend on the number of pairs alone: a pair has as many cells as the widest expert has atoms, and those that
    its own expert lacks are sorted behind the last offset, where a grouped GEMM does not go. Made for inference:
    gradients go through the loop.
    """

    def __init__(self, form: Ragged, setting: Setting, linear: Linear = grouped_linear):
        super().__init__(form, setting, linear)
        self._counts: dict[torch.device, Tensor] = {}

    def read_rows(self, factors: Factors, rows: Tensor, routing: Routing) -> Tensor:
        if torch.is_grad_enabled():
            return super().read_rows(factors, rows, routing)
        form, atom = self.form, atom_of(self.form)
        order, ends, real = self._cells(routing, form.halves)
        per_pair = form.halves * self._most
        out = self.linear(rows[order // per_pair], self._atoms(factors).transpose(1, 2), ends)
        placed = _unsorted(out, order, real).view(len(rows), form.halves, self._most * atom)
        return torch.nn.functional.pad(placed, (0, form.channels - self._most * atom)).flatten(1)

    def write(self, factors: Factors, activations: Tensor, routing: Routing) -> Tensor:
        if torch.is_grad_enabled():
            return super().write(factors, activations, routing)
        atom = atom_of(self.form)
        order, ends, real = self._cells(routing, 1)
        rows = activations[:, : self._most * atom].reshape(-1, atom)[order]
        out = _unsorted(self.linear(rows, self._atoms(factors), ends), order, real)
        return out.view(len(activations), self._most, self.form.hidden).sum(1)

    def _atoms(self, factors: Factors) -> Tensor:
        """(atoms, a, H)."""
        return factors["weight"].view(-1, atom_of(self.form), self.form.hidden)

    @cached_property
    def _most(self) -> int:
        """Atoms of the widest expert."""
        return max(self.form.widths) // atom_of(self.form)

    def _cells(self, routing: Routing, halves: int) -> tuple[Tensor, Tensor, Tensor]:
        """Every pair's cells, (pairs, halves, atoms of the widest): their order by atom, where each atom's end, and
        which are real."""
        device = routing.expert.device
        if device not in self._counts:
            self._counts[device] = torch.tensor(self.form.widths, device=device) // atom_of(self.form)
        counts = self._counts[device]
        starts = self.form.halves * (counts.cumsum(0) - counts)
        every = sum(self.form.widths) // atom_of(self.form) * self.form.halves
        count, start = counts[routing.expert].view(-1, 1, 1), starts[routing.expert].view(-1, 1, 1)
        place = torch.arange(self._most, device=device)
        atom = start + count * torch.arange(halves, device=device).unsqueeze(1) + place
        real = (place < count).expand_as(atom).flatten()
        atom, order = torch.sort(torch.where(real, atom.flatten(), every), stable=True)
        return order, torch.searchsorted(atom, torch.arange(every, device=device), right=True).int(), real


def _unsorted(cells: Tensor, order: Tensor, real: Tensor) -> Tensor:
    """Back in the order of the pairs, nought where an expert has no atom (whatever memory held came out there)."""
    out = torch.empty_like(cells)
    out[order] = cells
    return out.masked_fill(~real.unsqueeze(1), 0)
