"""Bytes, messages and operations of a layout by hand, of a base in 16 bits and of a quantised one."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from support.planned import stage_memory

from megatron_tiedlora.adapters.tied_adapter import make_adapter_config, targets_of
from megatron_tiedlora.base.shapes import TARGET_NAMES
from megatron_tiedlora.checkpoint.sources import find_model
from megatron_tiedlora.config.settings import make_settings
from megatron_tiedlora.parallel.groups import Grid
from megatron_tiedlora.planning.layout import Layout, StagePlan, plan_stages
from megatron_tiedlora.planning.report import dry_run_report
from megatron_tiedlora.planning.run_plan import pays_to_compile, plan_run

SHAPE = find_model("llama2-70b", weights=False).shape
ADAPTER = make_adapter_config("tl6", rank=8, layers=tuple(range(1, 81)), targets=targets_of(SHAPE), seed=0)


def planned(tp: int, pp: int, dp: int, **changes: Any) -> tuple[StagePlan, ...]:
    sizes = {"tp_size": tp, "pp_size": pp, "dp_size": dp, "zero_stage": 1, "on_gpu": True, "micro_batches": 256 // dp}
    return plan_stages(SHAPE, Layout(**{"adapters": (ADAPTER,), "length": 4096, **sizes, **changes}))


def test_a_layout_costs_what_its_fields_say() -> None:
    """Twice the tensor-parallel ranks halve the base; ZeRO-2 shards gradients; sequences are cut with tp alone."""
    base = [stage_memory(planned(tp, 1, 32 // tp)[0], tokens=4096) for tp in (4, 8)]
    assert base[0].base == pytest.approx(2 * base[1].base, rel=1e-3)
    one, two = (stage_memory(planned(4, 1, 8, zero_stage=stage)[0], tokens=4096) for stage in (1, 2))
    assert one.gradients == 8 * two.gradients and one.optimizer == two.optimizer
    whole, cut = (planned(4, 1, 8, shards_sequences=cuts)[0].layout for cuts in (False, True))
    assert (whole.sequence_parts, cut.sequence_parts) == (1, 4)
    assert planned(1, 1, 32)[0].layout.sequence_parts == 1 and not planned(1, 1, 32)[0].layout.sequence_parallel


def test_trained_numbers_of_all_targets_of_70b() -> None:
    every = replace(ADAPTER, targets=targets_of(SHAPE, TARGET_NAMES))
    for method, count in (("lora", 87_818_240), ("tl5", 1_097_728), ("tl6", 7_817_728)):
        assert sum(replace(every, method=method).num_trained().values()) == count


def test_compiling_pays_in_long_runs() -> None:
    """By the numbers that the layers of one rank process: its tokens, times the widths of its layers."""
    widths = 80 * (8192 + 28672)
    for ranks, tp, pp in ((1, 1, 1), (8, 8, 1), (4, 1, 4), (2, 1, 1)):
        grid = Grid(0, ranks, tp_size=tp, pp_size=pp)
        least = 1000 * widths / ranks
        assert pays_to_compile(SHAPE, grid, num_tokens=1000, least_work=least)
        assert not pays_to_compile(SHAPE, grid, num_tokens=999, least_work=least)


# A quantised base -----------------------------------------------------------------------------------------------------

LLAMA_70B = {"model": "llama2-70b", "max_length": 4096, "micro_batch_size": 1, "recompute": "selective"}
BLOCK_WEIGHTS = 80 * (8192 * (8192 + 2 * 1024) + 8192 * 8192 + 3 * 8192 * 28672)


def plan_of(world_size: int = 1, **changes: Any) -> Any:
    settings = {**LLAMA_70B, "dry_run": True, "plan_for": "gpu", "world_size": world_size, **changes}
    return plan_run(make_settings(settings), rank=0, world_size=world_size)


def test_70b_in_nf4_fits_one_gpu_of_80_gb() -> None:
    (stage,) = plan_of(base="nf4").stages
    memory = stage_memory(stage, tokens=4096)
    assert stage.quantised_bytes == BLOCK_WEIGHTS * 4.5 / 8 == pytest.approx(38.5e9, rel=1e-3)
    assert stage.base_bytes - stage.quantised_bytes == 2 * (2 * 32000 * 8192 + 161 * 8192)
    assert memory.dequantised == 2 * 2 * 8192 * 28672 and memory.total < 80e9
    assert stage_memory(plan_of(base=None).stages[0], tokens=4096).total > 150e9
    report = dry_run_report(make_settings({**LLAMA_70B, "base": "nf4", "dry_run": True, "plan_for": "gpu"})).text
    assert "base weights: 38.50 GB of them before ZeRO are the linears of the blocks in nf4" in report
    assert re.search(r"base weights +one dequantised +adapter", report)


@pytest.mark.parametrize(("base", "bits"), [("int8", 8), ("fp8", 8), ("nf4", 4.5)])
def test_bytes_by_format(base: str, bits: float) -> None:
    """Of 8-bit formats a row has 4 bytes more; at TP 8 every shard of down's rows has the scale."""
    rows = 80 * (10240 + 8192 + 2 * 28672 + 8192)
    for tp in (1, 8):
        stages = plan_of(tp, tensor_parallel=tp, base=base).stages
        shared = 80 * 2 * 8192 * (tp - 1)
        scales = 0 if base == "nf4" else 4 * (rows + shared)
        assert stages[0].quantised_bytes * tp == BLOCK_WEIGHTS * bits / 8 + scales


def test_a_shard_within_a_block_needs_more_scales() -> None:
    """7B's down projection at TP 8 has 1,376 columns on a rank: scales in blocks of 32, 5 bits."""
    stage = plan_of(8, model="llama2-7b", tensor_parallel=8, base="nf4").stages[0]
    down, others = 4096 * 11008, 4096 * (3 * 4096 + 4096 + 2 * 11008)
    assert stage.quantised_bytes * 8 == 32 * (down * 5 + others * 4.5) / 8


def test_zero_3_gathers_fewer_bytes() -> None:
    stages = (plan_of(2, base=base, ds_config="zero3.json").stages[0] for base in (None, "nf4"))
    plain, nf4 = (stage_memory(stage, tokens=4096) for stage in stages)
    assert nf4.base / plain.base == pytest.approx(0.287, abs=0.01) and nf4.engine < 0.6 * plain.engine
