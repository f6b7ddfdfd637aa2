"""Read configs of SmolLM3."""

from dataclasses import replace

from megatron_tiedlora.base import shapes
from megatron_tiedlora.base.messages import shown
from megatron_tiedlora.model.families.decoder import family, gated_decoder
from megatron_tiedlora.model.hf_config import FULL, SLIDING, HfConfig


@family(
    *(2048, 11008, 36, 16, 4),
    vocab_size=128256,
    max_position_embeddings=32768,
    rope_theta=2000000.0,
    no_rope_layer_interval=4,
    tie_word_embeddings=True,
)
def smollm3(config: HfConfig) -> shapes.ModelShape:
    """Return the `ModelShape` of SmolLM3: LLaMA layers, some without rotation of queries and keys."""
    num_layers, interval = config.size("num_hidden_layers"), config.size("no_rope_layer_interval")
    rotates = config.get("no_rope_layers")  # 1 is a layer with rotation, despite the name of the field
    if rotates is None:
        rotates = [int(layer % interval != 0) for layer in range(1, num_layers + 1)]
    if not isinstance(rotates, list) or len(rotates) != num_layers or not {*map(repr, rotates)} <= {"0", "1"}:
        wanted = f"a list of {num_layers} zeros and ones. Correct the field"
        raise config.error(f"no_rope_layers = {shown(rotates)} is not {wanted}")
    window = config.window(used=config.flag("use_sliding_window"))
    # By default, the layers without rotation have the window.
    kinds = [FULL if rotated or window is None else SLIDING for rotated in rotates]
    shape = gated_decoder(config, window=window, layer_types=kinds, bias=True)
    kinds_of = ((shape.kind_of(block), rotated) for block, rotated in enumerate(rotates, start=1))
    return replace(shape, kinds=tuple(kind if rotated else kind._replace(rope=None) for kind, rotated in kinds_of))
