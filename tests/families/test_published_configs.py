"""Configs of published models are read as they are."""

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
_VISION = {"hidden_size": 1152, "image_size": 896, "model_type": "siglip_vision_model", "vision_use_head": False}
# name: (fields, longest row, elements of a head that are rotated)
PUBLISHED: dict[str, tuple[dict[str, Any], int, int]] = {
    "Mistral-7B-v0.1": (
        {"model_type": "mistral", "sliding_window": 4096, "num_key_value_heads": 8, "rope_theta": 10000.0,
         "max_position_embeddings": 32768, "hidden_size": 4096, "vocab_size": 32000, "torch_dtype": "bfloat16"},
        32768, 128,
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
    "Phi-3-mini-4k": ({**_PHI, "rope_scaling": None, "sliding_window": 2047, "vocab_size": 32064}, 4096, 96),
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
        65536, 128,
    ),
    "gemma-2b": (
        {"model_type": "gemma", "attention_bias": False, "attention_dropout": 0.0, "head_dim": 256,
         "hidden_act": "gelu", "hidden_activation": None, "hidden_size": 2048, "intermediate_size": 16384,
         "num_attention_heads": 8, "num_hidden_layers": 18, "num_key_value_heads": 1, "rope_scaling": None,
         "rope_theta": 10000.0},
        8192, 256,
    ),
    "gemma-2-27b": (
        {"model_type": "gemma2", "attn_logit_softcapping": 50.0, "cache_implementation": "hybrid", "head_dim": 128,
         "final_logit_softcapping": 30.0, "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh",
         "hidden_size": 4608, "intermediate_size": 36864, "num_attention_heads": 32, "num_hidden_layers": 46,
         "num_key_value_heads": 16, "query_pre_attn_scalar": 144, "rope_theta": 10000.0, "sliding_window": 4096,
         "sliding_window_size": 4096},
        8192, 128,
    ),
    "gemma-3-27b-it": (
        {"model_type": "gemma3", "boi_token_index": 255999, "eoi_token_index": 256000, "eos_token_id": [1, 106],
         "image_token_index": 262144, "initializer_range": 0.02, "mm_tokens_per_image": 256, "vision_config": _VISION,
         "text_config": {"head_dim": 128, "hidden_size": 5376, "intermediate_size": 21504, "model_type": "gemma3_text",
                         "num_attention_heads": 32, "num_hidden_layers": 62, "num_key_value_heads": 16,
                         "query_pre_attn_scalar": 168, "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
                         "sliding_window": 1024}},
        131072, 128,
    ),
    "Mistral-Small-3.1-24B": (
        {"model_type": "mistral3", "image_token_index": 10, "multimodal_projector_bias": False, "spatial_merge_size": 2,
         "projector_hidden_act": "gelu", "vision_config": {"model_type": "pixtral"}, "vision_feature_layer": -1,
         "text_config": {"attention_dropout": 0.0, "head_dim": 128, "hidden_act": "silu", "hidden_size": 5120,
                         "intermediate_size": 32768, "max_position_embeddings": 131072, "model_type": "mistral",
                         "num_hidden_layers": 40, "rms_norm_eps": 1e-05, "rope_theta": 1e9, "sliding_window": None,
                         "vocab_size": 131072}},
        131072, 128,
    ),
    "GLM-4-9B-0414": (
        {"model_type": "glm4", "attention_bias": False, "eos_token_id": [151329, 151336, 151338], "head_dim": 128,
         "hidden_size": 4096, "intermediate_size": 13696, "max_position_embeddings": 32768, "num_key_value_heads": 2,
         "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "vocab_size": 151552},
        32768, 64,
    ),
    "granite-3.3-8b": (
        {"model_type": "granite", "attention_bias": False, "attention_dropout": 0.0, "attention_multiplier": 0.0078125,
         "embedding_multiplier": 12.0, "intermediate_size": 12800, "logits_scaling": 16.0, "mlp_bias": False,
         "num_hidden_layers": 40, "num_key_value_heads": 8, "residual_multiplier": 0.22, "rope_scaling": None,
         "max_position_embeddings": 131072, "rope_theta": 10000000.0, "tie_word_embeddings": True, "vocab_size": 49159},
        131072, 128,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_is_taken_as_it_is(name: str) -> None:
    values, longest, rotated = PUBLISHED[name]
    shape = shape_from_hf(values, source=name)
    assert (shape.limit.tokens, shape.heads.rotary_dim) == (longest, rotated)
