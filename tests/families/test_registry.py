"""Families of models: what a config means, published ones too, and what is rejected."""

from __future__ import annotations

import ast
import json
import random
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.folders import ROOT
from support.tiny_models import FAMILY_MODELS, tiny_config, write_tiny_model

from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.base.shapes import AttentionKind, HeadShape, LinearScaling, ModelShape, RopeShape, StoredRows
from megatron_tiedlora.checkpoint.base_weights import BaseWeights
from megatron_tiedlora.checkpoint.sources import ModelSource, find_model
from megatron_tiedlora.model import hf_config
from megatron_tiedlora.model.attention import amplitude, inverse_frequencies
from megatron_tiedlora.model.families import FAMILIES, shape_from_hf
from megatron_tiedlora.model.hf_config import HfConfig, read_rope
from megatron_tiedlora.model.weights import WeightRule, weight_rules
from megatron_tiedlora.parallel.frozen_weight import FrozenWeight
from megatron_tiedlora.parallel.groups import RankGroup
from megatron_tiedlora.parallel.shard_spec import ShardSpec

SIZES = {
    "vocab_size": 320,
    "hidden_size": 256,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 32,
}


FACTORS = {"short_factor": [1.5] * 4, "long_factor": [2.0] * 4}
HASHES: list[tuple[dict[str, Any], str]] = [
    ({}, "35e62db89a6e44fe"),
    ({"rope_type": "linear", "factor": 2.0}, "49d40d55a98eb0b2"),
    ({"rope_type": "yarn", "factor": 2.0}, "ff9545776698c3c8"),
    ({"rope_type": "longrope", **FACTORS}, "156d0f2334fa6de8"),
]


# What a config means -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", FAMILIES)
def test_an_absent_field_means_what_transformers_means(model_type: str) -> None:
    from transformers import AutoConfig

    written = AutoConfig.for_model(model_type, **SIZES).to_dict()
    found = shape_from_hf({"model_type": model_type, **SIZES})
    assert found == shape_from_hf(written)
    assert (found.max_positions, found.tied_embeddings) == (
        written["max_position_embeddings"],
        written["tie_word_embeddings"],
    )


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_field_of_transformers_config_is_read_harmless_or_rejected(model_type: str) -> None:
    """A new field in a new version of transformers turns this red, and is not ignored."""
    from transformers import AutoConfig

    written = AutoConfig.for_model(model_type, **SIZES).to_dict()
    names = {field.name for field in fields(type(AutoConfig.for_model(model_type)))} | written.keys()
    config = HfConfig(written, "here", FAMILIES[model_type].defaults)
    FAMILIES[model_type].read(config)
    assert not names - hf_config._HARMLESS - hf_config._OFF.keys() - config._read


@pytest.mark.parametrize("name", FAMILY_MODELS)
def test_each_field_that_is_deleted_means_what_transformers_means(name: str, tmp_path: Path) -> None:
    from transformers import AutoConfig

    written = tiny_config(**FAMILY_MODELS[name]).to_diff_dict()
    for field in sorted(written.keys() - {"model_type"}):
        values = {key: value for key, value in written.items() if key != field}
        (tmp_path / "config.json").write_text(json.dumps(values))
        try:
            theirs = AutoConfig.from_pretrained(tmp_path).to_dict()
        except Exception:  # it rejects what is left: 32 heads that hidden_size does not divide, 3 layer_types of 32
            assert field in {"num_attention_heads", "hidden_size", "num_hidden_layers"}, field
            continue
        assert _shape_or_error(values) == _shape_or_error(theirs), field


def _shape_or_error(values: dict[str, Any]) -> ModelShape | str:
    try:
        return shape_from_hf(values)
    except UserError as error:  # 8 heads are not a multiple of the 32 key-value heads that an absent field means
        return str(error)


