"""Several sources with weights -> windows: as many as are wanted, or all that there are in these proportions."""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from .documents import BUILT_IN
from .sources import OWN, parse_sources, shares
from .tokenizer import Tokenizer
from .windows import read_ids, sample_windows, windows


@dataclass(frozen=True)
class Reading:
    """How text becomes tokens: of which model, cut how, from which column of rows.

    vocabulary: rows of the model's embedding.  length: tokens a window.
    """

    tokenizer: Tokenizer
    vocabulary: int
    length: int
    column: str | None = None

    def ids(self, source: str | None, split: str = "train") -> Tensor:
        return read_ids(source, self.tokenizer, self.vocabulary, split=split, column=self.column)


def draw_windows(reading: Reading, text: str | None, samples: int, seed: int) -> tuple[Tensor, dict[str, int]]:
    """(≤ samples, length) windows of what `text` names, but for the model's own, and how many are of which source.

    A source that is too short for its share gives all it has, with a warning where that shifts the weights.
    """
    named = [source for source in parse_sources(text) if source.name != OWN]
    if not named:
        drawn = sample_windows(reading.ids(None), reading.length, samples, seed, BUILT_IN)
        return drawn, {BUILT_IN: len(drawn)}
    parts, counts = [], {}
    for source, wanted in zip(named, shares(samples, [s.weight for s in named]), strict=True):
        drawn = sample_windows(reading.ids(source.name), reading.length, wanted, seed, source.name)
        if len(drawn) < wanted and len(named) > 1:
            warnings.warn(
                f"{source.name}: has {len(drawn)} windows of {reading.length} tokens, {wanted} would be its share.",
                stacklevel=2,
            )
        parts.append(drawn)
        counts[source.name] = len(drawn)
    return torch.cat(parts), counts


def all_windows(reading: Reading, text: str | None) -> Tensor:
    """(n, length): every window of what `text` names, but for the model's own; of sources with weights as many as there
    are in these proportions, from their beginnings."""
    named = [source for source in parse_sources(text) if source.name != OWN]
    if not named:
        return windows(reading.ids(None), reading.length, BUILT_IN)
    parts = [windows(reading.ids(source.name), reading.length, source.name) for source in named]
    if any(source.given for source in named):
        most = min(len(part) / source.weight for part, source in zip(parts, named, strict=True))
        parts = [part[: max(1, round(most * source.weight))] for part, source in zip(parts, named, strict=True)]
    return torch.cat(parts)
