"""Read configs of Ministral 3."""

from megatron_tiedlora.base import shapes
from megatron_tiedlora.model.families.decoder import family, gated_decoder
from megatron_tiedlora.model.hf_config import HfConfig, read_rope, rope_fields

_YARN = {"rope_type": "yarn", "rope_theta": 1000000.0, "factor": 16.0, "original_max_position_embeddings": 16384}

_OWN = "llama_4_scaling_beta", "max_position_embeddings"  # fields that are not about rotation


@family(
    *(4096, 14336, 34, 32, 8),
    vocab_size=131072,
    head_dim=128,
    max_position_embeddings=262144,
    rms_norm_eps=1e-5,
    rope_parameters={**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1},
)
def ministral3(config: HfConfig) -> shapes.ModelShape:
    """Return the `ModelShape` of Ministral 3: Mistral layers, in rows that are not longer than the original positions.

    Queries at later positions p have a factor, 1 + beta log(1 + floor(p / original positions)).
    """
    values = rope_fields(config, config.get("rope_parameters"))
    numbers = HfConfig(values, config.source, {}, of=" of rope_parameters")
    numbers.small_number("llama_4_scaling_beta")
    original = numbers.size("original_max_position_embeddings")
    rope, _ = read_rope(config, values={name: value for name, value in values.items() if name not in _OWN})
    why = f"has other factors of queries beyond {original} tokens (llama_4_scaling_beta)"
    limit = shapes.LengthLimit(original, f"{why}. Longer rows are not implemented")
    return gated_decoder(config, rope=(rope, limit), window=config.window())
