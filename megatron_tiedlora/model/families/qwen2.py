"""Qwen2 and Qwen2.5: a bias on query, key and value and none on the output."""

from __future__ import annotations

from megatron_tiedlora.base.shapes import ModelShape
from megatron_tiedlora.model.gated_decoder import gated_decoder
from megatron_tiedlora.model.hf_config import HfConfig


def read(config: HfConfig) -> ModelShape:
    """The shape of a `Qwen2ForCausalLM`. Raises UserError for features that are not implemented."""
    config.reject_unless("use_sliding_window", False)
    for name in ("sliding_window", "max_window_layers"):  # no effect without use_sliding_window
        config.get(name)
    config.reject_unless("use_mrope", False)  # in the config.json of Qwen2.5
    return gated_decoder(config, qkv_bias=True, output_bias=False, max_positions=32768, num_kv_heads=32)
