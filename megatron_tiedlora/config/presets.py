"""Shapes of the LLaMA-2 models, as the fields of a Hugging Face `config.json`. For dry runs and random weights."""

from __future__ import annotations

from typing import Any

_COMMON: dict[str, Any] = {
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
_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
_ROWS = {
    "llama2-7b": (4096, 11008, 32, 32, 32),
    "llama2-13b": (5120, 13824, 40, 40, 40),
    "llama2-70b": (8192, 28672, 80, 64, 8),
}
PRESETS = {name: {**_COMMON, **dict(zip(_SIZES, row, strict=True))} for name, row in _ROWS.items()}
