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
from support.folders import ROOT
from support.tiny_models import FAMILY_MODELS, SIZES, tiny_config, tiny_model

from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.base.shapes import AttentionKind, HeadShape, LinearScaling, ModelShape, RopeShape
from megatron_tiedlora.checkpoint.sources import ModelSource
from megatron_tiedlora.model import hf_config
from megatron_tiedlora.model.attention import amplitude, inverse_frequencies
from megatron_tiedlora.model.families import FAMILIES, shape_from_hf
from megatron_tiedlora.model.hf_config import HfConfig, read_rope
from megatron_tiedlora.model.weights import weight_rules

FACTORS = {"short_factor": [1.5] * 4, "long_factor": [2.0] * 4}
HASHES: list[tuple[dict[str, Any], str]] = [
    ({}, "35e62db89a6e44fe"),
    ({"rope_type": "linear", "factor": 2.0}, "49d40d55a98eb0b2"),
    ({"rope_type": "yarn", "factor": 2.0}, "ff9545776698c3c8"),
    ({"rope_type": "longrope", **FACTORS}, "156d0f2334fa6de8"),
]


TOWERS = {"gemma3": "gemma3_text", "mistral3": "mistral"}  # the type of the text model in multimodal ones
FULL, SLIDING = hf_config.FULL, hf_config.SLIDING


def fields_of(model_type: str, **fields: Any) -> dict[str, Any]:
    """Fields of a small config; of a multimodal one, those of its text model."""
    values = {**SIZES, **fields}
    return {"model_type": model_type, **({"text_config": values} if model_type in TOWERS else values)}


def windows_of(shape: ModelShape) -> list[int | None]:
    """The window of each block."""
    return [shape.kind_of(block).window for block in range(1, shape.num_layers + 1)]


# What a config means -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", FAMILIES)
def test_an_absent_field_means_what_transformers_means(model_type: str) -> None:
    from transformers import AutoConfig

    written = AutoConfig.for_model(**fields_of(model_type)).to_dict()
    found = shape_from_hf(fields_of(model_type))
    assert found == shape_from_hf(written)
    text = written.get("text_config", written)
    assert found.max_positions == text["max_position_embeddings"]
    assert found.tied_embeddings == written["tie_word_embeddings"]
    window = text.get("sliding_window")
    window = window if window and window < found.max_positions else None  # OLMo 3's 4,096 of 2,048
    kinds = text.get("layer_types") or [SLIDING] * 3
    assert windows_of(found) == [window if kind == SLIDING else None for kind in kinds]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_field_of_transformers_config_is_read_harmless_or_rejected(model_type: str) -> None:
    """A new field in a new version of transformers turns this red, and is not ignored."""
    from transformers import AutoConfig

    written = AutoConfig.for_model(**fields_of(model_type)).to_dict()
    names = {field.name for field in fields(type(AutoConfig.for_model(model_type)))} | written.keys()
    config = HfConfig(written, "here", FAMILIES[model_type].defaults)
    FAMILIES[model_type].read(config)
    assert not names - hf_config._HARMLESS - hf_config._OFF.keys() - config._read


@pytest.mark.parametrize("name", FAMILY_MODELS)
def test_each_field_that_is_deleted_means_what_transformers_means(name: str, tmp_path: Path) -> None:
    from transformers import AutoConfig

    written = tiny_config(**FAMILY_MODELS[name]).to_diff_dict()
    for changed in (written, written.get("text_config", {})):
        for field in sorted(changed.keys() - {"model_type"}):
            kept = changed.pop(field)
            (tmp_path / "config.json").write_text(json.dumps(written))
            ours = _shape_or_error(json.loads((tmp_path / "config.json").read_text()))
            changed[field] = kept
            try:
                theirs = AutoConfig.from_pretrained(tmp_path).to_dict()
            except Exception:  # it rejects what is left: 32 heads that hidden_size does not divide, 3 layer_types of 32
                assert field in {"num_attention_heads", "hidden_size", "num_hidden_layers"}, field
                continue
            assert ours == _shape_or_error(theirs), field


