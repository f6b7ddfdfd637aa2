"""One tiny model or more of each family: what `tiny_models.tiny_config` needs for it. A new family is one line here."""

from __future__ import annotations

from typing import Any

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.3, 2.5],
    "long_factor": [2.0, 4.0, 8.0],
    "original_max_position_embeddings": 64,
    "partial_rotary_factor": 0.75,
}
# Key-value heads are fewer than heads, and in the second model of a family as many.
FAMILY_MODELS: dict[str, dict[str, Any]] = {
    "llama linear": {"rope": {"rope_type": "linear", "factor": 3.0}},
    "llama dynamic": {"rope": {"rope_type": "dynamic", "factor": 3.0}, "num_kv_heads": 4},
    "llama yarn": {"rope": YARN, "tied": True},
    "mistral": {"family": "mistral", "sliding_window": 64, "head_dim": 12},
    "mistral mha": {"family": "mistral", "sliding_window": None, "num_kv_heads": 4},
    "qwen2": {"family": "qwen2"},
    "qwen2 mha": {"family": "qwen2", "num_kv_heads": 4, "tied": True, "rope": YARN},
    "qwen3": {"family": "qwen3", "head_dim": 12},
    "qwen3 mha": {"family": "qwen3", "num_kv_heads": 4, "head_dim": 16, "attention_bias": True, "rope": YARN},
    "phi3": {"family": "phi3", "original_max_position_embeddings": 64, "rope": LONGROPE},
    "phi3 mha": {"family": "phi3", "num_kv_heads": 4, "sliding_window": 64},
    "stablelm": {"family": "stablelm", "use_qkv_bias": True, "rope": {"partial_rotary_factor": 0.5}},
    "smollm3 mha": {"family": "smollm3", "no_rope_layer_interval": 3, "num_kv_heads": 4},
    "smollm3": {"family": "smollm3", "no_rope_layer_interval": 2, "tied": True},
    "stablelm mha": {"family": "stablelm", "num_kv_heads": 4},
    "olmo2": {"family": "olmo2", "head_dim": 12},
    "olmo2 mha": {"family": "olmo2", "num_kv_heads": 4, "attention_bias": True, "rope": YARN},
    "olmo3": {"family": "olmo3", "head_dim": 12, "sliding_window": 64, "rope": YARN},
    "olmo3 mha": {"family": "olmo3", "num_kv_heads": 4, "sliding_window": 64, "layer_types": None, "tied": True},
}
