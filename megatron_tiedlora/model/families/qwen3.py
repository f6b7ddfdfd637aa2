"""Qwen3, the dense models: an RMS norm of each head of queries and keys before the rotation."""

from __future__ import annotations

from megatron_tiedlora.base.shapes import ModelShape
from megatron_tiedlora.model.families import qwen2
from megatron_tiedlora.model.gated_decoder import gated_decoder
from megatron_tiedlora.model.hf_config import HfConfig
from megatron_tiedlora.model.hf_rope import read_rope

DEFAULTS = {**qwen2.DEFAULTS, "head_dim": 128}


def read(config: HfConfig) -> ModelShape:
    """The shape of a `Qwen3ForCausalLM`. Raises UserError for features that are not implemented."""
    bias = config.flag("attention_bias")
    window = config.window(used=config.flag("use_sliding_window"))
    return gated_decoder(
        config, rope=read_rope(config), window=window, qkv_bias=bias, output_bias=bias, head_norms=True
    )
