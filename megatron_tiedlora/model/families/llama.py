"""LLaMA 1 to 3, and models of the same shape."""

from __future__ import annotations

from megatron_tiedlora.base.shapes import ModelShape
from megatron_tiedlora.model.gated_decoder import gated_decoder
from megatron_tiedlora.model.hf_config import HfConfig


def read(config: HfConfig) -> ModelShape:
    """The shape of a `LlamaForCausalLM`. Raises UserError for features that are not implemented."""
    config.reject_unless("sliding_window")
    config.reject_unless("use_sliding_window", False)
    config.reject_unless("mlp_bias", False)
    config.reject_unless("partial_rotary_factor", 1)
    config.reject_unless("logits_scaling", 1)
    config.reject_unless("attn_logit_softcapping")
    config.reject_unless("final_logit_softcapping")
    config.reject_unless("num_local_experts")
    config.reject_unless("use_qk_norm", False)
    config.reject_unless("rope_interleaved", False)
    bias = config.flag("attention_bias")
    return gated_decoder(config, qkv_bias=bias, output_bias=bias, max_positions=2048)
