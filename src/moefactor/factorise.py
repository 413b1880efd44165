"""Stage 3: every layer's factors, from weights, statistics and the plan alone; then the checkpoint."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from .calibrate import Calibration, observe
from .errors import UserError
from .experts import ExpertWeights
from .methods import Method
from .methods.base import accepted
from .methods.refine import LayerTokens
from .plan import LayerPlan, Plan
from .progress import Progress, Steps, silent
from .run_folder import Entry, RunFolder
from .runtime.experts import FactorisedExperts
from .stats import GRADIENTS, LayerStats
from .streaming import Activations, StreamedModel

STAGE = "factorise"
# Of a layer, that a second look keeps: enough for every expert, and 2 GB at a hidden size of 7168 in bfloat16.
MOST_TOKENS = 131_072
# Parameters: layers that run in float32 on a CPU once they are compressed. 16-bit products leave kernels behind for
# every shape (streaming._multiply), up to a few hundred megabytes, more than the wider copy takes.
SMALL = 1 << 26


def factorise(
    model: StreamedModel, plan: Plan, method: Method, run: RunFolder, *, calibration: Calibration | None = None,
    sequential: bool = True, progress: Progress = silent,
) -> dict[int, Entry]:  # fmt: skip
    """Factorises every layer that the journal lacks and enters it there. Returns the journal.

    Args:
        calibration: the text that `sequential` runs through the layers.
        sequential: calibrate each layer on what the factorised layers before it really give; otherwise statistics
            come from the run folder. Methods that read no statistics here run nothing either way.
    """
    needs = method.factorise_needs(plan.options)
    if needs and sequential and calibration is None:
        raise UserError("Sequential factorising needs the calibration text; give it, or use --no-sequential.")
    live = bool(needs) and sequential
    gradients = needs & GRADIENTS
    if live and gradients and gradients - set((run.calibration() or {"statistics": []})["statistics"]):
        raise UserError(
            f"{run.folder}: {method.name} reads {', '.join(sorted(gradients))} of the dense model. "
            f"Run `moefactor calibrate {model.name} --run {run.folder} --method {method.name}` first."
        )
    job = _Job(model, plan, method, run, calibration if needs else None, live)
    if len(job.done) < len(plan.layers):
        job.run_through(calibration, needs, progress) if live else job.each_alone(needs, progress)
    return job.done


class _Job:
    """The journal of one factorisation and the steps that fill it."""

    def __init__(
        self, model: StreamedModel, plan: Plan, method: Method, run: RunFolder, calibration: Calibration | None,
        live: bool,
    ):  # fmt: skip
        self.model, self.plan, self.method, self.run = model, plan, method, run
        # Whatever decides the bytes of a layer; a journal made under another digest is refused.
        about = calibration and calibration.description
        self.digest = hashlib.sha256(repr((plan.digest(), about, live)).encode()).hexdigest()
        self.done = run.journal(self.digest)

    def each_alone(self, needs: set[str], progress: Progress) -> None:
        """Layers one by one, on the run folder's statistics."""
        steps = Steps(progress, STAGE, len(self.plan.layers))
        for index, layer_plan in enumerate(self.plan.layers):
            if index not in self.done:
                stats = self.run.stats(index, self.model.device)
                if needs and (stats is None or needs - stats.tensors().keys() - {"routing"}):
                    raise UserError(
                        f"{self.run.folder}: {self.method.name} reads {', '.join(sorted(needs))} of every layer; run "
                        f"calibrate with --method {self.method.name}, or factorise sequentially."
                    )
                steps.detail = self.finish(index, self.model.expert_weights(layer_plan.layer), stats)
            steps.tick()

    def run_through(self, calibration: Calibration, needs: set[str], progress: Progress) -> None:
        """Layers in the model's order, each observed on what the factorised ones before it give."""
        batches = calibration.batches
        activations = self.model.embed(batches)
        places = {layer.decoder_layer: index for index, layer in enumerate(self.model.experts)}
        last = max(index for index in range(len(self.plan.layers)) if index not in self.done)
        end = self.model.decoder_layers.index(self.model.experts[last].decoder_layer) + 1
        steps = Steps(progress, STAGE, 2 * end * len(batches))
        for decoder_layer in self.model.decoder_layers[:end]:
            index = places.get(decoder_layer)
            with self.model.loaded(decoder_layer):
                if index is not None and index not in self.done:
                    steps.detail = self.observe_and_finish(index, activations, needs, steps)
                else:
                    steps.skip(len(batches))
                if index == last:
                    return
                with self.factorised(index):
                    self.model.run(decoder_layer, activations, tick=steps.tick)

    def observe_and_finish(self, index: int, activations: Activations, needs: set[str], steps: Steps) -> str:
        layer = self.plan.layers[index].layer
        gradients = needs & GRADIENTS
        stats = observe(self.model, layer.decoder_layer, activations, needs - gradients, keep=False, tick=steps.tick)
        if gradients:  # the dense model's, from calibration
            stats = stats.with_gradients(self.run.stats(index, self.model.device))
        module = self.model.model.get_submodule(layer.name)
        weights = ExpertWeights.from_model_layout(layer, dict(module.named_parameters(recurse=False)))
        look = None
        if self.method.refit is not None:
            look = partial(self.tokens, index, module, weights, activations)
        return self.finish(index, weights, stats, look)

    def tokens(
        self, index: int, module: nn.Module, weights: ExpertWeights, activations: Activations
    ) -> LayerTokens:  # fmt: skip
        """Runs the dense layer once more and notes what its experts are given."""
        calls: list[tuple[Tensor, Tensor, Tensor]] = []
        every = sum(state.shape[0] * state.shape[1] for state in activations.states)
        step = -(-every // MOST_TOKENS)

        def note(_: nn.Module, args: tuple, kwargs: dict) -> None:
            given = [*args, *kwargs.values()][:3]
            calls.append(tuple(part.detach()[::step].clone() for part in given))

        handle = module.register_forward_pre_hook(note, with_kwargs=True)
        try:
            self.model.run(weights.layer.decoder_layer, activations, keep=False)
        finally:
            handle.remove()
        experts = FactorisedExperts.replacing(module, self.plan.layers[index])

        def expert(number: int, x: Tensor) -> Tensor:
            parts = [p[number].to(x) for p in (weights.gate, weights.up) if p is not None]
            before = x @ torch.cat(parts).T
            if weights.layer.biased:
                before = before + weights.biases()["first_bias"][number]
            return experts._activate(before) @ weights.down[number].to(x).T

        def compressed(tensors: dict[str, Tensor]) -> nn.Module:
            built = FactorisedExperts.replacing(module, self.plan.layers[index])
            copies = {k: v.to(self.model.device, torch.float32, copy=True) if v.is_floating_point() else v
                      for k, v in tensors.items()}  # fmt: skip
            built.load_state_dict(copies, assign=True, strict=False)
            return built

        inputs, chosen, weight = (torch.cat(parts) for parts in zip(*calls, strict=True))
        return LayerTokens(weights.layer, inputs, chosen, weight, module, expert, experts._activate, compressed)

    def finish(
        self, index: int, weights: ExpertWeights, stats: LayerStats | None,
        look: Callable[[], LayerTokens] | None = None,
    ) -> str:  # fmt: skip
        """Factorises one layer, writes it, enters it in the journal; returns a line for the progress bar."""
        started = time.perf_counter()
        layer_plan = self.plan.layers[index]
        options = accepted(self.method.factorise, self.plan.options)
        compressed = self.method.factorise(weights, stats, layer_plan, seed=self.plan.seed + index, **options)
        if look is not None:
            options = accepted(self.method.refit, self.plan.options)
            compressed = self.method.refit(
                weights, stats, compressed, look(), layer_plan, seed=self.plan.seed + index, **options
            )
        dtype, prefix = self.model.stored_dtype, layer_plan.layer.name
        sha256 = self.run.write_layer(index, _named(prefix, compressed.tensors, dtype))
        seconds = round(time.perf_counter() - started, 3)
        curves = {stack: _thinned(curve) for stack, curve in compressed.curves.items()}
        self.done[index] = Entry(sha256, compressed.errors, seconds, curves)
        self.run.enter(self.digest, self.done)
        error = max(compressed.errors.values(), default=0.0)
        return f"{layer_plan.layer.decoder_layer}, relative error {error:.3f}"

    @contextmanager
    def factorised(self, index: int | None) -> Iterator[None]:
        """The loaded layer with its experts as written; a dense layer as it is."""
        if index is None:
            yield
            return
        layer_plan: LayerPlan = self.plan.layers[index]
        parent_name, _, leaf = layer_plan.layer.name.rpartition(".")
        parent = self.model.model.get_submodule(parent_name)
        original = getattr(parent, leaf)
        experts = FactorisedExperts.replacing(original, layer_plan)
        prefix = layer_plan.layer.name + "."
        dtype = self.model.dtype  # what is run in need not be what is stored in
        if self.model.device.type == "cpu" and layer_plan.layer.parameter_count <= SMALL:
            dtype = torch.float32
        tensors = {
            k.removeprefix(prefix): v.to(self.model.device, dtype if v.is_floating_point() else None)
            for k, v in self.run.layer(index).items()
        }
        experts.load_state_dict(tensors, assign=True, strict=False)
        setattr(parent, leaf, experts)
        try:
            yield
        finally:
            setattr(parent, leaf, original)


def _named(prefix: str, tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors under their names in the checkpoint, rounded to its dtype; indices stay whole numbers."""
    return {f"{prefix}.{k}": v.to(dtype) if v.is_floating_point() else v for k, v in tensors.items()}


def _thinned(curve: list[float], points: int = 200) -> list[float]:
    """At most `points` of a loss curve, the first and the last among them."""
    if len(curve) <= points:
        return curve
    return [curve[round(i * (len(curve) - 1) / (points - 1))] for i in range(points)]
