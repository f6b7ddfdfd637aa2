"""Read configs of OLMo 2."""

from megatron_tiedlora.base import shapes
from megatron_tiedlora.model.families.decoder import AFTER, family, gated_decoder
from megatron_tiedlora.model.hf_config import HfConfig


@family(vocab_size=50304, rms_norm_eps=1e-5)
def olmo2(config: HfConfig) -> shapes.ModelShape:
    """Return the shape of OLMo 2, with norms after attention and MLP, and over all heads of queries and of keys."""
    return gated_decoder(config, bias=True, norms=AFTER, head_norms="together")
