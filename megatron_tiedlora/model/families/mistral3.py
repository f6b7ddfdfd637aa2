"""Read configs of Mistral Small 3.1 and 3.2 and of Ministral 3: Mistral's text models inside multimodal models."""

from megatron_tiedlora.base import presets, shapes
from megatron_tiedlora.model.families.decoder import family, text_tower
from megatron_tiedlora.model.hf_config import HfConfig


@family()
def mistral3(config: HfConfig) -> shapes.ModelShape:
    """Return the shape of the text model, which is that of Mistral Small if `text_config` is absent."""
    return text_tower(config, "mistral", "ministral3", absent=presets.PRESETS["mistral-small-24b"])
