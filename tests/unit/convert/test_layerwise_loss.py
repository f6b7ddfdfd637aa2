"""The loss by layers is that of the whole model with its adapter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from native_files import with_adapter
from tiny_models import write_tiny_model

from megatron_tiedlora.checkpoint import load_model as blocks
from megatron_tiedlora.checkpoint.base_weights import BaseWeights
from megatron_tiedlora.checkpoint.load_model import load_model
from megatron_tiedlora.convert import layerwise as module
from megatron_tiedlora.convert.layerwise import layerwise_loss
from megatron_tiedlora.model import layer_specs
from megatron_tiedlora.model.batch import MicroBatch

CPU = torch.device("cpu")


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
def test_it_is_that_of_the_whole_model(
    tied: bool, share: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SHARE", share)
    monkeypatch.setattr(blocks, "BLOCK_ELEMENTS", 64 * 32)
    monkeypatch.setattr(layer_specs, "HEAD_ROWS", 7)
    folder = write_tiny_model(tmp_path / "model", tokenizer=False, tied=tied)
    source, adapter, _ = with_adapter(folder, "tl6", (1, 3), targets=("qkv", "down_proj"))
    batches = [batch(2, 11, 0), batch(3, 20, 1), batch(1, 8, 2)]
    model = load_model(source, adapter, dtype=torch.float32)
    plain = load_model(source, None, dtype=torch.float32)
    calls: list[None] = []
    with BaseWeights(folder, source.shape) as weights:
        found = layerwise_loss(
            source.shape,
            weights.read,
            adapter,
            batches,
            dtype=torch.float32,
            device=CPU,
            between=lambda: calls.append(None),
        )
    wanted, without = (
        sum(float(whole.predict(some.tokens, some.positions, some.labels).sum()) for some in batches)
        for whole in (model, plain)
    )
    assert found == pytest.approx(wanted, rel=1e-5) and abs(without - wanted) > 1e-2 * wanted
    assert len(calls) == 3 * (1 if share else 3)
