"""`python vllm_says.py DTYPE KERNELS FOLDER ...`: of each folder, the log-probability that vLLM gives each token of the
prompts on standard input, in JSON as the last line. No module of ours is imported, no plug-in of anybody's.

KERNELS: vLLM's `own`, or `plain`: vLLM's config, loader and layers, and its unquantised experts on what they hold once
it is decompressed, since for most formats it has no kernel for CPUs.
"""

from __future__ import annotations

import json
import os
import sys

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_PLUGINS": "",
}  # fmt: skip

import torch
import vllm
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import dequantize
from vllm.model_executor.layers.fused_moe import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.fused_moe.oracle.fp8 import Fp8MoeBackend
from vllm.model_executor.layers.fused_moe.oracle.int_wna16 import WNA16MoEBackend
from vllm.model_executor.layers.fused_moe.oracle.nvfp4 import NvFp4MoeBackend
from vllm.model_executor.layers.quantization.compressed_tensors import compressed_tensors_moe as methods
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
    compressed_tensors_moe_w4a4_nvfp4 as nvfp4,
)
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
    compressed_tensors_moe_w8a8_fp8 as fp8,
)
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
    compressed_tensors_moe_wna16 as wna16,
)


def decompressed(layer: torch.nn.Module, stack: str, scheme: dict) -> torch.Tensor:
    """(experts, rows, columns) of what vLLM's loader has put into a layer's `w13` or `w2`."""
    from compressed_tensors.compressors import BaseCompressor

    held = {name.removeprefix(f"{stack}_"): p.data for name, p in layer.named_parameters() if name.startswith(stack)}
    library = QuantizationScheme.model_validate({**scheme, "targets": ["Linear"]})
    compressor = BaseCompressor.get_value_from_registry(scheme["format"])
    stacked = []
    for expert in range(layer.w2_weight_scale.shape[0]):
        tensors = {name: tensor[expert] for name, tensor in held.items() if tensor.numel()}
        if "weight_packed" in tensors:
            packed = tensors["weight_packed"]
            factor = 2 if packed.dtype == torch.uint8 else 32 // library.weights.num_bits
            tensors["weight_shape"] = torch.tensor([packed.shape[0], packed.shape[1] * factor])
        if "weight_global_scale" in tensors:
            scales = tensors["weight_global_scale"].reshape(-1)
            assert (scales == scales[0]).all(), "vLLM has one for both"
            tensors["weight_global_scale"] = scales[:1]
        if library.weights.strategy == "block":
            stacked.append(dequantize(tensors["weight"], tensors["weight_scale"], args=library.weights))
        else:
            stacked.append(compressor.decompress(tensors, library)["weight"].float())
    return torch.stack(stacked)


def with_plain_kernels() -> None:
    """Experts are created and loaded as vLLM's methods for their format say, and run as if they had none."""
    choose = methods.CompressedTensorsMoEMethod.get_moe_method
    for module, name, backend in (
        (wna16, "select_wna16_moe_backend", WNA16MoEBackend.EMULATION),
        (fp8, "select_fp8_moe_backend", Fp8MoeBackend.TRITON),
        (nvfp4, "select_nvfp4_moe_backend", NvFp4MoeBackend.MARLIN),
    ):
        setattr(module, name, lambda backend=backend, **_: (backend, None))

    def get(config: object, layer: torch.nn.Module, layer_name: str) -> UnquantizedFusedMoEMethod:
        theirs, plain = choose(config, layer, layer_name), UnquantizedFusedMoEMethod(layer.moe_config)
        assert type(theirs) is not UnquantizedFusedMoEMethod, f"{layer_name}: not taken for quantised"
        scheme = config.get_scheme_dict(layer, f"{layer_name}.0.{layer.ckpt_gate_proj_name}")
        dtypes: list[torch.dtype] = []

        def create(layer: torch.nn.Module, *args: object, **named: object) -> None:
            dtypes.append(named["params_dtype"])
            theirs.create_weights(layer, *args, **named)

        def process(layer: torch.nn.Module) -> None:
            for stack in ("w13", "w2"):
                weight = decompressed(layer, stack, scheme).to(dtypes[0])
                setattr(layer, f"{stack}_weight", torch.nn.Parameter(weight, requires_grad=False))
            UnquantizedFusedMoEMethod.process_weights_after_loading(plain, layer)

        plain.create_weights, plain.process_weights_after_loading = create, process
        return plain

    methods.CompressedTensorsMoEMethod.get_moe_method = staticmethod(get)


def says(folder: str, dtype: str, prompts: list[list[int]]) -> list[list[float]]:
    model = vllm.LLM(folder, dtype=dtype, max_model_len=128, max_num_seqs=4, enforce_eager=True)
    sampling = vllm.SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1)
    said = model.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
    model.llm_engine.engine_core.shutdown()
    return [
        [place[token].logprob for place, token in zip(one.prompt_logprobs[1:], prompt[1:], strict=True)]
        for one, prompt in zip(said, prompts, strict=True)
    ]


if __name__ == "__main__":
    dtype, kernels, *folders = sys.argv[1:]
    prompts = json.load(sys.stdin)
    if kernels == "plain":
        with_plain_kernels()
    answers = [says(folder, dtype, prompts) for folder in folders]
    assert not [name for name in sys.modules if name.startswith("moefactor")]
    print(json.dumps(answers), flush=True)
