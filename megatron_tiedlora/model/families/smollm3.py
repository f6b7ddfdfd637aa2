"""Read configs of SmolLM3."""

from megatron_tiedlora.base import shapes
from megatron_tiedlora.base.messages import shown
from megatron_tiedlora.model.families.decoder import family, gated_decoder
from megatron_tiedlora.model.hf_config import HfConfig, read_rope


@family(
    vocab_size=128256,
    hidden_size=2048,
    num_hidden_layers=36,
    num_attention_heads=16,
    num_key_value_heads=4,
    max_position_embeddings=32768,
    rope_theta=2000000.0,
    no_rope_layer_interval=4,
    tie_word_embeddings=True,
)
def smollm3(config: HfConfig) -> shapes.ModelShape:
    """Return the `ModelShape` of SmolLM3: LLaMA layers, some without rotation of queries and keys."""
    bias = config.flag("attention_bias")
    num_layers, interval = config.size("num_hidden_layers"), config.size("no_rope_layer_interval")
    rotates = config.get("no_rope_layers")  # 1 is a layer with rotation, despite the name of the field
    if rotates is None:
        rotates = [int(layer % interval != 0) for layer in range(1, num_layers + 1)]
    if not isinstance(rotates, list) or len(rotates) != num_layers or not {*map(repr, rotates)} <= {"0", "1"}:
        wanted = f"a list of {num_layers} zeros and ones. Correct the field"
        raise config.error(f"no_rope_layers = {shown(rotates)} is not {wanted}")
    rope = read_rope(config)
    window = config.window(used=config.flag("use_sliding_window"))
    blocks = [shapes.AttentionKind(rope[0] if rotated else None) for rotated in rotates]
    return gated_decoder(config, rope=rope, window=window, qkv_bias=bias, output_bias=bias, kinds=blocks)
