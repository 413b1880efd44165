"""How far one model's next tokens are from another's: divergence, agreement, loops, and how sure of it the text makes.

KL(p ‖ q) over a vocabulary of 150,000 tokens takes as many numbers of every token of the text. Kept are p's likeliest
tokens, all the others as one, and a few drawn from these others. Known exactly is then the divergence of the K + 1
cells, a lower bound of the whole one (data processing); what it lacks is, by the chain rule, p(rest) · KL of the others
among themselves, and its mean over the drawn ones has that expectation. So the sum has no bias, whatever K.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

RESAMPLES = 4000  # of the bootstrap: the ends of a 95 % interval move by a hundredth of its length from seed to seed
DRAWN_AT_ONCE = 1 << 24  # window numbers
# A loop: so many times back to back, over so many tokens, a sequence of at most so many. Fewer and shorter ones are in
# what people write: rows of dashes, indentation, a refrain.
TIMES, OVER, PERIOD = 4, 32, 64


@dataclass(frozen=True)
class Interval:
    """A mean over windows, and where 95 % of the means of resampled windows lie; None where there is one window."""

    value: float
    low: float | None
    high: float | None

    def exp(self) -> Interval:
        low, high = (None if end is None else _exp(end) for end in (self.low, self.high))
        return Interval(_exp(self.value), low, high)


def _exp(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float64).exp())  # infinity, where math.exp raises


@dataclass(frozen=True)
class Divergence:
    """Of a model from the dense one, on one text or on several.

    windows, tokens: scored.
    kl: mean KL(dense ‖ model) of the next token, nats a token.
    agreement: share of the tokens at which both find the same next token the likeliest.
    perplexity_ratio: the model's perplexity over the dense one's.
    """

    windows: int
    tokens: int
    kl: Interval
    agreement: Interval
    perplexity_ratio: Interval


@dataclass(frozen=True)
class Repetition:
    """What greedy output repeats, of a model beside the dense one, from the same prompts.

    outputs: of each model.  prompt, tokens: of each output at most.
    looping, dense_looping: share of the outputs in which a sequence stands at least four times back to back, over at
        least 32 tokens.
    distinct, dense_distinct: share of different ones among an output's sequences of four tokens, mean.
    """

    outputs: int
    prompt: int
    tokens: int
    looping: Interval
    dense_looping: Interval
    distinct: Interval
    dense_distinct: Interval


@dataclass(frozen=True)
class Scores:
    """Of each window of one text the means over its tokens, float64 (windows, 3): divergence; agreement; rise of the
    loss over the dense model's, nats.  tokens: scored in a window."""

    means: Tensor
    tokens: int


def cells(log_probs: Tensor, top: Tensor) -> Tensor:
    """(n, vocabulary) log-probabilities, (n, K) different tokens -> (n, K + 1): theirs, and that of all the others."""
    rest = log_probs.scatter(1, top, -math.inf).logsumexp(1, keepdim=True)
    return torch.cat([log_probs.gather(1, top), rest], 1)


def kl_of_cells(p: Tensor, q: Tensor) -> Tensor:
    """(n, cells) log-probabilities of both -> (n,) KL(p ‖ q), nats; a cell in which p has nothing counts nothing."""
    terms = p.exp() * (p - q)
    return terms.masked_fill(p == -math.inf, 0.0).sum(-1)


