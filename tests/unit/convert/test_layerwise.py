"""Logits of one layer at a time are those of the whole model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from family_models import FAMILY_MODELS
from native_files import with_adapter
from tiny_models import write_tiny_model

from megatron_tiedlora.checkpoint import load_model as blocks
from megatron_tiedlora.checkpoint.base_weights import BaseWeights
from megatron_tiedlora.checkpoint.load_model import load_model
from megatron_tiedlora.convert import layerwise
from megatron_tiedlora.convert.layerwise import Weights, layerwise_logits

ALL = ("qkv", "o_proj", "gate_up", "down_proj")


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


@pytest.mark.parametrize("name", ["llama", *FAMILY_MODELS])
def test_families(tmp_path: Path, name: str) -> None:
    base = write_tiny_model(tmp_path, tokenizer=False, **FAMILY_MODELS.get(name, {}))
    found = logits(base, torch.float32, layers=(1, 3))
    for layerwise_found, whole in found.values():
        torch.testing.assert_close(layerwise_found, whole, rtol=1e-5, atol=1e-5)
    native, plain = found["native"][0], found["plain"][0]
    assert (native - plain).abs().max() > 0.02 * native.abs().max()


@pytest.mark.parametrize("targets", [("o_proj",), ("gate_up",), ("down_proj",), ALL], ids="-".join)
@pytest.mark.parametrize("layers", [(3,), (1, 2)], ids=str)
def test_targets(tmp_path: Path, targets: tuple[str, ...], layers: tuple[int, ...]) -> None:
    base = write_tiny_model(tmp_path, tokenizer=False)
    found = logits(base, torch.float32, targets=targets, layers=layers)
    for layerwise_found, whole in found.values():
        torch.testing.assert_close(layerwise_found, whole, rtol=1e-5, atol=1e-5)
    native, plain = found["native"][0], found["plain"][0]
    assert (native - plain).abs().max() > 0.02 * native.abs().max()


def test_bf16(tmp_path: Path) -> None:
    base = write_tiny_model(tmp_path, dtype=torch.bfloat16, tokenizer=False)
    for found, whole in logits(base, torch.bfloat16).values():
        assert found.dtype == torch.float32
        assert (found - whole.float()).abs().max() < 0.02 * whole.abs().max()


@pytest.mark.parametrize("weight", [torch.float16, torch.float64])
def test_weights_of_other_dtypes(tmp_path: Path, weight: torch.dtype) -> None:
    base = write_tiny_model(tmp_path, dtype=weight, tokenizer=False)
    for found, whole in logits(base, torch.float32).values():
        torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-5)
