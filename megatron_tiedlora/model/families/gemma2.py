"""Read configs of Gemma 2."""

from dataclasses import replace
from typing import Any

from megatron_tiedlora.base import shapes
from megatron_tiedlora.base.presets import SIZES
from megatron_tiedlora.model.families.decoder import AROUND, family
from megatron_tiedlora.model.families.gemma import GEMMA_DEFAULTS, gemma_decoder
from megatron_tiedlora.model.hf_config import HfConfig

GEMMA2_DEFAULTS: dict[str, Any] = {
    **GEMMA_DEFAULTS,
    **dict(zip(SIZES, (2304, 9216, 26, 8, 4), strict=True)),
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}


def gemma2_decoder(config: HfConfig, *, every: int, **features: Any) -> shapes.ModelShape:
    """Return the shape of Gemma layers with norms before and after attention and MLP, and a window in most layers.

    Args:
        every: each layer whose number is a multiple of it has full attention.
    """
    for unused in ("hidden_act", "sliding_window_size"):  # transformers reads `hidden_activation` and `sliding_window`
        config.get(unused)
    features |= {"window": config.window(), "layer_types": config.alternating(every), "norms": AROUND}
    factor = config.number("query_pre_attn_scalar") ** -0.5
    shape = gemma_decoder(config, activation="hidden_activation", multiplier=factor, **features)
    return replace(shape, logit_cap=config.cap("final_logit_softcapping"))


@family(**GEMMA2_DEFAULTS, vocab_size=256000, attn_logit_softcapping=50.0, final_logit_softcapping=30.0)
def gemma2(config: HfConfig) -> shapes.ModelShape:
    """Return the `ModelShape` of Gemma 2: every other layer has a window, and scores and logits are capped."""
    return gemma2_decoder(config, every=2, cap=config.cap("attn_logit_softcapping"))
