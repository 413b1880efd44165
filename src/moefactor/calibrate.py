"""Stage 1: run the model over text, one layer at a time, and keep what its experts saw."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .errors import UserError, required, unknown
from .identity import CALIBRATION, maths_version, weights_now
from .loading import load
from .methods import Method
from .observing import observe, observe_gradients
from .progress import Progress, Steps, silent
from .run_folder import RunFolder
from .stats import GRADIENTS, STATISTICS
from .streaming import StreamedModel
from .text import (
    OWN,
    Reading,
    draw_windows,
    kept_windows,
    load_tokenizer,
    model_length,
    own_weight,
    sources,
    start_token,
    vocabulary_of,
    write_windows,
)

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
        seed: int = 0, batch_size: int = 4, own: float = 0.0, text_column: str | None = None, kept: Path | None = None,
        progress: Progress = silent,
    ) -> Calibration:  # fmt: skip
        """Draws `samples` windows of `seqlen` tokens (2048, or the model's length) from text by `seed`.

        Args:
            source: file, folder or dataset; `A:2,B:1` for several with weights, their shares of the windows; None for
                the text every Python has; `self`, alone or among them, for text that the model writes.
            batch_size: windows run at a time.
            own: share of the windows that the model writes itself, and what a short text lacks; a `self` among the
                sources says it instead.
            text_column: of .jsonl, .parquet and datasets that holds the text or the messages, see text.read_documents.
            kept: file for what the model wrote, so that a resumed run need not write it again.
        """
        length, tokenizer = model_length(model.config, seqlen), load_tokenizer(model.folder, model.trust_remote_code)
        own = own_weight(source) or own
        parts: list[Tensor] = []
        counts: dict[str, int] = {}
        if own < 1:
            reading = Reading(tokenizer, vocabulary_of(model.model), length, text_column)
            drawn, counts = draw_windows(reading, source, max(1, round((1 - own) * samples)), seed)
            parts.append(drawn)
        missing = samples - sum(counts.values()) if own else 0
        if missing:

            def write() -> Tensor:
                whole = load(
                    model.name, device=model.device, dtype=model.dtype, trust_remote_code=model.trust_remote_code
                )
                return write_windows(whole, tokenizer, missing, length, seed, progress)

            writer = weights_now(model.reader.checkpoint), str(model.dtype), maths_version("text")
            parts.append(kept_windows(kept, (*writer, missing, length, seed), (missing, length), write))
        chosen = torch.cat(parts)
        description = {
            "source": source or next(iter(counts), OWN), "windows": counts, "text_column": text_column,
            "samples": len(chosen), "own": missing, "seqlen": length, "seed": seed,
            "sha256": hashlib.sha256(chosen.numpy().tobytes()).hexdigest(),
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
    share = own_weight(source) if named else method.own_text
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
    if start_token(load_tokenizer(model.folder, model.trust_remote_code)) is None:
        return "has no token that begins a text"
    return None


def calibrate(
    model: StreamedModel, run: RunFolder, calibration: Calibration, needs: Iterable[str], *, progress: Progress = silent
) -> None:
    """Writes the dense model's statistics of every expert layer into the run folder.

    A finished calibration of the same text that has these statistics (or more) is left as it is; an unfinished one
    goes on at the decoder layer where it stopped. Gradient statistics take the model through a backward pass as well,
    one layer at a time: every layer's inputs wait on disk meanwhile.
    """
    for name in needs:
        if name not in STATISTICS:
            raise unknown("statistic", name, STATISTICS)
    needs = set(needs) | {"routing"}
    with run.opened(model):
        about = {**calibration.description, **run.stamp(model, *CALIBRATION)}
        if covers(run.calibration(), about, needs) and run.has_stats(len(model.experts)):
            return
        job = _Job(model, run, calibration, needs, {**about, "statistics": sorted(needs)}, progress)
        job.forward()
        if job.gradients:
            job.backward()
        run.finish_calibration(job.about)


def covers(earlier: dict | None, about: dict, needs: set[str]) -> bool:
    """Whether a finished calibration is about the same and has these statistics."""
    return (
        earlier is not None
        and {k: v for k, v in earlier.items() if k not in ("statistics", "files")} == about
        and needs <= {*earlier.get("statistics", [])}
    )


class _Job:
    """One calibration: forward through the decoder layers, then backward where gradients are asked for.

    RUN/states holds what enters each decoder layer that is still needed, RUN/calibrating.json how many layers are done
    in each direction. What is in memory is what is on disk, so a killed run goes on with the same numbers.
    """

    def __init__(
        self, model: StreamedModel, run: RunFolder, calibration: Calibration, needs: set[str], about: dict,
        progress: Progress,
    ):  # fmt: skip
        self.model, self.run, self.about = model, run, about
        self.gradients, self.forwards = needs & GRADIENTS, needs - GRADIENTS
        self.batches = calibration.batches
        if "fisher" in needs:  # each sequence's gradient is squared on its own
            self.batches = [row for batch in self.batches for row in batch.split(1)]
        self.first, self.last = model.experts[0].decoder_layer, model.experts[-1].decoder_layer
        self.layers = model.decoder_layers
        if not self.gradients:
            self.layers = self.layers[: self.layers.index(self.last) + 1]
        self.places = {layer.decoder_layer: index for index, layer in enumerate(model.experts)}
        self.activations = model.embed(self.batches)
        self.done = run.calibrating(about)
        if not self.done or self.activations.pools:  # what layers share with those far behind them is in memory alone
            run.forget_calibration()
            self.done = {"about": about, "forward": 0, "backward": 0}
        total = len(self.layers) * len(self.batches) * (2 if self.gradients else 1)
        self.steps = Steps(progress, STAGE, total)
        self.steps.skip((self.done["forward"] + self.done["backward"]) * len(self.batches))

    def forward(self) -> None:
        resumed = self.done["forward"]
        for number in range(resumed, len(self.layers)):
            decoder_layer = self.layers[number]
            self.steps.detail = decoder_layer
            if number and number == resumed:
                self.activations.enter(self.run.states(_entering(number), self.model.device))
            elif number == 0 and self.gradients:
                self.run.write_states(_entering(0), self.activations.tensors())
            keep = bool(self.gradients) or decoder_layer != self.last
            with self.model.loaded(decoder_layer):
                stats = observe(
                    self.model, decoder_layer, self.activations, self.forwards, keep=keep, tick=self.steps.tick
                )
            if stats is not None:
                self.run.write_stats(self.places[decoder_layer], stats)
            if keep:
                self.run.write_states(_entering(number + 1), self.activations.tensors())
            self._note("forward", number + 1)
            if not self.gradients:
                self.run.drop_states(_entering(number))

    def backward(self) -> None:
        """From the last decoder layer down to the first that has experts."""
        first = self.layers.index(self.first)
        flowing: list[Tensor] | None = None
        for number in range(self.done["backward"], len(self.layers) - first):
            at = len(self.layers) - 1 - number
            decoder_layer = self.layers[at]
            self.steps.detail = f"{decoder_layer}, backward"
            flowing = flowing or self._flowing(at + 1)
            self.activations.enter(self.run.states(_entering(at), self.model.device))
            with self.model.loaded(decoder_layer):
                stats = observe_gradients(
                    self.model, decoder_layer, self.activations, flowing, self.gradients, keep=at > first,
                    tick=self.steps.tick,
                )  # fmt: skip
            if stats is not None:
                index = self.places[decoder_layer]
                forward = required(self.run.stats(index, self.model.device), "the forward pass's statistics")
                self.run.write_stats(index, forward.with_gradients(stats))
            if at > first:
                self.run.write_states(_leaving(at), self.activations.gradients(flowing))
            self._note("backward", number + 1)
            self.run.drop_states(_entering(at + 1))
            self.run.drop_states(_leaving(at + 1))

    def _flowing(self, number: int) -> list[Tensor]:
        """The loss gradients at what enters a decoder layer, or at what leaves the last."""
        if number < len(self.layers):
            return self.activations.flow(self.run.states(_leaving(number), self.model.device))
        self.activations.enter(self.run.states(_entering(number), self.model.device))
        return self.model.loss_gradients(self.batches, self.activations)

    def _note(self, direction: str, done: int) -> None:
        self.done = {**self.done, direction: done}
        self.run.write_calibrating(self.done)


def _entering(number: int) -> str:
    return f"{number:05d}"


def _leaving(number: int) -> str:
    """Of the gradient, on its way back."""
    return f"{number:05d}-gradient"
