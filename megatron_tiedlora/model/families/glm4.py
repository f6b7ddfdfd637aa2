"""Read configs of GLM-4."""

from dataclasses import replace

from megatron_tiedlora.base import shapes
from megatron_tiedlora.model.families.decoder import Norms, family, gated_decoder
from megatron_tiedlora.model.hf_config import HfConfig, read_rope

_AROUND = Norms("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm")


@family(
    *(4096, 13696, 40, 32, 2),
    vocab_size=151552,
    head_dim=128,
    max_position_embeddings=131072,
    rms_norm_eps=1.5625e-07,
    attention_bias=True,
    partial_rotary_factor=0.5,
)
def glm4(config: HfConfig) -> shapes.ModelShape:
    """Return the `ModelShape` of GLM-4-0414, with a fused gate and up, and rotation of neighbouring elements."""
    rope, limit = read_rope(config, partial=True)
    rope, bias = replace(rope, interleaved=True), config.flag("attention_bias")
    return gated_decoder(config, rope=(rope, limit), qkv_bias=bias, norms=_AROUND, fused=(shapes.GATE_UP,))
