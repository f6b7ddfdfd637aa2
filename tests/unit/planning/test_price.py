"""Prices: what is computed once for many layouts equals what each has alone, and each term by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.planned import (
    H100,
    THREE,
    changed,
    group_of,
    largest_memory,
    searched,
    short,
    stage_memory,
    step_parts,
    the_only,
)
from support.run_helpers import Base

from megatron_tiedlora.config.cli import parse_settings
from megatron_tiedlora.config.job_settings import parse_plan
from megatron_tiedlora.config.settings import Settings, make_settings
from megatron_tiedlora.engine.engine_json import SHIPPED_CONFIGS
from megatron_tiedlora.parallel.groups import TENSOR
from megatron_tiedlora.planning.adapter_plans import counted, plan_adapters, prepare_all_data
from megatron_tiedlora.planning.cluster_report import hint_lines, plan_cluster
from megatron_tiedlora.planning.layout import Storage, plan_stages
from megatron_tiedlora.planning.machines import CPU, Machine
from megatron_tiedlora.planning.passes import saved_per_token, step_flops, step_traffic
from megatron_tiedlora.planning.planned import Planned, StepPlan
from megatron_tiedlora.planning.search import Candidate
from megatron_tiedlora.planning.step_time import Links, Seconds, step_seconds

SOURCE = short("llama2-7b", 6)
ONE = ("--ds_config=zero1.json", "--recompute=none", "--micro_batch_size=1", "--formats=none", "--max_length=4096")


def priced(*flags: str, ranks: int = 1, **keywords: Any) -> Candidate:
    """The only layout that the flags leave."""
    return the_only(*flags, source=SOURCE, ranks=ranks, **keywords)


PRICED: dict[str, dict[str, Any]] = {
    "some layers": {"layers": "3,5", "targets": "all", "method": "lora"},
    "plain": {"recompute": "none"},
    "shared": {"adapters": THREE, "sequence_parallel": True, "recompute": "selective"},
    "in turn": {"adapters": THREE, "share_micro_batches": False},
    "late": {"adapters": "- name: all\n- name: late\n  layers: 3,4,5\n", "recompute": "none"},
}


@pytest.mark.parametrize("most", [pytest.param(60, marks=pytest.mark.slow), 12])
@pytest.mark.parametrize("case", PRICED)
def test_each_layout_has_the_price_that_it_has_alone(case: str, most: int, tmp_path: Path) -> None:
    """Memory, messages and time are those of a dry run with its flags, and of each of its stages by itself.

    In a search layouts share them, as do stages of one layout whose blocks, adapters and links are alike.
    """
    given = {"global_batch_size": 24, "max_length": 1024, **PRICED[case]}
    if "adapters" in given:
        (tmp_path / "a.yaml").write_text(given["adapters"])
        given["adapters"] = str(tmp_path / "a.yaml")
    flags = [f"--{name}={value}" for name, value in given.items()]
    rows = searched(*flags, source=SOURCE, ranks=12, per_node=4).all_rows
    assert {(row.layout.pp_size, row.layout.tp_size) for row in rows} >= {(1, 1), (3, 4), (6, 2)}
    for one in rows[:: max(1, len(rows) // most)]:
        step = group_of(SOURCE, 12, **{**given, **one.flags})
        alone = Planned(step=step, layout=step.layout, machine=one.machine, per_node=4)
        for name in ("layout", "fullest", "needed", "fits", "work", "parts"):
            assert getattr(alone, name) == getattr(one, name), (one.name, name)
        assert alone.seconds == pytest.approx(one.seconds, rel=1e-12)
        assert (alone.hours, alone.mfu) == pytest.approx((one.hours, one.mfu), rel=1e-12)
        for index in (0, one.layout.pp_size - 1):
            assert alone.traffic(index) == one.traffic(index)
        assert one.needed == max(largest_memory(step, stage, one.machine).total for stage in step.stages), one.name
        assert one.parts == step_parts(step.stages, step.batches, Links(step.layout, 4), one.machine), one.name


def test_the_pruned_table_is_the_full_one() -> None:
    """What is dropped by its weights alone would not have fitted; the order of the others is the same."""
    machine = changed(H100, memory=2.6e9, context=1e8, communicator=1e7)
    found = searched("--global_batch_size=8", "--max_length=512", source=SOURCE, ranks=4, machine=machine)
    dropped = {one.name for one in found.others if not one.has_room_for_weights}
    assert 0 < len(dropped) < len(found.candidates)
    full = [replace(one, known={}) for one in found.candidates]  # each by itself
    room = full[0].capacity
    assert all(one.fullest[1].total > room for one in full if one.name in dropped)
    fitting = sorted(
        (one for one in full if one.fullest[1].total <= room),
        key=lambda one: (one.seconds.total, one.fullest[1].total),
    )
    for rows, is_ranked in ((found.rows, True), (found.elsewhere, False)):
        assert [(one.name, one.needed, one.seconds) for one in rows] == [
            (one.name, one.fullest[1].total, one.seconds) for one in fitting if (one.storage == Storage()) == is_ranked
        ]
        assert len(rows) > 10
    assert len(found.all_rows) == len(found.candidates)


# Terms by hand ------------------------------------------------------------------------------------------------------


def test_products_and_attention_are_those_of_the_samples() -> None:
    """Without recompute they are the FLOPs of MFU, divided by the rates."""
    one = priced(*ONE, "--global_batch_size=4")
    adapter, tokens = one.layout.adapters[0], 4 * 4096
    flops = step_flops(SOURCE.shape, adapter, (4096,) * 4, 4 * 4095, num_after=tokens)
    products = (flops["linears"] + flops["low_rank"] + flops["head"]) / (989.4e12 * 0.68)
    assert one.seconds.matmuls == pytest.approx(products, rel=1e-3)
    assert one.seconds.attention == pytest.approx(flops["attention"] / (989.4e12 * 0.41), rel=1e-9)
    assert one.seconds.launches == 0, "4,096 tokens of 7B take a card longer than launching them"
    assert one.mfu == pytest.approx(one.work.flops / 989.4e12 / one.seconds.total)


def test_reading_beside_computing_is_charged_where_it_is_measured() -> None:
    """Weights of a block forward and, but the first QKV's, back; the head's twice in 4 parts; queries three times."""
    slow = changed(H100, weights__bf16=1e9, queries__bf16=1e6)
    plain, read = (priced(*ONE, "--global_batch_size=4", machine=machine).seconds for machine in (H100, slow))
    shape = SOURCE.shape
    blocks = 2 * 6 * shape.block.num_weights - shape.block.qkv.num_weights
    head = 2 * 4 * shape.vocab_size * shape.hidden_size
    assert read.matmuls - plain.matmuls == pytest.approx(4 * (blocks + head) / 1e9)
    assert read.attention - plain.attention == pytest.approx(4 * 4096 * 6 * 3 * shape.hidden_size / 1e6)


@pytest.mark.parametrize("machine", [H100, CPU], ids=["gpu", "cpu"])
@pytest.mark.parametrize("keeps", [False, True])
def test_fp8_products_transpose_on_a_gpu_only(machine: Machine, keeps: bool) -> None:
    """Half of the matmuls read transposed codes: a byte read and one written. What norms, gates and gradients of gates
    do not round themselves is rounded: 2 bytes read and one written. The first QKV needs none backward. On a CPU, both
    are in the emulation."""
    flags = ("--base=fp8", "--products=fp8", f"--keep_transposed={keeps}", "--global_batch_size=1")
    one = priced(*flags, *ONE[:3], "--max_length=512", machine=machine)
    blocks = 6 * SOURCE.shape.block.num_weights - SOURCE.shape.block.qkv.num_weights
    forward, backward = 6 * 4096, 6 * (12288 + 4096 + 4096) - 12288
    rounded = 512 * 3 * (forward + backward)
    moved = (0 if keeps else 2 * blocks) + rounded
    assert one.seconds.dequantised == pytest.approx(moved / (3350e9 * 0.8) if machine.on_gpu else 0)


def test_recompute_is_charged() -> None:
    """Selective: gate and up once more in all blocks but the last. Full: all of a block's matmuls, of the last QKV."""
    plain, selective, full = (
        priced(*ONE, f"--recompute={kind}", "--global_batch_size=4").seconds for kind in ("none", "selective", "full")
    )
    linears, rate, tokens = SOURCE.shape.block.adaptable, 989.4e12 * 0.68, 4 * 4096
    gate_up = 2 * tokens * linears["gate_up"].num_weights
    assert selective.matmuls - plain.matmuls == pytest.approx(5 * gate_up / rate, rel=2e-3)
    whole = sum(2 * tokens * linear.num_weights for linear in linears.values())
    of_last = 2 * tokens * linears["qkv"].num_weights
    assert full.matmuls - plain.matmuls == pytest.approx((5 * whole + of_last) / rate, rel=2e-3)
    assert full.attention == pytest.approx(4 / 3 * plain.attention)
    assert full.elementwise > selective.elementwise > plain.elementwise


