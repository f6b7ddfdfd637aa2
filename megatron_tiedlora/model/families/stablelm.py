"""Read configs of StableLM 2 and NVIDIA's GPT-2B-001."""

from megatron_tiedlora.base import shapes
from megatron_tiedlora.model.families.decoder import family, gated_decoder
from megatron_tiedlora.model.hf_config import HfConfig, read_rope


@family(
    *(2560, 6912, 32, 32, 32),
    vocab_size=50304,
    max_position_embeddings=4096,
    layer_norm_eps=1e-5,
    partial_rotary_factor=0.25,
)
def stablelm(config: HfConfig) -> shapes.ModelShape:
    """Return the shape of StableLM 2 and NVIDIA's GPT-2B-001, with biased LayerNorms and partly rotated heads."""
    rope, eps = read_rope(config, partial=True), config.small_number("layer_norm_eps")
    return gated_decoder(config, rope=rope, norm_eps=eps, qkv_bias=config.flag("use_qkv_bias"))
