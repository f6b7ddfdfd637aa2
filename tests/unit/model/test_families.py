"""Families of models: what a config means, what is rejected, and one with other biases at several layouts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import ROOT
from forked_ranks import groups_of, run_on_ranks
from layout_runs import Layout, prepare, run_and_check, settings_of
from safetensors.torch import load_file, save_file
from tiny_models import write_tiny_model

from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.base.shapes import ModelShape, StoredRows
from megatron_tiedlora.checkpoint.base_weights import BaseWeights
from megatron_tiedlora.checkpoint.load_model import load_model
from megatron_tiedlora.checkpoint.sources import find_model
from megatron_tiedlora.evaluation.decoder import Decoder
from megatron_tiedlora.model.families import FAMILIES, shape_from_hf
from megatron_tiedlora.model.weights import WeightRule, weight_rules
from megatron_tiedlora.parallel.frozen_weight import FrozenWeight
from megatron_tiedlora.parallel.grid import Grid
from megatron_tiedlora.parallel.groups import ParallelGroups
from megatron_tiedlora.parallel.shard_spec import ShardSpec
from megatron_tiedlora.planning.partition import layer_costs, partition

SIZES = {
    "vocab_size": 320,
    "hidden_size": 256,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 32,
}


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
def test_a_field_that_nothing_knows_is_rejected_by_name(model_type: str) -> None:
    with pytest.raises(UserError, match=r"here: the field 'residual_scale' = 0.5 is unknown. Remove it"):
        shape_from_hf({"model_type": model_type, **SIZES, "residual_scale": 0.5}, source="here")


def test_a_family_that_is_not_there_is_rejected_with_those_that_are() -> None:
    with pytest.raises(UserError, match=rf"'mamba' is not implemented\. This version trains {', '.join(FAMILIES)}$"):
        shape_from_hf({"model_type": "mamba"})


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


def test_only_the_registry_imports_a_family() -> None:
    package = ROOT / "megatron_tiedlora"
    names = [f"families.{name}" for name in FAMILIES]
    assert not [file for file in package.rglob("*.py") if any(name in file.read_text() for name in names)]


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
    query, key, value = (weights.pop(name) for name in names)
    fused = torch.cat([key, query, value])
    save_file({**weights, "model.layers.0.self_attn.kqv.weight": fused}, folder / "model.safetensors")
    total = len(fused)
    starts = (len(key), 0, len(key) + len(query))
    qkv = replace(
        source.shape.block.qkv, sources=tuple(StoredRows("self_attn.kqv", start, total) for start in starts)
    )
    shape = replace(source.shape, block=replace(source.shape.block, qkv=qkv))
    with BaseWeights(folder, shape) as stored:
        rule = rules_of(shape, 1)["layers.1.attention.qkv.weight"]
        for rank in range(2):
            local = torch.empty(rule.spec.local_shape(rule.shape, 2))
            stored.fill(rule, FrozenWeight(local), tp_rank=rank, tp_size=2)
            assert torch.equal(local, rule.spec.split(torch.cat([query, key, value]), rank, 2))
    given = rule.by_stored_tensor(torch.cat([query, key, value]))
    assert list(given) == ["model.layers.0.self_attn.kqv.weight"]
    assert torch.equal(given["model.layers.0.self_attn.kqv.weight"], fused)


# Qwen2 at several layouts ------------------------------------------------------------------------------------------


def _logits(folder: str, tp: int, pp: int) -> torch.Tensor | None:
    grid = Grid(torch.distributed.get_rank(), tp * pp, tp_size=tp, pp_size=pp)
    source, groups = find_model(folder), groups_of(grid) if tp * pp > 1 else ParallelGroups()
    stages = partition(layer_costs(source.shape, length=32, first_adapted=1), pp)
    stage = load_model(source, None, dtype=torch.float32, grid=grid, groups=groups, stages=stages)
    decoder = Decoder(stage, groups, source.shape)
    tokens = _tokens()
    with torch.no_grad():
        found = decoder.forward(tokens, torch.arange(32).expand_as(tokens), decoder.new_caches(2, 32))
    decoder.finish()
    return found


def _tokens() -> torch.Tensor:
    return torch.randint(3, 320, (2, 32), generator=torch.Generator().manual_seed(11))


@pytest.mark.distributed
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2)])
def test_qwen2_computes_what_transformers_does(tmp_path: Path, tp: int, pp: int) -> None:
    from transformers import AutoModelForCausalLM

    folder = write_tiny_model(tmp_path / "model", family="qwen2", num_layers=5, tied=pp > 1)
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(_tokens()).logits.detach()
    found = run_on_ranks(_logits, str(folder), tp, pp, ranks=tp * pp, folder=tmp_path / "ranks")[-1]
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.distributed
@pytest.mark.timeout(600)
def test_qwen2_trains_as_the_oracle_does(tmp_path: Path) -> None:
    """Losses, clipped norms and adapters of four steps at (1, 1, 1), (2, 1, 1) and (1, 2, 1)."""
    model = write_tiny_model(tmp_path / "model", family="qwen2", num_layers=5, num_heads=8, num_kv_heads=4)
    base = {**settings_of(model, tmp_path), "max_steps": 4}
    oracles: dict[Any, Any] = {}
    alone, tensor, pipeline = (
        prepare(base, tmp_path, Layout(*sizes), oracles=oracles) for sizes in ((1, 1, 1), (2, 1, 1), (1, 2, 1))
    )
    for name, cases in {"alone": [alone], "two": [tensor, pipeline]}.items():
        (tmp_path / name).mkdir()
        run_and_check(cases, tmp_path / name)
