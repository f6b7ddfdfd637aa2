"""Mistral 7B, Nemo and Small: LLaMA's layers, with a sliding window in the oldest models."""

from __future__ import annotations

from megatron_tiedlora.base.shapes import ModelShape
from megatron_tiedlora.model.gated_decoder import gated_decoder
from megatron_tiedlora.model.hf_config import HfConfig
from megatron_tiedlora.model.hf_rope import read_rope

DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 4096 * 32,
    "rms_norm_eps": 1e-6,
    "sliding_window": 4096,
}


def read(config: HfConfig) -> ModelShape:
    """The shape of a `MistralForCausalLM`. Raises UserError for features that are not implemented."""
    return gated_decoder(config, rope=read_rope(config), window=config.window())
