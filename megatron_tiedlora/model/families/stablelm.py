"""StableLM 2, and NVIDIA's GPT-2B-001: LayerNorms with biases, and part of a head rotated."""

from megatron_tiedlora.base.shapes import ModelShape
from megatron_tiedlora.model.gated_decoder import gated_decoder
from megatron_tiedlora.model.hf_config import HfConfig, read_rope

DEFAULTS = {
    "vocab_size": 50304,
    "hidden_size": 2560,
    "intermediate_size": 6912,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "layer_norm_eps": 1e-5,
    "partial_rotary_factor": 0.25,
}


def read(config: HfConfig) -> ModelShape:
    """The shape of a `StableLmForCausalLM`. Raises UserError for features that are not implemented."""
    return gated_decoder(
        config,
        rope=read_rope(config, partial=True),
        norm_eps=config.small_number("layer_norm_eps"),
        qkv_bias=config.flag("use_qkv_bias"),
    )
