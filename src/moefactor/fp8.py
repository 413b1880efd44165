"""Fine-grained FP8 sources (DeepSeek-V3, Kimi-K2): weights in blocks, a float32 scale for each.

transformers 5.23 derives the block from rows // scale_rows, which raises for 576 rows with 5 scales and is silently
4 % wrong for 192 rows with 2: the last block is shorter. Here the block is the one that config.json declares.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import FineGrainedFP8Config, PretrainedConfig
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

from .compat import replace_operation

SCALE = "_scale_inv"


def dequantise(weight: Tensor, scales: Tensor, block: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """weight (…, rows, columns) FP8, scales (…, ⌈rows/b0⌉, ⌈columns/b1⌉) -> weight · scale, rounded once to `dtype`."""
    rows, columns = weight.shape[-2:]
    spread = scales.float().repeat_interleave(block[0], dim=-2).repeat_interleave(block[1], dim=-1)
    return (weight.float() * spread[..., :rows, :columns]).to(dtype)


class DeclaredBlocks(Fp8Dequantize):
    """transformers' conversion step with the declared block size."""

    def _dequantize_one(self, quantized: Tensor, scales: Tensor, output_dtype: torch.dtype | None = None) -> Tensor:
        block = tuple(self.hf_quantizer.quantization_config.weight_block_size)
        return dequantise(quantized, scales, block, output_dtype or torch.bfloat16)


class Fp8Source(FineGrainedFP8HfQuantizer):
    """Reads FP8 tensors into a model of ordinary layers; nothing is computed in FP8."""

    def __init__(self, config: PretrainedConfig):
        declared = config.quantization_config
        block = declared.get("weight_block_size") or (128, 128)
        super().__init__(FineGrainedFP8Config(weight_block_size=tuple(block), dequantize=True), pre_quantized=True)

    @property
    def block(self) -> tuple[int, int]:
        rows, columns = self.quantization_config.weight_block_size
        return rows, columns

    def update_weight_conversions(self, *conversions: object) -> list:
        return replace_operation(super().update_weight_conversions(*conversions), Fp8Dequantize, DeclaredBlocks(self))
