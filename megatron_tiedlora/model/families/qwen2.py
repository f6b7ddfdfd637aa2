"""Read configs of Qwen1.5, Qwen2 and Qwen2.5."""

from typing import Any

from megatron_tiedlora.base import shapes
from megatron_tiedlora.model.families.decoder import family, gated_decoder
from megatron_tiedlora.model.hf_config import HfConfig, window_of_last_layers

QWEN_DEFAULTS: dict[str, Any] = {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "max_window_layers": 28,
}


@family(**QWEN_DEFAULTS)
def qwen2(config: HfConfig) -> shapes.ModelShape:
    """Return the shape of Qwen1.5, Qwen2 and Qwen2.5, with a bias on query, key and value but not on the output."""
    return gated_decoder(config, window=window_of_last_layers(config), qkv_bias=True)
