"""A compressed model beside the dense one, token by token: divergence, agreement, loops, with intervals."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from .baseline import Baseline, DenseText, tokenizer_digest
from .checkpoint import Checkpoint, resolve
from .discover import read_config
from .divergence import (
    Divergence,
    Repetition,
    Scores,
    cells,
    divergence_of,
    draw_others,
    kl_of_cells,
    kl_of_others,
    repetition_of,
)
from .errors import NotFinite, UserError
from .evaluation import Evaluation, Subject, cut, label_of
from .files import differences, locked
from .identity import weights_record
from .progress import Progress, Steps, silent
from .text import (
    OWN,
    Reading,
    continue_text,
    generation_settings,
    load_tokenizer,
    model_length,
    vocabulary_of,
    write_windows,
)

# Kept of each of the dense model's distributions: likeliest tokens, and tokens drawn from the others. What the drawing
# adds to the error of a mean is a small part of what the windows' own differences make of it (docs/evaluation.md).
TOP, DRAWN = 64, 16
LOGITS_AT_ONCE = 1 << 25  # where a whole vocabulary is looked at in float32


@dataclass(frozen=True)
class Contrast:
    """A model beside the dense one.

    texts: by label; `self` is what the dense model writes itself.
    overall: mean over the given texts, each with the same weight, the dense model's own not among them.
    repetition: of greedy output, where that was asked for.
    """

    dense: Evaluation
    model: Evaluation
    texts: dict[str, Divergence]
    overall: Divergence
    repetition: Repetition | None = None


def evaluate_against(
    name: str, dense: str | None, texts: Sequence[str | None], *, baseline: str | Path | None = None, top: int = TOP,
    own: int = 0, greedy: int = 0, seed: int = 0, window: int | None = None, max_windows: int | None = None,
    batch_size: int = 8, device: torch.device | str | None = None, dtype: torch.dtype | str = "auto",
    text_column: str | None = None, trust_remote_code: bool = False, progress: Progress = silent,
) -> Contrast:  # fmt: skip
    """Measures the dense model and then `name`, one in memory at a time, and how far their next tokens are apart.

    Args:
        name: of the model, usually compressed from the dense one; it must have the same tokens.
        dense: what it is compared with; None for whatever `baseline` has.
        baseline: a file for the dense model's word on these texts. Where it does not exist it is measured and written;
            where it does the dense model is not loaded. UserError where it is for other weights, texts or options.
        top: likeliest tokens that are kept of each of the dense model's distributions; of all others a few are drawn,
            see divergence.py. Exact where it is the vocabulary or more.
        own: windows that the dense model writes itself, drawn from its distribution, to compare on as well.
        greedy: windows, spread over the texts, whose first quarter both models go on from with the likeliest token, for
            the other three quarters or until they end it, to see what repeats itself.
        seed: of everything drawn: the dense model's own text, tokens beyond `top`, the intervals' windows.
    The others as for evaluate; they hold for both models.
    """
    how = Measurement(
        tuple(texts), top, own, greedy, seed, window, max_windows, batch_size, device, dtype, text_column,
        trust_remote_code, progress,
    )  # fmt: skip
    return how.contrast(name, how.baseline(name, dense, baseline))


@dataclass(frozen=True)
class Measurement:
    """What is measured, and how: the same of every model. See evaluate_against."""

    texts: tuple[str | None, ...]
    top: int = TOP
    own: int = 0
    greedy: int = 0
    seed: int = 0
    window: int | None = None
    max_windows: int | None = None
    batch_size: int = 8
    device: torch.device | str | None = None
    dtype: torch.dtype | str = "auto"
    text_column: str | None = None
    trust_remote_code: bool = False
    progress: Progress = silent

    def __post_init__(self) -> None:
        if self.top < 1 or self.own < 0 or self.greedy < 0:
            asked = f"{self.top} likeliest tokens, {self.own} own and {self.greedy} greedy windows"
            raise UserError(f"{asked}: at least 1, 0 and 0.")

    def baseline(self, name: str, dense: str | None, path: str | Path | None = None) -> Baseline:
        """What the dense model says of the texts as `name` reads them: from the file, or measured, and kept there."""
        file, asked = None if path is None else Path(path).expanduser(), self._asked(name)
        if file is not None and file.exists():
            known = Baseline.read(file)
            known.check(file, asked, lambda vocabulary: self._windows(name, vocabulary), dense)
            return known
        if dense is None:
            raise UserError(f"{file or name}: no dense model's word to compare with; name that model too (--against).")
        if found := differences(asked, self._asked(dense)):
            raise UserError(f"{name}: reads text otherwise than {dense} ({found[0]}), so they can't be compared.")
        if file is None:
            return self._measured(dense, asked)
        with locked(file.with_name(file.name + ".lock"), str(file)):
            known = replace(self._measured(dense, asked), weights=weights_record(Checkpoint(resolve(dense))))
            known.write(file)
        return known

    def contrast(self, name: str, known: Baseline) -> Contrast:
        """The model beside the dense one."""
        subject = self._loaded(name)
        parts: dict[str, list[Tensor]] = {label: [] for label in known.texts}

        def look(label: str, first: int, logits: Tensor, losses: Tensor) -> None:
            if logits.shape[-1] != known.vocabulary:
                raise UserError(
                    f"{name}: says {logits.shape[-1]} numbers of each next token, the dense model {known.vocabulary}, "
                    "so they can't be compared."
                )
            dense, device = known.texts[label], logits.device
            kl, agreement = torch.empty(losses.shape), torch.empty(losses.shape)
            for (window, at), q in _log_probs(logits):
                top, p_cells, drawn, p_drawn, best = (
                    part[first + window, at].to(device)
                    for part in (dense.top, dense.cells, dense.drawn, dense.drawn_log_probs, dense.best)
                )
                q_cells, q_drawn = cells(q, top.long()), q.gather(1, drawn.long())
                found = kl_of_cells(p_cells, q_cells) + kl_of_others(p_cells, q_cells, p_drawn, q_drawn)
                kl[window, at] = found.cpu()
                agreement[window, at] = (q.argmax(-1) == best).float().cpu()
            rise = losses.cpu() - dense.loss[first : first + len(losses)]
            parts[label].append(torch.stack([part.double().mean(1) for part in (kl, agreement, rise)], 1))

        evaluation = subject.evaluation({label: known.texts[label].ids.long() for label in known.given}, look)
        if OWN in known.texts:
            subject.score({OWN: known.texts[OWN].ids.long()}, look)
        scores = {label: Scores(torch.cat(found), known.texts[label].loss.shape[1]) for label, found in parts.items()}
        return Contrast(
            Evaluation(**known.dense),
            evaluation,
            {label: divergence_of([found], self.seed) for label, found in scores.items()},
            divergence_of([scores[label] for label in known.given], self.seed),
            None if known.greedy is None else _repetition(subject, known.greedy, self.seed),
        )

    def _measured(self, dense: str, asked: dict) -> Baseline:
        subject = self._loaded(dense)
        texts = self._windows(dense, vocabulary_of(subject.model))
        parts: dict[str, list[list[Tensor]]] = {label: [] for label in [*texts, OWN]}
        widths = set()
        generator = torch.Generator(subject.model.device).manual_seed(self.seed)

        def look(label: str, first: int, logits: Tensor, losses: Tensor) -> None:
            if losses.isnan().any():
                raise NotFinite("what the model says of the next token", dense)
            widths.add(logits.shape[-1])
            seen = []
            for _, p in _log_probs(logits):
                top = p.topk(min(self.top, p.shape[-1])).indices
                drawn = draw_others(p, top, DRAWN, generator)
                seen.append((top.int(), cells(p, top), drawn.int(), p.gather(1, drawn), p.argmax(-1).int()))
            tensors = [torch.cat(each).unflatten(0, losses.shape) for each in zip(*seen, strict=True)]
            parts[label].append([tensor.cpu() for tensor in (*tensors, losses)])

        evaluation = subject.evaluation(texts, look)
        every = dict(texts)
        if self.own:
            length = asked["window"]
            every[OWN] = write_windows(subject.model, subject.tokenizer, self.own, length, self.seed, self.progress)
            subject.score({OWN: every[OWN]}, look)
        said = {}
        for label, ids in every.items():
            top, p, drawn, p_drawn, best, losses = (torch.cat(each) for each in zip(*parts.pop(label), strict=True))
            said[label] = DenseText(ids.int(), top, p, drawn, p_drawn, losses, best)
        greedy = _continued(subject, _prompts(texts, self.greedy)) if self.greedy else None
        return Baseline(asked, asdict(evaluation), widths.pop(), said, greedy)

    def _asked(self, of: str) -> dict:
        """What a baseline belongs to, beside the weights and the words of the texts."""
        return {
            "texts": [label_of(text) for text in self.texts],
            "window": self._length(of),
            "max_windows": self.max_windows,
            "top": self.top,
            "own": self.own,
            "greedy": self.greedy,
            "seed": self.seed,
            "dtype": str(self.dtype).removeprefix("torch."),
            "tokenizer": tokenizer_digest(load_tokenizer(resolve(of), self.trust_remote_code)),
        }

    def _length(self, of: str) -> int:
        return model_length(read_config(resolve(of), of, self.trust_remote_code), self.window)

    def _windows(self, of: str, vocabulary: int) -> dict[str, Tensor]:
        tokenizer = load_tokenizer(resolve(of), self.trust_remote_code)
        return cut(Reading(tokenizer, vocabulary, self._length(of), self.text_column), self.texts, self.max_windows)

    def _loaded(self, name: str) -> Subject:
        return Subject(name, self.device, self.dtype, self.trust_remote_code, self.batch_size, self.progress)


def _log_probs(logits: Tensor) -> Iterator[tuple[tuple[int, slice], Tensor]]:
    """(n, L, vocabulary) -> window and positions, and their log-probabilities (positions, vocabulary) in float32, a
    part of a window at a time: of a large vocabulary a batch's would come to many times the logits."""
    step = max(1, LOGITS_AT_ONCE // logits.shape[-1])
    for window, row in enumerate(logits):
        for start in range(0, len(row), step):
            at = slice(start, start + step)
            yield (window, at), row[at].float().log_softmax(-1)


def _prompts(texts: dict[str, Tensor], count: int) -> Tensor:
    """(count, length), as many as there are at most: windows spread evenly over all the texts."""
    every = torch.cat(list(texts.values()))
    return every[torch.linspace(0, len(every) - 1, min(count, len(every))).long()]


def _continued(subject: Subject, prompts: Tensor) -> Tensor:
    """(n, length) windows -> the same shape, int32: their first quarter, then what is likeliest, -1 from an end on."""
    prompt = _prompt_length(prompts.shape[1])
    found = generation_settings(subject.folder, ("eos_token_id",))
    ends = found.get("eos_token_id", subject.tokenizer.eos_token_id)
    ends = torch.tensor([] if ends is None else ends, dtype=torch.long).flatten()
    batches = prompts.long().split(subject.batch_size)
    steps = Steps(subject.progress, "greedy", len(batches))
    written = torch.full(prompts.shape, -1, dtype=torch.int32)
    written[:, :prompt] = prompts[:, :prompt]
    for rows, ids in zip(written.split(subject.batch_size), batches, strict=True):
        ids = ids[:, :prompt].to(subject.model.device)
        out = continue_text(subject.model, subject.tokenizer, ids, prompts.shape[1] - prompt, found)[:, prompt:].cpu()
        ended = torch.isin(out, ends).cumsum(1) > 0
        rows[:, prompt : prompt + out.shape[1]] = out.masked_fill(ended, -1)
        steps.tick()
    return written


def _prompt_length(window: int) -> int:
    return max(1, window // 4)


def _repetition(subject: Subject, dense: Tensor, seed: int) -> Repetition:
    """dense: (n, length) prompts and what the dense model made of them, see _continued."""
    prompt = _prompt_length(dense.shape[1])

    def outputs(written: Tensor) -> list[Tensor]:
        return [row[row >= 0] for row in written[:, prompt:]]

    model = _continued(subject, dense)
    return repetition_of(outputs(dense), outputs(model), prompt, dense.shape[1] - prompt, seed)