def test_messages_are_charged_once() -> None:
    """The tensor group's bytes over a ring of two, and 15 us for each message; nothing hides them."""
    one = priced(*ONE, "--tensor_parallel=2", "--sequence_parallel=true", "--global_batch_size=4", ranks=2)
    stages = plan_stages(SOURCE.shape, one.layout)
    traffic = step_traffic(stages[0], one.step.batches)
    messages, size = traffic.of_group(TENSOR)
    # u's sum is the tensor group's too, but once a step
    once = 15e-6 + 4 * stages[0].shape.num_layers * 8 / 360e9
    assert one.seconds.tensor == pytest.approx(size / 2 / 360e9 + messages * 15e-6 - once, rel=1e-4)
    assert messages > 8 * 6 * 4


def test_messages_are_hidden_beside_the_other_half() -> None:
    """Each of the messages of the blocks before the last attention, by the share of its time that is saved."""
    flags = (*ONE, "--tensor_parallel=2", "--sequence_parallel=true", "--global_batch_size=4", "--micro_batch_size=2")
    plain = priced(*flags, ranks=2)
    shown, hidden = (priced(*flags, "--overlap=halves", ranks=2, machine=changed(H100, hidden=h)) for h in (0.0, 0.85))
    messages, halves = (step_traffic(one.stages[0], one.step.batches).of_group(TENSOR) for one in (plain, shown))
    assert halves[0] > 1.8 * messages[0] and halves[1] == pytest.approx(messages[1], rel=1e-3)
    assert hidden.seconds.tensor == pytest.approx(shown.seconds.tensor * (1 - 0.85 * (1 - 1 / 6)), rel=1e-3)
    slow = changed(H100, node_bandwidth=1e9)  # a message takes far longer than what is computed beside it
    exposed = priced(*flags, "--overlap=halves", ranks=2, machine=slow).seconds
    computed = exposed.matmuls + exposed.elementwise + exposed.attention
    never = priced(*flags, "--overlap=halves", ranks=2, machine=changed(slow, hidden=0.0)).seconds
    assert never.tensor - exposed.tensor == pytest.approx(0.85 * computed, rel=1e-6)


