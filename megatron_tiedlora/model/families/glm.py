"""Read configs of the first GLM-4 models, and build the layers that GLM models share."""

from dataclasses import replace
from typing import Any

from megatron_tiedlora.base import shapes
from megatron_tiedlora.model.families.decoder import family, gated_decoder
from megatron_tiedlora.model.hf_config import HfConfig, read_rope

GLM_SIZES = 4096, 13696, 40, 32, 2
GLM_DEFAULTS: dict[str, Any] = {
    "vocab_size": 151552,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1.5625e-07,
    "attention_bias": True,
    "partial_rotary_factor": 0.5,
}


def glm_decoder(config: HfConfig, **features: Any) -> shapes.ModelShape:
    """Return the shape of layers with a fused gate and up, which rotate neighbouring elements in a part of a head."""
    rope, limit = read_rope(config, partial=True)
    rope, bias = replace(rope, interleaved=True), config.flag("attention_bias")
    return gated_decoder(config, rope=(rope, limit), qkv_bias=bias, fused=(shapes.GATE_UP,), **features)


@family(*GLM_SIZES, **GLM_DEFAULTS)
def glm(config: HfConfig) -> shapes.ModelShape:
    """Return the `ModelShape` of GLM-4-9B and GLM-Edge, with norms before attention and MLP."""
    return glm_decoder(config)
