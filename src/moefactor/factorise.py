"""Stage 3: every layer's factors, from weights, statistics and the plan alone."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from .calibrate import Calibration
from .errors import NotFinite, UserError, located, required
from .experts import CompressedExperts, ExpertWeights
from .files import differences, digest_of
from .fitting.refine import LayerTokens, rounded
from .identity import FACTORS
from .methods import Method, accepted
from .observing import layer_tokens, observe, standing_in
from .ordinary import Smaller, stored_routers
from .plan import LayerPlan, Plan
from .progress import Progress, Steps, silent
from .run_folder import Entry, RunFolder
from .stats import GRADIENTS, LayerStats
from .streaming import Activations, StreamedModel

STAGE = "factorise"


def factorise(
    model: StreamedModel, plan: Plan, method: Method, run: RunFolder, *, calibration: Calibration | None = None,
    sequential: bool = True, progress: Progress = silent, seen: dict[str, Tensor] | None = None,
) -> dict[int, Entry]:  # fmt: skip
    """Factorises every layer that the journal lacks and enters it there. Returns the journal.

    Args:
        calibration: the text that `sequential` runs through the layers.
        sequential: calibrate each layer on what the factorised layers before it really give; otherwise statistics
            come from the run folder. Methods that read no statistics here run nothing either way.
        seen: filled with the tokens an expert of every layer that is observed, decoder layer -> (E,).
    """
    needs = method.factorise_needs(plan.options)
    if needs and sequential and calibration is None:
        raise UserError("Sequential factorising needs the calibration text; give it, or use --no-sequential.")
    text = calibration if needs and sequential else None
    live = text is not None
    with run.opened(model):
        stored = needs & GRADIENTS if live else needs - {"routing"}
        calibrated = run.calibrated_for(model, stored, method.name)
        check_made_for(model, plan, run)
        described = None if text is None else text.description
        if calibrated and described:
            other = differences(described, {key: calibrated.get(key) for key in described})
            if other:
                raise UserError(
                    f"{run.folder}: was calibrated on another text ({'; '.join(other[:3])}). Give the same text, or "
                    "calibrate and plan again."
                )
        about = {
            "plan": plan.digest(), "method": plan.method, "sequential": live, "calibration": described,
            "statistics": calibrated, "stored_dtype": str(model.stored_dtype), **run.stamp(model, *FACTORS),
        }  # fmt: skip
        job = _Job(model, plan, method, run, about, {} if seen is None else seen)
        if len(job.done) < len(plan.layers):
            job.each_alone(needs, progress) if text is None else job.run_through(text, needs, progress)
    return job.done


def check_made_for(model: StreamedModel, plan: Plan, run: RunFolder) -> None:
    """Raises UserError for a plan that was made for other weights, by other statistics or another version."""
    if not plan.made_for:  # written by hand
        return
    now = {**run.stamp(model, *FACTORS), "calibration": plan.made_for.get("calibration")}
    if now["calibration"] is not None:
        now["calibration"] = digest_of(run.calibration())[:32]
    other = differences(now, plan.made_for)
    if other:
        raise UserError(f"{run.plan}: was made for something else ({'; '.join(other)}). Plan again.")


class _Job:
    """The journal of one factorisation and the steps that fill it."""

    def __init__(
        self, model: StreamedModel, plan: Plan, method: Method, run: RunFolder, about: dict, seen: dict[str, Tensor]
    ):
        self.model, self.plan, self.method, self.run, self.seen = model, plan, method, run, seen
        self.about = about  # whatever decides the bytes of a layer; a journal about something else is refused
        self.done = run.journal(about)

    def each_alone(self, needs: set[str], progress: Progress) -> None:
        """Layers one by one, on the run folder's statistics."""
        steps = Steps(progress, STAGE, len(self.plan.layers))
        for index, layer_plan in enumerate(self.plan.layers):
            if index not in self.done:
                stats = self.run.stats(index, self.model.device, layer_plan.layer) if needs else None
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
        smaller = Smaller(self.model, self.plan) if self.plan.standard() else None
        for decoder_layer in self.model.decoder_layers[:end]:
            index = places.get(decoder_layer)
            with self.model.loaded(decoder_layer):
                if index is not None and index not in self.done:
                    steps.detail = self.observe_and_finish(index, activations, needs, steps, smaller)
                else:
                    steps.skip(len(batches))
                if index == last:
                    return
                if index is None:
                    self.model.run(decoder_layer, activations, tick=steps.tick)
                    continue
                with standing_in(self.model, self.plan.layers[index], self.run.layer(index), smaller):
                    self.model.run(decoder_layer, activations, tick=steps.tick)

    def observe_and_finish(
        self, index: int, activations: Activations, needs: set[str], steps: Steps, smaller: Smaller | None
    ) -> str:
        layer = self.plan.layers[index].layer
        gradients = needs & GRADIENTS
        found = observe(self.model, layer.decoder_layer, activations, needs - gradients, keep=False, tick=steps.tick)
        stats = required(found, "what the layer's experts saw")
        self.seen[layer.decoder_layer] = stats.count
        if gradients:
            dense = self.run.stats(index, self.model.device, layer)
            stats = stats.with_gradients(required(dense, "what calibration saw of the dense model"))
        module = self.model.model.get_submodule(layer.name)
        weights = ExpertWeights.from_model_layout(layer, dict(module.named_parameters(recurse=False)))
        look = None
        if self.method.refit is not None:
            unrounded = self.plan.layers[index].unrounded  # what is trained; FactorisedExperts trains no codes
            look = partial(layer_tokens, self.model, unrounded, weights, activations, smaller)
        return self.finish(index, weights, stats, look)

    def finish(
        self, index: int, weights: ExpertWeights, stats: LayerStats | None,
        look: Callable[[], LayerTokens] | None = None,
    ) -> str:  # fmt: skip
        """Factorises one layer, writes it, enters it in the journal; returns a line for the progress bar."""
        started = time.perf_counter()
        layer_plan, seed = self.plan.layers[index], self.plan.seed + index
        name = layer_plan.layer.name
        with located(name):
            options = accepted(self.method.factorise, self.plan.options)
            wanted = layer_plan if self.method.rounds(self.plan.options) else layer_plan.unrounded
            compressed = self.method.factorise(weights, stats, wanted, seed=seed, **options)
            check_factors(compressed)
            refit = self.method.refit
            if refit is not None and look is not None:
                options = accepted(refit, self.plan.options)
                compressed = refit(weights, stats, compressed, look(), wanted, seed=seed, **options)
                check_factors(compressed)
            if compressed.forms != layer_plan.forms:
                compressed = rounded(compressed, layer_plan.forms)
        check_made(compressed, layer_plan, self.method)
        stored = named(name, compressed.tensors, self.model.stored_dtype)
        sha256 = self.run.write_layer(index, stored | stored_routers(self.model, compressed.routers))
        seconds = round(time.perf_counter() - started, 3)
        curves = {stack: _thinned(curve) for stack, curve in compressed.curves.items()}
        self.done[index] = Entry(sha256, compressed.errors, seconds, curves)
        self.run.enter(self.about, self.done)
        error = max(compressed.errors.values(), default=0.0)
        return f"{layer_plan.layer.decoder_layer}, relative error {error:.3f}"