def draw_others(log_probs: Tensor, top: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """(n, count) tokens drawn by (n, vocabulary) log-probabilities, with replacement, from those not in (n, K) `top`;
    any ones where nothing is left."""
    others = log_probs.scatter(1, top, -math.inf)
    odds = others.softmax(1)
    odds = torch.where(others.amax(1, keepdim=True) == -math.inf, 1.0, odds)
    return torch.multinomial(odds, count, replacement=True, generator=generator)


def kl_of_others(p_cells: Tensor, q_cells: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """p(rest) · KL of p and q within the rest, from tokens that p draws there, nats; without bias, and never negative.

    For r = q/p within the rest, −log r has the divergence for its mean under p, and r − 1 has 0: their sum varies
    least where the models are close (http://joschu.net/blog/kl-approx.html).

    Args:
        p_cells, q_cells: (n, K + 1) as `cells` gives them.
        p, q: (n, drawn) log-probabilities of the tokens that were drawn.
    """
    rest = p_cells[:, -1]
    log_ratio = (q - q_cells[:, -1:]) - (p - rest.unsqueeze(1))
    return (rest.exp() * (log_ratio.expm1() - log_ratio).mean(1)).masked_fill(rest == -math.inf, 0.0)


def intervals(windows: list[Tensor], seed: int = 0) -> list[Interval]:
    """A mean and its 95 % interval for each column, by the percentile bootstrap over windows.

    Args:
        windows: for each text (n, columns), a row a window. Windows are resampled within their text, all columns
            alike; every text counts the same, however many windows it has.
        seed: of the resampling.
    """
    generator = torch.Generator().manual_seed(seed)
    value = torch.stack([text.double().mean(0) for text in windows]).mean(0)
    if sum(map(len, windows)) == len(windows):
        return [Interval(float(v), None, None) for v in value]
    drawn = torch.stack([_resampled_means(text.double(), generator) for text in windows]).mean(0)
    low, high = drawn.quantile(torch.tensor([0.025, 0.975], dtype=drawn.dtype), dim=0)
    return [Interval(*map(float, row)) for row in zip(value, low, high, strict=True)]


def _resampled_means(text: Tensor, generator: torch.Generator) -> Tensor:
    """(n, columns) -> (RESAMPLES, columns)."""
    parts, left = [], RESAMPLES
    while left:
        count = min(left, max(1, DRAWN_AT_ONCE // text.numel()))
        chosen = torch.randint(len(text), (count, len(text)), generator=generator)
        parts.append(text[chosen].mean(1))
        left -= count
    return torch.cat(parts)


def divergence_of(texts: list[Scores], seed: int = 0) -> Divergence:
    """Of one text's windows, or the mean over several texts: the perplexity's ratio then is the geometric one."""
    kl, agreement, rise = intervals([text.means for text in texts], seed)
    windows = [len(text.means) for text in texts]
    tokens = sum(count * text.tokens for count, text in zip(windows, texts, strict=True))
    return Divergence(sum(windows), tokens, kl, agreement, rise.exp())


def longest_loop(tokens: Tensor) -> int:
    """Tokens of the longest stretch of (n,) that repeats a sequence of up to PERIOD tokens at least TIMES times."""
    longest = 0
    for period in range(1, min(PERIOD, len(tokens) // TIMES) + 1):
        same = tokens[period:] == tokens[:-period]
        # The runs of True lie between two False: of as many tokens, and the first period itself.
        breaks = torch.nonzero(torch.nn.functional.pad(~same, (1, 1), value=True)).flatten()
        stretch = int(breaks.diff().max()) - 1 + period
        if stretch >= TIMES * period:
            longest = max(longest, stretch)
    return longest


def distinct_share(tokens: Tensor, length: int = 4) -> float:
    """Share of different ones among the sequences of `length` tokens in (n,); 1 where there are none."""
    if len(tokens) < length:
        return 1.0
    every = tokens.unfold(0, length, 1)
    return len(every.unique(dim=0)) / len(every)


def repetition_of(dense: list[Tensor], model: list[Tensor], prompt: int, tokens: int, seed: int = 0) -> Repetition:
    """Of what the two models wrote, an output each of the same prompts, the prompts left out."""
    columns = [
        torch.tensor([[longest_loop(out) >= OVER, distinct_share(out)] for out in outputs], dtype=torch.float64)
        for outputs in (model, dense)
    ]
    looping, distinct, dense_looping, dense_distinct = intervals([torch.cat(columns, 1)], seed)
    return Repetition(len(model), prompt, tokens, looping, dense_looping, distinct, dense_distinct)
