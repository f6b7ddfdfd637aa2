"""Read configs of Mistral 7B, Nemo and Small."""

from megatron_tiedlora.base import shapes
from megatron_tiedlora.model.families.decoder import family, gated_decoder
from megatron_tiedlora.model.hf_config import HfConfig


@family(intermediate_size=14336, num_key_value_heads=8, max_position_embeddings=4096 * 32, sliding_window=4096)
def mistral(config: HfConfig) -> shapes.ModelShape:
    """Return the shape of Mistral 7B, Nemo and Small: LLaMA layers, all with a sliding window in the oldest models."""
    return gated_decoder(config, window=config.window())
