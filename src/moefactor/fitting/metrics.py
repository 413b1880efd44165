"""What a change of a layer's weights costs the model's loss, to second order, and how far to believe it.

With R_e the change of one matrix, the loss rises by ½ Σ_e ⟨L_e R_e, R_e C_e⟩ (Kronecker-factored Fisher):

- gate and up: C_e the second moment of the expert's inputs, L_e = diag(n_e s_e), s_e the mean squared loss gradient at
  its pre-activations;
- down, from the hidden side: C_e = G_e, the second moment of the loss gradient at its outputs, L_e = n_e E[h hᵀ];
- channel k of expert e taken out whole: ½ n_e E[h_k²] · d_kᵀ G_e d_k.

The two are the Kronecker factors of K-FAC (Martens & Grosse 2015), and they are damped: calibration shows one sample of
what the model will read, so every factor is a mixture, with weight 1 − damping of what was seen, with weight `damping`
of text of which nothing is known, under which experts are used evenly and moments are multiples of the identity. An
expert that the text hardly reached is mostly the latter. damping = 1, or no statistics at all, is the data-free case:
relative squared errors of the weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..experts import ExpertWeights
from ..stats import LayerStats
from .channels import importance
from .linalg import weighted_error
from .rounding import grouped
from .stack import Stack

RIDGE = 1e-2  # of the mean diagonal, times 1 + 64/tokens: experts with few tokens keep their own columns


class Metrics:
    """One layer's factors, float64, on the weights' device.

    Args:
        damping: 0 to 1, the weight of what calibration did not see.
    """

    def __init__(self, weights: ExpertWeights, stats: LayerStats | None, damping: float):
        if stats is not None and stats.count.sum() == 0:
            stats = None
        self.weights, self.stats, self.damping = weights, stats, damping
        self.layer = weights.layer
        self.halves = len(self.layer.projections) - 1
        self.first = Stack(self.layer.first_stack, weights.stack(self.layer.first_stack), stats)
        self.down = Stack("down", weights.stack("down"), stats)
        experts = self.layer.experts
        self.device = weights.down.device
        if stats is None:
            ones = torch.ones(experts, dtype=torch.float64, device=self.device)
            # ½ · 2/‖W‖² · ‖R‖²: each stack's relative error.
            self.count = ones * 2 / self.down.weights.double().square().sum().clamp(min=1e-30)
            self.sensitivity = torch.full(
                self.first.shape[:2], 2.0 / max(1e-30, float(self.first.weights.double().square().sum())),
                dtype=torch.float64, device=self.device,
            )  # fmt: skip
            return
        seen, even = (1 - damping) * stats.count.double(), damping * stats.count.double().mean()
        self.count = seen + even  # (E,)
        self._own = seen / self.count.clamp(min=1e-30)
        gradient = stats.required("first_gradient").double()
        self.sensitivity = (1 - damping) * gradient + damping * gradient.mean()  # (E, width), times n_e
        self._pooled_output = stats.required("output_gradient").sum(0).double() / stats.count.sum()

    def input(self, expert: int) -> Tensor:
        """(H, H) C_e of gate and up."""
        if self.stats is None:
            return self._identity(self.layer.hidden)
        return self._mixed(expert, self.first.moment(expert), self.first.layer_moment)

    def output(self, expert: int) -> Tensor:
        """(H, H) G_e."""
        if self.stats is None:
            return self._identity(self.layer.hidden)
        count = self.stats.count[expert].clamp(min=1)
        gradient = self.stats.required("output_gradient")[expert].double()
        return self._mixed(expert, gradient / count, self._pooled_output)

    def hidden(self, expert: int) -> Tensor:
        """(I, I) E[h hᵀ]."""
        if self.stats is None:
            return self._identity(self.layer.intermediate)
        return self._mixed(expert, self.down.moment(expert), self.down.layer_moment)

    def pooled_input(self) -> Tensor:
        """(H, H): C of the layer, for what its experts share."""
        return self._identity(self.layer.hidden) if self.stats is None else self._drawn(self.first.layer_moment)

    def pooled_output(self) -> Tensor:
        return self._identity(self.layer.hidden) if self.stats is None else self._drawn(self._pooled_output)

    def prices(self) -> Tensor:
        """(E, I): what each channel costs when it goes alone; without statistics the product of its rows' norms."""
        w = self.weights
        blind = w.up.double().square().sum(2) * w.down.double().square().sum(1)
        if w.gate is not None:
            blind = blind * w.gate.double().square().sum(2)
        if self.stats is None:
            return blind
        seen = importance(w, self.stats)
        return (1 - self.damping) * seen + self.damping * blind * (seen.sum() / blind.sum().clamp(min=1e-30))

    def rows(self, channels: Tensor) -> Tensor:
        """Which rows of the first stack belong to some channels: gate's, then up's."""
        return torch.cat([channels + half * self.layer.intermediate for half in range(self.halves)])

    def first_energy(self) -> Tensor:
        """(E, width): what each row of gate and up would cost were it zero."""
        parts = []
        for expert, w in enumerate(self.first.weights):
            w = w.double()
            parts.append((w @ self.input(expert) * w).sum(1))
        return 0.5 * self.sensitivity * torch.stack(parts)

    def row_energies(self, side: str, group: int, ranks: list[int]) -> dict[int, tuple[Tensor, Tensor]]:
        """rank (0: no basis) -> two (E, rows) of a stack: what each row loses beyond the layer's first `rank` hidden
        directions, and the energy of which rounding costs a share.

        Noise is even within a group: of a row w it costs ½ · left · Σ_groups mean(w²) · Σ diag(C), C the metric of the
        side that experts share.

        Args:
            side: `first` or `down`.
        """
        basis = project = None
        if any(ranks):
            every = torch.arange(self.layer.intermediate, device=self.device)
            whole = Cut(self, [every] * self.layer.experts, [d.double() for d in self.down.weights])
            if side == "first":
                basis = whole.first_directions()[1]
                project = torch.linalg.inv(basis)
            else:
                _, basis, project = whole.down_directions()
        if side == "first":
            weights, metric, left = self.first.weights, self.input, self.sensitivity
        else:
            weights, metric = self.down.weights, self.output
            left = torch.stack([self.count[e] * self.hidden(e).diagonal() for e in range(self.layer.experts)])
        members = grouped(torch.ones(self.layer.hidden, device=self.device), group).sum(1, keepdim=True)
        found: dict[int, tuple[list[Tensor], list[Tensor]]] = {rank: ([], []) for rank in ranks}
        for expert, rows in enumerate(weights):
            rows, moment = rows.float(), metric(expert).float()
            half = 0.5 * left[expert].unsqueeze(1).float()
            for based in sorted({bool(rank) for rank in ranks}):
                if based:
                    assert basis is not None
                    assert project is not None
                    rows, own = rows @ project.float(), ((basis.float() @ moment) * basis.float()).sum(1)
                else:
                    own = moment.diagonal()
                energy = (half * rows.square() * own).cumsum(1)
                even = grouped(rows, group)
                noise = even.square().sum(2, keepdim=True) / members
                noise = noise.expand_as(even).flatten(1)[:, : rows.shape[1]]
                noise = (half * noise * own).cumsum(1)
                for each in ranks:
                    if bool(each) == based:
                        last = (each or rows.shape[1]) - 1
                        found[each][0].append((energy[:, -1] - energy[:, last]).double())
                        found[each][1].append(noise[:, last].double())
        return {rank: (torch.stack(lost), torch.stack(noise)) for rank, (lost, noise) in found.items()}

    def channel_energies(self, group: int) -> Tensor:
        """(E, I): the energy of a channel's rows of which rounding costs a share."""
        first = self.row_energies("first", group, [0])[0][1]
        return first.unflatten(1, (self.halves, -1)).sum(1) + self.row_energies("down", group, [0])[0][1]

    def first_cost(self, expert: int, rows: Tensor, change: Tensor) -> float:
        """Of a change (n, H) of some rows of gate and up."""
        weighted = self.sensitivity[expert][rows].unsqueeze(1) * change
        return 0.5 * float((weighted @ self.input(expert) * change).sum())

    def down_cost(self, expert: int, change: Tensor) -> float:
        """Of a change (I, H) of downᵀ."""
        return 0.5 * float(self.count[expert] * (self.hidden(expert) @ change @ self.output(expert) * change).sum())

    def refitted_down(self, expert: int, channels: Tensor) -> Tensor:
        """(kept, H) float64: the rows of downᵀ that make up best for the channels that are gone."""
        down = self.down.weights[expert].double()
        if not len(channels):
            return down[channels]
        moment = self.hidden(expert)
        tokens = self.stats.count[expert] if self.stats is not None else torch.tensor(64.0)
        return solve_down(moment[channels][:, channels], moment[channels] @ down, down[channels], float(tokens))

    def _mixed(self, expert: int, own: Tensor, layer: Tensor) -> Tensor:
        share = float(self._own[expert])
        return share * own + (1 - share) * layer.diagonal().mean() * self._identity(len(own))

    def _drawn(self, moment: Tensor) -> Tensor:
        return (1 - self.damping) * moment + self.damping * moment.diagonal().mean() * self._identity(len(moment))

    def _identity(self, size: int) -> Tensor:
        return torch.eye(size, dtype=torch.float64, device=self.device)


