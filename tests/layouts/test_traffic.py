"""What --dry_run predicts is what real steps send: every message and byte of ours, by group and kind, on every rank.

Of the data-parallel group, where DeepSpeed alone sends, it predicts the bytes, and under ZeRO-3 the most there can be.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from forked_ranks import run_on_ranks
from report_tables import stage_table
from torch import distributed
from traffic_runs import Ran, ours, run_cases, write_inputs

from megatron_tiedlora.adapters.tied_adapter import Target, make_adapter_config
from megatron_tiedlora.config.settings import make_settings
from megatron_tiedlora.model.layer_specs import StoredTensor
from megatron_tiedlora.parallel.groups import (
    DATA,
    GROUPS,
    MODEL,
    PIPELINE,
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
from megatron_tiedlora.planning.report import bytes_in_words, dry_run_report

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.cpu_seconds(30, reason="the first test makes the starts that all share"),
]

TP, PP = {"tensor_parallel": 2}, {"pipeline_parallel": 2}
BOTH = {**TP, **PP}
ALONE = {**TP, "micro_batch_size": 4}  # two micro-batches are enough where no stage waits for another
FIVE = {"model": "five"}  # where it matters which layer it is; else the model has three
WHOLE = {"sequence_parallel": False}
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
        "dp zero2, offloaded": {"ds_config": "zero2_offload.json", "method": "tl5"},
        "dp zero3": {**LATER, "ds_config": "zero3.json", "method": "vera"},
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
        "tp x pp whole": {**BOTH, **WHOLE, **LATER},
        "tp x pp, layer of the first stage": {**BOTH, "method": "lora", "layers": (2,), **FIVE},
        "tp x pp, layer of the last stage": {**BOTH, **WHOLE, **FULL, "method": "lora", "layers": (5,), **FIVE},
        "tp x pp, tied embeddings": {**BOTH, "model": "tied", "dtype": "bf16"},
        "tp x dp": {**TP, "ds_config": "zero2.json"},
        "tp x dp whole": {**TP, **WHOLE, "ds_config": "zero1.json", "method": "vera"},
        "tp x dp, recompute": {**TP, **FULL, **LATER, "ds_config": "zero0.json", "method": "tl5"},
    },
}
MUTATED, LONG, ESTIMATED = "tp, mutated", "tp, long steps", "dp zero3, base in parts"
NAMES = [(ranks, name) for ranks, cases in CASES.items() for name in cases]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Ran]:
    """All cases, in one start of two ranks and one of four."""
    folder = tmp_path_factory.mktemp("traffic")
    base = {**write_inputs(folder), "model": "three"}
    return {
        name: found
        for ranks, changes in CASES.items()
        for name, found in run_cases(changes, base, folder, ranks=ranks).items()
    }


@pytest.fixture(autouse=True)
def _cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MEGATRON_TIEDLORA_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize(("ranks", "name"), [item for item in NAMES if item[1] not in (MUTATED, LONG, ESTIMATED)])
def test_prediction_is_what_is_counted(
    ran: Mapping[str, Ran], monkeypatch: pytest.MonkeyPatch, ranks: int, name: str
) -> None:
    found = ran[name]
    if found.case.head_rows is not None:
        monkeypatch.setattr(passes, "HEAD_ROWS", found.case.head_rows)
        assert max(supervised for _, _, supervised in found.counted[0].shapes) > found.case.head_rows
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


def test_the_tied_sum_is_one_message_a_step(ran: Mapping[str, Ran]) -> None:
    for name in ("pp", "pp, bf16", "tp x pp", "tp x pp tl5, recompute"):
        for rank, counted in enumerate(ran[name].counted):
            parts = 2 if name.startswith("tp") else 1
            # A and B, rank 3, each cut over tensor-parallel ranks: d is 32, and QKV has 48 + 24 + 24 rows.
            assert counted.traffic.of_group(TIED) == (1, 4 * 3 * (32 + 96) // parts), (name, rank)
    for name in ("pp zero0, one layer", "tp x pp vera", "tp x pp, layer of the first stage"):
        assert all(counted.traffic.of_group(TIED) == (0, 0) for counted in ran[name].counted), name


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


def test_base_bytes_are_those_of_built_stages(ran: Mapping[str, Ran]) -> None:
    seen = set()
    for found in ran.values():
        for rank, counted in enumerate(found.counted):
            plan = found.plan(rank)
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


@pytest.mark.parametrize(
    "name", ["dp zero0", "dp zero3", "tp whole", "tp, packed", "tp x pp, tied embeddings", "tp vera"]
)
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
        stage: Any = SimpleNamespace(layout=layout, trained=(20, 3), held=(20, 3), local_base=base)
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
