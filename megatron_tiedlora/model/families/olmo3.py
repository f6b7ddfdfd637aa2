"""Read configs of OLMo 3."""

from megatron_tiedlora.base import shapes
from megatron_tiedlora.base.messages import shown
from megatron_tiedlora.model.families.decoder import BEHIND, family, gated_decoder
from megatron_tiedlora.model.hf_config import FULL, SLIDING, HfConfig, read_rope, rope_fields


@family(vocab_size=50304, rms_norm_eps=1e-5, sliding_window=4096)
def olmo3(config: HfConfig) -> shapes.ModelShape:
    """Return the `ModelShape` of OLMo 3: OLMo 2 layers, most of them with a sliding window and a different rotation."""
    bias, num_layers = config.flag("attention_bias"), config.size("num_hidden_layers")
    kinds = config.get("layer_types")
    if kinds is None:
        kinds = [SLIDING if layer % 4 else FULL for layer in range(1, num_layers + 1)]
    if not isinstance(kinds, list) or len(kinds) != num_layers or any(kind not in (FULL, SLIDING) for kind in kinds):
        wanted = f"{num_layers} kinds of layers, each {FULL} or {SLIDING}. Use a different model"
        raise config.error(f"layer_types = {shown(kinds)} is not a list of {wanted}")
    # `rope_parameters` has an entry for each kind of layer. `rope_theta` and `rope_scaling` apply to full attention.
    theta, by_kind = 500000.0, rope_fields(config, config.get("rope_parameters"))
    fields = (by_kind.get(FULL), by_kind.get(SLIDING), config.get("rope_scaling"))
    full, sliding, scaling = (rope_fields(config, own) for own in fields)
    full = {"rope_theta": config.get("rope_theta") or theta, **full, **scaling}
    ropes = {FULL: read_rope(config, values=full), SLIDING: read_rope(config, values={"rope_theta": theta, **sliding})}
    limits = [limit for _, limit in ropes.values() if limit is not None]
    return gated_decoder(
        config,
        rope=(ropes[FULL][0], min(limits, key=lambda limit: limit.tokens, default=None)),
        kinds=[shapes.AttentionKind(ropes[kind][0]) for kind in kinds],
        window=config.window(used=SLIDING in kinds),
        qkv_bias=bias,
        output_bias=bias,
        norms=BEHIND,
        head_norms="together",
    )
