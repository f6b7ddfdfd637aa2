"""Phi-3, Phi-3.5 and Phi-4: q, k and v in one stored tensor, gate and up in another, and part of a head rotated."""

from megatron_tiedlora.base.shapes import ModelShape
from megatron_tiedlora.model.gated_decoder import gated_decoder
from megatron_tiedlora.model.hf_config import HfConfig, read_rope

DEFAULTS = {
    "vocab_size": 32064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "max_position_embeddings": 4096,
    "original_max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}


def read(config: HfConfig) -> ModelShape:
    """The shape of a `Phi3ForCausalLM`. Raises UserError for features that are not implemented."""
    original = config.size("original_max_position_embeddings")
    rope = read_rope(
        config, partial=True, original_positions=original, other_names={"su": "longrope", "yarn": "longrope"}
    )
    return gated_decoder(config, rope=rope, window=config.window(), fused=True)
