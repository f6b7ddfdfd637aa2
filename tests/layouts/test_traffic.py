"""What --dry_run predicts is what real steps send: every message and byte of ours, by group and kind, on every rank.

Of the data-parallel group, where DeepSpeed alone sends, it predicts the bytes, and under ZeRO-3 the most there can be.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.cases import marked
from support.forked_ranks import run_on_ranks
from support.planned import stage_table
from support.traffic_runs import Case, Counted, Ran, ours, run_cases, starts, write_inputs
from torch import distributed

from megatron_tiedlora.adapters.adapter_groups import ONLY
from megatron_tiedlora.adapters.tied_adapter import Target, make_adapter_config
from megatron_tiedlora.base.messages import bytes_in_words
from megatron_tiedlora.config.settings import make_settings
from megatron_tiedlora.model.layer_specs import StoredTensor
from megatron_tiedlora.parallel.groups import (
    DATA,
    GROUPS,
    MODEL,
    PIPELINE,
    STAGE,
    TENSOR,
    TIED,
    WORLD,
    ParallelGroups,
    RankGroup,
    Traffic,
    TrafficCounter,
    named_handles,
)
from megatron_tiedlora.planning import passes
from megatron_tiedlora.planning.layout import Layout
from megatron_tiedlora.planning.passes import STOP_VOTES_BYTES, engine_traffic, saved_per_token
from megatron_tiedlora.planning.report import dry_run_report

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.cpu_seconds(20, reason="the first test makes the start that all share"),
]

TP, PP = {"tensor_parallel": 2}, {"pipeline_parallel": 2}
BOTH = {**TP, **PP}
ALONE = {**TP, "micro_batch_size": 4}  # two micro-batches are enough where no stage waits for another
FIVE = {"model": "five"}  # where it matters which layer it is; else the model has three
WHOLE = {"sequence_parallel": False}
HALVES = {"overlap": "halves", "micro_batch_size": 4, "packing": False}
FULL = {"recompute": "full"}
PACKED = {"packing": True, "micro_batch_size": 1, "global_batch_size": 24}
ONE_LAYER = {"method": "lora", "layers": (3,)}
# The third step is counted, and of other cases the first. In its first one, ZeRO-3 agrees on what it traces.
LATER = {"steps_before": 2}

# By name, what differs from the base settings. Data parallel is what is left of the ranks.
CASES: dict[int, dict[str, dict[str, Any]]] = {
    2: {
        "dp zero0": {"ds_config": "zero0.json"},
        "dp zero1": {"ds_config": "zero1.json", "method": "vera"},
        "dp zero1, gradients larger than a bucket": {"ds_config": "small1", "method": "lora"},
        "dp zero1, a bucket for each gradient": {**LATER, "ds_config": "small1"},
        "dp zero2": {"ds_config": "zero2.json"},
        "dp zero2, rates": {"ds_config": "zero2.json", "rate_factors": "B=8,u=2"},
        "dp zero2, offloaded": {"ds_config": "zero2_offload.json", "method": "tl5"},
        "dp zero3": {**LATER, "ds_config": "zero3.json", "method": "vera"},
        "dp zero3, rates": {**LATER, "ds_config": "zero3.json", "rate_factors": "B=4"},
        "dp zero3, base in parts": {**LATER, "ds_config": "parted3"},
        "dp zero3, nf4": {**LATER, "ds_config": "zero3.json", "base": "nf4"},
        "pp, fp8": {**PP, "base": "fp8"},
        "pp": {**PP},
        "pp zero0, one layer": {**PP, **ONE_LAYER, "ds_config": "zero0.json"},
        "pp, bf16": {**PP, "dtype": "bf16", "method": "tl5"},
        "tp whole": {**ALONE, **WHOLE},
        "tp whole, recompute": {**ALONE, **WHOLE, **FULL, "method": "vera"},
        "tp, recompute": {**ALONE, **FULL},
        "tp, recompute of gate and up": {**ALONE, "recompute": "selective", "layers": (2, 4), **FIVE},
        "tp, nf4": {**ALONE, "base": "nf4"},
        "tp, one layer": {**ALONE, **ONE_LAYER},
        "tp, short head": {**ALONE, "head_rows": 16, "ds_config": "zero0.json"},
        "tp, packed": {**ALONE, **PACKED},
        "tp, halves, recompute": {**TP, **HALVES, **FULL},
        "tp whole, halves": {**TP, **HALVES, **WHOLE, "recompute": "selective"},
        "dp zero2, packed": {**PACKED, "ds_config": "zero2.json"},
        "pp, packed": {**PP, **PACKED, **LATER},
        "tp, mutated": {**ALONE, "extra_message": True},
        "tp, long steps": {**TP, "long_steps": True},
        "tp vera": {**ALONE, "method": "vera", "layers": (2, 3, 5), **FIVE},
    },
    4: {
        "tp x pp": {**BOTH, **FIVE},
        "tp x pp tl5, recompute": {**BOTH, **FULL, "method": "tl5", "ds_config": "zero0.json"},
        "tp x pp, packed": {**BOTH, **PACKED},
        "tp x dp, packed": {**TP, **PACKED, "ds_config": "zero2.json"},
        "tp x pp vera": {**BOTH, "method": "vera"},
        "tp x pp, halves": {**BOTH, **HALVES, "micro_batch_size": 2, **FIVE},
        "tp x pp whole": {**BOTH, **WHOLE, **LATER},
        "tp x pp, layer of the first stage": {**BOTH, "method": "lora", "layers": (2,), **FIVE},
        "tp x pp, layer of the last stage": {**BOTH, **WHOLE, **FULL, "method": "lora", "layers": (5,), **FIVE},
        "tp x pp, tied embeddings": {**BOTH, "model": "tied", "dtype": "bf16"},
        "tp x dp": {**TP, "ds_config": "zero2.json"},
        "tp x dp whole": {**TP, **WHOLE, "ds_config": "zero1.json", "method": "vera", "rate_factors": "u=3"},
        "tp x dp, recompute": {**TP, **FULL, **LATER, "ds_config": "zero0.json", "method": "tl5"},
    },
    8: {
        "tp x pp x dp, recompute": {**BOTH, **FULL, **FIVE, "global_batch_size": 16},
        "pp x dp 4, packed": {**PP, **PACKED, **FIVE, "method": "tl5", "global_batch_size": 48},
        "pp 4 x dp": {"pipeline_parallel": 4, **FIVE, "ds_config": "zero0.json", "global_batch_size": 16},
    },
}
MUTATED, LONG, ESTIMATED = "tp, mutated", "tp, long steps", "dp zero3, base in parts"
NAMES = [name for cases in CASES.values() for name in cases]
# Cases of which each choice is made in another case too.
SLOW = {
    *("dp zero2, offloaded", "dp zero3", "dp zero1, gradients larger than a bucket", "pp, bf16", "tp whole"),
    *("tp, recompute of gate and up", "tp, one layer", "dp zero2, packed", "pp, packed", "tp vera"),
    *("tp x dp, packed", "tp x pp vera", "tp x pp whole", "tp x pp, layer of the first stage", "tp x dp, recompute"),
    *("pp x dp 4, packed", "pp 4 x dp"),
}


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Ran]:
    folder = tmp_path_factory.mktemp("traffic")
    return starts(CASES, {**write_inputs(folder), "model": "three"}, folder, SLOW)


@pytest.fixture(autouse=True)
def _cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MEGATRON_TIEDLORA_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("name", marked([name for name in NAMES if name not in (MUTATED, LONG, ESTIMATED)], SLOW))
def test_prediction_is_what_is_counted(ran: Mapping[str, Ran], monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    found = ran[name]
    if found.case.head_rows is not None:
        monkeypatch.setattr(passes, "HEAD_ROWS", found.case.head_rows)
        assert max(supervised for *_, supervised, _ in found.counted[0].shapes) > found.case.head_rows
    for rank, counted in enumerate(found.counted):
        plan = found.plan(rank)
        steps = plan.batches.accumulation_steps
        assert 1 < len(counted.shapes) < steps if plan.settings.packing else len(counted.shapes) == steps > 1
        assert counted.traffic.messages, "nothing was counted"
        found.check(rank)


def test_what_zero_3_fetches_is_an_upper_bound(ran: Mapping[str, Ran]) -> None:
    """Parameters are gathered at most for each pass of each micro-batch; most of them at least half as often."""
    found = ran[ESTIMATED]
    for rank, counted in enumerate(found.counted):
        found.check(rank)
        assert counted.traffic.of_group(DATA)[1] > 0.45 * found.predicted(rank)[1]


def test_an_extra_message_per_layer_is_seen(ran: Mapping[str, Ran]) -> None:
    """The comparison can fail: a block that sends one message more than it should breaks it on every rank."""
    found = ran[MUTATED]
    for rank, counted in enumerate(found.counted):
        (predicted, _), sent = found.predicted(rank), ours(counted.traffic)
        assert predicted != sent
        predicted.add(TENSOR, "all-reduce", 4, count=3 * len(counted.shapes))  # one fp32 number for each of 3 blocks
        assert predicted == sent


def test_what_long_steps_send_more(ran: Mapping[str, Ran]) -> None:
    """The dry run says it in a line of its own: a sum over all ranks after each micro-batch but the last."""
    found = ran[LONG]
    for rank, counted in enumerate(found.counted):
        (predicted, _), sent = found.predicted(rank), ours(counted.traffic)
        assert predicted != sent
        predicted.add(WORLD, "all-reduce", STOP_VOTES_BYTES, count=len(counted.shapes) - 1)
        assert predicted == sent


TIED_SUMS = ["pp", "pp, bf16", "tp x pp", "tp x pp tl5, recompute"]
NO_TIED_SUM = ["pp zero0, one layer", "tp x pp vera", "tp x pp, layer of the first stage"]


@pytest.mark.parametrize("name", marked([*TIED_SUMS, *NO_TIED_SUM], SLOW))
def test_the_tied_sum_is_one_message_a_step(ran: Mapping[str, Ran], name: str) -> None:
    """A and B, rank 3, each cut over tensor-parallel ranks: d is 32, and QKV has 48 + 24 + 24 rows."""
    size = 4 * 3 * (32 + 96) // (2 if name.startswith("tp") else 1)
    expected = (1, size) if name in TIED_SUMS else (0, 0)
    assert [counted.traffic.of_group(TIED) for counted in ran[name].counted] == [expected] * len(ran[name].counted)


def test_which_groups_a_layout_uses(ran: Mapping[str, Ran]) -> None:
    groups = {
        "dp zero0": {DATA, WORLD},
        "pp": {PIPELINE, TIED, MODEL, WORLD},
        "tp, recompute": {TENSOR, MODEL, WORLD},
        "tp x pp": {TENSOR, PIPELINE, TIED, MODEL, WORLD},
        "tp x dp": {TENSOR, DATA, MODEL, WORLD},
    }
    for name, expected in groups.items():
        for counted in ran[name].counted:
            assert {group for group, _ in counted.traffic.messages} == expected, name


@pytest.mark.parametrize(
    "names", [sorted({*NAMES} - SLOW), pytest.param(sorted(SLOW), marks=pytest.mark.slow)], ids=["some", "others"]
)
def test_base_bytes_are_those_of_built_stages(ran: Mapping[str, Ran], names: list[str]) -> None:
    seen = set()
    for name in names:
        for rank, counted in enumerate(ran[name].counted):
            plan = ran[name].plan(rank)
            if plan.engine.zero_stage < 3:
                assert plan.stage.base_bytes == counted.base_bytes
                seen.add(counted.base_bytes)
    assert len(seen) >= 8, "models, cuts and stages differ"


@pytest.mark.parametrize("name", ["dp zero0", "pp", "tp, nf4", "tp x pp", "tp x pp, tied embeddings", "tp x dp whole"])
def test_the_report_says_it(ran: Mapping[str, Ran], name: str) -> None:
    """The tables of --dry_run hold what a built stage weighs and what is predicted for the first step."""
    found = ran[name]
    text = dry_run_report(make_settings(found.case.settings), launched_ranks=len(found.counted)).text
    memory, messages = stage_table(text, "bytes per rank"), stage_table(text, "messages and bytes")
    for rank, counted in enumerate(found.counted):
        plan = found.plan(rank)
        stage = plan.grid.pp_rank
        assert memory[stage]["base weights"] == bytes_in_words(counted.base_bytes)
        if plan.grid.dp_rank == 0:
            traffic, most = found.predicted(rank)
            expected = {group: traffic.of_group(group) for group in GROUPS}
            texts = {group: f"{n:,} / {bytes_in_words(size)}" for group, (n, size) in expected.items() if n}
            texts |= {DATA: f"at most {bytes_in_words(most)}"} if most else {}
            assert bool(most) == (plan.grid.dp_size > 1 and plan.engine.zero_stage > 0)
            cells = {column.replace("all ranks", WORLD): cell for column, cell in messages[stage].items()}
            assert cells == texts


BUILT = ["dp zero0", "dp zero3", "dp zero3, nf4", "tp whole", "tp, packed", "tp, nf4", "pp, fp8", "tp vera"]


@pytest.mark.parametrize("name", marked([*BUILT, "tp x pp, tied embeddings"], SLOW))
def test_saved_bytes_are_those_of_a_built_block(ran: Mapping[str, Ran], name: str) -> None:
    """What is counted on tensors without data equals what the block of a stage keeps at its layout."""
    found = ran[name]
    for rank, counted in enumerate(found.counted):
        plan = found.plan(rank)
        assert saved_per_token(plan.source.shape, plan.layout) == counted.saved_bytes_per_token, rank


def test_what_deepspeed_sends_at_each_zero_stage() -> None:
    """By hand: 23 numbers of 4 bytes are trained; the base has 5 and 8 of 2 bytes, which 3 ranks pad to 6 and 9."""
    target = Target("qkv", 1, (1, 1, 1), "column")
    bound, adapter = {}, make_adapter_config("tl6", rank=1, layers=(1,), targets=(target,), seed=0)
    for zero_stage, dp_size in [(0, 3), (1, 3), (2, 3), (3, 3), (3, 1)]:
        layout = Layout((adapter,), length=8, dp_size=dp_size, zero_stage=zero_stage)
        base = {StoredTensor(5, 2): 1, StoredTensor(8, 2): 1}
        stage: Any = SimpleNamespace(
            layout=layout, trained=(20, 3), held=(20, 3), local_base=base, parameter_groups={1.0: 23}, num_norms=1
        )
        bound[zero_stage, dp_size] = engine_traffic(stage, num_micro_batches=4).of_group(DATA)[1]
    assert bound == {
        (0, 3): 0,  # which we sum
        (1, 3): 4 * 23 + 4 * 24 + 4,
        (2, 3): 4 * 4 * 23 + 4 * 24 + 4,
        (3, 3): 4 * (2 * (2 * 15 + 4 * 24) + 4 * 24) + 8,
        (3, 1): 0,
    }


def _count_alone(folder: str) -> Traffic:
    alone = distributed.new_group([0])
    groups = ParallelGroups(data=RankGroup(alone, 0, 1), tied=RankGroup(alone, 0, 1))
    with TrafficCounter(named_handles(groups)) as counter:
        distributed.all_reduce(torch.zeros(3), group=alone)
    return counter.traffic


def test_a_group_of_one_rank_has_no_messages(tmp_path: Path) -> None:
    (counted,) = run_on_ranks(_count_alone, str(tmp_path), ranks=1, folder=tmp_path)
    assert counted == Traffic()


# Weak scaling: more data-parallel ranks do not add to what a rank sends ---------------------------------------------

Sizes = tuple[int, int, int]  # tensor, pipeline, data
# The models have 8 heads on 4 key-value heads, and 5 layers.
LAYOUTS: list[Sizes] = [
    (tp, pp, ranks // (tp * pp))
    for ranks in (1, 2, 4, 8)
    for tp in (1, 2, 4)
    for pp in (1, 2, 4)
    if ranks % (tp * pp) == 0
]


def weak_scaling(found: Mapping[Sizes, Ran]) -> Iterator[tuple[Sizes, int, tuple[Traffic, int]]]:
    """(layout, stage, what its first rank is predicted to send), and that all ranks of a stage send the same."""
    for (tp, pp, dp), run in found.items():
        for stage in range(pp):
            ranks = range(stage * dp * tp, (stage + 1) * dp * tp)
            predicted = [run.predicted(rank) for rank in ranks]
            assert all(other == predicted[0] for other in predicted)
            yield (tp, pp, dp), stage, predicted[0]


def check_growth(found: Mapping[Sizes, Ran]) -> None:
    """With the work of a data-parallel rank fixed, what a rank sends does not depend on how many of them there are.

    Two things do: the first of them adds a group, and ZeRO-1's gather ends in padding for each rank.
    """
    rows = {(layout, stage): predicted for layout, stage, predicted in weak_scaling(found)}
    for ((tp, pp, dp), stage), (traffic, most) in rows.items():
        alone, none = rows[(tp, pp, 1), stage]
        for group in (PIPELINE, TIED, MODEL):
            assert traffic.of_group(group) == alone.of_group(group), (tp, pp, dp)
        # The sum of u, over the ranks of a stage: without data parallelism the tensor group, with one stage the world.
        u_sums = int(tp > 1)
        apart = {STAGE: u_sums * (dp > 1 and pp > 1), WORLD: u_sums * (dp > 1 and pp == 1)}
        assert traffic.of_group(TENSOR)[0] == alone.of_group(TENSOR)[0] - sum(apart.values()), (tp, pp, dp)
        if tp > 1:
            both = [sum(found.of_group(group)[1] for group in (TENSOR, STAGE, WORLD)) for found in (traffic, alone)]
            assert both[0] == both[1], (tp, pp, dp)
        assert none == 0
        if dp > 1:
            two = rows[(tp, pp, 2), stage][1]
            assert two <= most < two + 4 * 2 * dp
        assert traffic.of_group(WORLD)[0] == (tp * pp * dp > 1) + apart[WORLD]
        assert traffic.of_group(STAGE)[0] == apart[STAGE]
        assert traffic.of_group(TIED)[0] == (pp > 1)


def weak_settings(folder: Path) -> dict[Sizes, dict[str, Any]]:
    """Every layout, on samples of the same lengths, with 8 samples a step for each data-parallel rank."""
    base = {**write_inputs(folder), "train_file": "even.jsonl"}
    return {
        (tp, pp, dp): {**base, "tensor_parallel": tp, "pipeline_parallel": pp, "global_batch_size": 8 * dp}
        for tp, pp, dp in LAYOUTS
    }


@pytest.mark.parametrize("most", [4, pytest.param(8, marks=pytest.mark.slow)])
def test_predicted_weak_scaling(tmp_path: Path, most: int) -> None:
    """The arithmetic alone, for every layout of up to so many ranks."""
    found = {}
    for layout, settings in weak_settings(tmp_path).items():
        if math.prod(layout) > most and layout not in ((2, 1, 4), (1, 2, 4)):  # data parallel grows beside both
            continue
        files = {name: str(tmp_path / settings[name]) for name in ("model", "train_file")}
        nothing = Counted(Traffic(), Traffic(), [], 0, 0.0)
        found[layout] = Ran(Case({ONLY: {**settings, **files}}), [nothing] * math.prod(layout))
    check_growth(found)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_weak_scaling(tmp_path: Path) -> None:
    """Every layout up to 8 ranks, counted; prints the table of docs/performance_log.md."""
    settings, found = weak_settings(tmp_path), {}
    for ranks in (1, 2, 4, 8):
        cases = {str(layout): settings[layout] for layout in LAYOUTS if math.prod(layout) == ranks}
        ran = run_cases(cases, {}, tmp_path, ranks=ranks)
        found.update({layout: ran[str(layout)] for layout in LAYOUTS if str(layout) in ran})
    for run in found.values():
        for rank, counted in enumerate(run.counted):
            assert len(counted.shapes) > 1 and bool(counted.traffic.messages) == (len(run.counted) > 1)
            run.check(rank)
        assert {shape[:2] for counted in run.counted for shape in counted.shapes} == {(2, 64)}
    check_growth(found)
    print_table(found)


def print_table(found: Mapping[Sizes, Ran]) -> None:
    print("\n| ranks | tensor, pipeline, data | stage |", " | ".join(GROUPS), "|")
    for layout, stage, _ in weak_scaling(found):
        counted = found[layout].counted[stage * layout[0] * layout[2]]
        cells = [counted.traffic.of_group(group) for group in GROUPS]
        texts = [f"{count} / {size:,}" if count else "" for count, size in cells]
        print(f"| {math.prod(layout)} | {', '.join(map(str, layout))} | {stage} |", " | ".join(texts), "|")
