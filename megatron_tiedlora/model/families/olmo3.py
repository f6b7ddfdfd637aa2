"""Read configs of OLMo 3."""

from megatron_tiedlora.base import shapes
from megatron_tiedlora.model.families.decoder import AFTER, family, gated_decoder
from megatron_tiedlora.model.hf_config import HfConfig, read_ropes


@family(vocab_size=50304, rms_norm_eps=1e-5, sliding_window=4096)
def olmo3(config: HfConfig) -> shapes.ModelShape:
    """Return the `ModelShape` of OLMo 3: OLMo 2 layers, most of them with a sliding window and a different rotation."""
    rope, local_rope = read_ropes(config, 500000.0, 500000.0)
    return gated_decoder(
        config,
        rope=rope,
        local_rope=local_rope,
        window=config.window(),
        layer_types=config.alternating(4),
        bias=True,
        norms=AFTER,
        head_norms="together",
    )
