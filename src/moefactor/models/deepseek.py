"""DeepSeekMoE (`model_type: deepseek`, DeepSeekMoE-16B): Llama's attention, DeepSeek-V2's experts.

Softmax routing without normalisation, ungated shared experts, a dense first layer (arXiv 2401.06066). Its hub code has
one module an expert; here they are fused, and read and written under the published tensor names.
"""

from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LlamaModel
from transformers import initialization as init
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.deepseek_v2.modeling_deepseek_v2 import (
    DeepseekV2Experts,
    DeepseekV2Moe,
    DeepseekV2TopkRouter,
)
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaPreTrainedModel

__all__ = ["DeepseekConfig", "DeepseekForCausalLM", "DeepseekModel"]


class DeepseekConfig(LlamaConfig):
    """The fields of the published config.json that Llama's lacks."""

    model_type = "deepseek"
    attribute_map = {"num_experts": "n_routed_experts"}  # noqa: RUF012 (a class attribute of transformers')

    moe_intermediate_size: int = 1408
    n_routed_experts: int = 64
    n_shared_experts: int = 2
    num_experts_per_tok: int = 6
    moe_layer_freq: int = 1
    first_k_dense_replace: int = 1
    norm_topk_prob: bool = False
    scoring_func: str = "softmax"
    topk_method: str = "greedy"
    n_group: int = 1
    topk_group: int = 1
    routed_scaling_factor: float = 1.0


class DeepseekDecoderLayer(LlamaDecoderLayer):
    def __init__(self, config: DeepseekConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        if layer_idx >= config.first_k_dense_replace and layer_idx % config.moe_layer_freq == 0:
            self.mlp = DeepseekV2Moe(config)  # type: ignore[assignment, arg-type]  # has the fields that it reads


class FusedExperts:
    """Lets both classes below choose how their experts run."""

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # transformers looks for the decorator in this file's source; the experts are DeepSeek-V2's, which have it.
        return True


class DeepseekModel(FusedExperts, LlamaModel):
    config: DeepseekConfig
    _no_split_modules = ["DeepseekDecoderLayer"]  # noqa: RUF012

    def __init__(self, config: DeepseekConfig):
        super().__init__(config)
        for index in range(config.num_hidden_layers):
            self.layers[index] = DeepseekDecoderLayer(config, index)
        self.post_init()


class DeepseekForCausalLM(FusedExperts, LlamaForCausalLM):
    config: DeepseekConfig
    _no_split_modules = ["DeepseekDecoderLayer"]  # noqa: RUF012

    def __init__(self, config: DeepseekConfig):
        # Not Llama's own, which builds a LlamaModel first, and that refuses an experts implementation.
        LlamaPreTrainedModel.__init__(self, config)
        self.model = DeepseekModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module: object) -> None:
        super()._init_weights(module)
        spread = self.config.initializer_range
        if isinstance(module, DeepseekV2TopkRouter):
            init.normal_(module.weight, mean=0.0, std=spread)
        elif isinstance(module, DeepseekV2Experts):
            init.normal_(module.gate_up_proj, mean=0.0, std=spread)
            init.normal_(module.down_proj, mean=0.0, std=spread)


AutoConfig.register("deepseek", DeepseekConfig)
AutoModel.register(DeepseekConfig, DeepseekModel)
AutoModelForCausalLM.register(DeepseekConfig, DeepseekForCausalLM)
register_checkpoint_conversion_mapping("deepseek", get_checkpoint_conversion_mapping("deepseek_v2"))
