"""Products whose matrix differs from run of rows to run of rows: one grouped GEMM, or a loop."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm

from ...forms import FLOAT, Form
from .setting import Setting

Linear = Callable[[Tensor, Tensor, Tensor], Tensor]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def grouped_linear(rows: Tensor, matrices: Tensor, offsets: Tensor) -> Tensor:
    """rows (S, in), sorted; matrices (n, in, out); offsets (n,) ends of each matrix's rows -> (S, out).

    Grouped GEMM where its rules allow (every non-unit stride a multiple of 16 bytes), else a loop. Rows are given an
    aligned stride here, so a rank that is not a multiple of 8 costs padded activations, never padded weights.
    """
    rows = rows.to(matrices.dtype)
    if not _aligned_for_grouped_mm(matrices):
        return looped_linear(rows, matrices, offsets)
    return grouped_mm(_aligned(rows), matrices, offs=offsets)


def looped_linear(rows: Tensor, matrices: Tensor, offsets: Tensor) -> Tensor:
    """The same, a product for each matrix that has rows; waits for a GPU once."""
    sizes = offsets.diff(prepend=offsets.new_zeros(1)).tolist()
    # Split and unbound rather than indexed: each index would cost a backward pass a gradient of the whole.
    pieces = zip(rows.to(matrices.dtype).split(sizes), matrices.unbind(), strict=True)
    return torch.cat([piece @ matrix for piece, matrix in pieces])


def grouped_hindrance(form: Form, setting: Setting) -> str | None:
    """Why a grouped GEMM can't serve this form's matrices here, if it can't."""
    if setting.dtype not in DTYPES:
        return f"torch's grouped GEMM does not take {setting.dtype_name}"
    if setting.device == "cuda":
        # float32 would go through bf16-only kernels; older cards have none at all.
        if setting.dtype != torch.bfloat16:
            return f"torch's grouped GEMM takes bfloat16 alone on CUDA, not {setting.dtype_name}; load in bfloat16"
        if setting.capability < (8, 0):
            return f"grouped GEMM wants compute capability 8.0, this card has {'.'.join(map(str, setting.capability))}"
    elif setting.device not in ("cpu", "meta"):
        return f"torch has no grouped GEMM on {setting.device}"
    columns = [s.shape[-1] for s in form.tensors().values() if s.dtype == FLOAT and len(s.shape) > 1]
    if columns and all(c % _alignment(setting.dtype) for c in columns):
        return (
            f"rows of {columns[0]} numbers are {columns[0] * setting.dtype.itemsize} bytes, grouped GEMM wants "
            "multiples of 16 (--rank-multiple 8)"
        )
    return None


def _alignment(dtype: torch.dtype) -> int:
    return 16 // dtype.itemsize


def _aligned_for_grouped_mm(matrices: Tensor) -> bool:
    # safetensors maps files at 8-byte boundaries, the kernel wants 16.
    if not _starts_aligned(matrices):
        return False
    align = _alignment(matrices.dtype)
    # The backward pass multiplies by what is laid out along the other axis, whose gradients nobody pads.
    if torch.is_grad_enabled() and any(size % align for size in matrices.shape[1:]):
        return False
    strides = matrices.stride()
    return strides[1:].count(1) == 1 and all(s % align == 0 for s in strides if s != 1)


def _starts_aligned(tensor: Tensor) -> bool:
    """Whether it starts at an address that a grouped GEMM takes. While torch.compile traces there are no addresses:
    weights were laid out, and what is computed starts where an allocator puts it."""
    return torch.compiler.is_compiling() or tensor.device.type == "meta" or tensor.data_ptr() % 16 == 0


def _aligned(rows: Tensor) -> Tensor:
    align = _alignment(rows.dtype)
    if rows.stride(-1) == 1 and rows.stride(0) % align == 0 and _starts_aligned(rows):
        return rows
    columns = rows.shape[-1]
    return torch.nn.functional.pad(rows, (0, -columns % align))[:, :columns]
