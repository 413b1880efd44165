"""A layer's factors refined against what the dense layer gives for the same tokens.

Minimises the mean of ‖G^{1/2} Σ_e g_e (y_e − ŷ_e)‖² over the layer's tokens, G the second moment of the loss gradient
at the layer's output: the second-order rise of the loss, of which the closed forms see one matrix at a time. Learning
rates are fractions of each tensor's root mean square, since factors differ in scale by orders of magnitude.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..errors import NotFinite
from ..experts import CompressedExperts, ExpertLayer
from ..routing import Routing
from .descent import Kept, descend

RATE = 0.006  # of each tensor's root mean square
BATCH = 4096  # tokens a step
PART = 1024  # tokens at a time: what a backward pass keeps of them is the most that refining holds
HELD_OUT = 16  # one token in so many decides what is kept
LOOK = 25  # steps between looks at the held-out tokens


@dataclass(frozen=True)
class LayerTokens:
    """What a layer's experts see, and the dense and the compressed experts to show it to.

    inputs (T, H); index, weight (T, k): the router's choice.
    dense: (inputs, index, weight) -> (T, H), the dense layer.
    expert: (expert, inputs) -> (n, H), what one dense expert gives, without bias.
    activate: (n, 2I or I) pre-activations, gate then up -> (n, I).
    module: tensors -> the compressed module with copies of them in float32.
    """

    layer: ExpertLayer
    inputs: Tensor
    index: Tensor
    weight: Tensor
    dense: Callable[[Tensor, Tensor, Tensor], Tensor]
    expert: Callable[[int, Tensor], Tensor]
    activate: Callable[[Tensor], Tensor]
    module: Callable[[dict[str, Tensor]], nn.Module]

    def down_moments(self, first: Tensor, bias: Tensor | None) -> Iterator[tuple[Tensor, Tensor]]:
        """For each expert Σ g² h' h'ᵀ (I, I) and Σ g² h' yᵀ (I, H), float64; first (E, 2I or I, H), the
        compressed first projections, and their bias."""
        routing = Routing(self.index, self.weight, self.layer.experts)
        for expert, (start, end) in enumerate(routing.bounds):
            x = self.inputs[routing.token[start:end]].float()
            g = routing.weight[start:end].unsqueeze(1).to(x)
            before = x @ first[expert].to(x).T
            h = self.activate(before if bias is None else before + bias[expert].to(x))
            h, y = (h * g).double(), (self.expert(expert, x) * g).double()
            yield h.T @ h, h.T @ y


def refine(
    compressed: CompressedExperts, tokens: LayerTokens, gradient: Tensor, *, steps: int, seed: int
) -> CompressedExperts:
    """The same layer with better factors; never worse on the held-out tokens.

    gradient: (H, H) second moment of the loss gradient at the layer's output, any scale.
    """
    held = torch.arange(len(tokens.inputs), device=tokens.inputs.device) % (HELD_OUT * 16) < 16  # in runs of 16
    seen = (~held).nonzero().flatten()
    held = held.nonzero().flatten()[:BATCH]
    if len(seen) < 64 or len(held) < 16:
        return compressed
    values, axes = torch.linalg.eigh(gradient.double())
    root = (axes * values.clamp(min=0).sqrt() @ axes.T).float()
    module = tokens.module(compressed.tensors)
    trained = [p for name, p in module.named_parameters() if name in compressed.tensors and p.is_floating_point()]
    groups = [{"params": [p], "lr": RATE * float(p.detach().square().mean().sqrt())} for p in trained if p.numel()]
    optimiser = torch.optim.Adam(groups, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda s: min(1.0, (s + 1) / 20) * (0.02 + 0.49 * (1 + math.cos(math.pi * min(1.0, s / steps))))
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():  # once: a token is drawn several times
        batches = zip(*(t.split(PART) for t in (tokens.inputs, tokens.index, tokens.weight)), strict=True)
        wanted = torch.cat([tokens.dense(*batch) for batch in batches])

    def error(chosen: Tensor) -> Tensor:
        given = module(tokens.inputs[chosen].float(), tokens.index[chosen], tokens.weight[chosen])
        return ((given - wanted[chosen]) @ root).square().sum()

    def held_out() -> float:
        with torch.no_grad():
            return sum(error(part).item() for part in held.split(PART)) / len(held)

    before = held_out()
    if not math.isfinite(before):
        raise NotFinite("the error of the layer's output on held-out tokens, before refining")
    kept = Kept(lambda: dict(module.named_parameters()), before)

    def backward() -> float:
        chosen = seen[torch.randint(len(seen), (min(BATCH, len(seen)),), generator=generator).to(seen.device)]
        total = 0.0
        for part in chosen.split(PART):
            loss = error(part) / len(chosen)
            loss.backward()
            total += loss.item()
        return total

    with torch.enable_grad():
        curve = descend(optimiser, schedule, backward, kept, steps=steps, look=held_out, every=LOOK)
    if kept.state is None:
        return compressed
    tensors = {name: kept.state.get(name, tensor) for name, tensor in compressed.tensors.items()}
    return replace(compressed, tensors=tensors, curves=compressed.curves | {"refine": curve})
