"""Qwen1.5, Qwen2 and Qwen2.5: a bias on query, key and value and none on the output."""

from megatron_tiedlora.base.shapes import ModelShape
from megatron_tiedlora.model.gated_decoder import gated_decoder
from megatron_tiedlora.model.hf_config import HfConfig, window_of_last_layers

DEFAULTS = {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "max_window_layers": 28,
}


def read(config: HfConfig) -> ModelShape:
    """The shape of a `Qwen2ForCausalLM`. Raises UserError for features that are not implemented."""
    return gated_decoder(config, window=window_of_last_layers(config), qkv_bias=True)
