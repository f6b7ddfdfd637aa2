"""Define presets, the shapes of well-known models as fields of a Hugging Face config.json.

They are for dry runs, plans and random weights.
"""

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
_GEMMA3 = {
    "model_type": "gemma3_text",
    "vocab_size": 262208,
    "max_position_embeddings": 131072,
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "rope_local_base_freq": 10000.0,
    "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    "sliding_window": 1024,
    "sliding_window_pattern": 6,
    "tie_word_embeddings": True,
    "bos_token_id": 2,
    "eos_token_id": [1, 106],
}
_OLMO3 = {
    "model_type": "olmo3",
    "vocab_size": 100278,
    "max_position_embeddings": 65536,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 8192,
        "attention_factor": 1.2079441541679836,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
    },
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "eos_token_id": 100257,
}
_MISTRAL_SMALL = {  # the text model of Mistral Small 3.1 and later
    "model_type": "mistral",
    "vocab_size": 131072,
    "max_position_embeddings": 131072,
    "head_dim": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000000.0,
    "sliding_window": None,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GRANITE = {  # Granite 3.3
    "model_type": "granite",
    "vocab_size": 49159,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000000.0,
    "embedding_multiplier": 12.0,
    "attention_multiplier": 0.0078125,
    "residual_multiplier": 0.22,
    "logits_scaling": 16.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
TINY = "tiny"  # a model that trains in seconds, with a tokenizer whose tokens are bytes
_TINY = {**_LLAMA2, "vocab_size": 320, "max_position_embeddings": 512}
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
_ROWS: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "llama2-7b": (_LLAMA2, (4096, 11008, 32, 32, 32)),
    "llama2-13b": (_LLAMA2, (5120, 13824, 40, 40, 40)),
    "llama2-70b": (_LLAMA2, (8192, 28672, 80, 64, 8)),
    "llama2-70b-8k": ({**_LLAMA2, "max_position_embeddings": 8192}, (8192, 28672, 80, 64, 8)),  # to plan long rows
    "llama3.1-8b": (_LLAMA31, (4096, 14336, 32, 32, 8)),
    "llama3.1-70b": (_LLAMA31, (8192, 28672, 80, 64, 8)),
    "qwen3-8b": (_QWEN3, (4096, 12288, 36, 32, 8)),
    "qwen3-14b": (_QWEN3, (5120, 17408, 40, 40, 8)),
    "qwen3-32b": (_QWEN3, (5120, 25600, 64, 64, 8)),
    "gpt-2b-001": (_GPT_2B, (2048, 5440, 24, 16, 16)),
    "gemma3-12b": ({**_GEMMA3, "head_dim": 256, "query_pre_attn_scalar": 256}, (3840, 15360, 48, 16, 8)),
    "gemma3-27b": ({**_GEMMA3, "head_dim": 128, "query_pre_attn_scalar": 168}, (5376, 21504, 62, 32, 16)),
    "olmo3-7b": (_OLMO3, (4096, 11008, 32, 32, 32)),
    "olmo3-32b": (_OLMO3, (5120, 27648, 64, 40, 8)),
    "mistral-small-24b": (_MISTRAL_SMALL, (5120, 32768, 40, 32, 8)),
    "granite-8b": (_GRANITE, (4096, 12800, 40, 32, 8)),
    TINY: (_TINY, (64, 160, 4, 4, 2)),
}
PRESETS = {name: {**common, **dict(zip(SIZES, row, strict=True))} for name, (common, row) in _ROWS.items()}


def small_llama(vocab_size: int, *sizes: int) -> dict[str, Any]:
    """Return the config.json of a LLaMA 2 with another vocabulary and other SIZES, for checks and measurements."""
    return {**_LLAMA2, "vocab_size": vocab_size, **dict(zip(SIZES, sizes, strict=True))}


def is_preset(name: str) -> bool:
    """Return whether --model NAME is a preset and not a folder with the same name."""
    try:
        return name in PRESETS and not user_path(name).is_dir()
    except UserError:  # the name cannot be a path
        return False
