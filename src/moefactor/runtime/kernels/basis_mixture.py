"""Mixtures of bases: rebuilt a few experts at a time, or, where they are linear, each basis at work on a token once."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ...forms import BasisMixture
from ...forms.base import Factors
from ...routing import Routing
from .atoms import AtomsKernel, atom_hindrance
from .base import Kernel
from .dense import RaggedKernel
from .grouped import Linear, grouped_linear, looped_linear
from .setting import Setting

REBUILT_AT_ONCE = 8  # experts' bases in memory together


class BasisMixtureKernel(Kernel[BasisMixture]):
    """Bases of the experts hit are rebuilt, those of the others never; linear mixtures not at all where that pays."""

    def __init__(self, form: BasisMixture, setting: Setting, linear: Linear = grouped_linear):
        super().__init__(form, setting, linear)
        self.ragged: RaggedKernel | None = None
        if form.ragged:
            as_atoms = setting.device == "cuda" and atom_hindrance(form.ragged) is None and linear is not looped_linear
            self.ragged = (AtomsKernel if as_atoms else RaggedKernel)(form.ragged, setting, linear)

    def read(self, factors: Factors, tokens: Tensor, routing: Routing) -> Tensor:
        through = self._mixed_latents if self._stays_factorised(routing) else self._into_rebuilt
        return self._read_private(factors, through(factors, tokens, routing), routing)

    def _into_rebuilt(self, factors: Factors, tokens: Tensor, routing: Routing) -> Tensor:
        """(T, H) -> (pairs, r) through the experts' own bases."""
        parts = []
        for experts, window, offsets in self._hit(routing):
            basis = self.form.expert_bases(factors, experts)
            latent = self.linear(tokens.index_select(0, routing.token[window]), basis.transpose(1, 2), offsets)
            parts.append(latent)
        return torch.cat(parts) if parts else tokens.new_zeros(0, self.form.rank)

    def _read_private(self, factors: Factors, latents: Tensor, routing: Routing) -> Tensor:
        """(pairs, r) -> (pairs, width)."""
        if self.ragged:
            return self.ragged.read_rows({"weight": factors["private"]}, latents, routing)
        return self.linear(latents, factors["private"], routing.offsets)

    def _write_private(self, factors: Factors, activations: Tensor, routing: Routing) -> Tensor:
        """(pairs, width) -> (pairs, r)."""
        if self.ragged:
            return self.ragged.write({"weight": factors["private"]}, activations, routing)
        return self.linear(activations, factors["private"].transpose(1, 2), routing.offsets)

    def write(self, factors: Factors, activations: Tensor, routing: Routing) -> Tensor:
        return self._out_of_rebuilt(factors, self._write_private(factors, activations, routing), routing)

    def _out_of_rebuilt(self, factors: Factors, latents: Tensor, routing: Routing) -> Tensor:
        """(pairs, r) -> (pairs, H) through the experts' own bases."""
        parts = [
            self.linear(latents[window], self.form.expert_bases(factors, experts), offsets)
            for experts, window, offsets in self._hit(routing)
        ]
        return torch.cat(parts) if parts else latents.new_zeros(0, self.form.hidden)

    def write_combined(self, factors: Factors, activations: Tensor, routing: Routing) -> Tensor:
        if not self._stays_factorised(routing):
            return routing.combine(self.write(factors, activations, routing))
        latents = self._write_private(factors, activations, routing)
        share = self._mix_by_token(factors, routing) * routing.by_token(routing.weight).unsqueeze(2)
        latents = share.to(latents.dtype).transpose(1, 2) @ routing.by_token(latents)  # (T, G·m, r)
        return latents.flatten(1) @ factors["basis"].flatten(0, 2)

    def _stays_factorised(self, routing: Routing) -> bool:
        """Whether the bases work on tokens: where they can, and where that is less work than rebuilding them."""
        form = self.form
        if form.activation != "identity" or form.basis_rank:
            return False
        pairs = routing.tokens * routing.top_k
        rebuilding = min(form.experts, pairs) * form.bases + pairs
        return routing.tokens * form.groups * form.bases <= rebuilding

    def _mixed_latents(self, factors: Factors, tokens: Tensor, routing: Routing) -> Tensor:
        """(pairs, r): Σ_j α_ej B_j x for every pair, in routing's order."""
        form = self.form
        basis = factors["basis"].flatten(0, 2)
        latents = (tokens.to(basis.dtype) @ basis.T).unflatten(1, (-1, form.rank))  # (T, G·m, r)
        return (self._mix_by_token(factors, routing) @ latents).flatten(0, 1)[routing.order]

    def _mix_by_token(self, factors: Factors, routing: Routing) -> Tensor:
        """(T, k, G·m): the mixing weights of each token's experts, zero for other groups' bases."""
        form = self.form
        mix = factors["mix"]
        if form.groups > 1:
            own = torch.eye(form.groups, dtype=mix.dtype, device=mix.device)
            own = own.repeat_interleave(form.experts // form.groups, 0)  # (E, G)
            mix = (own.unsqueeze(2) * mix.unsqueeze(1)).flatten(1)
        return mix[routing.by_token(routing.expert)]

    def _hit(self, routing: Routing) -> Iterator[tuple[list[int], slice, Tensor]]:
        """Runs of experts that have rows, a few at a time, so that bases of the others are never rebuilt."""
        form = self.form
        size = form.experts // form.groups
        hit = [(e, a, b) for e, (a, b) in enumerate(routing.bounds) if b > a]
        while hit:
            group = hit[0][0] // size
            run = [entry for entry in hit[:REBUILT_AT_ONCE] if entry[0] // size == group]
            hit = hit[len(run) :]
            start = run[0][1]
            ends = torch.tensor([b - start for *_, b in run], dtype=torch.int32, device=routing.expert.device)
            yield [e for e, *_ in run], slice(start, run[-1][2]), ends
