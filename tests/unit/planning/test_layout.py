"""The planners need a ModelShape and a Layout and nothing else: every layout of a cluster, without a run's settings."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from planned import stage_memory

from megatron_tiedlora.adapters.tied_adapter import make_adapter_config, targets_of
from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.base.shapes import TARGET_NAMES
from megatron_tiedlora.checkpoint.sources import find_model
from megatron_tiedlora.model.partition import check_layout
from megatron_tiedlora.parallel.groups import DATA, WORLD, Grid
from megatron_tiedlora.planning.layout import Layout, MicroBatchShape, StagePlan, plan_stages, shared_shape
from megatron_tiedlora.planning.passes import engine_traffic, saved_per_token, step_flops, step_traffic
from megatron_tiedlora.planning.run_plan import pays_to_compile

SHAPE = find_model("llama2-70b", weights=False).shape
ADAPTER = make_adapter_config("tl6", rank=8, layers=tuple(range(1, 81)), targets=targets_of(SHAPE), seed=0)
RANKS = 32


def layouts() -> list[tuple[int, int, int]]:
    """Those of 32 ranks that the model can be cut into, by (tensor, pipeline, data)."""
    found = []
    for tp in range(1, RANKS + 1):
        for pp in range(1, RANKS // tp + 1):
            try:
                check_layout(SHAPE, Grid(0, RANKS, tp_size=tp, pp_size=pp))
            except UserError:
                continue
            found.append((tp, pp, RANKS // (tp * pp)))
    return found


def planned(tp: int, pp: int, dp: int, **changes: Any) -> tuple[StagePlan, ...]:
    sizes = {"tp_size": tp, "pp_size": pp, "dp_size": dp, "zero_stage": 1, "on_gpu": True, "micro_batches": 256 // dp}
    return plan_stages(SHAPE, Layout(**{"adapters": (ADAPTER,), "length": 4096, **sizes, **changes}))


def full_micro_batches(layout: Layout) -> tuple[MicroBatchShape, ...]:
    return (shared_shape(layout, [(0, [np.arange(layout.length) > 0] * layout.rows)]),) * layout.micro_batches


def test_every_layout_of_a_cluster_can_be_planned() -> None:
    """70B has 8 key-value heads and 80 layers: of 32 ranks, up to 8 share a layer, and any power of 2 are stages."""
    fits = []
    for tp, pp, dp in layouts():
        stages = planned(tp, pp, dp)
        assert [layer for stage in stages for layer in stage.layers] == list(range(82))
        assert sum(stage.cost_share for stage in stages) == pytest.approx(1)
        shapes = full_micro_batches(stages[0].layout)
        for stage in stages:
            sent = step_traffic(stage, shapes)
            _, most = engine_traffic(stage, num_micro_batches=len(shapes)).of_group(DATA)
            assert bool(sent.messages) and (dp > 1) == (most > 0)
        memory = max(stage_memory(stage, tokens=shapes[0].num_tokens).total for stage in stages)
        if memory < 80e9:
            fits.append((tp, pp, dp))
    assert len(layouts()) == 6 + 5 + 4 + 3
    assert (1, 1, 32) not in fits and (8, 4, 1) in fits and (4, 2, 4) in fits


def test_a_layout_costs_what_its_fields_say() -> None:
    """Twice the tensor-parallel ranks halve the base; ZeRO-2 shards gradients; sequences are cut with tp alone."""
    base = [stage_memory(planned(tp, 1, 32 // tp)[0], tokens=4096) for tp in (4, 8)]
    assert base[0].base == pytest.approx(2 * base[1].base, rel=1e-3)
    one, two = (stage_memory(planned(4, 1, 8, zero_stage=stage)[0], tokens=4096) for stage in (1, 2))
    assert one.gradients == 8 * two.gradients and one.optimizer == two.optimizer
    whole, cut = (planned(4, 1, 8, shards_sequences=cuts)[0].layout for cuts in (False, True))
    assert (whole.sequence_parts, cut.sequence_parts) == (1, 4)
    assert planned(1, 1, 32)[0].layout.sequence_parts == 1 and not planned(1, 1, 32)[0].layout.sequence_parallel


def test_every_target_is_planned() -> None:
    """All four beside QKV: FLOPs, A x saved and sent, factors and their gathers."""
    every = replace(ADAPTER, targets=targets_of(SHAPE, TARGET_NAMES))
    d, k, f, r, layers, rows = 8192, 1024, 28672, 8, 80, 4096
    one, four = (planned(2, 1, 16, adapters=(adapter,))[0] for adapter in (ADAPTER, every))
    assert saved_per_token(SHAPE, four.layout) - saved_per_token(SHAPE, one.layout) == 3 * 2 * r
    batch = full_micro_batches(one.layout)[:1]
    before, after = (step_traffic(stage, batch) for stage in (one, four))
    assert after.messages == before.messages
    added = {key: size - before.bytes[key] for key, size in after.bytes.items() if size != before.bytes[key]}
    # A of gate_up, B and v of o_proj and down_proj; and 8 columns of gate_up a layer. The other two send no more.
    gathered = 4 * (r * d + 2 * (d * r + layers * d))
    sent = 2 * layers * rows * r + gathered
    u = 4 * 3 * layers * r
    assert added == {("tensor", "all-gather"): sent, ("tensor", "reduce-scatter"): sent, (WORLD, "all-reduce"): u}
    counts = {"num_tokens": rows, "squared_lengths": rows**2, "num_after": rows, "num_supervised": rows}
    flops = [step_flops(SHAPE, stage.layout.adapters[0], **counts).total() for stage in (one, four)]
    widths = (d + d) + (d + 2 * f) + (f + d)
    assert flops[1] - flops[0] == 6 * r * widths * layers * rows
    for method, qkv, everything in (("lora", 11_796_480, 87_818_240), ("tl5", 147_456, 1_097_728)):
        for adapter, count in ((ADAPTER, qkv), (every, everything)):
            assert sum(replace(adapter, method=method).num_trained().values()) == count
    assert sum(every.num_trained().values()) == 7_817_728 and d + 2 * k == ADAPTER.targets[0].out_size


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("name", TARGET_NAMES)
def test_factors_are_counted_once(name: str, recompute: str) -> None:
    """In fp32 and at alpha = r they are the parameters; else F is a copy, of which all layers have the same."""
    tied = replace(ADAPTER, method="tl5", targets=targets_of(SHAPE, (name,)))
    changes = {"dtype": torch.float32, "recompute": recompute}
    one, two = (
        stage_memory(planned(1, 1, 1, adapters=(replace(tied, alpha=alpha),), **changes)[0], tokens=4096).activations
        for alpha in (tied.rank, 2 * tied.rank)
    )
    assert two - one == 4 * tied.rank * tied.targets[0].out_size


def test_a_layout_that_does_not_fit_is_rejected() -> None:
    check_layout(SHAPE, Grid(0, 16, tp_size=8, pp_size=2), zero_stage=1, ds_config="zero1.json")
    with pytest.raises(UserError, match="ZeRO-2 does not go with --pipeline_parallel 2"):
        check_layout(SHAPE, Grid(0, 16, tp_size=8, pp_size=2), zero_stage=2, ds_config="mine.json")


def test_compiling_pays_in_long_runs() -> None:
    """By the numbers that the layers of one rank process: its tokens, times the widths of its layers."""
    widths = 80 * (8192 + 28672)
    for ranks, tp, pp in ((1, 1, 1), (8, 8, 1), (4, 1, 4), (2, 1, 1)):
        grid = Grid(0, ranks, tp_size=tp, pp_size=pp)
        least = 1000 * widths / ranks
        assert pays_to_compile(SHAPE, grid, num_tokens=1000, least_work=least)
        assert not pays_to_compile(SHAPE, grid, num_tokens=999, least_work=least)
