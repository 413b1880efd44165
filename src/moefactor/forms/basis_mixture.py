"""BasisMixture: W_e = A_eᵀ · f(Σ_j α_ej B_j), bases shared, mixing weights and A_e private.

MoBE (arXiv 2508.05257) with full bases, SLBF with bases of low rank, B_j = U_j V_j, biaxial with experts that kept
their own number of channels.

With f the identity, A_eᵀ Σ_j α_ej (B_j x): each basis works on a token once, for all of its experts, and no weight is
rebuilt. Only a batch with many more tokens than experts, or a mixture of many bases, is cheaper with rebuilt bases.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from .base import INT32, Factors, Form, TensorSpec, listed
from .fields import Fields
from .ragged import Ragged


def identity(x: Tensor) -> Tensor:
    return x


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": torch.nn.functional.silu,
    "tanh": torch.tanh,
    "identity": identity,
}


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

    name = "basis_mixture"
    mixes_bases = True

    @cached_property
    def ragged(self) -> Ragged | None:
        """How `private` is stored where widths are uneven: experts of hidden size r."""
        if not self.widths:
            return None
        return Ragged(self.experts, self.width, self.rank, widths=self.widths, halves=self.halves)

    @property
    def kept_widths(self) -> tuple[int, ...] | None:
        return self.widths or None

    @property
    def channel_tensor(self) -> str:
        return "private" if self.widths else ""

    def rows(self) -> Ragged:
        return self.ragged or super().rows()

    def tensors(self) -> dict[str, TensorSpec]:
        each, k = (self.groups, self.bases), self.basis_rank
        private = self.ragged.shapes()["weight"] if self.ragged else (self.experts, self.rank, self.width)
        specs = {"private": TensorSpec(private), "mix": TensorSpec((self.experts, self.bases))}
        if not k:
            return {**specs, "basis": TensorSpec((*each, self.rank, self.hidden))}
        return {
            **specs,
            "basis_pivots": TensorSpec((*each, k), INT32),
            "basis_left": TensorSpec((*each, self.rank - k, k)),
            "basis_right": TensorSpec((*each, k, self.hidden)),
        }

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
        if self.ragged:
            return self.ragged.dense({"weight": factors["private"]}, expert) @ basis
        return factors["private"][expert].T @ basis

    def units(self) -> tuple[int, ...]:
        return (self.basis_rank or self.bases,)

    def with_units(self, units: Iterable[int]) -> BasisMixture:
        (bought,) = units
        return replace(self, basis_rank=bought) if self.basis_rank else replace(self, bases=bought)

    def summary(self) -> str:
        what = f"{self.bases} bases of {self.rank} rows, {self.activation}"
        what += f", each of rank {self.basis_rank}" if self.basis_rank else ""
        return f"{self.name}, {what}" + (f"; {listed('widths', self.widths)}" if self.widths else "")

    def to_json(self) -> dict:
        data = {
            "form": "basis_mixture", "bases": self.bases, "rank": self.rank, "activation": self.activation,
            "groups": self.groups, "basis_rank": self.basis_rank,
        }  # fmt: skip
        return {**data, "widths": list(self.widths), "halves": self.halves} if self.widths else data

    @classmethod
    def from_json(cls, data: Fields, *, experts: int, width: int, hidden: int) -> BasisMixture:
        groups = data.whole("groups", 1, experts)
        if experts % groups:
            raise data.error(f"{experts} experts can't be cut into {groups} equal groups.")
        widths: tuple[int, ...] = ()
        halves = 1
        if data.list("widths", []):
            ragged = Ragged.from_json(data, experts=experts, width=width, hidden=hidden)
            widths, halves = ragged.widths, ragged.halves
        rank = data.whole("rank", 1, min(width, hidden))
        return cls(
            experts, width, hidden, bases=data.whole("bases", 1, experts // groups), rank=rank,
            activation=data.choice("activation", ACTIVATIONS), groups=groups,
            basis_rank=data.whole("basis_rank", 0, min(rank, hidden)), widths=widths, halves=halves,
        )  # fmt: skip


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
    rows = left.double()
    chosen: list[Tensor] = []
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
