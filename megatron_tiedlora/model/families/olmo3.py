"""OLMo 3: OLMo 2's layers, most of them with a sliding window and a rotation of their own."""

from megatron_tiedlora.base.messages import UserError, shown
from megatron_tiedlora.base.shapes import ModelShape
from megatron_tiedlora.model.gated_decoder import BEHIND, gated_decoder
from megatron_tiedlora.model.hf_config import FULL, SLIDING, HfConfig, read_ropes_by_kind

DEFAULTS = {"vocab_size": 50304, "rms_norm_eps": 1e-5, "sliding_window": 4096}


def read(config: HfConfig) -> ModelShape:
    """The shape of an `Olmo3ForCausalLM`. Raises UserError for features that are not implemented."""
    bias, num_layers = config.flag("attention_bias"), config.size("num_hidden_layers")
    kinds = config.get("layer_types")
    if kinds is None:
        kinds = [SLIDING if layer % 4 else FULL for layer in range(1, num_layers + 1)]
    if not isinstance(kinds, list) or len(kinds) != num_layers or any(kind not in (FULL, SLIDING) for kind in kinds):
        raise UserError(f"{config.source}: layer_types = {shown(kinds)} is not a list of {num_layers} kinds of layers")
    ropes = read_ropes_by_kind(config, theta=500000.0)
    limits = [limit for _, limit in ropes.values() if limit is not None]
    return gated_decoder(
        config,
        rope=(ropes[FULL][0], min(limits, key=lambda limit: limit.tokens, default=None)),
        ropes=[ropes[kind][0] for kind in kinds],
        window=config.window(used=SLIDING in kinds),
        qkv_bias=bias,
        output_bias=bias,
        norms=BEHIND,
        head_norms="together",
    )
