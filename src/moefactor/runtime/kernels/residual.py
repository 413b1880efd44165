"""Residuals caught in a vector, around the kernel that runs the form they correct."""

from __future__ import annotations

import torch
from torch import Tensor

from ...forms import SparseResidual, WindowResidual
from ...forms.base import Factors
from ...routing import Routing, inverse
from .base import Kernel
from .setting import Setting


class SparseResidualKernel(Kernel[SparseResidual]):
    """The residual of the experts hit is rebuilt, that of the others never."""

    def __init__(self, form: SparseResidual, setting: Setting, inner: Kernel):
        super().__init__(form, setting, inner.linear)
        self.inner = inner

    def read(self, factors: Factors, tokens: Tensor, routing: Routing) -> Tensor:
        out = self.inner.read(self.form.inner_factors(factors), tokens, routing)
        tokens = tokens.to(factors["residual"].dtype)
        back = self.form.back_projected
        parts = [tokens[routing.token[a:b]] @ back(factors, e).T for e, (a, b) in self._hit(routing)]
        return out + torch.cat(parts) if parts else out

    def write(self, factors: Factors, activations: Tensor, routing: Routing) -> Tensor:
        inner = self.inner.write(self.form.inner_factors(factors), activations, routing)
        return inner + self._write_residual(factors, activations, routing)

    def write_combined(self, factors: Factors, activations: Tensor, routing: Routing) -> Tensor:
        inner = self.inner.write_combined(self.form.inner_factors(factors), activations, routing)
        return inner + routing.combine(self._write_residual(factors, activations, routing))

    def _write_residual(self, factors: Factors, activations: Tensor, routing: Routing) -> Tensor:
        activations = activations.to(factors["residual"].dtype)
        back = self.form.back_projected
        parts = [activations[a:b] @ back(factors, e) for e, (a, b) in self._hit(routing)]
        return torch.cat(parts) if parts else activations.new_zeros(0, self.form.hidden)

    @staticmethod
    def _hit(routing: Routing) -> list[tuple[int, tuple[int, int]]]:
        return [(e, (a, b)) for e, (a, b) in enumerate(routing.bounds) if b > a]


class WindowResidualKernel(Kernel[WindowResidual]):
    """The vector is multiplied as it lies, a matrix (width, s). Cut into pieces of s, tokens in the expert's order meet
    all of its rows at once, and row i of the residual is piece 0 at row i, piece 1 at row i + 1, and so on round the
    circle."""

    def __init__(self, form: WindowResidual, setting: Setting, inner: Kernel):
        super().__init__(form, setting, inner.linear)
        self.inner = inner
        self._maps: dict[torch.device, dict[str, Tensor]] = {}

    def read(self, factors: Factors, tokens: Tensor, routing: Routing) -> Tensor:
        out = self.inner.read(self.form.inner_factors(factors), tokens, routing)
        maps = self._map(routing.expert.device)
        sort, group_ends = self._by_group(routing, maps)
        padded = torch.nn.functional.pad(tokens.to(factors["residual"].dtype), (0, 1))
        ordered = padded.index_select(1, maps["sources"].flatten()).unflatten(1, maps["sources"].shape)
        pieces = ordered[routing.token[sort], maps["place"][routing.expert[sort]]].view(-1, self.form.step)
        rows = self.linear(pieces, self._vectors(factors).transpose(1, 2), group_ends * self._pieces)
        rows = rows.view(-1, self._pieces, self.form.width)
        met = rows[:, 0].clone()
        for piece in range(1, self._pieces):
            turn = piece % self.form.width
            met[:, : self.form.width - turn] += rows[:, piece, turn:]
            met[:, self.form.width - turn :] += rows[:, piece, :turn]
        return out + met[inverse(sort)]

    def write(self, factors: Factors, activations: Tensor, routing: Routing) -> Tensor:
        inner = self.inner.write(self.form.inner_factors(factors), activations, routing)
        maps = self._map(routing.expert.device)
        sort, windows = self._windows(factors, activations, routing, maps)
        return inner + windows[inverse(sort)].gather(1, maps["entries"][maps["place"][routing.expert]])

    def write_combined(self, factors: Factors, activations: Tensor, routing: Routing) -> Tensor:
        """Windows of one order are added up before it is undone."""
        inner = self.inner.write_combined(self.form.inner_factors(factors), activations, routing)
        maps = self._map(routing.expert.device)
        sort, windows = self._windows(factors, activations, routing, maps)
        orders, reach = maps["sources"].shape
        cell = routing.token[sort] * orders + maps["place"][routing.expert[sort]]
        weighted = windows.float() * routing.weight[sort].unsqueeze(1)
        summed = weighted.new_zeros(routing.tokens * orders, reach).index_add_(0, cell, weighted)
        of_order = summed.view(-1, orders, reach).unbind(1)
        parts = [own.index_select(1, at) for own, at in zip(of_order, maps["entries"].unbind(), strict=True)]
        return inner + sum(parts[1:], parts[0]).to(inner.dtype)

    def _windows(
        self, factors: Factors, activations: Tensor, routing: Routing, maps: dict[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """The pairs' order by group, and (pairs, C · s): what each gives the entries from its first row's start on."""
        sort, group_ends = self._by_group(routing, maps)
        rows = activations[sort].to(factors["residual"].dtype)
        pieces = torch.stack([rows.roll(c, 1) for c in range(self._pieces)], 1).flatten(0, 1)  # (pairs · C, width)
        windows = self.linear(pieces, self._vectors(factors), group_ends * self._pieces)
        return sort, windows.view(-1, self._pieces * self.form.step)

    def _vectors(self, factors: Factors) -> Tensor:
        """(groups, width, s)."""
        return factors["residual"].view(len(self.form.groups), self.form.width, self.form.step)

    def _by_group(self, routing: Routing, maps: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The pairs' order by group, and the end of each group's."""
        group, sort = torch.sort(maps["group"][routing.expert], stable=True)
        every = torch.arange(len(self.form.groups), device=group.device, dtype=group.dtype)
        return sort, torch.searchsorted(group, every, right=True).int()

    @property
    def _pieces(self) -> int:
        """C, the pieces of a window."""
        return -(-self.form.hidden // self.form.step)

    def _map(self, device: torch.device) -> dict[str, Tensor]:
        """Index maps on `device`.

        group, place: (E,), of each expert.  sources: (places, C · s), the hidden unit at each entry of a window, H
        where the last piece has none.  entries: (places, H), where each hidden unit is.
        """
        if device not in self._maps:
            form = self.form
            at = [form.places[expert] for expert in range(form.experts)]
            orders = torch.stack([form.order(place, device) for place in range(max(map(len, form.groups)))])
            self._maps[device] = {
                "group": torch.tensor([group for group, *_ in at], device=device),
                "place": torch.tensor([place for _, place, _ in at], device=device),
                "sources": torch.nn.functional.pad(
                    orders, (0, self._pieces * form.step - form.hidden), value=form.hidden
                ),
                "entries": orders.argsort(dim=1),
            }
        return self._maps[device]
