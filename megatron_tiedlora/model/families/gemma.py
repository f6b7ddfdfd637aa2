"""Read configs of Gemma 1, and build the layers that all Gemma models share."""

from dataclasses import replace
from typing import Any

from megatron_tiedlora.base import shapes
from megatron_tiedlora.base.messages import shown
from megatron_tiedlora.model.families.decoder import ACTIVATIONS, family, gated_decoder
from megatron_tiedlora.model.hf_config import HfConfig

GEMMA_DEFAULTS: dict[str, Any] = {"head_dim": 256, "max_position_embeddings": 8192, "tie_word_embeddings": True}


def gemma_decoder(config: HfConfig, **features: Any) -> shapes.ModelShape:
    """Return the shape of layers whose norms add 1 to their weights, with embeddings times sqrt(hidden size)."""
    shape = gated_decoder(config, bias=True, norm_offset=1.0, **features)
    return replace(shape, embedding_multiplier=shape.hidden_size**0.5, rounds_embedding=True)


@family(3072, 24576, 28, 16, 16, **GEMMA_DEFAULTS, vocab_size=256000, hidden_act="gelu_pytorch_tanh")
def gemma(config: HfConfig) -> shapes.ModelShape:
    """Return the `ModelShape` of Gemma 1. Its first configs say "gelu" for the approximation by tanh."""
    if (other := config.get("hidden_activation")) not in (None, "gelu_pytorch_tanh"):
        raise config.error(f"hidden_activation = {shown(other)} is not implemented. Use a different model")
    return gemma_decoder(config, activations={**ACTIVATIONS, "gelu": "gelu"})