@pytest.mark.parametrize("kind", ["default", "linear", "dynamic", "llama3", "yarn", "longrope"])
def test_frequencies_are_those_of_transformers(kind: str) -> None:
    """200 drawn sets of parameters of each kind, on a share of a head, with defaults for numbers that are absent."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    draw = random.Random(kind)
    for _ in range(200):
        head_dim, share = draw.choice([16, 32, 64, 128]), draw.choice([0.25, 0.5, 0.75, 1.0])
        positions = draw.choice([512, 2048, 131072])
        rope: dict[str, Any] = {
            "rope_type": kind,
            "rope_theta": draw.choice([500.0, 1e4, 5e5, 1e7]),
            "factor": draw.uniform(1, 40),
            "original_max_position_embeddings": positions // draw.choice([1, 4, 32]),
            "low_freq_factor": draw.uniform(0.5, 2),
            "high_freq_factor": draw.uniform(2.5, 8),
            "partial_rotary_factor": share,
            "short_factor": [draw.uniform(1, 9) for _ in range(int(head_dim * share) // 2)],
            "long_factor": [1.0],
        }
        for name, value in (
            *(("attention_factor", draw.uniform(0.5, 2)), ("beta_fast", draw.uniform(16, 64))),
            *(("beta_slow", draw.uniform(0.5, 3)), ("truncate", False), ("mscale", 1.3), ("mscale_all_dim", 0.7)),
        ):
            if draw.random() < 0.4:
                rope[name] = value
        if kind == "longrope" and draw.random() < 0.5:
            del rope["factor"]
        values = {**SIZES, "head_dim": head_dim, "max_position_embeddings": positions, "rope_parameters": rope}
        read, _ = read_rope(HfConfig(values, "here", {}), partial=True)
        theirs = SimpleNamespace(**values, standardize_rope_params=lambda: None)
        if kind == "default":
            size = int(head_dim * share)
            wanted, factor = 1.0 / rope["rope_theta"] ** (torch.arange(0, size, 2).float() / size), 1.0
        else:
            wanted, factor = ROPE_INIT_FUNCTIONS[kind](theirs, None)
        found = inverse_frequencies(HeadShape(1, 1, head_dim, read))
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)
        assert amplitude(read.scaling) == pytest.approx(factor, rel=1e-12)


@pytest.mark.parametrize(("changes", "said"), [
    ({"rope_type": "proportional"}, "rope_type 'proportional' is not implemented. Use a model with one of: default,"),
    ({"rope_type": "llama3", "factor": 2.0}, "low_freq_factor of the rotary embedding is missing"),
    ({"rope_type": "linear", "factor": -1.0}, "factor = -1.0 of the rotary embedding is not a positive number"),
    ({"rope_type": "yarn", "factor": 2.0, "truncate": 1}, "truncate = 1 of the rotary embedding is neither true nor"),
    ({"rope_type": "yarn", "factor": 2.0, "rope_theta": 1.0}, "rope_theta = 1.0 must be above 1 for yarn"),
    ({"rope_type": "longrope", "long_factor": [1.0]}, "short_factor = None of the rotary embedding is not a list"),
    ({"rope_type": "longrope", "long_factor": [1.0], "short_factor": [1.0]}, "short_factor has 1 numbers, but there"),
    ({"rope_type": "yarn", "original_max_position_embeddings": 1e-9}, "original_max_position_embeddings is below 1"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5 is not implemented"),
    ({"mrope_section": [2, 2]}, "'mrope_section' of the rotary embedding is not implemented"),
])  # fmt: skip
def test_rotations_that_are_not_computed_are_rejected(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as error:
        rope = {"rope_theta": 1e4, **changes}
        shape_from_hf({"model_type": "llama", **SIZES, "rope_parameters": rope}, source="here")
    assert str(error.value).startswith("here: ") and said in str(error.value)


@pytest.mark.parametrize(("model_type", "changes"), [
    ("stablelm", {"qk_layernorm": True}), ("stablelm", {"use_parallel_residual": True}),
    ("phi3", {"mlp_bias": True}), ("phi3", {"embd_pdrop": 0.1}), ("mistral", {"num_local_experts": 8}),
    ("qwen3", {"layer_types": ["sliding_attention"]}), ("qwen2", {"use_mrope": True}),
])  # fmt: skip
def test_features_of_other_models_are_rejected_by_name(model_type: str, changes: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=rf"^here: {next(iter(changes))} .*not implemented"):
        shape_from_hf({"model_type": model_type, **SIZES, **changes}, source="here")


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_field_that_nothing_knows_is_rejected_by_name(model_type: str) -> None:
    with pytest.raises(UserError, match=r"here: the field 'residual_scale' = 0.5 is unknown. Remove it"):
        shape_from_hf({"model_type": model_type, **SIZES, "residual_scale": 0.5}, source="here")


def test_a_family_that_is_not_there_is_rejected_with_those_that_are() -> None:
    with pytest.raises(UserError, match=rf"'mamba' is not implemented\. Use a model of type {', '.join(FAMILIES)}$"):
        shape_from_hf({"model_type": "mamba"})


@pytest.mark.parametrize(("model_type", "reason"), [
    ("mixtral", "it is a mixture of experts"), ("qwen3_moe", "it is a mixture of experts"),
    ("deepseek_v3", "it is a mixture of experts"), ("mamba", "it has layers without attention"),
    ("qwen3_next", "it is a mixture of experts"), ("glm4", "its rotary embedding rotates neighbouring elements"),
    ("gemma3", "it is part of a multimodal model"), ("falcon", "its attention and MLP have the same input"),
    ("gemma2", "it scales the activations between its layers"),
    ("granite", "it scales the activations between its layers"),
    ("gemma3_text", "it scales the activations between its layers"), ("nemotron", "its MLP has no gate"),
    ("gpt_neox", "its attention and MLP have the same input"),
])  # fmt: skip
def test_models_that_are_out_of_reach_are_rejected_with_the_reason(model_type: str, reason: str) -> None:
    from transformers import AutoConfig

    values = AutoConfig.for_model(model_type).to_dict()
    with pytest.raises(UserError, match=f"^here: model_type '{model_type}' is not implemented, because {reason}. Use"):
        shape_from_hf(values, source="here")


@pytest.mark.parametrize(("rope", "start"), HASHES)
def test_the_hash_of_a_base_stays(rope: dict[str, Any], start: str) -> None:
    """It is stored with every adapter."""
    values = {"model_type": "llama", **SIZES, "rope_parameters": {"rope_theta": 1e4, **rope}}
    assert ModelSource("x", None, shape_from_hf(values)).base_hash.startswith(start)


@pytest.mark.parametrize(("changes", "limit"), [
    ({"use_sliding_window": False}, 32768), ({"use_sliding_window": True}, 32768),
    ({"use_sliding_window": True, "max_window_layers": 2}, 4096),
    ({"use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention", "full_attention"]}, 4096),
])  # fmt: skip
def test_a_window_limits_rows_if_a_layer_has_it(changes: dict[str, Any], limit: int) -> None:
    """There are 3 layers, and by default windows begin at layer 28."""
    for model_type in ("qwen2", "qwen3"):
        assert shape_from_hf({"model_type": model_type, **SIZES, **changes}).limit.tokens == limit


@pytest.mark.parametrize(("changes", "said"), [
    ({"use_mrope": True}, "use_mrope = True"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types has 'sliding_attention'"),
    ({"num_key_value_heads": 5}, "32 heads are not a multiple of num_key_value_heads 5"),
    ({"num_key_value_heads": 0}, "num_key_value_heads = 0"),
])  # fmt: skip
def test_what_qwen2_does_not_compute_is_rejected(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        shape_from_hf({"model_type": "qwen2", **SIZES, **changes})
    assert shape_from_hf({"model_type": "qwen2", **SIZES, "num_key_value_heads": None}).heads.num_kv == 32


@pytest.mark.parametrize(("changes", "said"), [
    ({"layer_types": ["full_attention"] * 2}, "is not a list of 3 kinds of layers"),
    ({"layer_types": ["full_attention", "chunked_attention", {}]}, "is not a list of 3 kinds of layers"),
    ({"sliding_window": None}, "layer_types has 'sliding_attention', which is not implemented"),
    ({"rope_parameters": {"sliding_attention": 7}}, "rope_parameters or rope_scaling is 7, not an object"),
    ({"rope_parameters": {"full_attention": {"rope_type": "odd"}}}, "rope_type 'odd' is not implemented"),
])  # fmt: skip
def test_what_olmo3_does_not_compute_is_rejected(changes: dict[str, Any], said: str) -> None:
    kinds = ["sliding_attention", "sliding_attention", "full_attention"]
    with pytest.raises(UserError, match=said):
        shape_from_hf({"model_type": "olmo3", **SIZES, "layer_types": kinds, **changes})


def test_layers_of_a_kind_have_the_rotation_of_their_kind() -> None:
    """As published: scaling is that of full attention alone."""
    scaling = {"rope_type": "linear", "factor": 2.0}
    values = {"model_type": "olmo3", **SIZES, "num_hidden_layers": 5, "rope_scaling": scaling}
    shape = shape_from_hf(values)
    wide, scaled = RopeShape(500000.0), RopeShape(500000.0, scaling=LinearScaling(2.0))
    assert [kind.rope for kind in shape.kinds] == [wide, wide, wide, scaled, wide]
    assert shape.heads.rope == shape.kind_of(4).rope == scaled
    alike = replace(shape, kinds=(AttentionKind(scaled),) * 5)
    hashes = {ModelSource("x", None, one).base_hash for one in (shape, alike)}
    assert len({*hashes, ModelSource("x", None, replace(alike, kinds=())).base_hash}) == len(hashes) == 2


def test_the_hash_of_a_base_knows_its_norms() -> None:
    shape = shape_from_hf({"model_type": "olmo2", **SIZES})
    plain_heads = replace(shape.heads, query_norm=None, key_norm=None)
    each = shape_from_hf({"model_type": "qwen3", **SIZES, "head_dim": shape.heads.dim}).heads
    changes: list[dict[str, Any]] = [{}, {"down_norm": None}, {"heads": plain_heads}]
    changes += [{"heads": replace(plain_heads, query_norm=each.query_norm, key_norm=each.key_norm)}]
    shapes = [replace(shape, block=replace(shape.block, **change)) for change in changes]
    assert len({ModelSource("x", None, one).base_hash for one in shapes}) == 4


def test_only_the_registry_imports_a_family() -> None:
    names = {f"megatron_tiedlora.model.families.{name}" for name in FAMILIES}
    for file in (ROOT / "megatron_tiedlora").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert not {f"{node.module}.{alias.name}" for alias in node.names} & names, file
    assert list(FAMILIES) == sorted(FAMILIES)


# Names and rows of stored tensors ----------------------------------------------------------------------------------


def rules_of(shape: ModelShape, layer: int) -> dict[str, WeightRule]:
    return {rule.name: rule for rule in weight_rules(shape) if rule.layer == layer}


def test_a_bias_on_query_key_and_value_alone() -> None:
    rules = rules_of(shape_from_hf({"model_type": "qwen2", **SIZES, "num_key_value_heads": 2}), 1)
    assert rules["layers.1.attention.qkv.bias"].hf_names == tuple(
        f"model.layers.0.self_attn.{part}_proj.bias" for part in "qkv"
    )
    assert rules["layers.1.attention.qkv.bias"].spec == ShardSpec(0, (256, 16, 16))
    assert "layers.1.attention.output.bias" not in rules


def test_rows_of_a_fused_tensor_are_read_and_given_back(tmp_path: Path) -> None:
    """A stored tensor that holds key, query and value, in this order."""
    folder = write_tiny_model(tmp_path / "model", tokenizer=False, num_layers=1)
    source = find_model(str(folder))
    weights = load_file(folder / "model.safetensors")
    names = [f"model.layers.0.self_attn.{part}_proj.weight" for part in "qkv"]
    query, key, value = (weights.pop(name).clone() for name in names)  # not views of the file, which is written again
    fused = torch.cat([key, query, value])
    save_file({**weights, "model.layers.0.self_attn.kqv.weight": fused}, folder / "model.safetensors")
    total = len(fused)
    starts = (len(key), 0, len(key) + len(query))
    qkv = replace(source.shape.block.qkv, sources=tuple(StoredRows("self_attn.kqv", start, total) for start in starts))
    shape = replace(source.shape, block=replace(source.shape.block, qkv=qkv))
    with BaseWeights(folder, shape) as stored:
        rule = rules_of(shape, 1)["layers.1.attention.qkv.weight"]
        for rank in range(2):
            local = torch.empty(rule.spec.local_shape(rule.shape, 2))
            stored.fill(rule, FrozenWeight(local), RankGroup(None, rank, 2))
            assert torch.equal(local, rule.spec.split(torch.cat([query, key, value]), rank, 2))
    given = rule.by_stored_tensor(torch.cat([query, key, value]))
    assert list(given) == ["model.layers.0.self_attn.kqv.weight"]
    assert torch.equal(given["model.layers.0.self_attn.kqv.weight"], fused)


# Published models -----------------------------------------------------------------------------------------------------


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
