"""Every gradient of every method in fp64 against the oracle's autograd, engine left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from engine_runs import relative_distance
from oracle import OracleConfig, cast_weights, load_weights
from oracle_training import oracle_gradients
from tiny_models import random_adapter, random_batches, write_tiny_model

from megatron_tiedlora.adapters.tied_adapter import AdapterPart, TiedAdapter, make_adapter_config, targets_of
from megatron_tiedlora.base.methods import METHOD_NAMES as METHODS
from megatron_tiedlora.checkpoint.base_weights import BaseWeights, load_base_weights
from megatron_tiedlora.checkpoint.sources import find_model
from megatron_tiedlora.model.layer_specs import layer_specs
from megatron_tiedlora.model.stage import Stage
from megatron_tiedlora.parallel.frozen_weight import frozen_weights

SHAPES: dict[str, dict[str, Any]] = {
    "gqa": {"num_layers": 5},
    "mha_tied": {"num_kv_heads": 4, "tied": True},
    "bias_head_dim": {"attention_bias": True, "head_dim": 12},
}


def build(folder: Path, method: str, layers: tuple[int, ...] | None, recompute: str) -> tuple[Stage, Any]:
    source = find_model(str(folder))
    oracle = random_adapter(
        method, OracleConfig.from_folder(folder), rank=4, alpha=6.0, layers=layers, seed=5, dtype=torch.float64
    )
    config = make_adapter_config(
        method,
        rank=4,
        alpha=6.0,
        layers=tuple(oracle.layers),
        targets=targets_of(source.shape),
        seed=0,
    )
    adapter = TiedAdapter(AdapterPart.whole(config), dtype=torch.float64)
    adapter.load_full(oracle.tensors)
    specs = layer_specs(source.shape, dtype=torch.float64, recomputes_gate=recompute == "selective")
    model = Stage(specs, adapter, recompute=recompute)
    with BaseWeights(folder, source.shape) as weights:
        load_base_weights(weights, frozen_weights(model))
    return model, oracle


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", [*METHODS, "one_layer"])
def test_gradients_equal_autograd(method: str, shape: str, recompute: str, tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "model", tokenizer=False, **SHAPES[shape])
    layers = (2,) if method == "one_layer" else None
    model, oracle = build(folder, "lora" if method == "one_layer" else method, layers, recompute)
    weights = cast_weights(load_weights(folder), torch.float64)
    batch = random_batches(1, samples_per_step=6, seed=2)[0]
    expected_loss, expected = oracle_gradients(weights, OracleConfig.from_folder(folder), oracle, batch)
    supervised = sum(sample.num_supervised for sample in batch)
    total = 0.0
    for sample in batch:
        positions = torch.arange(sample.input_ids.shape[1])[None]
        loss = model(sample.input_ids, positions, sample.labels) / supervised
        loss.backward()
        total += float(loss.detach())
    assert abs(total - expected_loss) <= 1e-12 * abs(expected_loss)
    trained = {name: p for name, p in model.adapter.named_parameters() if p.requires_grad}
    assert set(trained) == set(expected) == set(oracle.trained)
    for name, parameter in trained.items():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0
        assert relative_distance(parameter.grad, expected[name]) <= 1e-10, name
        assert (parameter.grad - expected[name]).abs().max() <= 1e-10 * expected[name].abs().max(), name
    untrained = [p for p in model.parameters() if not p.requires_grad]
    assert all(parameter.grad is None for parameter in untrained)
    # Tied by identity: one object each for A and B, however many layers use it.
    assert len({id(p) for p in model.parameters()}) == len(list(model.named_parameters()))
