"""What can be done with a decoder layer of a streamed model: look at what its experts see, and stand in for them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from .errors import located, required
from .experts import ExpertLayer, ExpertWeights
from .fitting.refine import BlockTokens, LayerTokens
from .ordinary import SmallBlock, Smaller, block_of, block_output
from .plan import LayerPlan
from .runtime.module import FactorisedExperts
from .stats import LayerStats
from .streaming import Activations, StreamedModel, Tick

# Of a layer, that a second look keeps: enough for every expert, and 2 GB at a hidden size of 7168 in bfloat16.
MOST_TOKENS = 131_072
# Parameters: layers that run in float32 on a CPU once they are compressed. 16-bit products leave kernels behind for
# every shape (streaming._multiply), up to a few hundred megabytes, more than the wider copy takes.
SMALL = 1 << 26


def observe(
    model: StreamedModel, decoder_layer: str, activations: Activations, needs: Iterable[str], *, keep: bool,
    tick: Tick,
) -> LayerStats | None:  # fmt: skip
    """Runs a loaded decoder layer and returns what its experts saw (None for a dense layer). Raises NotFinite."""
    layer = model.experts_of(decoder_layer)
    if layer is None:
        model.run(decoder_layer, activations, keep=keep, tick=tick)
        return None
    stats = LayerStats.zeros(layer, needs, model.device)
    module = model.model.get_submodule(layer.name)
    vars(module)["observer"] = stats.add
    try:
        model.run(decoder_layer, activations, keep=keep, tick=tick)
    finally:
        del vars(module)["observer"]
    stats.check_finite(layer.name)
    return stats


def observe_gradients(
    model: StreamedModel, decoder_layer: str, activations: Activations, flowing: list[Tensor], needs: set[str], *,
    keep: bool, tick: Tick,
) -> LayerStats | None:  # fmt: skip
    """Takes the loss gradients at a loaded decoder layer's outputs back to its inputs, in place, and returns the
    gradient statistics of its experts (None for a dense layer). Raises NotFinite."""
    layer = model.experts_of(decoder_layer)
    if layer is None:
        model.backward(decoder_layer, activations, flowing, tick, keep=keep)
        return None
    stats = LayerStats.zeros(layer, needs, model.device)
    module = model.model.get_submodule(layer.name)
    if needs & {"output_gradient", "first_gradient"}:
        vars(module)["gradient_observer"] = stats
    if "fisher" in needs:
        module.requires_grad_(True)

    def after_batch() -> None:
        if "fisher" in needs:
            _add_fisher(layer, module, stats)
        tick()

    try:
        model.backward(decoder_layer, activations, flowing, after_batch, keep=keep)
    finally:
        vars(module).pop("gradient_observer", None)
    stats.check_finite(layer.name)
    return stats


def _add_fisher(layer: ExpertLayer, module: nn.Module, stats: LayerStats) -> None:
    """Adds the square of the gradients that one sequence left on the experts' weights, and clears them."""
    gradients = {name: required(p.grad, f"{name}'s gradient") for name, p in module.named_parameters(recurse=False)}
    canonical = ExpertWeights.from_model_layout(layer, gradients)
    parts = [canonical.stack(name) for name in layer.projections]
    stats.required("fisher").add_(torch.cat(parts, dim=1).float().square())
    module.zero_grad()


