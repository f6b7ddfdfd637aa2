"""Fields that published models have in their config.json, beside sizes, are known: each model is taken as it is."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_tiedlora.model.families import shape_from_hf

_FACTORS = {"short_factor": [1.0 + i / 48 for i in range(48)], "long_factor": [2.0] * 48}
_MINI = {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32, "bos_token_id": 1, "use_cache": True}
_PHI = {
    **_MINI, "model_type": "phi3", "architectures": ["Phi3ForCausalLM"], "attention_bias": False, "embd_pdrop": 0.0,
    "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"}, "resid_pdrop": 0.0, "rms_norm_eps": 1e-5,
    "original_max_position_embeddings": 4096, "pad_token_id": 32000, "attention_dropout": 0.0, "rope_theta": 10000.0,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.40.2", "hidden_act": "silu",
}  # fmt: skip
# name: (fields, longest row, elements of a head that are rotated)
PUBLISHED: dict[str, tuple[dict[str, Any], int, int]] = {
    "Mistral-7B-v0.1": (
        {"model_type": "mistral", "sliding_window": 4096, "num_key_value_heads": 8, "rope_theta": 10000.0,
         "max_position_embeddings": 32768, "hidden_size": 4096, "vocab_size": 32000, "torch_dtype": "bfloat16"},
        4096, 128,
    ),
    "Mistral-Nemo": (
        {"model_type": "mistral", "sliding_window": None, "head_dim": 128, "hidden_size": 5120, "rope_theta": 1e6,
         "max_position_embeddings": 131072, "attention_dropout": 0.0, "num_hidden_layers": 40},
        131072, 128,
    ),
    "Qwen2.5-7B": (
        {"model_type": "qwen2", "hidden_size": 3584, "num_attention_heads": 28, "num_key_value_heads": 4,
         "max_window_layers": 28, "sliding_window": 131072, "use_mrope": False, "use_sliding_window": False,
         "rope_theta": 1000000.0, "max_position_embeddings": 131072},
        131072, 128,
    ),
    "Qwen3-8B": (
        {"model_type": "qwen3", "attention_bias": False, "head_dim": 128, "max_window_layers": 36, "rope_scaling": None,
         "sliding_window": None, "use_sliding_window": False, "max_position_embeddings": 40960, "rope_theta": 1000000},
        40960, 128,
    ),
    "Phi-3-mini-4k": ({**_PHI, "rope_scaling": None, "sliding_window": 2047, "vocab_size": 32064}, 2047, 96),
    "Phi-3.5-mini": (
        {**_PHI, "rope_scaling": {**_FACTORS, "type": "longrope"}, "sliding_window": 262144,
         "max_position_embeddings": 131072},
        4096, 96,
    ),
    "Phi-3-mini-128k, an old spelling": (
        {**_PHI, "rope_scaling": {**_FACTORS, "type": "su"}, "max_position_embeddings": 131072}, 4096, 96,
    ),
    "Phi-4-mini": (
        {**_PHI, "full_attn_mod": 1, "interpolate_factor": 1, "lm_head_bias": False, "mlp_bias": False,
         "partial_rotary_factor": 0.75, "num_attention_heads": 24, "num_key_value_heads": 8,
         "rope_scaling": {**_FACTORS, "type": "longrope"}, "max_position_embeddings": 131072, "sliding_window": 262144},
        4096, 96,
    ),
    "StableLM-2-1.6B": (
        {"model_type": "stablelm", "hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32,
         "num_hidden_layers": 24, "layer_norm_eps": 1e-5, "partial_rotary_factor": 0.25, "rope_theta": 10000,
         "use_qkv_bias": True, "tie_word_embeddings": False, "vocab_size": 100352},
        4096, 16,
    ),
    "SmolLM3-3B": (
        {"model_type": "smollm3", "attention_bias": False, "layer_types": ["full_attention"] * 36, "mlp_bias": False,
         "max_window_layers": 28, "no_rope_layer_interval": 4, "no_rope_layers": [1, 1, 1, 0] * 9, "pretraining_tp": 2,
         "max_position_embeddings": 65536, "rope_scaling": None, "rope_theta": 5000000.0, "sliding_window": None,
         "transformers.js_config": {"kv_cache_dtype": {"fp16": "float16"}}, "use_sliding_window": False},
        65536, 128,
    ),
    "OLMo-2-1124-7B": (
        {"model_type": "olmo2", "attention_bias": False, "attention_dropout": 0.0, "max_position_embeddings": 4096,
         "num_key_value_heads": 32, "rms_norm_eps": 1e-6, "rope_scaling": None, "rope_theta": 500000,
         "tie_word_embeddings": False, "vocab_size": 100352, "pad_token_id": 100277, "hidden_act": "silu"},
        4096, 128,
    ),
    "Olmo-3-7B": (
        {"model_type": "olmo3", "attention_bias": False, "sliding_window": 4096,
         "layer_types": [*["sliding_attention"] * 3, "full_attention"] * 8,
         "rope_scaling": {"attention_factor": 1.2079441541679836, "beta_fast": 32, "beta_slow": 1, "factor": 8.0,
                          "original_max_position_embeddings": 8192, "rope_type": "yarn"},
         "max_position_embeddings": 65536, "rope_theta": 500000, "vocab_size": 100278},
        4096, 128,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_is_taken_as_it_is(name: str) -> None:
    values, longest, rotated = PUBLISHED[name]
    shape = shape_from_hf(values, source=name)
    assert (shape.limit.tokens, shape.heads.rotary_dim) == (longest, rotated)
