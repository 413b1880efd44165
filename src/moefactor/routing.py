"""The (token, expert) pairs of one call, sorted by expert, and back."""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import UserError


class Routing:
    """The (token, expert) pairs of one call, sorted by expert.

    Args:
        top_k_index: (tokens, k) expert ids; ids >= experts mean "skip" and get weight 0.
        top_k_weights: (tokens, k).
    """

    def __init__(self, top_k_index: Tensor, top_k_weights: Tensor, experts: int):
        self.experts = experts
        self.tokens, self.top_k = top_k_index.shape
        ids = top_k_index.reshape(-1)
        weights = top_k_weights.reshape(-1)
        skipped = ids >= experts
        # Clamped rather than cut: a data-dependent shape would break torch.compile and CUDA graphs.
        ids = ids.clamp(max=experts - 1)
        weights = weights.masked_fill(skipped, 0)
        self.expert, self.order = torch.sort(ids, stable=True)  # (pairs,)
        self.token = self.order // self.top_k  # (pairs,)
        self.weight = weights[self.order]  # (pairs,)
        every = torch.arange(experts, device=ids.device, dtype=ids.dtype)
        # Not bincount, which asks a GPU for the largest id and so waits for it.
        self.offsets = torch.searchsorted(self.expert, every, right=True).int()  # (experts,) end of each expert's rows
        self.counts = self.offsets.diff(prepend=self.offsets.new_zeros(1))  # (experts,)
        # Not cached_property, whose lock torch.compile can't enter on Python 3.11.
        self._bounds: list[tuple[int, int]] | None = None
        self._places: Tensor | None = None

    @property
    def bounds(self) -> list[tuple[int, int]]:
        """Rows of each expert on the host; one synchronisation on a GPU, only for forms that loop. UserError where a
        CUDA graph is being captured, which could not hold it."""
        if self._bounds is None:
            if self.offsets.is_cuda and torch.cuda.is_current_stream_capturing():
                raise UserError(
                    "A form of these experts asks the host how many rows each has, which CUDA graphs can't hold. "
                    "Start the engine without them: --enforce-eager (vLLM), --disable-cuda-graph (SGLang)."
                )
            ends = self.offsets.tolist()
            self._bounds = list(zip([0, *ends[:-1]], ends, strict=True))
        return self._bounds

    @property
    def places(self) -> Tensor:
        """(pairs,) where each pair of the tokens' order lies in the experts' order."""
        if self._places is None:
            self._places = inverse(self.order)
        return self._places

    def split(self, pairs: Tensor) -> tuple[Tensor, ...]:
        """Each expert's rows. All at once: a slice apiece would cost a backward pass as many gradients of the whole."""
        return pairs.split([end - start for start, end in self.bounds])

    def by_token(self, pairs: Tensor) -> Tensor:
        """(pairs, …) in the experts' order -> (T, k, …)."""
        return pairs.index_select(0, self.places).unflatten(0, (self.tokens, self.top_k))

    def combine(self, pairs: Tensor) -> Tensor:
        """Σ over a token's experts of weight · row: (pairs, H) -> (tokens, H).

        Reshape and sum rather than index_add_: deterministic on CUDA, float32 accumulation in bfloat16.
        """
        weighted = pairs * self.weight.unsqueeze(-1).to(pairs.dtype)
        return self.by_token(weighted).sum(dim=1)


def inverse(order: Tensor) -> Tensor:
    """Of a permutation."""
    places = torch.empty_like(order)
    places[order] = torch.arange(len(order), device=order.device)
    return places
