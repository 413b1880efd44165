"""Products on a GPU for a few tokens: f(Σ_j α_ej B_j) is formed tile by tile in registers and multiplied at once; with
one basis an expert it is a grouped GEMM for what torch's does not take (float16, sizes that are not aligned).

Imported only where Triton is; its interpreter (TRITON_INTERPRET=1) runs it on a CPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...forms.base import Factors
from ...routing import Routing
from .basis_mixture import BasisMixtureKernel
from .grouped import looped_linear

MOST_TOKENS = 64  # beyond, experts' bases are used so often that forming them whole is the cheaper way
MOST_ROWS = 8 * MOST_TOKENS  # of a grouped GEMM; a loop over experts reads weights once, tiles once for ROWS rows
ROWS, OUT, IN = 16, 32, 64  # of a tile: pairs, what comes out, what is summed over


class TritonMixture(BasisMixtureKernel):
    """For inference on few tokens; else its parent's ways. Nothing waits for the GPU, so CUDA graphs can hold it."""

    def _into_rebuilt(self, factors: Factors, tokens: Tensor, routing: Routing) -> Tensor:
        if torch.is_grad_enabled() or routing.tokens > MOST_TOKENS:
            return super()._into_rebuilt(factors, tokens, routing)
        return self._through(factors, tokens.to(factors["basis"].dtype).index_select(0, routing.token), routing, out=2)

    def _out_of_rebuilt(self, factors: Factors, latents: Tensor, routing: Routing) -> Tensor:
        if torch.is_grad_enabled() or routing.tokens > MOST_TOKENS:
            return super()._out_of_rebuilt(factors, latents, routing)
        return self._through(factors, latents.to(factors["basis"].dtype), routing, out=3)

    def _through(self, factors: Factors, rows: Tensor, routing: Routing, *, out: int) -> Tensor:
        """rows (pairs, in) through every expert's basis. `out`: the axis of (G, m, r, H) that comes out."""
        basis = factors["basis"] if out == 3 else factors["basis"].transpose(2, 3)
        return _launch(rows, basis, factors["mix"], routing.offsets, self.form.activation)


def tiled_linear(rows: Tensor, matrices: Tensor, offsets: Tensor) -> Tensor:
    """As grouped_linear: rows (S, in), sorted; matrices (n, in, out); offsets (n,) -> (S, out)."""
    if torch.is_grad_enabled() or len(rows) > MOST_ROWS:
        return looped_linear(rows, matrices, offsets)
    ones = matrices.new_ones(len(matrices), 1)
    return _launch(rows.to(matrices.dtype), matrices.unsqueeze(1), ones, offsets, "identity")


def _launch(rows: Tensor, bases: Tensor, mix: Tensor, offsets: Tensor, activation: str) -> Tensor:
    """rows (S, in); bases (G, m, in, out) of groups of as many experts each; mix (E, m); offsets (E,) -> (S, out)."""
    groups, count, inner, outer = bases.shape
    rows, mix = rows.contiguous(), mix.contiguous()
    found = rows.new_zeros(len(rows), outer)
    if len(rows):
        # Experts first: those that run side by side share what they read of the bases.
        _mixture[(len(mix), triton.cdiv(outer, OUT))](
            rows, bases, mix, offsets, found, outer, inner, bases.stride(0), bases.stride(1), bases.stride(3),
            bases.stride(2), count, len(mix) // groups, activation, ROWS, OUT, IN,
        )  # fmt: skip
    return found


@triton.jit
def _mixture(
    rows, basis, mix, offsets, found, out_size, in_size,
    group_stride, basis_stride, out_stride, in_stride, bases,
    group_size, activation: tl.constexpr, ROWS: tl.constexpr, OUT: tl.constexpr, IN: tl.constexpr,
):  # fmt: skip
    """found[p, o] = Σ_i rows[p, i] · f(Σ_j mix[e, j] basis[g, j, o, i]) for the pairs p of expert e, one tile of o."""
    expert = tl.program_id(0)
    outs = tl.program_id(1) * OUT + tl.arange(0, OUT)
    start = tl.load(offsets + expert - 1, mask=expert > 0, other=0)
    end = tl.load(offsets + expert)
    group = (expert // group_size).to(tl.int64)
    for first in range(start, end, ROWS):
        pairs = first + tl.arange(0, ROWS)
        total = tl.zeros((ROWS, OUT), dtype=tl.float32)
        for at in range(0, in_size, IN):
            ins = at + tl.arange(0, IN)
            inside = (outs[:, None] < out_size) & (ins[None, :] < in_size)
            place = basis + group * group_stride + outs[:, None] * out_stride + ins[None, :] * in_stride
            formed = tl.zeros((OUT, IN), dtype=tl.float32)
            for j in range(0, bases):
                weight = tl.load(mix + expert * bases + j).to(tl.float32)
                formed += weight * tl.load(place, mask=inside, other=0.0).to(tl.float32)
                place += basis_stride
            if activation == "silu":
                formed = formed * tl.sigmoid(formed)
            elif activation == "tanh":
                formed = 2 * tl.sigmoid(2 * formed) - 1
            own = (pairs[:, None] < end) & (ins[None, :] < in_size)
            values = tl.load(rows + pairs[:, None] * in_size + ins[None, :], mask=own, other=0.0)
            total += tl.dot(values, tl.trans(formed).to(values.dtype), input_precision="ieee")
        inside = (pairs[:, None] < end) & (outs[None, :] < out_size)
        tl.store(found + pairs[:, None] * out_size + outs[None, :], total.to(found.dtype.element_ty), mask=inside)
