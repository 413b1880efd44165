"""What every form can do, and the routed products they are made of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm

Factors = dict[str, Tensor]


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

    @cached_property
    def bounds(self) -> list[tuple[int, int]]:
        """Rows of each expert on the host; one synchronisation on a GPU, only for forms that loop."""
        ends = self.offsets.tolist()
        return list(zip([0, *ends[:-1]], ends, strict=True))

    @cached_property
    def _places(self) -> Tensor:
        """(pairs,) where each pair of the tokens' order lies in the experts' order."""
        places = torch.empty_like(self.order)
        places[self.order] = torch.arange(len(places), device=places.device)
        return places

    def split(self, pairs: Tensor) -> tuple[Tensor, ...]:
        """Each expert's rows. All at once: a slice apiece would cost a backward pass as many gradients of the whole."""
        return pairs.split([end - start for start, end in self.bounds])

    def by_token(self, pairs: Tensor) -> Tensor:
        """(pairs, …) in the experts' order -> (T, k, …)."""
        return pairs.index_select(0, self._places).unflatten(0, (self.tokens, self.top_k))

    def combine(self, pairs: Tensor) -> Tensor:
        """Σ over a token's experts of weight · row: (pairs, H) -> (tokens, H).

        Reshape and sum rather than index_add_: deterministic on CUDA, float32 accumulation in bfloat16.
        """
        weighted = pairs * self.weight.unsqueeze(-1).to(pairs.dtype)
        return self.by_token(weighted).sum(dim=1)


def grouped_linear(rows: Tensor, matrices: Tensor, offsets: Tensor) -> Tensor:
    """rows (S, in), sorted; matrices (n, in, out); offsets (n,) ends of each matrix's rows -> (S, out).

    Grouped GEMM where its rules allow (every non-unit stride a multiple of 16 bytes, SM80+ on CUDA), else a loop.
    Rows are given an aligned stride here, so a rank that is not a multiple of 8 costs padded activations, never
    padded weights.
    """
    rows = rows.to(matrices.dtype)
    if not _grouped_mm_allows(matrices):
        return _loop(rows, matrices, offsets)
    return grouped_mm(_aligned(rows), matrices, offs=offsets)


def _alignment(dtype: torch.dtype) -> int:
    return 16 // dtype.itemsize


def _grouped_mm_allows(matrices: Tensor) -> bool:
    if matrices.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return False
    if matrices.device.type == "cuda":
        # float32 would go through bf16-only kernels; older cards have none at all.
        if matrices.dtype != torch.bfloat16 or torch.cuda.get_device_capability(matrices.device) < (8, 0):
            return False
    elif matrices.device.type != "cpu":
        return False
    # safetensors maps files at 8-byte boundaries, the kernel wants 16.
    if matrices.device.type != "meta" and matrices.data_ptr() % 16:
        return False
    align = _alignment(matrices.dtype)
    # The backward pass multiplies by what is laid out along the other axis, whose gradients nobody pads.
    if torch.is_grad_enabled() and any(size % align for size in matrices.shape[1:]):
        return False
    strides = matrices.stride()
    return strides[1:].count(1) == 1 and all(s % align == 0 for s in strides if s != 1)


def _aligned(rows: Tensor) -> Tensor:
    align = _alignment(rows.dtype)
    if rows.stride(-1) == 1 and rows.stride(0) % align == 0 and rows.data_ptr() % 16 == 0:
        return rows
    columns = rows.shape[-1]
    return torch.nn.functional.pad(rows, (0, -columns % align))[:, :columns]


def _loop(rows: Tensor, matrices: Tensor, offsets: Tensor) -> Tensor:
    sizes = offsets.diff(prepend=offsets.new_zeros(1)).tolist()
    # Split and unbound rather than indexed: each index would cost a backward pass a gradient of the whole.
    pieces = zip(rows.split(sizes), matrices.unbind(), strict=True)
    return torch.cat([piece @ matrix for piece, matrix in pieces])


@dataclass(frozen=True)
class Form(ABC):
    """A way to store a stack: E matrices (width, H) that share their hidden side.

    Args:
        experts: E.
        width: rows of each matrix, I for one projection, 2I for gate and up together.
        hidden: H.
    """

    experts: int
    width: int
    hidden: int

    @abstractmethod
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor stored."""

    def integers(self) -> frozenset[str]:
        """Names of the tensors that hold indices (int32); the others have the checkpoint's dtype."""
        return frozenset()

    @property
    def kept_widths(self) -> tuple[int, ...] | None:
        """Channels that each expert kept; None where all have all of theirs."""
        return None

    @abstractmethod
    def dense(self, factors: Factors, expert: int) -> Tensor:
        """(width, H) of one expert, rebuilt."""

    @abstractmethod
    def read(self, factors: Factors, tokens: Tensor, routing: Routing) -> Tensor:
        """From the hidden side: tokens (T, H) -> (pairs, width), rows in routing's order (gate, up)."""

    @abstractmethod
    def write(self, factors: Factors, activations: Tensor, routing: Routing) -> Tensor:
        """To the hidden side: (pairs, width) in routing's order -> (pairs, H), not yet weighted (down)."""

    def write_combined(self, factors: Factors, activations: Tensor, routing: Routing) -> Tensor:
        """`write`, weighted and summed over each token's experts: (pairs, width) -> (T, H)."""
        return routing.combine(self.write(factors, activations, routing))

    @abstractmethod
    def to_json(self) -> dict: ...

    @classmethod
    @abstractmethod
    def from_json(cls, data: dict, *, experts: int, width: int, hidden: int, where: str) -> Form: ...

    def parameter_count(self) -> int:
        return sum(prod(shape) for shape in self.shapes().values())
