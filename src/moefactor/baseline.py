"""What a dense model says of some text, kept in one file, so that compressed ones are compared with it without it.

A safetensors file. For text number i: `i.ids` (windows, L) int32. Of each next token, (windows, L − 1, ·): `i.top` (K)
int32, the likeliest, and `i.cells` (K + 1) float32, their log-probabilities and that of all others together; `i.drawn`
(D) int32, tokens drawn from these others, and `i.drawn_log_probs`; `i.loss` float32, minus the log-probability of the
one that comes; `i.best` int32, the likeliest. `greedy` (outputs, L) int32: prompts, each with its likeliest
continuation, -1 from an end on. The header holds JSON: what it belongs to, what was measured of the dense model, and a
checksum. It comes to 8 (K + D) + 16 bytes a token of text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path

from torch import Tensor

from .checkpoint import Checkpoint, resolve
from .errors import UserError
from .files import differences, digest_of, read_about, read_tensors, tensors_digest, write_tensors
from .identity import other_weights
from .text import OWN, Tokenizer

VERSION = 1  # of what is in it, the fields of Evaluation among that
KEYS = {"baseline", "asked", "weights", "dense", "vocabulary", "texts", "sha256"}


@dataclass(frozen=True)
class DenseText:
    """The dense model's word on one text, see above."""

    ids: Tensor
    top: Tensor
    cells: Tensor
    drawn: Tensor
    drawn_log_probs: Tensor
    loss: Tensor
    best: Tensor


@dataclass(frozen=True)
class Baseline:
    """The dense model's word on several texts.

    asked: what was to be measured, and how.  dense: the model's Evaluation, as a dict.  vocabulary: its logits' width.
    texts: by label.  greedy: see above; None where none was asked for.  weights: their weights_record, of what is kept.
    """

    asked: dict
    dense: dict
    vocabulary: int
    texts: dict[str, DenseText]
    greedy: Tensor | None = None
    weights: dict = field(default_factory=dict)

    @property
    def given(self) -> list[str]:
        """Labels of the texts, without what the model wrote itself."""
        return [label for label in self.texts if label != OWN]

    def write(self, path: Path) -> None:
        tensors = {
            f"{index}.{part.name}": getattr(text, part.name)
            for index, text in enumerate(self.texts.values())
            for part in fields(text)
        }
        if self.greedy is not None:
            tensors["greedy"] = self.greedy
        about = {
            "baseline": VERSION, "asked": self.asked, "weights": self.weights, "dense": self.dense,
            "vocabulary": self.vocabulary, "texts": list(self.texts),
        }  # fmt: skip
        write_tensors(path, tensors, {**about, "sha256": _checksum(about, tensors)})

    @classmethod
    def read(cls, path: Path) -> Baseline:
        """UserError for a file that is damaged, or not of ours."""
        about = read_about(path)
        if about is None or not about.keys() >= KEYS:
            raise UserError(f"{path}: not a baseline that moefactor wrote. Choose another name.")
        if about["baseline"] != VERSION:
            raise UserError(f"{path}: a baseline of another version of moefactor. Remove it, and it is measured again.")
        tensors = read_tensors(path)
        if _checksum({key: said for key, said in about.items() if key != "sha256"}, tensors) != about["sha256"]:
            raise UserError(f"{path}: damaged: its numbers are not those that were written. Remove it.")
        texts = {
            label: DenseText(**{part.name: tensors[f"{index}.{part.name}"] for part in fields(DenseText)})
            for index, label in enumerate(about["texts"])
        }
        kept = {key: about[key] for key in ("asked", "weights", "dense", "vocabulary")}
        return cls(**kept, texts=texts, greedy=tensors.get("greedy"))

    def check(self, path: Path, asked: dict, given: Callable[[int], dict[str, Tensor]], dense: str | None) -> None:
        """UserError, with what differs, where it was measured otherwise, on other text, or is another model's.

        Args:
            given: vocabulary -> the windows of the texts that are asked for, by label.
            dense: the model that it should be of; None for any.
        """
        found = differences(asked, self.asked)
        if not found:
            ids = given(self.vocabulary)
            found = [
                f"{label} is other text now" for label in ids if not ids[label].equal(self.texts[label].ids.long())
            ]
        if not found and dense is not None:
            found = [f"{dense}: {what}" for what in other_weights(self.weights, Checkpoint(resolve(dense)))]
        if found:
            raise UserError(
                f"{path}: a baseline for something else ({'; '.join(found[:3])}). Ask for the same, or name another "
                "file or remove this one, and it is measured."
            )


def _checksum(about: dict, tensors: dict[str, Tensor]) -> str:
    return digest_of([about, tensors_digest(tensors)])


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    """Of the tokens that there are; what it makes of a text is seen by the text's own ids."""
    return digest_of(tokenizer.get_vocab())[:16]
