"""Mistral 7B, Nemo and Small: LLaMA's layers, with a sliding window in the oldest models."""

from megatron_tiedlora.base.shapes import ModelShape
from megatron_tiedlora.model.gated_decoder import gated_decoder
from megatron_tiedlora.model.hf_config import HfConfig

DEFAULTS = {
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096 * 32,
    "sliding_window": 4096,
}


def read(config: HfConfig) -> ModelShape:
    """The shape of a `MistralForCausalLM`. Raises UserError for features that are not implemented."""
    return gated_decoder(config, window=config.window())
