"""Shapes of well-known models, as the fields of a Hugging Face `config.json`. For dry runs and random weights."""

from typing import Any

from megatron_tiedlora.base.messages import UserError, user_path

_LLAMA2: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_LLAMA31 = {
    **_LLAMA2,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}
_QWEN3 = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}
_GPT_2B = {  # NVIDIA's GPT-2B-001, see docs/families.md
    "model_type": "stablelm",
    "vocab_size": 256000,
    "max_position_embeddings": 4096,
    "layer_norm_eps": 1e-5,
    "partial_rotary_factor": 0.5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
TINY = "tiny"  # a model that trains in seconds, with a tokenizer whose tokens are bytes
_TINY = {**_LLAMA2, "vocab_size": 320, "max_position_embeddings": 512}
_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
_ROWS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "llama2-7b": (_LLAMA2, (4096, 11008, 32, 32, 32)),
    "llama2-13b": (_LLAMA2, (5120, 13824, 40, 40, 40)),
    "llama2-70b": (_LLAMA2, (8192, 28672, 80, 64, 8)),
    "llama3.1-8b": (_LLAMA31, (4096, 14336, 32, 32, 8)),
    "llama3.1-70b": (_LLAMA31, (8192, 28672, 80, 64, 8)),
    "qwen3-8b": (_QWEN3, (4096, 12288, 36, 32, 8)),
    "qwen3-32b": (_QWEN3, (5120, 25600, 64, 64, 8)),
    "gpt-2b-001": (_GPT_2B, (2048, 5440, 24, 16, 16)),
    TINY: (_TINY, (64, 160, 4, 4, 2)),
}
PRESETS = {name: {**common, **dict(zip(_SIZES, row, strict=True))} for name, (common, row) in _ROWS.items()}


def is_preset(name: str) -> bool:
    """Whether --model NAME means a preset: there is one of that name, and no such folder."""
    try:
        return name in PRESETS and not user_path(name).is_dir()
    except UserError:  # it cannot be a path
        return False