@pytest.mark.parametrize("name", FAMILY_MODELS)
def test_the_factors_and_windows_of_layers_are_those_in_transformers_layers(name: str) -> None:
    model = tiny_model(**FAMILY_MODELS[name])
    values, text = model.config.to_dict(), model.config.get_text_config()
    shape, decoder = shape_from_hf(values), getattr(model.model, "language_model", model.model)
    for block, layer in enumerate(decoder.layers, start=1):
        attention = layer.self_attn
        assert shape.heads.scale == attention.scaling
        assert shape.heads.cap == getattr(attention, "attn_logit_softcapping", None)
        assert shape.kind_of(block).window == getattr(
            attention, "sliding_window", getattr(text, "sliding_window", None)
        )
        assert shape.block.multiplier == getattr(layer, "residual_multiplier", 1.0)
    factor = getattr(decoder.embed_tokens, "scalar_embed_scale", getattr(decoder, "embedding_multiplier", 1.0))
    assert (shape.embedding_multiplier, shape.rounds_embedding) == (factor, "gemma" in name)
    assert shape.logit_divisor == getattr(text, "logits_scaling", 1.0)
    assert shape.logit_cap == getattr(text, "final_logit_softcapping", None)
    stored = {rule.hf_names[0] for rule in weight_rules(shape) if rule.offset}
    assert stored == {one for one, _ in model.named_parameters() if "gemma" in name and "vision" not in one
                      and "norm" in one and "projector" not in one}  # fmt: skip


def _shape_or_error(values: dict[str, Any]) -> ModelShape | str:
    try:
        return shape_from_hf(values)
    except UserError as error:  # 8 heads are not a multiple of the 32 key-value heads that an absent field means
        return str(error).removeprefix("text_config: ")


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
    ("qwen3", {"layer_types": [SLIDING] * 3}), ("qwen2", {"use_mrope": True}), ("mistral", {"layer_types": [FULL] * 3}),
    ("smollm3", {"layer_types": [SLIDING] * 3, "sliding_window": 8}), ("llama", {"layer_types": [SLIDING] * 3}),
    ("gemma2", {"layer_types": [FULL, "chunked_attention", FULL]}), ("gemma3_text", {"layer_types": [FULL, {}, FULL]}),
    ("gemma", {"use_bidirectional_attention": True}), ("gemma3_text", {"use_bidirectional_attention": True}),
    ("gemma", {"hidden_activation": "gelu"}), ("gemma2", {"hidden_activation": "gelu"}), ("glm4", {"hidden_act": []}),
    ("gemma", {"hidden_act": "relu"}), ("llama", {"hidden_act": "gelu"}), ("granite", {"mlp_bias": True}),
    ("gemma3_text", {"attn_logit_softcapping": 50.0}), ("llama", {"residual_multiplier": 0.5}),
    ("gemma3", {"use_bidirectional_attention": True}),
])  # fmt: skip
def test_features_of_other_models_are_rejected_by_name(model_type: str, changes: dict[str, Any]) -> None:
    where = "here: text_config" if model_type in TOWERS else "here"
    with pytest.raises(UserError, match=rf"^{where}: {next(iter(changes))} .*not implemented"):
        shape_from_hf(fields_of(model_type, **changes), source="here")


