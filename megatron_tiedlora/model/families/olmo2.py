"""OLMo 2: norms after attention and MLP in place of those before, and norms of all heads of queries and of keys."""

from megatron_tiedlora.base.shapes import ModelShape
from megatron_tiedlora.model.gated_decoder import BEHIND, gated_decoder
from megatron_tiedlora.model.hf_config import HfConfig

DEFAULTS = {"vocab_size": 50304, "rms_norm_eps": 1e-5}


def read(config: HfConfig) -> ModelShape:
    """The shape of an `Olmo2ForCausalLM`. Raises UserError for features that are not implemented."""
    bias = config.flag("attention_bias")
    return gated_decoder(config, qkv_bias=bias, output_bias=bias, norms=BEHIND, head_norms="together")
