"""Stage 4: what compression cost and what it gave: perplexity, speed, bytes."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from .checkpoint import Checkpoint, resolve
from .discover import FusedExperts, is_fused_experts
from .loading import load
from .progress import Progress, Steps, silent
from .runtime.linear import Packed
from .runtime.module import FactorisedExperts
from .streaming import checked_device
from .text import BUILT_IN, Reading, load_tokenizer, model_length, vocabulary_of, windows

STAGE = "evaluate"


@dataclass(frozen=True)
class Evaluation:
    """Measurements of one model.

    parameters, expert_parameters: counted on the loaded model (experts: the routed ones' stored tensors), as numbers,
        however many bits they take.
    resident_bytes, expert_bytes: of parameters in memory; disk_bytes: of the safetensors files.
    perplexity: text -> exp(mean negative log-likelihood) over non-overlapping windows.
    tokens_per_second: scored in the perplexity passes, prompt processing.
    expected_loss: of a compressed model whose plan foretold it, the rise of the loss over the dense one's, in nats a
        token.
    expert_bits: that the routed experts take in memory, over the parameters that they had before anything was removed.
    """

    model: str
    parameters: int
    expert_parameters: int
    resident_bytes: int
    expert_bytes: int
    disk_bytes: int
    dtype: str
    window: int
    perplexity: dict[str, float] = field(default_factory=dict)
    tokens_per_second: float = 0.0
    expected_loss: float | None = None
    expert_bits: float = 0.0

    @property
    def mean_perplexity(self) -> float:
        """Geometric mean over the texts."""
        return math.exp(sum(math.log(p) for p in self.perplexity.values()) / len(self.perplexity))


def evaluate(
    name: str, texts: Sequence[str | None], *, window: int | None = None, max_windows: int | None = None,
    batch_size: int = 8, device: torch.device | str | None = None, dtype: torch.dtype | str = "auto",
    text_column: str | None = None, trust_remote_code: bool = False, progress: Progress = silent,
) -> Evaluation:  # fmt: skip
    """Loads a model, dense or compressed, with plain transformers and measures it.

    Args:
        texts: files, folders or dataset names (their test split); None for the text every Python has.
        window: tokens a window, by default 2048 or the model's length.
        max_windows: of each text, from its beginning; None for all.
        dtype: to load and run in; "auto" is the checkpoint's own.
        text_column: of .jsonl, .parquet and datasets that holds the text or the messages, see text.read_documents.
        trust_remote_code: whether code from the model's repository may run, for what transformers lacks.
    """
    subject = Subject(name, device, dtype, trust_remote_code, batch_size, progress)
    length = model_length(subject.model.config, window)
    reading = Reading(subject.tokenizer, vocabulary_of(subject.model), length, text_column)
    return subject.evaluation(cut(reading, texts, max_windows))


def cut(reading: Reading, texts: Sequence[str | None], max_windows: int | None) -> dict[str, Tensor]:
    """Label -> (windows, length) of each text, from its beginning."""
    found = {}
    for text in texts:
        label = label_of(text)
        found[label] = windows(reading.ids(text, split="test"), reading.length, label)[:max_windows]
    return found


# Is shown every batch when it has been scored: the text's label, the first window's number in it, the logits
# (n, L − 1, vocabulary), and the losses (n, L − 1).
Look = Callable[[str, int, Tensor, Tensor], None]


def unseen(label: str, first: int, logits: Tensor, losses: Tensor) -> None:
    """The default: nobody looks."""


class Subject:
    """A model that is measured, whole on its device. Args: see evaluate."""

    def __init__(
        self, name: str, device: torch.device | str | None, dtype: torch.dtype | str, trust_remote_code: bool,
        batch_size: int, progress: Progress,
    ):  # fmt: skip
        self.name, self.batch_size, self.progress = name, batch_size, progress
        device = checked_device(device)
        self.folder = resolve(name)
        self.tokenizer = load_tokenizer(self.folder, trust_remote_code)
        self.disk_bytes = Checkpoint(self.folder).bytes()
        self.model = load(name, device=device, dtype=dtype, trust_remote_code=trust_remote_code)

    @torch.no_grad()
    def score(self, texts: dict[str, Tensor], look: Look = unseen) -> tuple[dict[str, float], float]:
        """Windows by label -> perplexity by label, and tokens a second, the looking left out."""
        steps = Steps(self.progress, STAGE, sum(-(-len(ids) // self.batch_size) for ids in texts.values()))
        steps.detail = Path(self.name).name
        perplexities, tokens, seconds = {}, 0, 0.0
        for label, every in texts.items():
            total, count, first = 0.0, 0, 0
            for ids in every.split(self.batch_size):
                started = time.perf_counter()
                ids = ids.to(self.model.device)
                logits = next_logits(self.model, ids)
                losses = next_losses(logits, ids)
                total, count = total + float(losses.sum()), count + losses.numel()  # waits for a GPU: before the clock
                seconds += time.perf_counter() - started
                tokens += ids.numel()
                look(label, first, logits, losses)
                first += len(ids)
                steps.tick()
            perplexities[label] = math.exp(total / count)
        return perplexities, tokens / seconds if seconds else 0.0

    def evaluation(self, texts: dict[str, Tensor], look: Look = unseen) -> Evaluation:
        perplexities, speed = self.score(texts, look)
        experts = [m for m in self.model.modules() if isinstance(m, FactorisedExperts) or is_fused_experts(m)]
        of_experts = [p for module in experts for p in module.parameters()]
        expert_parameters = sum(_numbers(module) for module in experts)
        # A tied head has its embedding's codes.
        packed = {id(m.weight_codes): m for m in self.model.modules() if isinstance(m, Packed)}.values()
        numbers = expert_parameters + sum(m.rows * m.columns for m in packed)
        of_packed = [p for module in packed for p in (module.weight_codes, module.weight_scale)]
        # Fewer or more than the numbers that they stand for.
        words = sum(p.numel() for p in (*of_experts, *of_packed))
        expert_bytes = sum(p.numel() * p.element_size() for p in of_experts)
        planned = _planned(self.folder)
        return Evaluation(
            self.name,
            parameters=sum(p.numel() for p in self.model.parameters()) - words + numbers,
            expert_parameters=expert_parameters,
            resident_bytes=sum(p.numel() * p.element_size() for p in self.model.parameters()),
            expert_bytes=expert_bytes,
            disk_bytes=self.disk_bytes,
            dtype=str(self.model.dtype).removeprefix("torch."),
            window=next(ids.shape[1] for ids in texts.values()),
            perplexity=perplexities,
            tokens_per_second=speed,
            expected_loss=planned.get("expected_loss"),
            expert_bits=8 * expert_bytes / planned.get("expert_parameters", {}).get("before", expert_parameters),
        )


def _planned(folder: Path) -> dict:
    """A compressed model's plan.json."""
    path = folder / "plan.json"
    return json.loads(path.read_text()) if path.is_file() else {}


def _numbers(experts: FactorisedExperts | FusedExperts) -> int:
    """Of a layer, however many bits they take."""
    if isinstance(experts, FactorisedExperts):
        return experts.parameter_count()
    return sum(p.numel() for p in experts.parameters())


@torch.no_grad()
def window_losses(model: torch.nn.Module, ids: Tensor) -> Tensor:
    """ids (n, L) -> (n, L − 1) negative log-likelihood of each token given those before it in its window, float32."""
    return next_losses(next_logits(model, ids), ids)


def next_logits(model: torch.nn.Module, ids: Tensor) -> Tensor:
    """ids (n, L) -> (n, L − 1, vocabulary) of each token but the first, given those before it."""
    return model(input_ids=ids, use_cache=False).logits[:, :-1]


def next_losses(logits: Tensor, ids: Tensor) -> Tensor:
    # A window at a time: float32 logits of them all would be twice what the model gave, and again in the softmax.
    pairs = zip(logits, ids[:, 1:], strict=True)
    return torch.stack(
        [torch.nn.functional.cross_entropy(row.float(), next_, reduction="none") for row, next_ in pairs]
    )


def label_of(text: str | None) -> str:
    """`wikitext2/test.txt` rather than a long path or a bare `test`."""
    path = Path(text or BUILT_IN)
    return "/".join(path.parts[-2:]) if path.exists() else str(text or BUILT_IN)
