"""Read configs of dense Qwen3 models."""

from megatron_tiedlora.base import shapes
from megatron_tiedlora.model.families.decoder import family, gated_decoder
from megatron_tiedlora.model.families.qwen2 import QWEN_DEFAULTS
from megatron_tiedlora.model.hf_config import HfConfig, window_of_last_layers


@family(**QWEN_DEFAULTS, head_dim=128)
def qwen3(config: HfConfig) -> shapes.ModelShape:
    """Return the shape of dense Qwen3 models, with an RMS norm on each query and key head before the rotation."""
    bias, window = config.flag("attention_bias"), window_of_last_layers(config)
    return gated_decoder(config, window=window, qkv_bias=bias, output_bias=bias, head_norms="each")
