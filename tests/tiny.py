"""Tiny random models of every architecture the tests run on, with a byte-level tokenizer trained on nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 260
COMMON = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 256, "eos_token_id": 257,
    "pad_token_id": 258, "tie_word_embeddings": False,
}  # fmt: skip
MLA = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "num_key_value_heads": 4, "head_dim": 8,
}  # fmt: skip
DEEPSEEK = {
    **MLA, "moe_intermediate_size": 24, "intermediate_size": 48, "n_routed_experts": 8, "n_shared_experts": 1,
    "num_experts_per_tok": 2, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1, "num_hidden_layers": 3,
}  # fmt: skip
QWEN = {
    "moe_intermediate_size": 24, "intermediate_size": 48, "num_experts": 8, "num_experts_per_tok": 2, "head_dim": 8,
}  # fmt: skip

# Architecture -> (model_type, what differs from COMMON).
TINY: dict[str, tuple[str, dict]] = {
    "mixtral": ("mixtral", {"intermediate_size": 24, "num_local_experts": 8, "num_experts_per_tok": 2}),
    "phimoe": ("phimoe", {"intermediate_size": 24, "num_local_experts": 8, "num_experts_per_tok": 2}),
    "olmoe": ("olmoe", {"intermediate_size": 24, "num_experts": 8, "num_experts_per_tok": 2}),
    "qwen2_moe": ("qwen2_moe", {**QWEN, "shared_expert_intermediate_size": 32}),
    "qwen3_moe": ("qwen3_moe", QWEN),
    "qwen3_next": (
        "qwen3_next",
        {
            **QWEN, "shared_expert_intermediate_size": 32, "linear_num_value_heads": 4, "linear_num_key_heads": 2,
            "linear_key_head_dim": 8, "linear_value_head_dim": 8, "num_hidden_layers": 4,
        },
    ),
    "deepseek_v2": ("deepseek_v2", {**DEEPSEEK, "topk_method": "group_limited_greedy"}),
    "deepseek_v3": ("deepseek_v3", DEEPSEEK),
    "kimi_k2": ("deepseek_v3", DEEPSEEK),
    "glm4_moe": (
        "glm4_moe",
        {
            "moe_intermediate_size": 24, "intermediate_size": 48, "n_routed_experts": 8, "n_shared_experts": 1,
            "num_experts_per_tok": 2, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "head_dim": 8,
            "num_hidden_layers": 3,
        },
    ),
    "ernie4_5_moe": (
        "ernie4_5_moe",
        {
            "moe_intermediate_size": 24, "intermediate_size": 48, "moe_num_experts": 8, "moe_k": 2,
            "moe_num_shared_experts": 1, "moe_layer_start_index": 1, "num_hidden_layers": 3, "head_dim": 8,
        },
    ),
    "minimax_m2": (
        "minimax_m2",
        {"intermediate_size": 24, "num_local_experts": 8, "num_experts_per_tok": 2, "head_dim": 8, "rotary_dim": 8},
    ),
    "granitemoe": ("granitemoe", {"intermediate_size": 24, "num_local_experts": 8, "num_experts_per_tok": 2}),
    "gpt_oss": (
        "gpt_oss",
        {"intermediate_size": 24, "num_local_experts": 8, "num_experts_per_tok": 2, "head_dim": 8,
         "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "nemotron_h": (
        "nemotron_h",
        {"moe_intermediate_size": 24, "intermediate_size": 48, "n_routed_experts": 8, "num_experts_per_tok": 2,
         "moe_shared_expert_intermediate_size": 32, "layers_block_type": ["moe", "attention", "moe"],
         "num_hidden_layers": 3, "head_dim": 8, "n_group": 1, "topk_group": 1},
    ),
}  # fmt: skip


def tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate(alphabet)}
    vocabulary |= {f"<{index}>": index for index in range(len(alphabet), VOCABULARY)}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<257>", pad_token="<258>")


def config(kind: str, **changes: object) -> AutoConfig:
    model_type, own = TINY[kind]
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
    return AutoConfig.for_model(model_type, **{**COMMON, **own, **changes})


def build(kind: str, folder: Path, *, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: object) -> Path:
    """Writes a random model with its tokenizer in the architecture's own layout on disk."""
    torch.manual_seed(seed)
    made = config(kind, **changes)
    made.dtype = dtype
    model = AutoModelForCausalLM.from_config(made, dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Initialisations of 0.02 give a model that says nothing; experts should matter.
            if parameter.ndim == 3:
                parameter.normal_(std=0.3)
            elif "bias" in name or "router" in name or name.endswith("gate.weight"):
                parameter.normal_(std=0.5)
    model.save_pretrained(folder, max_shard_size="100KB")
    tokenizer().save_pretrained(folder)
    return folder