def layer_tokens(
    model: StreamedModel, layer_plan: LayerPlan, weights: ExpertWeights, activations: Activations,
    smaller: Smaller | None = None,
) -> LayerTokens:  # fmt: skip
    """Runs the loaded dense layer once more and keeps what its experts are given, MOST_TOKENS at most.

    smaller: where the result is an ordinary MoE; then what the MoE block is given, too.
    """
    layer = layer_plan.layer
    module = model.model.get_submodule(layer.name)
    calls: list[tuple[Tensor, ...]] = []
    every = sum(state.shape[0] * state.shape[1] for state in activations.states)
    step = -(-every // MOST_TOKENS)

    def note(*parts: Tensor) -> None:
        calls.append(tuple(part[::step].clone() for part in parts))

    vars(module)["witness"] = note
    entering = _Entering(model, layer, step)
    try:
        model.run(layer.decoder_layer, activations, keep=False)
    finally:
        del vars(module)["witness"]
        entering.end()
    experts = FactorisedExperts.replacing(module, layer_plan)

    def expert(number: int, x: Tensor) -> Tensor:
        parts = [p[number].to(x) for p in (weights.gate, weights.up) if p is not None]
        before = x @ torch.cat(parts).T
        if layer.biased:
            before = before + weights.biases()["first_bias"][number]
        return experts.activate(before) @ weights.down[number].to(x).T

    def compressed(tensors: dict[str, Tensor]) -> nn.Module:
        built = FactorisedExperts.replacing(module, layer_plan)
        copies = {
            name: t.to(model.device, torch.float32, copy=True) if t.is_floating_point() else t
            for name, t in tensors.items()
        }
        built.load_state_dict(copies, assign=True, strict=False)
        return built

    inputs, chosen, weight = (torch.cat(parts) for parts in zip(*calls, strict=True))
    block = None
    if smaller is not None and entering.states is not None:
        dense = model.model.get_submodule(layer.decoder_layer)

        def small(tensors: dict[str, Tensor]) -> SmallBlock:
            named = {f"{layer.name}.{name}": tensor for name, tensor in tensors.items()}
            return SmallBlock(layer_plan, smaller.decoder_layer(layer_plan, dense, named))

        block = BlockTokens(torch.cat(entering.states), partial(block_output, entering.block), small)
    return LayerTokens(layer, inputs, chosen, weight, module, expert, experts.activate, compressed, block)


class _Entering:
    """Keeps what enters a layer's MoE block, every `step`-th token; nothing (None) of one that takes more than states,
    or that is the decoder layer itself."""

    def __init__(self, model: StreamedModel, layer: ExpertLayer, step: int):
        self.block, self.step = model.model.get_submodule(block_of(layer)), step
        self.states: list[Tensor] | None = None if block_of(layer) == layer.decoder_layer else []
        self._hook = self.block.register_forward_pre_hook(self._note, with_kwargs=True)

    def _note(self, block: nn.Module, args: tuple, kwargs: dict) -> None:
        given = [value for value in (*args, *kwargs.values()) if value is not None]
        if len(given) != 1 or not isinstance(given[0], Tensor):
            self.states = None
        if self.states is not None:
            self.states.append(given[0].detach().flatten(0, -2)[:: self.step].clone())

    def end(self) -> None:
        self._hook.remove()


@contextmanager
def standing_in(
    model: StreamedModel, layer_plan: LayerPlan, tensors: dict[str, Tensor], smaller: Smaller | None = None
) -> Iterator[None]:
    """A loaded decoder layer with factors in place of its experts, or, where the result is an ordinary MoE, the smaller
    model's decoder layer in its place; `tensors` by their names in the journal."""
    layer = layer_plan.layer
    if smaller is not None:
        path, _, number = layer.decoder_layer.rpartition(".")
        layers = model.model.get_submodule(path)
        assert isinstance(layers, nn.ModuleList)  # as discover.decoder_layers saw
        dense = layers[int(number)]
        layers[int(number)] = smaller.decoder_layer(layer_plan, dense, tensors)
        try:
            with located(layer.name):
                yield
        finally:
            layers[int(number)] = dense
        return
    parent_name, _, leaf = layer.name.rpartition(".")
    parent = model.model.get_submodule(parent_name)
    original = getattr(parent, leaf)
    experts = FactorisedExperts.replacing(original, layer_plan.unrounded)
    dtype = model.dtype  # what is run in need not be what is stored in
    if model.device.type == "cpu" and layer.parameter_count <= SMALL:
        dtype = torch.float32
    factors = {
        name.removeprefix(layer.name + "."): t.to(model.device, dtype if t.is_floating_point() else None)
        for name, t in tensors.items()
    }
    for stack, form in layer_plan.forms.items():  # dequantised once for all batches, one layer at a time
        _, whole = form.expanded({name: factors.pop(f"{stack}_{name}") for name in form.tensors()})
        factors |= {f"{stack}_{name}": tensor for name, tensor in whole.items()}
    experts.load_state_dict(factors, assign=True, strict=False)
    setattr(parent, leaf, experts)
    try:
        with located(layer.name):
            yield
    finally:
        setattr(parent, leaf, original)
