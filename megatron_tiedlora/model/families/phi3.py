"""Read configs of Phi-3, 3.5 and 4."""

from megatron_tiedlora.base import shapes
from megatron_tiedlora.model.families.decoder import family, gated_decoder
from megatron_tiedlora.model.hf_config import HfConfig, read_rope


@family(
    *(3072, 8192),
    vocab_size=32064,
    max_position_embeddings=4096,
    original_max_position_embeddings=4096,
    rms_norm_eps=1e-5,
)
def phi3(config: HfConfig) -> shapes.ModelShape:
    """Return the shape of Phi-3, 3.5 and 4, with fused q, k and v, fused gate and up, and partly rotated heads."""
    original, names = config.size("original_max_position_embeddings"), {"su": "longrope", "yarn": "longrope"}
    rope = read_rope(config, partial=True, original_positions=original, other_names=names)
    return gated_decoder(config, rope=rope, window=config.window(), fused=(shapes.QKV, shapes.GATE_UP))
