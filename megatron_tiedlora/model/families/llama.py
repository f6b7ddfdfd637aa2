"""Read configs of LLaMA 1 to 3, and models with the same layers."""

from megatron_tiedlora.base import shapes
from megatron_tiedlora.model.families.decoder import family, gated_decoder
from megatron_tiedlora.model.hf_config import HfConfig


@family(4096, 11008, 32, 32, vocab_size=32000, hidden_act="silu", max_position_embeddings=2048, rms_norm_eps=1e-6)
def llama(config: HfConfig) -> shapes.ModelShape:
    """Return the `ModelShape` of LLaMA 1 to 3, and of models with the same layers."""
    return gated_decoder(config, bias=True)
