"""Read configs of the first GLM-4 models."""

from megatron_tiedlora.base import shapes
from megatron_tiedlora.model.families.decoder import family
from megatron_tiedlora.model.families.glm4 import GLM_DEFAULTS, GLM_SIZES, glm_decoder
from megatron_tiedlora.model.hf_config import HfConfig


@family(*GLM_SIZES, **GLM_DEFAULTS)
def glm(config: HfConfig) -> shapes.ModelShape:
    """Return the `ModelShape` of GLM-4-9B and GLM-Edge: GLM-4-0414 layers with norms before attention and MLP only."""
    return glm_decoder(config)
