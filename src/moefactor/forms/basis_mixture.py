"""BasisMixture: W_e = A_eᵀ · f(Σ_j α_ej B_j), bases shared, mixing weights and A_e private.

MoBE (arXiv 2508.05257) with full bases, SLBF with bases of low rank, B_j = U_j V_j, biaxial with experts that kept
their own number of channels.

With f the identity, A_eᵀ Σ_j α_ej (B_j x): each basis works on a token once, for all of its experts, and no weight is
rebuilt. Only a batch with many more tokens than experts, or a mixture of many bases, is cheaper with rebuilt bases.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ..errors import UserError, unknown
from .base import Factors, Form, Routing, grouped_linear
from .ragged import Ragged

ACTIVATIONS = {"silu": torch.nn.functional.silu, "tanh": torch.tanh, "identity": lambda x: x}
REBUILT_AT_ONCE = 8  # experts' bases in memory together


@dataclass(frozen=True)
class BasisMixture(Form):
    """`private` (E, r, width), or for ragged experts (halves · Σ widths, r); `mix` (E, m); and the bases.

    Full bases: `basis` (G, m, r, H). Of rank k, gauge-fixed: `basis_pivots` (G, m, k) int32, the rows in which U_j is
    the identity; `basis_left` (G, m, r−k, k), its other rows in order; `basis_right` (G, m, k, H).

    Args:
        bases: m, of each group.
        rank: r, rows of a basis.
        activation: f, a name of ACTIVATIONS.
        groups: G runs of E/G consecutive experts, each with bases of its own.
        basis_rank: k, or 0 for full bases.
        widths, halves: as in Ragged, for experts of uneven widths; () for whole ones.
    """

    bases: int
    rank: int
    activation: str = "silu"
    groups: int = 1
    basis_rank: int = 0
    widths: tuple[int, ...] = ()
    halves: int = 1

    @cached_property
    def _ragged(self) -> Ragged | None:
        """How `private` is stored where widths are uneven: experts of hidden size r."""
        if not self.widths:
            return None
        return Ragged(self.experts, self.width, self.rank, widths=self.widths, halves=self.halves)

    @property
    def kept_widths(self) -> tuple[int, ...] | None:
        return self.widths or None

    def shapes(self) -> dict[str, tuple[int, ...]]:
        each, k = (self.groups, self.bases), self.basis_rank
        private = self._ragged.shapes()["weight"] if self._ragged else (self.experts, self.rank, self.width)
        shapes = {"private": private, "mix": (self.experts, self.bases)}
        if not k:
            return {**shapes, "basis": (*each, self.rank, self.hidden)}
        return {
            **shapes,
            "basis_pivots": (*each, k),
            "basis_left": (*each, self.rank - k, k),
            "basis_right": (*each, k, self.hidden),
        }

    def integers(self) -> frozenset[str]:
        return frozenset({"basis_pivots"} if self.basis_rank else ())

    def expert_bases(self, factors: Factors, experts: list[int]) -> Tensor:
        """(n, r, H): f(Σ_j α_ej B_j) of some experts of one group."""
        group = experts[0] // (self.experts // self.groups)
        mix = factors["mix"][experts]
        if not self.basis_rank:
            mixed = (mix @ factors["basis"][group].flatten(1)).view(-1, self.rank, self.hidden)
        else:
            left = self.full_left(factors, group)  # (m, r, k)
            # Σ_j α_j U_j V_j as one product: [α_1 U_1 … α_m U_m] · [V_1; …; V_m]
            wide = torch.einsum("nj,jrk->nrjk", mix, left).flatten(2)
            mixed = wide @ factors["basis_right"][group].flatten(0, 1)
        return ACTIVATIONS[self.activation](mixed)

    def full_left(self, factors: Factors, group: int) -> Tensor:
        """(m, r, k): U_j with its identity rows put back."""
        pivots, rest = factors["basis_pivots"][group].long(), factors["basis_left"][group]
        full = rest.new_zeros(self.bases, self.rank, self.basis_rank)
        full.scatter_(1, pivots.unsqueeze(2).expand(-1, -1, self.basis_rank), _identities(pivots, rest))
        return full.scatter(1, _others(pivots, self.rank).unsqueeze(2).expand_as(rest), rest)

    def dense(self, factors: Factors, expert: int) -> Tensor:
        basis = self.expert_bases(factors, [expert])[0]
        if self._ragged:
            return self._ragged.dense({"weight": factors["private"]}, expert) @ basis
        return factors["private"][expert].T @ basis

    def read(self, factors: Factors, tokens: Tensor, routing: Routing) -> Tensor:
        if self._stays_factorised(routing):
            return self._read_private(factors, self._mixed_latents(factors, tokens, routing), routing)
        parts = []
        for experts, window, offsets in self._hit(routing):
            basis = self.expert_bases(factors, experts)
            latent = grouped_linear(tokens.index_select(0, routing.token[window]), basis.transpose(1, 2), offsets)
            parts.append(latent)
        return self._read_private(factors, torch.cat(parts) if parts else tokens.new_zeros(0, self.rank), routing)

    def _read_private(self, factors: Factors, latents: Tensor, routing: Routing) -> Tensor:
        """(pairs, r) -> (pairs, width)."""
        if self._ragged:
            return self._ragged.read_rows({"weight": factors["private"]}, latents, routing)
        return grouped_linear(latents, factors["private"], routing.offsets)

    def _write_private(self, factors: Factors, activations: Tensor, routing: Routing) -> Tensor:
        """(pairs, width) -> (pairs, r)."""
        if self._ragged:
            return self._ragged.write({"weight": factors["private"]}, activations, routing)
        return grouped_linear(activations, factors["private"].transpose(1, 2), routing.offsets)

    def write(self, factors: Factors, activations: Tensor, routing: Routing) -> Tensor:
        latents, parts = self._write_private(factors, activations, routing), []
        for experts, window, offsets in self._hit(routing):
            parts.append(grouped_linear(latents[window], self.expert_bases(factors, experts), offsets))
        return torch.cat(parts) if parts else activations.new_zeros(0, self.hidden)

    def write_combined(self, factors: Factors, activations: Tensor, routing: Routing) -> Tensor:
        if not self._stays_factorised(routing):
            return routing.combine(self.write(factors, activations, routing))
        latents = self._write_private(factors, activations, routing)
        share = self._mix_by_token(factors, routing) * routing.by_token(routing.weight).unsqueeze(2)
        latents = share.to(latents.dtype).transpose(1, 2) @ routing.by_token(latents)  # (T, G·m, r)
        return latents.flatten(1) @ factors["basis"].flatten(0, 2)

    def _stays_factorised(self, routing: Routing) -> bool:
        """Whether the bases work on tokens: where they can, and where that is less work than rebuilding them."""
        if self.activation != "identity" or self.basis_rank:
            return False
        pairs = routing.tokens * routing.top_k
        rebuilding = min(self.experts, pairs) * self.bases + pairs
        return routing.tokens * self.groups * self.bases <= rebuilding

    def _mixed_latents(self, factors: Factors, tokens: Tensor, routing: Routing) -> Tensor:
        """(pairs, r): Σ_j α_ej B_j x for every pair, in routing's order."""
        basis = factors["basis"].flatten(0, 2)
        latents = (tokens.to(basis.dtype) @ basis.T).view(routing.tokens, -1, self.rank)  # (T, G·m, r)
        return (self._mix_by_token(factors, routing) @ latents).flatten(0, 1)[routing.order]

    def _mix_by_token(self, factors: Factors, routing: Routing) -> Tensor:
        """(T, k, G·m): the mixing weights of each token's experts, zero for other groups' bases."""
        mix = factors["mix"]
        if self.groups > 1:
            own = torch.eye(self.groups, dtype=mix.dtype, device=mix.device)
            own = own.repeat_interleave(self.experts // self.groups, 0)  # (E, G)
            mix = (own.unsqueeze(2) * mix.unsqueeze(1)).flatten(1)
        return mix[routing.by_token(routing.expert)]

    def _hit(self, routing: Routing) -> Iterator[tuple[list[int], slice, Tensor]]:
        """Runs of experts that have rows, a few at a time, so that bases of the others are never rebuilt."""
        size = self.experts // self.groups
        hit = [(e, a, b) for e, (a, b) in enumerate(routing.bounds) if b > a]
        while hit:
            group = hit[0][0] // size
            run = [entry for entry in hit[:REBUILT_AT_ONCE] if entry[0] // size == group]
            hit = hit[len(run) :]
            start = run[0][1]
            ends = torch.tensor([b - start for *_, b in run], dtype=torch.int32, device=routing.expert.device)
            yield [e for e, *_ in run], slice(start, run[-1][2]), ends

    def to_json(self) -> dict:
        data = {
            "form": "basis_mixture", "bases": self.bases, "rank": self.rank, "activation": self.activation,
            "groups": self.groups, "basis_rank": self.basis_rank,
        }  # fmt: skip
        return {**data, "widths": list(self.widths), "halves": self.halves} if self.widths else data

    @classmethod
    def from_json(cls, data: dict, *, experts: int, width: int, hidden: int, where: str) -> BasisMixture:
        if data["activation"] not in ACTIVATIONS:
            raise UserError(f"{where}: {unknown('activation', data['activation'], ACTIVATIONS)}")
        form = cls(
            experts, width, hidden, bases=data["bases"], rank=data["rank"], activation=data["activation"],
            groups=data["groups"], basis_rank=data["basis_rank"], widths=tuple(data.get("widths", ())),
            halves=data.get("halves", 1),
        )  # fmt: skip
        if form.widths:
            Ragged.from_json(data, experts=experts, width=width, hidden=hidden, where=where)
        _within(where, "groups", form.groups, 1, experts)
        if experts % form.groups:
            raise UserError(f"{where}: {experts} experts can't be cut into {form.groups} equal groups.")
        _within(where, "bases", form.bases, 1, experts // form.groups)
        _within(where, "rank", form.rank, 1, min(width, hidden))
        _within(where, "basis_rank", form.basis_rank, 0, min(form.rank, hidden))
        return form


def pack_bases(left: Tensor, right: Tensor) -> Factors:
    """Gauge-fixes B_j = U_j V_j so that k² entries a basis need not be stored: left (G, m, r, k), right (G, m, k, H).

    U ← U U_a⁻¹, V ← U_a V with U_a the k rows of U that a column-pivoted QR of Uᵀ picks, so that U_a is well
    conditioned and its rows become the identity.
    """
    groups, bases, rank, k = left.shape
    pivots = _pivot_rows(left.flatten(0, 1)).view(groups, bases, k)
    square = left.gather(2, pivots.unsqueeze(3).expand(-1, -1, -1, k)).double()
    others = _others(pivots.flatten(0, 1), rank).view(groups, bases, rank - k)
    rest = left.gather(2, others.unsqueeze(3).expand(-1, -1, -1, k)).double()
    return {
        "basis_pivots": pivots.int(),
        "basis_left": torch.linalg.solve(square.transpose(2, 3), rest.transpose(2, 3)).transpose(2, 3).to(left),
        "basis_right": (square @ right.double()).to(left),
    }


def _pivot_rows(left: Tensor) -> Tensor:
    """(n, r, k) -> (n, k) ascending: the rows that a QR of the transpose with column pivoting takes first."""
    rows, chosen = left.double(), []
    for _ in range(left.shape[2]):
        norms = rows.square().sum(2)
        if chosen:
            norms.scatter_(1, torch.stack(chosen, 1), -1.0)
        chosen.append(norms.argmax(1))
        pivot = rows.gather(1, chosen[-1].view(-1, 1, 1).expand(-1, 1, rows.shape[2]))
        pivot = pivot / pivot.norm(dim=2, keepdim=True).clamp(min=1e-30)
        rows = rows - (rows @ pivot.transpose(1, 2)) * pivot
    return torch.stack(chosen, 1).sort(1).values


def _others(pivots: Tensor, rank: int) -> Tensor:
    """(m, k) chosen rows -> (m, r−k) the other rows, ascending."""
    free = torch.ones(len(pivots), rank, dtype=torch.bool, device=pivots.device).scatter(1, pivots, False)
    return free.nonzero()[:, 1].view(len(pivots), rank - pivots.shape[1])


def _identities(pivots: Tensor, like: Tensor) -> Tensor:
    k = pivots.shape[1]
    return torch.eye(k, dtype=like.dtype, device=like.device).expand(len(pivots), k, k)


def _within(where: str, name: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or not low <= value <= high:
        raise UserError(f"{where}: {name} {value!r} does not fit; it must be a whole number from {low} to {high}.")
