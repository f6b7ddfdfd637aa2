"""Read configs of Qwen1.5, Qwen2 and Qwen2.5."""

from typing import Any

from megatron_tiedlora.base import shapes
from megatron_tiedlora.base.messages import shown
from megatron_tiedlora.model.families.decoder import family, gated_decoder
from megatron_tiedlora.model.hf_config import FULL, SLIDING, HfConfig

QWEN_DEFAULTS: dict[str, Any] = {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "max_window_layers": 28,
}


def windows_of_last_layers(config: HfConfig) -> dict[str, Any]:
    """Return arguments of `gated_decoder`: the window of Qwen models and the default kinds of layers."""
    window, first = config.window(used=config.flag("use_sliding_window")), config.get("max_window_layers")
    if window and type(first) is not int:
        raise config.error(f"max_window_layers = {shown(first)} is not an integer. Correct this field")
    layers = range(config.size("num_hidden_layers"))
    return {"window": window, "layer_types": [SLIDING if window and layer >= first else FULL for layer in layers]}


@family(**QWEN_DEFAULTS)
def qwen2(config: HfConfig) -> shapes.ModelShape:
    """Return the shape of Qwen1.5, Qwen2 and Qwen2.5, with a bias on query, key and value but not on the output."""
    return gated_decoder(config, **windows_of_last_layers(config), qkv_bias=True)