def check_made(compressed: CompressedExperts, plan: LayerPlan, method: Method) -> None:
    """Raises UserError where a method did not make what the plan says: one that was edited beyond what it can do."""
    wanted = plan.tensors()
    for name in sorted({*wanted, *compressed.tensors}):
        found = tuple(compressed.tensors[name].shape) if name in compressed.tensors else None
        asked = wanted[name].shape if name in wanted else None
        if found != asked:
            raise UserError(
                f"{plan.layer.name}: {method.name} can't make what plan.json asks for: {name} is "
                f"{asked or 'not there'} in the plan, {found or 'not there'} in what it made. Plan again."
            )


def check_factors(compressed: CompressedExperts) -> None:
    """Raises NotFinite naming the stack and the first expert of factors that hold a NaN or an infinity."""
    for name, tensor in compressed.tensors.items():
        if not tensor.is_floating_point() or not tensor.numel() or torch.stack(tensor.aminmax()).isfinite().all():
            continue
        for stack, form in compressed.forms.items():
            factors = compressed.factors(stack)
            for expert in range(form.experts):
                if not form.dense(factors, expert).isfinite().all():
                    raise NotFinite(f"expert {expert}", stack)
        raise NotFinite(name)


def named(prefix: str, tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors under their names in the checkpoint, rounded to its dtype; indices stay whole numbers.

    Raises NotFinite where a number is too large for that dtype.
    """
    stored = {f"{prefix}.{k}": v.to(dtype) if v.is_floating_point() else v for k, v in tensors.items()}
    for name, tensor in stored.items():
        if tensor.is_floating_point() and tensor.numel() and not torch.stack(tensor.aminmax()).isfinite().all():
            raise NotFinite(f"{name} rounded to {str(dtype).removeprefix('torch.')}")
    return stored


def _thinned(curve: list[float], points: int = 200) -> list[float]:
    """At most `points` of a loss curve, the first and the last among them."""
    if len(curve) <= points:
        return curve
    return [curve[round(i * (len(curve) - 1) / (points - 1))] for i in range(points)]
