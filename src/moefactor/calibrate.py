"""Stage 1: run the model over text, one layer at a time, and keep what its experts saw."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from .errors import UserError, unknown
from .experts import ExpertLayer, ExpertWeights
from .methods import Method
from .progress import Progress, Steps, silent
from .run_folder import RunFolder
from .runtime.transformers import load
from .stats import GRADIENTS, STATISTICS, LayerStats
from .streaming import Activations, StreamedModel, Tick
from .text import (
    OWN,
    kept_windows,
    load_tokenizer,
    model_length,
    read_text,
    sample_windows,
    sources,
    start_token,
    tokenise,
    write_windows,
)

STAGE = "calibrate"
BUILT_IN = "pydoc_data.topics"  # the text that every Python has
OWN_SHARE = 0.5  # share of the windows that the model writes itself for `NAME,self`


@dataclass(frozen=True)
class Calibration:
    """The text to calibrate on, read and cut.

    batches: token ids (batch, seqlen) each.
    description: where they come from, with a checksum of the tokens; what a resumed run is compared by.
    """

    batches: list[Tensor]
    description: dict

    @classmethod
    def read(
        cls, model: StreamedModel, source: str | None = None, *, samples: int = 256, seqlen: int | None = None,
        seed: int = 0, batch_size: int = 4, own: float = 0.0, kept: Path | None = None, progress: Progress = silent,
    ) -> Calibration:  # fmt: skip
        """Draws `samples` windows of `seqlen` tokens (2048, or the model's length) from a text by `seed`.

        Args:
            source: file, folder or dataset; None for the text every Python has; `self` for text that the model writes;
                `NAME,self` for both.
            batch_size: windows run at a time.
            own: share of the windows that the model writes itself, and what a short text lacks; `self` and `NAME,self`
                say it themselves.
            kept: file for what the model wrote, so that a resumed run need not write it again.
        """
        length = model_length(model.config, seqlen)
        read, named = sources(source)
        if named:
            own = OWN_SHARE if read else 1.0
        parts, tokenizer, given = [], load_tokenizer(model.folder), 0
        if own < 1:
            ids = tokenise(tokenizer, read_text(read))
            parts.append(sample_windows(ids, length, max(1, round((1 - own) * samples)), seed, read or BUILT_IN))
            given = len(parts[0])
        missing = samples - given if own else 0
        if missing:

            def write() -> Tensor:
                whole = load(model.name, device=model.device, dtype=model.dtype)
                return write_windows(whole, tokenizer, missing, length, seed, progress)

            parts.append(kept_windows(kept, (model.name, missing, length, seed), write))
        chosen = torch.cat(parts)
        description = {
            "source": source or (BUILT_IN if given else OWN), "samples": len(chosen), "own": missing,
            "seqlen": length, "seed": seed, "sha256": hashlib.sha256(chosen.numpy().tobytes()).hexdigest(),
        }  # fmt: skip
        return cls(list(chosen.split(batch_size)), description)


def own_share(method: Method, model: StreamedModel, wanted: float | None, source: str | None = None) -> float:
    """Share of the calibration windows that the model is to write itself: what was asked for, or the method's own, and
    then all of them where no text is given; none, with a warning, where the model can't write.

    Raises UserError for what is no share, and for one beside a `source` that says it itself.
    """
    if wanted is not None and not 0 <= wanted <= 1:
        raise UserError(f"--own-text is a share, from 0 to 1, found {wanted}.")
    read, named = sources(source)
    if named and wanted is not None:
        raise UserError(f"--calibration {source} says already how much the model writes; leave --own-text out.")
    if wanted == 1 and read:
        raise UserError(f"--own-text 1 leaves no window for {read}; use --calibration self.")
    if wanted is not None:
        return wanted
    share = OWN_SHARE if named else method.own_text
    hindrance = _hindrance(model) if share and not named else None
    if hindrance:
        warnings.warn(
            f"{model.name} {hindrance}, so it writes no calibration text of its own; text of one kind would mislead, "
            "give it of many. (--own-text 0 says that this is meant.)",
            stacklevel=2,
        )
        return 0.0
    return share if read or not share else 1.0  # what the model writes is all there is


def _hindrance(model: StreamedModel) -> str | None:
    """Why a model can't write text, if it can't."""
    if not model.fits_in_memory():
        return "does not fit in memory"
    if model.reader.source is not None:
        return "is quantised"
    if start_token(load_tokenizer(model.folder)) is None:
        return "has no token that begins a text"
    return None


def observe(
    model: StreamedModel, decoder_layer: str, activations: Activations, needs: Iterable[str], *, keep: bool,
    tick: Tick,
) -> LayerStats | None:  # fmt: skip
    """Runs a loaded decoder layer and returns what its experts saw (None for a dense layer)."""
    layer = model.experts_of(decoder_layer)
    if layer is None:
        model.run(decoder_layer, activations, keep=keep, tick=tick)
        return None
    stats = LayerStats.zeros(layer, needs, model.device)
    module = model.model.get_submodule(layer.name)
    module.observer = stats.add
    try:
        model.run(decoder_layer, activations, keep=keep, tick=tick)
    finally:
        del module.observer
    return stats


def calibrate(
    model: StreamedModel, run: RunFolder, calibration: Calibration, needs: Iterable[str], *, progress: Progress = silent
) -> None:
    """Writes the dense model's statistics of every expert layer into the run folder.

    A finished calibration of the same text that has these statistics (or more) is left as it is. Gradient statistics
    take the model through a backward pass as well, one layer at a time: every layer's inputs wait on disk meanwhile.
    """
    for name in needs:
        if name not in STATISTICS:
            raise unknown("statistic", name, STATISTICS)
    needs = set(needs) | {"routing"}
    description = {**calibration.description, "statistics": sorted(needs)}
    earlier = run.calibration()
    if earlier == {**description, "statistics": earlier and earlier["statistics"]} and needs <= {
        *earlier["statistics"]
    }:
        return
    batches = calibration.batches
    if "fisher" in needs:  # each sequence's gradient is squared on its own
        batches = [row for batch in batches for row in batch.split(1)]
    gradients = needs & GRADIENTS
    last = model.experts[-1].decoder_layer
    layers = model.decoder_layers
    if not gradients:
        layers = layers[: layers.index(last) + 1]
    places = {layer.decoder_layer: index for index, layer in enumerate(model.experts)}
    steps = Steps(progress, STAGE, len(layers) * len(batches) * (2 if gradients else 1))
    run.forget_calibration()
    activations = model.embed(batches)
    for number, decoder_layer in enumerate(layers):
        if gradients:
            run.write_activations(number, activations.tensors())
        keep = bool(gradients) or decoder_layer != last
        with model.loaded(decoder_layer):
            stats = observe(model, decoder_layer, activations, needs - gradients, keep=keep, tick=steps.tick)
        if stats is not None:
            run.write_stats(places[decoder_layer], stats)
        steps.detail = decoder_layer
    if gradients:
        _calibrate_backward(model, run, batches, activations, gradients, places, steps)
        run.drop_activations()
    run.write_calibration(description)


def _calibrate_backward(
    model: StreamedModel, run: RunFolder, batches: list[Tensor], activations: Activations, needs: set[str],
    places: dict[str, int], steps: Steps,
) -> None:  # fmt: skip
    """Adds the gradient statistics, from the last decoder layer down to the first that has experts."""
    flowing = model.loss_gradients(batches, activations)
    first = model.experts[0].decoder_layer
    for number in reversed(range(len(model.decoder_layers))):
        decoder_layer = model.decoder_layers[number]
        activations.enter(run.activations(number, model.device))
        layer = model.experts_of(decoder_layer)
        steps.detail = f"{decoder_layer}, backward"
        with model.loaded(decoder_layer):
            if layer is None:
                model.backward(decoder_layer, activations, flowing, steps.tick)
                continue
            stats = LayerStats.zeros(layer, needs, model.device)
            module = model.model.get_submodule(layer.name)
            if needs & {"output_gradient", "first_gradient"}:
                module.gradient_observer = stats
            if "fisher" in needs:
                module.requires_grad_(True)

            def after_batch(layer: ExpertLayer = layer, module: nn.Module = module, stats: LayerStats = stats) -> None:
                if "fisher" in needs:
                    _add_fisher(layer, module, stats)
                steps.tick()

            model.backward(decoder_layer, activations, flowing, after_batch, keep=decoder_layer != first)
            vars(module).pop("gradient_observer", None)
        index = places[decoder_layer]
        run.write_stats(index, run.stats(index, model.device).with_gradients(stats))
        if decoder_layer == first:
            return


def _add_fisher(layer: ExpertLayer, module: nn.Module, stats: LayerStats) -> None:
    """Adds the square of the gradients that one sequence left on the experts' weights, and clears them."""
    gradients = {name: p.grad for name, p in module.named_parameters(recurse=False)}
    canonical = ExpertWeights.from_model_layout(layer, gradients)
    parts = [canonical.stack(name) for name in layer.projections]
    stats.fisher += torch.cat(parts, dim=1).float().square()
    module.zero_grad()
