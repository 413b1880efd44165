"""Stage 1: run the model over text, one layer at a time, and keep what its experts saw."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from .errors import unknown
from .progress import Progress, Steps, silent
from .run_folder import RunFolder
from .stats import STATISTICS, LayerStats
from .streaming import Activations, StreamedModel, Tick
from .text import load_tokenizer, model_length, read_text, sample_windows, tokenise

STAGE = "calibrate"


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
        seed: int = 0, batch_size: int = 8,
    ) -> Calibration:  # fmt: skip
        """Draws `samples` windows of `seqlen` tokens (2048, or the model's length) from a text by `seed`.

        Args:
            source: file, folder or dataset; None for the text every Python has.
            batch_size: windows run at a time.
        """
        length = model_length(model.config, seqlen)
        ids = tokenise(load_tokenizer(model.folder), read_text(source))
        source = source or "pydoc_data.topics"
        chosen = sample_windows(ids, length, samples, seed, source)
        digest = hashlib.sha256(chosen.numpy().tobytes()).hexdigest()
        description = {"source": source, "samples": len(chosen), "seqlen": length, "seed": seed, "sha256": digest}
        return cls(list(chosen.split(batch_size)), description)


def observe(
    model: StreamedModel, decoder_layer: str, activations: Activations, needs: Iterable[str], *, keep: bool,
    tick: Tick,
) -> LayerStats | None:  # fmt: skip
    """Runs a loaded decoder layer and returns what its experts saw (None for a dense layer)."""
    layer = model.experts_of(decoder_layer)
    if layer is None:
        model.run(decoder_layer, activations, keep=keep, tick=tick)
        return None
    stats = LayerStats.zeros(layer.experts, layer.hidden, layer.intermediate, needs, model.device)
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

    A finished calibration of the same text and statistics is left as it is.
    """
    for name in needs:
        if name not in STATISTICS:
            raise unknown("statistic", name, STATISTICS)
    needs = set(needs) | {"routing"}
    description = {**calibration.description, "statistics": sorted(needs)}
    if run.calibration() == description:
        return
    activations = model.embed(calibration.batches)
    last = model.experts[-1].decoder_layer
    layers = model.decoder_layers[: model.decoder_layers.index(last) + 1]
    steps = Steps(progress, STAGE, len(layers) * len(calibration.batches))
    for decoder_layer in layers:
        with model.loaded(decoder_layer):
            stats = observe(model, decoder_layer, activations, needs, keep=decoder_layer != last, tick=steps.tick)
        if stats is not None:
            index = [e.decoder_layer for e in model.experts].index(decoder_layer)
            run.write_stats(index, stats)
        steps.detail = decoder_layer
    run.write_calibration(description)
