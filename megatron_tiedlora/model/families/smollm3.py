"""SmolLM3: LLaMA's layers, in some of which queries and keys are not rotated."""

from megatron_tiedlora.base.messages import UserError, shown
from megatron_tiedlora.base.shapes import ModelShape
from megatron_tiedlora.model.gated_decoder import gated_decoder
from megatron_tiedlora.model.hf_config import HfConfig, read_rope

DEFAULTS = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
    "rope_theta": 2000000.0,
    "no_rope_layer_interval": 4,
    "tie_word_embeddings": True,
}


def read(config: HfConfig) -> ModelShape:
    """The shape of a `SmolLM3ForCausalLM`. Raises UserError for features that are not implemented."""
    bias = config.flag("attention_bias")
    num_layers, interval = config.size("num_hidden_layers"), config.size("no_rope_layer_interval")
    rotates = config.get("no_rope_layers")  # 1 for a layer with rotation, whatever the field's name says
    if rotates is None:
        rotates = [int(layer % interval != 0) for layer in range(1, num_layers + 1)]
    if not isinstance(rotates, list) or len(rotates) != num_layers or not {*map(repr, rotates)} <= {"0", "1"}:
        wanted = f"a list of {num_layers} zeros and ones"
        raise UserError(f"{config.source}: no_rope_layers = {shown(rotates)} is not {wanted}")
    rope = read_rope(config)
    return gated_decoder(
        config,
        rope=rope,
        window=config.window(used=config.flag("use_sliding_window")),
        qkv_bias=bias,
        output_bias=bias,
        ropes=[rope[0] if rotated else None for rotated in rotates],
    )
