"""Logits and losses of one layer at a time are those of the whole model with its adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from native_files import with_adapter
from tiny_models import FAMILY_MODELS, write_tiny_model

from megatron_tiedlora.base.shapes import TARGET_NAMES
from megatron_tiedlora.checkpoint import load_model as blocks
from megatron_tiedlora.checkpoint.base_weights import BaseWeights
from megatron_tiedlora.checkpoint.load_model import load_model
from megatron_tiedlora.convert import layerwise
from megatron_tiedlora.convert.layerwise import Weights, layerwise_logits, layerwise_loss
from megatron_tiedlora.model import layer_specs
from megatron_tiedlora.model.batch import MicroBatch


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A head of 100 rows at a time, which do not divide the vocabulary, and weights read by 64 rows."""
    monkeypatch.setattr(layerwise, "_HEAD_ELEMENTS", 100 * 32)
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 64 * 32)


def logits(base: Path, dtype: torch.dtype, **adapter_fields: object) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Of base + adapter and of the base: one layer at a time, and by whole models."""
    source, adapter, _ = with_adapter(base, "tl6", **adapter_fields)
    tokens = torch.randint(0, source.shape.vocab_size, (2, 17), generator=torch.Generator().manual_seed(1))
    with BaseWeights(base, source.shape) as weights:
        models: list[Weights] = [(weights.read, {"native": adapter}), (weights.read, {"plain": None})]
        found = layerwise_logits(source.shape, models, tokens, dtype=dtype)
    positions = torch.arange(17).expand_as(tokens)
    whole = {"native": load_model(source, adapter, dtype=dtype), "plain": load_model(source, None, dtype=dtype)}
    with torch.no_grad():
        return {name: (found[name], model.predict(tokens, positions)) for name, model in whole.items()}


# Options of the model, and of its adapter.
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    **{name: (FAMILY_MODELS.get(name, {}), {"layers": (1, 3)}) for name in ("llama", *FAMILY_MODELS)},
    **{
        f"{'-'.join(targets)} {layers}": ({}, {"targets": targets, "layers": layers})
        for targets in (("o_proj",), ("gate_up",), ("down_proj",), TARGET_NAMES)
        for layers in ((3,), (1, 2))
    },
    "stored in fp16": ({"dtype": torch.float16}, {}),
    "stored in fp64": ({"dtype": torch.float64}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_the_whole_model(tmp_path: Path, case: str) -> None:
    model, adapter = CASES[case]
    found = logits(write_tiny_model(tmp_path, tokenizer=False, **model), torch.float32, **adapter)
    for by_layer, whole in found.values():
        torch.testing.assert_close(by_layer, whole, rtol=1e-5, atol=1e-5)
    native, plain = found["native"][0], found["plain"][0]
    assert (native - plain).abs().max() > 0.02 * native.abs().max()


def test_in_bf16(tmp_path: Path) -> None:
    base = write_tiny_model(tmp_path, dtype=torch.bfloat16, tokenizer=False)
    for found, whole in logits(base, torch.bfloat16).values():
        assert found.dtype == torch.float32
        assert (found - whole.float()).abs().max() < 0.02 * whole.abs().max()


# The loss -----------------------------------------------------------------------------------------------------------


def batch(rows: int, length: int, seed: int) -> MicroBatch:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, 320, (rows, length), generator=generator)
    labels = tokens.roll(-1, 1).masked_fill(torch.rand(rows, length, generator=generator) < 0.3, -100)
    labels[:, -1] = -100
    lengths = torch.full((rows,), length)
    positions = torch.arange(length).expand(rows, length)
    return MicroBatch(tokens=tokens, positions=positions, labels=labels, lengths=lengths, num_samples=rows)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("share", [0.25, 0.0])
def test_the_loss_is_that_of_the_whole_model(
    tied: bool, share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layerwise, "_SHARE", share)
    monkeypatch.setattr(layer_specs, "HEAD_ROWS", 7)
    folder = write_tiny_model(tmp_path / "model", tokenizer=False, tied=tied)
    source, adapter, _ = with_adapter(folder, "tl6", (1, 3), targets=("qkv", "down_proj"))
    batches = [batch(2, 11, 0), batch(3, 20, 1), batch(1, 8, 2)]
    model = load_model(source, adapter, dtype=torch.float32)
    plain = load_model(source, None, dtype=torch.float32)
    calls: list[None] = []
    with BaseWeights(folder, source.shape) as weights:
        options: Any = {"dtype": torch.float32, "device": torch.device("cpu"), "between": lambda: calls.append(None)}
        found = layerwise_loss(source.shape, weights.read, adapter, batches, **options)
    wanted, without = (
        sum(float(whole.predict(some.tokens, some.positions, some.labels).sum()) for some in batches)
        for whole in (model, plain)
    )
    assert found == pytest.approx(wanted, rel=1e-5) and abs(without - wanted) > 1e-2 * wanted
    assert len(calls) == 3 * (1 if share else 3)