@pytest.mark.parametrize(("model_type", "changes", "said"), [
    ("granite", {"attention_multiplier": 0}, "attention_multiplier = 0 is not a positive number"),
    ("granite", {"residual_multiplier": -0.2}, "residual_multiplier = -0.2 is not a positive number"),
    ("granite", {"logits_scaling": float("nan")}, "logits_scaling = nan is not a positive number"),
    ("granite", {"embedding_multiplier": float("inf")}, "embedding_multiplier = inf is not a positive number"),
    ("granite", {"embedding_multiplier": True}, "embedding_multiplier = True is not a positive number"),
    ("gemma2", {"attn_logit_softcapping": 0}, "attn_logit_softcapping = 0 is not a positive number"),
    ("gemma2", {"final_logit_softcapping": "30"}, "final_logit_softcapping = '30' is not a positive number"),
    ("gemma3_text", {"query_pre_attn_scalar": -1}, "query_pre_attn_scalar = -1 is not a positive number"),
    ("gemma3_text", {"sliding_window_pattern": 0}, "sliding_window_pattern = 0 is not an integer from 1"),
    ("gemma3_text", {"rope_local_base_freq": "x"}, "rope_theta = 'x' of the rotary embedding is not a positive"),
    ("gemma3_text", {"rope_parameters": {"rope_type": "linear", "factor": 8.0}}, "rope_parameters has 'factor', which"),
    ("gemma2", {"sliding_window": None}, "layer_types has 'sliding_attention', which is not implemented"),
    ("mistral", {"sliding_window": 0}, "sliding_window = 0 is not an integer from 1"),
    ("mistral", {"layer_types": [SLIDING]}, "layer_types = ['sliding_attention'] is not a list of 3 kinds of layers"),
    ("qwen3", {"use_sliding_window": True, "max_window_layers": None}, "max_window_layers = None is not an integer"),
    ("glm4", {"partial_rotary_factor": 1.5}, "partial_rotary_factor = 1.5 is not implemented"),
])  # fmt: skip
def test_a_wrong_value_is_rejected_by_name(model_type: str, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as error:
        shape_from_hf(fields_of(model_type, **changes), source="here")
    assert str(error.value).startswith(f"here: {said}") and "\n" not in str(error.value)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_field_that_nothing_knows_is_rejected_by_name(model_type: str) -> None:
    where = "here: text_config" if model_type in TOWERS else "here"
    with pytest.raises(UserError, match=rf"{where}: the field 'residual_scale' = 0.5 is unknown. Remove it"):
        shape_from_hf(fields_of(model_type, residual_scale=0.5), source="here")
    with pytest.raises(UserError, match=r"here: the field 'residual_scale' = 0.5 is unknown. Remove it"):
        shape_from_hf({**fields_of(model_type), "residual_scale": 0.5}, source="here")


def test_a_family_that_is_not_there_is_rejected_with_those_that_are() -> None:
    with pytest.raises(UserError, match=rf"'mamba' is not implemented\. Use a model of type {', '.join(FAMILIES)}$"):
        shape_from_hf({"model_type": "mamba"})


@pytest.mark.parametrize(("model_type", "reason"), [
    ("mixtral", "it is a mixture of experts"), ("qwen3_moe", "it is a mixture of experts"),
    ("deepseek_v3", "it is a mixture of experts"), ("mamba", "it has layers without attention"),
    ("granitemoehybrid", "models of this type can have experts, and layers without attention"),
    ("qwen3_next", "it is a mixture of experts"), ("llava", "it is part of a multimodal model"),
    ("gemma3n", "it is part of a multimodal model"), ("falcon", "its attention and MLP have the same input"),
    ("nemotron", "its MLP has no gate"),
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


@pytest.mark.parametrize(("model_type", "changes", "windows"), [
    ("qwen2", {"use_sliding_window": False, "max_window_layers": 0}, [None] * 3),
    ("qwen3", {"use_sliding_window": True}, [None] * 3),  # by default windows begin at layer 28
    ("qwen3", {"use_sliding_window": True, "max_window_layers": 2}, [None, None, 4096]),
    ("qwen2", {"use_sliding_window": True, "max_window_layers": 0}, [4096] * 3),
    ("qwen2", {"use_sliding_window": True, "layer_types": [FULL, SLIDING, FULL]}, [None, 4096, None]),
    ("mistral", {"sliding_window": 4096}, [4096] * 3),
    ("mistral", {"sliding_window": None}, [None] * 3),
    ("phi3", {"sliding_window": 2047}, [2047] * 3),
    ("phi3", {"sliding_window": 4096}, [None] * 3),  # a window of all positions
    ("smollm3", {"use_sliding_window": True, "sliding_window": 8, "no_rope_layers": [1, 0, 1]}, [None, 8, None]),
    ("smollm3", {"use_sliding_window": True, "sliding_window": 8, "layer_types": [SLIDING, FULL, FULL]},
     [8, None, None]),
    ("smollm3", {"use_sliding_window": False, "sliding_window": 8}, [None] * 3),
    ("olmo3", {"num_hidden_layers": 5, "sliding_window": 512}, [512, 512, 512, None, 512]),
    ("gemma2", {}, [4096, None, 4096]),
    ("gemma3_text", {"num_hidden_layers": 7, "sliding_window": 512}, [512] * 5 + [None, 512]),
    ("gemma3_text", {"sliding_window_pattern": 2}, [4096, None, 4096]),
    ("gemma3_text", {"layer_types": [FULL, SLIDING, SLIDING], "sliding_window_pattern": 2}, [None, 4096, 4096]),
    ("gemma3", {"sliding_window_pattern": 3}, [4096, 4096, None]),
    ("mistral3", {}, [4096] * 3),
])  # fmt: skip
def test_each_layer_has_the_window_that_transformers_gives_it(
    model_type: str, changes: dict[str, Any], windows: list[int | None]
) -> None:
    """And rows may be longer than the window."""
    shape = shape_from_hf(fields_of(model_type, **changes))
    assert windows_of(shape) == windows
    assert shape.limit.tokens == shape.max_positions > max(filter(None, windows), default=1)
    assert bool(shape.kinds) == (any(windows) or model_type == "smollm3")


@pytest.mark.parametrize("model_type", ["mistral", "olmo3", "phi3"])
def test_windows_do_not_change_the_hash_of_a_base(model_type: str) -> None:
    hashes = set()
    for window in (100, 200, 10**6):
        hashes.add(ModelSource("x", None, shape_from_hf(fields_of(model_type, sliding_window=window))).base_hash)
    assert len(hashes) == 1


@pytest.mark.parametrize(("changes", "said"), [
    ({"use_mrope": True}, "use_mrope = True"),
    ({"layer_types": [FULL, SLIDING, FULL]}, "layer_types has 'sliding_attention'"),
    ({"num_key_value_heads": 5}, "32 heads are not a multiple of num_key_value_heads 5"),
    ({"num_key_value_heads": 0}, "num_key_value_heads = 0"),
])  # fmt: skip
def test_what_qwen2_does_not_compute_is_rejected(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        shape_from_hf({"model_type": "qwen2", **SIZES, **changes})
    assert shape_from_hf({"model_type": "qwen2", **SIZES, "num_key_value_heads": None}).heads.num_kv == 32


@pytest.mark.parametrize(("changes", "said"), [
    ({"layer_types": ["full_attention"] * 2}, "is not a list of 3 kinds of layers"),
    ({"layer_types": ["full_attention", "chunked_attention", {}]}, "layer_types has 'chunked_attention', which is not"),
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


def test_only_the_registry_and_families_import_a_family() -> None:
    """And the registry finds them: each module is one, and none is in a list."""
    package = ROOT / "megatron_tiedlora/model/families"
    assert {file.stem for file in package.glob("*.py")} - {"__init__", "decoder"} == FAMILIES.keys() - {"gemma3_text"}
    names = {f"megatron_tiedlora.model.families.{name}" for name in FAMILIES}
    for file in {*(ROOT / "megatron_tiedlora").rglob("*.py")} - {*package.glob("*.py")}:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom):
                imported = {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
                assert not imported & names, file
    assert list(FAMILIES) == sorted(FAMILIES)
