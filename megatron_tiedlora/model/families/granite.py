"""Read configs of Granite."""

from dataclasses import replace

from megatron_tiedlora.base import shapes
from megatron_tiedlora.model.families.decoder import family, gated_decoder
from megatron_tiedlora.model.hf_config import HfConfig


@family(embedding_multiplier=1.0, attention_multiplier=1.0, residual_multiplier=1.0, logits_scaling=1.0)
def granite(config: HfConfig) -> shapes.ModelShape:
    """Return the `ModelShape` of dense Granite 3: LLaMA layers with four factors."""
    shape = gated_decoder(config, bias=True, multiplier=config.number("attention_multiplier"))
    return replace(
        shape,
        block=replace(shape.block, multiplier=config.number("residual_multiplier")),
        embedding_multiplier=config.number("embedding_multiplier"),
        logit_divisor=config.number("logits_scaling"),
    )
