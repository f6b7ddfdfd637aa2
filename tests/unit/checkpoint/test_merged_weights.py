"""A base read with an adapter merged into it: any rows and columns, and the shards of every tensor-parallel rank."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from native_files import with_adapter
from oracle import OracleConfig, load_weights, merged_weights
from tiny_models import write_tiny_model
from torch.testing import assert_close

from megatron_tiedlora.base.shapes import TARGET_NAMES
from megatron_tiedlora.checkpoint.load_model import MergedWeights, load_model
from megatron_tiedlora.parallel.frozen_weight import frozen_weights
from megatron_tiedlora.parallel.groups import Grid


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("base"), tokenizer=False)


def test_a_slice_has_the_values_of_the_whole(base: Path) -> None:
    source, adapter, oracle = with_adapter(base, "tl6", (1, 3), targets=TARGET_NAMES)
    wanted = merged_weights(load_weights(base), OracleConfig.from_folder(base), oracle)
    with MergedWeights(source, adapter) as weights:
        assert len(weights.changed) == 2 * 7
        for name in sorted(weights.changed):
            rows, columns = wanted[name].shape
            assert_close(weights.read(name), wanted[name], rtol=1e-6, atol=1e-6)
            for part, dim in ((slice(5, rows - 3), 0), (slice(7, columns - 2), 1)):
                own = wanted[name][part] if dim == 0 else wanted[name][:, part]
                assert_close(weights.read(name, part, dim), own, rtol=1e-6, atol=1e-6)
            assert torch.equal(weights.read_base(name, slice(0, rows)), load_weights(base)[name])


def test_every_rank_loads_its_shards_of_the_merged_model(base: Path) -> None:
    """Rows of QKV, gate and up, columns of the others."""
    source, adapter, _ = with_adapter(base, "tl6", targets=TARGET_NAMES)
    whole = frozen_weights(load_model(source, adapter, dtype=torch.float32, merged=True))
    plain = frozen_weights(load_model(source, None, dtype=torch.float32))
    ranks = [
        frozen_weights(load_model(source, adapter, dtype=torch.float32, grid=Grid(rank, 2, tp_size=2), merged=True))
        for rank in range(2)
    ]
    changed = 0
    with MergedWeights(source, None) as weights:
        for rule in weights.rules:
            full, own = (next(iter(frozen[rule.name].parameters.values())) for frozen in (whole, plain))
            changed += not torch.equal(full, own)
            for rank, frozen in enumerate(ranks):
                (shard,) = frozen[rule.name].parameters.values()
                assert_close(shard, rule.spec.split(full, rank, 2), rtol=1e-6, atol=1e-6)
    assert changed == 3 * 4
