"""Stage 4: what compression cost and what it gave: perplexity, speed, bytes."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from .checkpoint import Checkpoint, resolve
from .discover import FusedExperts, is_fused_experts
from .loading import load
from .progress import Progress, Steps, silent
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
    device = checked_device(device)
    folder = resolve(name)
    tokenizer = load_tokenizer(folder, trust_remote_code)
    disk_bytes = Checkpoint(folder).bytes()
    model = load(name, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    length = model_length(model.config, window)
    reading = Reading(tokenizer, vocabulary_of(model), length, text_column)
    batches = {}
    for text in texts:
        label = text or BUILT_IN
        cut = windows(reading.ids(text, split="test"), length, label)
        batches[_label(label)] = cut[:max_windows].split(batch_size)
    steps = Steps(progress, STAGE, sum(len(b) for b in batches.values()))
    steps.detail = Path(name).name
    perplexities, tokens, seconds = {}, 0, 0.0
    for label, text_batches in batches.items():
        total = count = 0.0
        for ids in text_batches:
            started = time.perf_counter()
            loss = window_losses(model, ids.to(device))
            total, count = total + float(loss.sum()), count + loss.numel()  # waits for a GPU, so comes before the clock
            seconds += time.perf_counter() - started
            tokens += ids.numel()
            steps.tick()
        perplexities[label] = math.exp(total / count)
    experts = [m for m in model.modules() if isinstance(m, FactorisedExperts) or is_fused_experts(m)]
    of_experts = [p for module in experts for p in module.parameters()]
    expert_parameters = sum(_numbers(module) for module in experts)
    words = sum(p.numel() for p in of_experts)  # fewer or more than the numbers where these are packed in words
    expert_bytes = sum(p.numel() * p.element_size() for p in of_experts)
    return Evaluation(
        name,
        parameters=sum(p.numel() for p in model.parameters()) - words + expert_parameters,
        expert_parameters=expert_parameters,
        resident_bytes=sum(p.numel() * p.element_size() for p in model.parameters()),
        expert_bytes=expert_bytes,
        disk_bytes=disk_bytes,
        dtype=str(model.dtype).removeprefix("torch."),
        window=length,
        perplexity=perplexities,
        tokens_per_second=tokens / seconds if seconds else 0.0,
        expected_loss=_planned(folder).get("expected_loss"),
        expert_bits=8 * expert_bytes / _planned(folder).get("expert_parameters", {}).get("before", expert_parameters),
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
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    # A window at a time: float32 logits of them all would be twice what the model gave, and again in the softmax.
    pairs = zip(logits, ids[:, 1:], strict=True)
    return torch.stack(
        [torch.nn.functional.cross_entropy(row.float(), next_, reduction="none") for row, next_ in pairs]
    )


def _label(text: str) -> str:
    """`wikitext2/test.txt` rather than a long path or a bare `test`."""
    path = Path(text)
    return "/".join(path.parts[-2:]) if path.exists() else text
