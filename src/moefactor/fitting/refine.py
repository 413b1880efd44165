"""A layer's factors refined against what the dense layer gives for the same tokens.

Minimises the mean of ‖G^{1/2} Σ_e g_e (y_e − ŷ_e)‖² over the layer's tokens, G the second moment of the loss gradient
at the layer's output: the second-order rise of the loss, of which the closed forms see one matrix at a time. Learning
rates are fractions of each tensor's root mean square, since factors differ in scale by orders of magnitude.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..errors import NotFinite
from ..experts import CompressedExperts, ExpertLayer
from ..forms import Form, Quantised
from ..routing import Routing
from .descent import Kept, descend
from .rounding import grids, packed

RATE = 0.006  # of each tensor's root mean square
ROUNDED_RATE = 0.001  # the same while values are rounded: at 0.006 they jump between levels and end worse than before
BATCH = 4096  # tokens a step
PART = 1024  # tokens at a time: what a backward pass keeps of them is the most that refining holds
HELD_OUT = 17  # one token in so many decides what is kept: a prime, or they would be the first of every window
LOOK = 25  # steps between looks at the held-out tokens


class Block(Protocol):
    """A smaller MoE block in float32, router and all; ordinary.SmallBlock is one.

    trained: the parameters to train, by the model's names.
    result: their values -> the compressed layer's tensors, and its router's.
    """

    trained: dict[str, nn.Parameter]

    def __call__(self, inputs: Tensor) -> Tensor: ...
    def result(self, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]: ...


@dataclass(frozen=True)
class BlockTokens:
    """What a layer's MoE block sees, and the dense and the smaller block to show it to.

    inputs (T, H).
    dense: (n, H) -> (n, H).
    module: the compressed layer's tensors -> the smaller block with copies of them.
    """

    inputs: Tensor
    dense: Callable[[Tensor], Tensor]
    module: Callable[[dict[str, Tensor]], Block]


@dataclass(frozen=True)
class LayerTokens:
    """What a layer's experts see, and the dense and the compressed experts to show it to.

    inputs (T, H); index, weight (T, k): the router's choice.
    dense: (inputs, index, weight) -> (T, H), the dense layer.
    expert: (expert, inputs) -> (n, H), what one dense expert gives, without bias.
    activate: (n, 2I or I) pre-activations, gate then up -> (n, I).
    module: tensors -> the compressed module with copies of them in float32.
    block: what the layer's whole MoE block sees, where the result is an ordinary MoE whose router can be trained.
    """

    layer: ExpertLayer
    inputs: Tensor
    index: Tensor
    weight: Tensor
    dense: Callable[[Tensor, Tensor, Tensor], Tensor]
    expert: Callable[[int, Tensor], Tensor]
    activate: Callable[[Tensor], Tensor]
    module: Callable[[dict[str, Tensor]], nn.Module]
    block: BlockTokens | None = None

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
    module = tokens.module(compressed.tensors)
    trained = {n: p for n, p in module.named_parameters() if n in compressed.tensors and p.is_floating_point()}
    parts = (tokens.inputs, tokens.index, tokens.weight)

    def given(chosen: Tensor) -> Tensor:
        inputs, index, weight = (part[chosen] for part in parts)
        return module(inputs.float(), index, weight)

    state, curve = improved(
        trained, given, partial(_through, tokens.dense, parts), gradient, len(tokens.inputs), steps=steps, seed=seed,
        rate=RATE,
    )  # fmt: skip
    if state is None:
        return compressed
    tensors = {name: state.get(name, tensor) for name, tensor in compressed.tensors.items()}
    return replace(compressed, tensors=tensors, curves=compressed.curves | {"refine": curve})


def refine_rounded(
    compressed: CompressedExperts, forms: Mapping[str, Form], tokens: LayerTokens, gradient: Tensor, *, steps: int,
    seed: int,
) -> CompressedExperts:  # fmt: skip
    """The layer in its quantised forms, scales and what is rounded trained together on its tokens (Straight); never
    worse on the held-out ones than rounded to the nearest.

    Args:
        compressed: in the forms that those of `forms` hold.
        gradient: (H, H), as of refine.
    """
    module = tokens.module(compressed.tensors)
    levels = {
        f"{stack}_{name}": grid
        for stack, form in forms.items()
        if isinstance(form, Quantised)
        for name, grid in grids(form).items()
    }
    trained = {n: p for n, p in module.named_parameters() if n in compressed.tensors and p.is_floating_point()}
    scales = {n: nn.Parameter(grid.scales(trained[n].detach())) for n, grid in levels.items()}

    def values() -> dict[str, Tensor]:
        return {n: levels[n].rounded(p, scales[n]) if n in levels else p for n, p in trained.items()}

    parts = (tokens.inputs, tokens.index, tokens.weight)

    def given(chosen: Tensor) -> Tensor:
        inputs, index, weight = (part[chosen] for part in parts)
        out: Tensor = functional_call(module, values(), (inputs.float(), index, weight))
        return out

    every = trained | {f"{n}_scale": scale for n, scale in scales.items()}
    state, curve = improved(
        every, given, partial(_through, tokens.dense, parts), gradient, len(tokens.inputs), steps=steps, seed=seed,
        rate=ROUNDED_RATE,
    )  # fmt: skip
    state = state or {}
    tensors = {name: state.get(name, tensor) for name, tensor in compressed.tensors.items()}
    known = {n: state.get(f"{n}_scale", scale) for n, scale in scales.items()} if state else {}
    result = replace(compressed, tensors=tensors, curves=compressed.curves | {"rounded": curve})
    return rounded(result, forms, known)


def rounded(
    compressed: CompressedExperts, forms: Mapping[str, Form], scales: Mapping[str, Tensor] | None = None
) -> CompressedExperts:
    """The layer in its quantised forms.

    Args:
        forms: what the layer is to be stored in; those that are quantised hold what it has now.
        scales: `{stack}_{tensor}` -> of those tensors for which they are known; searched otherwise.
    """
    tensors = dict(compressed.tensors)
    for stack, form in forms.items():
        if not isinstance(form, Quantised):
            continue
        factors = {name: tensors.pop(f"{stack}_{name}") for name in form.inner.tensors()}
        known = {n: scales[f"{stack}_{n}"] for n in factors if f"{stack}_{n}" in scales} if scales else None
        tensors |= {f"{stack}_{name}": tensor for name, tensor in packed(form, factors, known).items()}
    return replace(compressed, forms=dict(forms), tensors=tensors)


def refine_block(
    compressed: CompressedExperts, tokens: BlockTokens, gradient: Tensor, *, steps: int, seed: int, rate: float
) -> CompressedExperts:
    """The same ordinary layer with better experts and a router that fits them.

    Args:
        gradient: (H, H), as of refine.
        rate: see improved.
    """
    module = tokens.module(compressed.tensors)
    state, curve = improved(
        module.trained, lambda chosen: module(tokens.inputs[chosen].float()),
        partial(_through, tokens.dense, (tokens.inputs,)), gradient, len(tokens.inputs), steps=steps, seed=seed,
        rate=rate,
    )  # fmt: skip
    if state is None:
        return compressed
    tensors, routers = module.result(state)
    return replace(compressed, tensors=tensors, routers=routers, curves=compressed.curves | {"refine": curve})


def _through(dense: Callable[..., Tensor], parts: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([dense(*batch) for batch in zip(*(part.split(PART) for part in parts), strict=True)])


def improved(
    trained: Mapping[str, Tensor], given: Callable[[Tensor], Tensor], wanted_of: Callable[[], Tensor], gradient: Tensor,
    count: int, *, steps: int, seed: int, rate: float,
) -> tuple[dict[str, Tensor] | None, list[float]]:  # fmt: skip
    """Better values of what is trained, where any are better on the held-out tokens, and the loss before each step.

    Args:
        given: numbers of tokens -> what the layer gives for them, (n, H).
        wanted_of: what the dense layer gives for all `count` tokens, (T, H).
        rate: of each tensor's root mean square, at first.
    """
    held = torch.arange(count, device=gradient.device) % (HELD_OUT * 16) < 16  # in runs of 16
    seen = (~held).nonzero().flatten()
    held = held.nonzero().flatten()[:BATCH]
    if len(seen) < 64 or len(held) < 16:
        return None, []
    values, axes = torch.linalg.eigh(gradient.double())
    root = (axes * values.clamp(min=0).sqrt() @ axes.T).float()
    groups = [
        {"params": [p], "lr": rate * float(p.detach().square().mean().sqrt())} for p in trained.values() if p.numel()
    ]
    if not groups:
        return None, []  # every expert of the layer is gone
    optimiser = torch.optim.Adam(groups, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda s: min(1.0, (s + 1) / 20) * (0.02 + 0.49 * (1 + math.cos(math.pi * min(1.0, s / steps))))
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():  # once: a token is drawn several times
        wanted = wanted_of()

    def error(chosen: Tensor) -> Tensor:
        return ((given(chosen) - wanted[chosen]) @ root).square().sum()

    def held_out() -> float:
        with torch.no_grad():
            return sum(error(part).item() for part in held.split(PART)) / len(held)

    before = held_out()
    if not math.isfinite(before):
        raise NotFinite("the error of the layer's output on held-out tokens, before refining")
    kept = Kept(lambda: dict(trained), before)

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
    return kept.state, curve
