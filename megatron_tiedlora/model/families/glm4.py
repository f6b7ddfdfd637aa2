"""Read configs of GLM-4-0414."""

from megatron_tiedlora.base import shapes
from megatron_tiedlora.model.families.decoder import Norms, family
from megatron_tiedlora.model.families.glm import GLM_DEFAULTS, GLM_SIZES, glm_decoder
from megatron_tiedlora.model.hf_config import HfConfig


@family(*GLM_SIZES, **GLM_DEFAULTS)
def glm4(config: HfConfig) -> shapes.ModelShape:
    """Return the `ModelShape` of GLM-4-0414, with norms before and after attention and MLP."""
    before, after = ("input_layernorm", "post_attention_layernorm"), ("post_self_attn_layernorm", "post_mlp_layernorm")
    return glm_decoder(config, norms=Norms(before[0], after[0], before[1], after[1]))