@pytest.mark.parametrize("overlaps", [False, True])
def test_gathers_are_hidden_only_where_the_engine_hides_them(tmp_path: Path, overlaps: bool) -> None:
    """Two passes gather each weight; with a stream of their own they take what is longer than the pass."""
    file = tmp_path / "zero3.json"
    overlap = "true" if overlaps else "false"
    file.write_text(f'{{"zero_optimization": {{"stage": 3, "overlap_comm": {overlap}}}}}')
    flags = (*ONE[1:], f"--ds_config={file}", "--global_batch_size=8")
    slow = changed(H100, network_bandwidth=2e8)  # a card's network takes far longer than the pass
    one = priced(*flags, "--tensor_parallel=1", ranks=2, per_node=1, machine=slow)
    base = plan_stages(SOURCE.shape, one.layout)[0].local_base
    numbers = sum(number * tensor.size for tensor, number in base.items())
    gathers = 4 * 2 * (2 * numbers / 2) / (2e8 * 0.9)  # 4 micro-batches, 2 passes, half of 2 bytes a number
    compute = one.seconds.total - one.seconds.gathers - one.seconds.sums - one.seconds.outside
    expected = gathers - compute if overlaps else gathers
    assert one.seconds.gathers == pytest.approx(expected, rel=0.01)
    fast = priced(*flags, "--tensor_parallel=1", ranks=2)
    assert (fast.seconds.gathers == 0) == overlaps


def test_the_bubble_of_a_pipeline() -> None:
    """Equal stages wait for (p - 1) / (m + p - 1) of the passes; unequal ones for more."""
    one = priced(*ONE, "--pipeline_parallel=2", "--global_batch_size=6", ranks=2)
    parts = one.parts
    passes = [sum(sum(each) for each in stage[parts.batches[0]]) for stage in parts.stages]
    least = (6 + 1) * min(passes)
    assert least < one.seconds.total - one.seconds.sums - one.seconds.outside < (6 + 1) * max(passes)
    equal = replace(parts, stages=[parts.stages[0]] * 2)
    (found,) = step_seconds([equal])
    assert found.bubble / (found.total - found.sums - found.outside) == pytest.approx(1 / 7)
    assert one.seconds.bubble > 0 and SOURCE.shape.num_layers == 6
    alone = priced(*ONE, "--pipeline_parallel=1", "--global_batch_size=6")
    assert alone.seconds.bubble == 0


