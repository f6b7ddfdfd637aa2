"""Qwen3, the dense models: an RMS norm of each head of queries and keys before the rotation."""

from megatron_tiedlora.base.shapes import ModelShape
from megatron_tiedlora.model.gated_decoder import gated_decoder
from megatron_tiedlora.model.hf_config import HfConfig, window_of_last_layers

DEFAULTS = {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "head_dim": 128,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "max_window_layers": 28,
}


def read(config: HfConfig) -> ModelShape:
    """The shape of a `Qwen3ForCausalLM`. Raises UserError for features that are not implemented."""
    bias = config.flag("attention_bias")
    window = window_of_last_layers(config)
    return gated_decoder(config, window=window, qkv_bias=bias, output_bias=bias, head_norms="each")
