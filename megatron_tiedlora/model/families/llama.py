"""LLaMA 1 to 3, and models of the same shape."""

from megatron_tiedlora.base.shapes import ModelShape
from megatron_tiedlora.model.gated_decoder import gated_decoder
from megatron_tiedlora.model.hf_config import HfConfig

DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
}


def read(config: HfConfig) -> ModelShape:
    """The shape of a `LlamaForCausalLM`. Raises UserError for features that are not implemented."""
    bias = config.flag("attention_bias")
    return gated_decoder(config, qkv_bias=bias, output_bias=bias)
