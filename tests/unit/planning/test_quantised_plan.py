"""What --dry_run says of a quantised base."""

from __future__ import annotations

import re
from typing import Any

import pytest
from planned import stage_memory

from megatron_tiedlora.config.settings import make_settings
from megatron_tiedlora.planning.report import dry_run_report
from megatron_tiedlora.planning.run_plan import plan_run

LLAMA_70B = {"model": "llama2-70b", "max_length": 4096, "micro_batch_size": 1, "recompute": "selective"}
BLOCK_WEIGHTS = 80 * (8192 * (8192 + 2 * 1024) + 8192 * 8192 + 3 * 8192 * 28672)


def plan(world_size: int = 1, **changes: Any) -> Any:
    settings = {**LLAMA_70B, "dry_run": True, "plan_for": "gpu", "world_size": world_size, **changes}
    return plan_run(make_settings(settings), rank=0, world_size=world_size)


def test_70b_in_nf4_fits_one_gpu_of_80_gb() -> None:
    (stage,) = plan(base="nf4").stages
    memory = stage_memory(stage, tokens=4096)
    assert stage.quantised_bytes == BLOCK_WEIGHTS * 4.5 / 8 == pytest.approx(38.5e9, rel=1e-3)
    assert stage.base_bytes - stage.quantised_bytes == 2 * (2 * 32000 * 8192 + 161 * 8192)
    assert memory.dequantised == 2 * 2 * 8192 * 28672 and memory.total < 80e9
    assert stage_memory(plan(base=None).stages[0], tokens=4096).total > 150e9
    report = dry_run_report(make_settings({**LLAMA_70B, "base": "nf4", "dry_run": True, "plan_for": "gpu"})).text
    assert "base weights: 38.50 GB of them before ZeRO are the linears of the blocks in nf4" in report
    assert re.search(r"base weights +one dequantised +adapter", report)


@pytest.mark.parametrize(("base", "bits"), [("int8", 8), ("fp8", 8), ("nf4", 4.5)])
def test_bytes_by_format(base: str, bits: float) -> None:
    """Of 8-bit formats a row has 4 bytes more; at TP 8 every shard of down's rows has the scale."""
    rows = 80 * (10240 + 8192 + 2 * 28672 + 8192)
    for tp in (1, 8):
        stages = plan(tp, tensor_parallel=tp, base=base).stages
        shared = 80 * 2 * 8192 * (tp - 1)
        scales = 0 if base == "nf4" else 4 * (rows + shared)
        assert stages[0].quantised_bytes * tp == BLOCK_WEIGHTS * bits / 8 + scales


def test_a_shard_within_a_block_needs_more_scales() -> None:
    """7B's down projection at TP 8 has 1,376 columns on a rank: scales in blocks of 32, 5 bits."""
    settings = {"model": "llama2-7b", "dry_run": True, "world_size": 8, "tensor_parallel": 8, "base": "nf4"}
    stage = plan_run(make_settings(settings), rank=0, world_size=8).stages[0]
    down, others = 4096 * 11008, 4096 * (3 * 4096 + 4096 + 2 * 11008)
    assert stage.quantised_bytes * 8 == 32 * (down * 5 + others * 4.5) / 8


def test_zero_3_gathers_fewer_bytes() -> None:
    sizes = {}
    for base in (None, "nf4"):
        stage = plan(2, base=base, ds_config="zero3.json").stages[0]
        sizes[base] = stage_memory(stage, tokens=4096)
    assert sizes["nf4"].base / sizes[None].base == pytest.approx(0.287, abs=0.01)
    assert sizes["nf4"].engine < 0.6 * sizes[None].engine