def test_activations_are_of_all_micro_batches_in_flight() -> None:
    """The first of three stages has three of them in flight, the second two."""
    flags = (*ONE, "--pipeline_parallel=3", "--global_batch_size=12")
    one = priced(*flags, ranks=3)
    stages = one.stages
    assert [len(stage.blocks) for stage in stages] == [2, 2, 2]
    first, second = (stage_memory(stage, tokens=4096).activations for stage in stages[:2])
    saved = saved_per_token(SOURCE.shape, one.layout) * 4096 * 2
    assert first - second == pytest.approx(saved, rel=0.2), "a micro-batch of two blocks"
    index, memory = one.fullest
    assert index == 0 and memory.activations == first
    assert first > 3 * saved * 0.8


@pytest.mark.parametrize("adapters", ["", "- name: a\n- name: b\n  method: lora\n  global_batch_size: 6\n"])
def test_real_samples_are_planned_for_every_layout(
    base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, adapters: str
) -> None:
    """With data, the steps of --epochs and layouts that do not shard sequences have the dry run's micro-batches too."""
    monkeypatch.setenv("MEGATRON_TIEDLORA_CACHE", str(base.cache))
    own = {"micro_batch_size": None, "max_steps": None, "warmup_steps": None}
    if adapters:
        (tmp_path / "two.yaml").write_text(adapters)
        own["adapters"] = tmp_path / "two.yaml"
    flags = base.arguments(global_batch_size=12, epochs=2, **own)
    command = parse_plan([*flags, "--ranks_on_cpu=2", "--formats=none", "--ds_config=zero0.json"])
    rows = plan_cluster(command).rows
    assert {row.layout.shards_sequences for row in rows} == {True, False}
    words = [*flags, "--dry_run", "--plan_for=cpu", "--world_size=2"]
    given = parse_settings(words, Settings).model_dump(exclude_unset=True)
    for row in rows:
        plans = plan_adapters(make_settings({**given, **row.flags}), rank=0, world_size=2, weights=False)
        data = prepare_all_data(plans)
        first = StepPlan.first(counted(plans, data), data, shares=True)
        assert row.layout == first.layout and first.steps == row.step.steps and (first.steps == 4 or adapters)
        assert row.step.batches == first.batches
        assert row.needed == max(largest_memory(first, stage, row.machine).total for stage in first.stages), row.name


def test_hints_name_the_engine_file_and_no_ties(tmp_path: Path) -> None:
    content = json.loads((SHIPPED_CONFIGS / "zero3.json").read_text())
    spent = Seconds(matmuls=1.0, gathers=1.0)
    hidden, measured = "beyond what FILE hides behind computation", changed(H100, attention__bf16=0.3)
    for overlaps, words in ((False, "because FILE overlaps none"), (True, hidden)):
        file = tmp_path / f"mine-{overlaps}.json"
        content["zero_optimization"]["overlap_comm"] = overlaps
        file.write_text(json.dumps(content))
        flags = [f"--ds_config={file}" if "zero1" in flag else flag for flag in ONE]
        found = searched(*flags, "--global_batch_size=8", source=SOURCE, ranks=2, machine=measured)
        row = next(one for one in found.rows if one.layout.dp_size == 2)
        row.seconds, found.rows = spent, [row]
        assert hint_lines(found) == [
            f"{row.name}: ZeRO-3 gathers weights for 50% of the time, {words.replace('FILE', str(file))}"
        ]
    flags = [flag for flag in ONE if "recompute" not in flag]
    found = searched(*flags, "--global_batch_size=8", source=SOURCE, ranks=1, machine=measured)
    found.rows = [next(one for one in found.rows if one.layout.recompute == name) for name in ("selective", "none")]
    again, plain = found.rows
    for seconds, hints in ((1.5, [f"{again.name} recomputes; {plain.name} does not, at 67% of its speed"]), (1.0, [])):
        again.seconds, plain.seconds = Seconds(1.0), Seconds(seconds + 1e-6)
        assert hint_lines(found) == hints
