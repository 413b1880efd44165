"""What calibration knows of a layer: sums over tokens, so that shards of the text merge by addition."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from .errors import NotFinite, UserError, required
from .experts import ExpertLayer

# What can be collected, and what each costs a layer in float32.
STATISTICS = {
    "routing": "tokens, Σg and Σg² of every expert (free)",
    "input_moment": "Σ g² x xᵀ of every expert's input: experts × H × H",
    "hidden_moment": "Σ g² h hᵀ of every expert's activation: experts × I × I",
    "hidden_square": "Σ h² and Σ g² h of every channel: experts × I, twice",
    "first_gradient": "Σ of the squared loss gradient at every pre-activation: experts × 2I, and a backward pass",
    "output_gradient": "Σ ∇ ∇ᵀ of the loss at every expert's output: experts × H × H, and a backward pass",
    "fisher": "Σ over sequences of the squared gradient of every weight: as many as weights, and a backward pass",
}
# Those of the dense model's loss: they need a backward pass, and cannot be had while the model is being compressed.
GRADIENTS = frozenset({"first_gradient", "output_gradient", "fisher"})


@dataclass
class LayerStats:
    """Sums over the calibration tokens of one layer; g is the router weight of a (token, expert) pair.

    count, weight, weight_square: (E,) tokens routed to e, Σg, Σg².
    output_norm: (E,) Σ g·‖f_e(x)‖.
    input_moment: (E, H, H) Σ g² x xᵀ.  hidden_moment: (E, I, I) Σ g² h hᵀ, h = act(gate)·up.
    hidden_square, hidden_sum: (E, I) Σ h² and Σ g² h.
    first_gradient: (E, 2I or I) Σ (∂(Σ loss)/∂ pre-activation)², gate then up.
    output_gradient: (E, H, H) Σ ∇ ∇ᵀ, ∇ = g · ∂(Σ loss)/∂y at the expert's output, router weight included.
    fisher: (E, projections·I, H) Σ over sequences of (∂loss/∂W)², gate then up then downᵀ.
    """

    count: Tensor
    weight: Tensor
    weight_square: Tensor
    output_norm: Tensor
    input_moment: Tensor | None = None
    hidden_moment: Tensor | None = None
    hidden_square: Tensor | None = None
    hidden_sum: Tensor | None = None
    first_gradient: Tensor | None = None
    output_gradient: Tensor | None = None
    fisher: Tensor | None = None

    @classmethod
    def zeros(cls, layer: ExpertLayer, needs: Iterable[str], device: torch.device | str = "cpu") -> LayerStats:
        experts, hidden, width = layer.experts, layer.hidden, layer.intermediate

        def sums_of(name: str, *shape: int) -> Tensor | None:
            return torch.zeros(experts, *shape, device=device) if name in needs else None

        def sums() -> Tensor:
            return torch.zeros(experts, dtype=torch.float64, device=device)

        return cls(
            count=sums(),
            weight=sums(),
            weight_square=sums(),
            output_norm=sums(),
            input_moment=sums_of("input_moment", hidden, hidden),
            hidden_moment=sums_of("hidden_moment", width, width),
            hidden_square=sums_of("hidden_square", width),
            hidden_sum=sums_of("hidden_square", width),
            first_gradient=sums_of("first_gradient", (len(layer.projections) - 1) * width),
            output_gradient=sums_of("output_gradient", hidden, hidden),
            fisher=sums_of("fisher", len(layer.projections) * width, hidden),
        )

    @classmethod
    def of(cls, tensors: dict[str, Tensor], where: str, layer: ExpertLayer | None = None) -> LayerStats:
        """From stored tensors; UserError for names or shapes that are not this layer's, NotFinite for numbers that are
        none."""
        names = [f.name for f in fields(cls)]
        odd, missing = set(tensors) - {*names}, {*names[:4]} - set(tensors)
        if odd or missing:
            raise UserError(
                f"{where}: not statistics of a layer ({', '.join(sorted(odd or missing))}). Calibrate again."
            )
        wanted = cls.zeros(layer, set(STATISTICS), "meta").tensors() if layer is not None else {}
        wrong = [name for name, tensor in tensors.items() if wanted and tensor.shape != wanted[name].shape]
        if layer is not None and wrong:
            raise UserError(f"{where}: {wrong[0]} is not of {layer.name}'s shape. Calibrate again.")
        stats = cls(**tensors)
        stats.check_finite(where)
        return stats

    def check_finite(self, where: str) -> None:
        """Raises NotFinite naming the statistic and the expert."""
        for name, tensor in self.tensors().items():
            for expert, part in enumerate(tensor):
                if part.numel() and not torch.stack(part.aminmax()).isfinite().all():
                    raise NotFinite(f"expert {expert}'s {name.replace('_', ' ')}", where)

    def add(self, expert: int, x: Tensor, h: Tensor, y: Tensor, g: Tensor) -> None:
        """One expert's tokens of one batch: x (n, H), h (n, I), y (n, H), g (n,)."""
        weight = g.double()
        self.count[expert] += len(g)
        self.weight[expert] += weight.sum()
        self.weight_square[expert] += weight.square().sum()
        self.output_norm[expert] += (weight * y.float().norm(dim=1)).sum()
        for moment, rows in ((self.input_moment, x), (self.hidden_moment, h)):
            if moment is not None:
                scaled = rows.float() * g.float().unsqueeze(1)
                moment[expert].addmm_(scaled.T, scaled)

        if self.hidden_square is not None and self.hidden_sum is not None:
            self.hidden_square[expert] += h.float().square().sum(0)
            self.hidden_sum[expert] += (h.float() * g.float().square().unsqueeze(1)).sum(0)

    def add_gradient(self, expert: int, gradient: Tensor) -> None:
        """gradient (n, H): ∇ at the expert's output for its tokens of one batch."""
        if self.output_gradient is not None:
            rows = gradient.float()
            self.output_gradient[expert].addmm_(rows.T, rows)

    def add_first_gradient(self, expert: int, gradient: Tensor) -> None:
        """gradient (n, 2I or I): at the expert's pre-activations, gate then up."""
        if self.first_gradient is not None:
            self.first_gradient[expert] += gradient.float().square().sum(0)

    def __add__(self, other: LayerStats) -> LayerStats:
        mine, others = self.tensors(), other.tensors()
        return LayerStats(**{name: tensor + others[name] for name, tensor in mine.items() if name in others})

    def with_gradients(self, other: LayerStats) -> LayerStats:
        """These sums, with the gradient statistics of `other`."""
        return replace(self, **{name: getattr(other, name) for name in GRADIENTS})

    def tensors(self) -> dict[str, Tensor]:
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}

    def required(self, name: str) -> Tensor:
        """A statistic that the method asked for."""
        return required(getattr(self, name), name)

    def frequency(self) -> Tensor:
        """(E,) share of the (token, expert) pairs; uniform where nothing was seen."""
        total = self.count.sum()
        return self.count / total if total > 0 else torch.full_like(self.count, 1 / len(self.count))

    def mean_moment(self, name: str, expert: int, layer: Tensor) -> Tensor:
        """The expert's weighted mean of x xᵀ (or h hᵀ), float64, borrowing from the layer where tokens are few.

        C_e ← (1−λ) C_e + λ C_layer, λ = n/(n + tokens) for n × n moments: half when there are as many tokens as
        rows, the layer's own when there are none. A ridge of 1e-6 of the mean diagonal keeps it invertible.
        `layer` is `layer_moment(name)`, which the caller keeps: it is a sum over all experts.
        """
        moments = self.required(name)
        size = moments.shape[-1]
        share = size / (size + float(self.count[expert]))
        own = moments[expert].double() / self.weight_square[expert].clamp(min=1e-300)
        return _with_ridge((1 - share) * own + share * layer if self.count[expert] > 0 else layer)

    def layer_moment(self, name: str) -> Tensor:
        """The mean over all of the layer's tokens, float64; the identity where nothing was seen."""
        moments = self.required(name)
        total = self.weight_square.sum()
        if total == 0:
            return torch.eye(moments.shape[-1], dtype=torch.float64, device=moments.device)
        pooled = torch.zeros_like(moments[0], dtype=torch.float64)
        for moment in moments:  # sum(dtype=float64) would copy all of them
            pooled += moment
        return _with_ridge(pooled / total)


def _with_ridge(moment: Tensor) -> Tensor:
    mean = moment.diagonal().mean().clamp(min=1e-12)
    return moment + 1e-6 * mean * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
