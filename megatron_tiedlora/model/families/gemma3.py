"""Read configs of Gemma 3: text models, and text models inside multimodal models."""

from megatron_tiedlora.base import shapes
from megatron_tiedlora.model.families.decoder import family, text_tower
from megatron_tiedlora.model.families.gemma2 import GEMMA2_DEFAULTS, gemma2_decoder
from megatron_tiedlora.model.hf_config import HfConfig, read_ropes


@family()
def gemma3(config: HfConfig) -> shapes.ModelShape:
    """Return the shape of the text model of a multimodal Gemma 3, which does not cap logits."""
    shape = text_tower(config, "gemma3_text")
    if shape.logit_cap is not None:
        raise config.error("text_config: final_logit_softcapping is not implemented in this type. Set it to null")
    return shape


@family(**{**GEMMA2_DEFAULTS, "max_position_embeddings": 131072}, vocab_size=262208, sliding_window_pattern=6)
def gemma3_text(config: HfConfig) -> shapes.ModelShape:
    """Return the `ModelShape` of Gemma 3: Gemma 2 layers with norms of heads, and another rotation within windows."""
    rope, local_rope = read_ropes(config, 1000000.0, config.get("rope_local_base_freq") or 10000.0)
    every = config.size("sliding_window_pattern")
    return gemma2_decoder(config, every=every, rope=rope, local_rope=local_rope, head_norms="each")
