"""Read configs of dense Qwen3 models."""

from megatron_tiedlora.base import shapes
from megatron_tiedlora.model.families.decoder import family, gated_decoder
from megatron_tiedlora.model.families.qwen2 import QWEN_DEFAULTS, windows_of_last_layers
from megatron_tiedlora.model.hf_config import HfConfig


@family(**QWEN_DEFAULTS, head_dim=128)
def qwen3(config: HfConfig) -> shapes.ModelShape:
    """Return the shape of dense Qwen3 models, with an RMS norm on each query and key head before the rotation."""
    return gated_decoder(config, **windows_of_last_layers(config), bias=True, head_norms="each")
