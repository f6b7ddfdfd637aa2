"""Names and rows of the stored tensors of a family, and of the text model inside a multimodal model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.tiny_models import SIZES, tiny_model, write_tiny_model

from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.base.presets import PRESETS
from megatron_tiedlora.base.shapes import ModelShape, StoredRows
from megatron_tiedlora.checkpoint.base_weights import BaseWeights, RandomWeights, write_random_model
from megatron_tiedlora.checkpoint.sources import ModelSource, find_model
from megatron_tiedlora.model.families import shape_from_hf
from megatron_tiedlora.model.weights import WeightRule, weight_rules
from megatron_tiedlora.parallel.frozen_weight import FrozenWeight
from megatron_tiedlora.parallel.groups import RankGroup
from megatron_tiedlora.parallel.shard_spec import ShardSpec

TOWERS = ("gemma3", "mistral3")


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


def source_names(shape: ModelShape) -> set[str]:
    """The modules of the stored tensors that are no linear of a block."""
    linears = (shape.embedding.sources[0].module, shape.head.sources[0].module)
    return {*linears, shape.final_norm.source, shape.block.source.format(index=4), shape.block.module_name(5)}


@pytest.mark.parametrize("model_type", TOWERS)
@pytest.mark.parametrize("tied", [True, False])
def test_the_text_tower_s_tensors_are_found_by_the_names_in_the_folder(
    model_type: str, tied: bool, tmp_path: Path
) -> None:
    """Names of files, as transformers and the hub have them, and names in memory."""
    folder = write_tiny_model(tmp_path / "model", tokenizer=False, family=model_type, tied=tied)
    values, stored = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    shape = shape_from_hf(values, names=stored.keys())
    assert {name: tuple(stored[name].shape) for name in stored if name.startswith("language_model.")} == {
        part.name: part.shape for rule in weight_rules(shape) for part in rule.parts
    }
    assert shape.block.module_name(5) == "model.language_model.layers.4" and shape.tied_embeddings == tied
    in_memory = {name: None for name, _ in tiny_model(family=model_type, tied=tied).named_parameters()}
    other = shape_from_hf(values, names=in_memory.keys())
    names = {part.name for rule in weight_rules(other) for part in rule.parts}
    assert names == {name for name in in_memory if "vision" not in name and "projector" not in name}
    assert other == shape_from_hf(values)  # without names, those in memory
    hashes = {ModelSource("x", None, one).base_hash for one in (shape, other)}
    alone = {**values["text_config"], "tie_word_embeddings": tied}
    assert hashes == {ModelSource("x", None, shape_from_hf(alone)).base_hash}


@pytest.mark.parametrize(("ties", "stored", "tied"), [
    ({}, "language_model.lm_head.weight", False), ({}, "vision_tower.x.weight", True),
    ({"tie_word_embeddings": True}, "language_model.lm_head.weight", True),
    ({"tie_word_embeddings": False}, "language_model.lm_head.weight", False),
    ({"tie_word_embeddings": None}, "vision_tower.x.weight", False),
])  # fmt: skip
def test_a_head_in_the_files_is_not_tied_unless_the_outer_config_says_so(
    ties: dict[str, Any], stored: str, tied: bool
) -> None:
    """Mistral Small 3.1 has a head in its files, and no field; the field of the text model is not used."""
    values = {"model_type": "mistral3", "text_config": {**SIZES, "tie_word_embeddings": not tied}}
    values |= ties
    names = {stored, "language_model.model.layers.0.mlp.up_proj.weight"}
    shape = shape_from_hf(values, names=names)
    assert shape.tied_embeddings == tied
    assert source_names(shape) == {
        *("language_model.model.embed_tokens", "language_model.lm_head", "language_model.model.norm"),
        *("language_model.model.layers.4", "model.language_model.layers.4"),
    }


@pytest.mark.parametrize(("model_type", "fields", "said"), [
    ("mistral3", {"text_config": {"model_type": "mistral4"}}, "text_config has model_type 'mistral4', which"),
    ("gemma3", {"text_config": {"model_type": "gemma2"}}, "text_config has model_type 'gemma2', which is not"),
    ("gemma3", {"text_config": []}, "text_config is [], not an object. Correct this field"),
    ("gemma3", {"text_config": {"final_logit_softcapping": 30.0}}, "text_config: final_logit_softcapping is not impl"),
    ("mistral3", {"text_config": {"num_key_value_heads": 5}}, "text_config: 32 heads are not a multiple of num_key"),
    ("mistral3", {"tie_word_embeddings": 1}, "tie_word_embeddings = 1 is neither true nor false"),
    ("mistral3", {"quantization_config": {"quant_method": "awq"}}, "quantization_config: weights quantised by 'awq'"),
    ("mistral3", {"text_config": {}, "hidden_size": 8}, "the field 'hidden_size' = 8 is unknown"),
])  # fmt: skip
def test_what_a_multimodal_config_may_not_say(model_type: str, fields: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as error:
        shape_from_hf({"model_type": model_type, **fields}, source="here")
    assert str(error.value).startswith(f"here: {said}") and "\n" not in str(error.value)


def test_a_text_tower_by_both_names_is_rejected() -> None:
    """transformers would take the other one."""
    names = [f"{prefix}norm.weight" for prefix in ("language_model.model.", "model.language_model.")]
    said = r"here: the model has tensors named model\.language_model\.\* and tensors named language_model\.model\.\*, "
    with pytest.raises(UserError, match=said):
        shape_from_hf({"model_type": "gemma3"}, source="here", names=names)


def test_a_norm_of_heads_with_an_offset_may_be_zero_but_not_the_negative_offset(tmp_path: Path) -> None:
    """The backward pass divides by the sum. The folder is written as `tiedlora random-model` writes it."""
    values = {**PRESETS["gemma3-12b"], **SIZES, "num_key_value_heads": 2, "head_dim": 8}
    folder = tmp_path / "model"
    write_random_model(values, folder, name="small", seed=0)
    shape, weights = shape_from_hf(values), load_file(folder / "model.safetensors")
    norms = {name for name in weights if "norm" in name}
    assert len(norms) == 3 * 6 + 1 and not any(weights[name].any() for name in norms)  # 1 + 0
    rule = rules_of(shape, 2)["layers.2.attention.qkv.key_norm"]
    with BaseWeights(folder, shape) as stored:
        stored.fill(rule, FrozenWeight(torch.ones(8)))
    weights[rule.hf_names[0]][3] = -1
    save_file(weights, folder / "model.safetensors")
    said = r"model\.safetensors: 1 \+ model\.layers\.1\.self_attn\.k_norm\.weight has a zero, and training would"
    with BaseWeights(folder, shape) as stored, pytest.raises(UserError, match=said):
        stored.fill(rule, FrozenWeight(torch.ones(8)))


@pytest.mark.parametrize("preset", ["gemma3-27b", "olmo3-7b", "mistral-small-24b", "granite-8b", "qwen3-14b"])
def test_transformers_loads_the_random_model_of_a_preset(preset: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    values = {**PRESETS[preset], **SIZES, "num_key_value_heads": 2, "head_dim": 8}
    write_random_model(values, tmp_path / "model", name=preset, seed=0)
    model, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(loading.values()) and [type(model).__name__] == model.config.architectures
    drawn = RandomWeights(weight_rules(shape_from_hf(values)))
    for rule in drawn.rules:
        if rule.linear is None:
            filled = FrozenWeight(torch.zeros(rule.shape))
            drawn.fill(rule, filled)
            assert torch.equal(model.get_parameter(rule.hf_names[0]).float(), filled.tensor), rule.name