def solve_down(moment: Tensor, cross: Tensor, original: Tensor, tokens: float) -> Tensor:
    """argmin_D Σ‖y − Dᵀh‖² + ridge·‖D − original‖²: moment (k, k) of h, cross (k, H) of h and y -> (k, H)."""
    ridge = RIDGE * (1 + 64 / max(1.0, tokens)) * moment.diagonal().mean() + 1e-30
    eye = torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    return torch.linalg.solve(moment + ridge * eye, cross + ridge * original)


def roots(moment: Tensor) -> tuple[Tensor, Tensor]:
    """M^{1/2} and M^{-1/2} of a positive semi-definite matrix, small eigenvalues lifted to 1e-8 of the largest."""
    values, axes = torch.linalg.eigh(moment)
    half = values.clamp(min=1e-8 * float(values[-1]) + 1e-30).sqrt()
    return axes * half @ axes.T, axes / half @ axes.T


@dataclass
class Cut:
    """A layer with some channels taken out: what is left of it and what its directions are worth.

    kept: channels of each expert.  down: (w_e, H) of each expert, refitted.
    """

    metrics: Metrics
    kept: list[Tensor]
    down: list[Tensor]

    @classmethod
    def of(cls, metrics: Metrics, prices: Tensor, widths: list[int], order: Tensor | None = None) -> Cut:
        """The dearest channels of every expert; `order` (E, I): with the highest first, in place of ascending."""
        kept = [p.topk(w).indices.sort().values for p, w in zip(prices, widths, strict=True)]
        if order is not None:
            kept = [k[o[k].argsort(descending=True)] for k, o in zip(kept, order, strict=True)]
        return cls(metrics, kept, [metrics.refitted_down(e, k) for e, k in enumerate(kept)])

    def first_rows(self) -> list[Tensor]:
        """(halves · w_e, H) float64 of each expert."""
        stack = self.metrics.first.weights
        return [stack[e][self.metrics.rows(k)].double() for e, k in enumerate(self.kept)]

    def down_change(self, expert: int, rows: Tensor) -> Tensor:
        """(I, H): the original minus `rows` (w_e, H) put back into place."""
        original = self.metrics.down.weights[expert].double()
        return original.index_add(0, self.kept[expert], -rows.to(original))

    def first_directions(self, metrics: Metrics | None = None) -> tuple[Tensor, Tensor]:
        """Prices (H,), falling, of gate and up's hidden directions, and the directions (H, H) as rows, C^{1/2} undone.

        `metrics`: to price by others than those that chose the channels.
        """
        metrics = metrics or self.metrics
        gram = torch.zeros(metrics.layer.hidden, metrics.layer.hidden, dtype=torch.float64, device=metrics.device)
        for expert, (channels, w) in enumerate(zip(self.kept, self.first_rows(), strict=True)):
            gram += w.T @ (metrics.sensitivity[expert][metrics.rows(channels)].unsqueeze(1) * w)
        root, inverse = roots(metrics.pooled_input())
        values, vectors = torch.linalg.eigh(0.5 * root @ gram @ root)
        return values.flip(0).clamp(min=0), vectors.flip(1).T @ inverse

    def down_directions(self, metrics: Metrics | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """The same of down: prices, directions (H, H) as rows to rebuild with, and columns to project with."""
        metrics = metrics or self.metrics
        root, inverse = roots(metrics.pooled_output())
        gram = torch.zeros_like(root)
        for expert, (channels, d) in enumerate(zip(self.kept, self.down, strict=True)):
            if len(channels):
                gram += metrics.count[expert] * d.T @ metrics.hidden(expert)[channels][:, channels] @ d
        values, vectors = torch.linalg.eigh(0.5 * root @ gram @ root)
        # D ≈ D·(G^{1/2} v)(v G^{-1/2}): project with root, rebuild with inverse.
        return values.flip(0).clamp(min=0), vectors.flip(1).T @ inverse, root @ vectors.flip(1)


def relative_first_error(cut: Cut, rebuilt: list[Tensor]) -> float:
    """Of gate and up in the norm of their inputs, channels that went counted as lost; rebuilt: (halves · w_e, H)."""
    metrics, lost, total = cut.metrics, 0.0, 0.0
    for expert, (channels, rows) in enumerate(zip(cut.kept, rebuilt, strict=True)):
        original, moment = metrics.first.weights[expert].double(), metrics.input(expert)
        lost += float(weighted_error(original.index_add(0, metrics.rows(channels), -rows.to(original)), moment))
        total += float(weighted_error(original, moment))
    return lost / total if total else 0.0
