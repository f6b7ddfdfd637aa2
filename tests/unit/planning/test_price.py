"""Prices: what is computed once for many layouts equals what each has alone, and each term by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from planned import H100, changed, searched, short, the_only
from run_helpers import write_base

from megatron_tiedlora.config.cli import parse_settings
from megatron_tiedlora.config.plan_settings import parse_plan
from megatron_tiedlora.config.settings import Settings, make_settings
from megatron_tiedlora.engine.engine_json import SHIPPED_CONFIGS
from megatron_tiedlora.parallel.traffic import TENSOR
from megatron_tiedlora.planning.cluster_report import make_plan
from megatron_tiedlora.planning.cluster_table import Plan, hint_lines
from megatron_tiedlora.planning.machines import CPU, Machine
from megatron_tiedlora.planning.memory import stage_memory
from megatron_tiedlora.planning.passes import saved_per_token, step_flops, step_traffic
from megatron_tiedlora.planning.price import Priced, Pricer, capacity
from megatron_tiedlora.planning.run_data import prepare_data
from megatron_tiedlora.planning.run_plan import RunPlan, plan_run
from megatron_tiedlora.planning.search import Candidate, Storage, planned_values
from megatron_tiedlora.planning.stages import plan_stages
from megatron_tiedlora.planning.step_plan import StepPlan
from megatron_tiedlora.planning.step_time import Links, Seconds, step_parts, step_seconds

SOURCE = short("llama2-7b", 6)
ONE = ("--ds_config=zero1.json", "--recompute=none", "--micro_batch_size=1", "--formats=none", "--max_length=4096")


def run_plan(candidate: Candidate) -> RunPlan:
    """The plan of a run that is given the candidate's flags."""
    (plan,) = candidate.step.plans.values()
    settings, ranks = plan.settings, candidate.layout.world_size
    given = {name: getattr(settings, name) for name in settings.model_fields_set}
    values = {**given, **planned_values(settings, True), **candidate.flags, "world_size": ranks}
    return plan_run(make_settings(values), rank=0, world_size=ranks, weights=False, source=plan.source)


def priced(*flags: str, ranks: int = 1, **keywords: object) -> tuple[Priced, Pricer]:
    """The only layout that the flags leave, with its price."""
    candidate, pricer = the_only(*flags, source=SOURCE, ranks=ranks, **keywords)  # type: ignore[arg-type]
    return pricer.price_in_full(candidate), pricer


@pytest.mark.parametrize(
    "flags", [("--layers=3,5", "--targets=all", "--method=lora"), ("--recompute=none",)], ids=["some layers", "plain"]
)
def test_each_layout_has_the_price_that_it_has_alone(flags: tuple[str, ...]) -> None:
    """Memory of all stages and time, from the plan of a run with the flags of the layout."""
    found, cluster = searched(*flags, "--global_batch_size=16", "--max_length=2048", source=SOURCE, ranks=8, per_node=4)
    pricer = Pricer(cluster)
    priced = pricer.price(found.candidates)
    assert {(p.candidate.layout.pp_size, p.candidate.layout.tp_size) for p in priced} >= {(1, 1), (2, 4), (4, 2)}
    for one in priced[:: max(1, len(priced) // 150)]:
        plan = run_plan(one.candidate)
        assert one.candidate.layout == plan.layout
        tokens = plan.layout.rows * plan.layout.length
        sizes = {"tokens": tokens, "documents": plan.layout.rows, "longest": plan.layout.length}
        memories = [stage_memory(stage, **sizes, machine=cluster.machine) for stage in plan.stages]
        assert one.needed == max(memory.total for memory in memories), one.name
        parts = step_parts(plan.stages, StepPlan({"": plan}).batches, Links(plan.layout, 4), cluster.machine)
        assert one.step.total == pytest.approx(step_seconds([parts])[0].total, rel=1e-12), one.name


def test_the_pruned_table_is_the_full_one() -> None:
    """What is dropped by its weights alone would not have fitted; the order of the others is the same."""
    machine = changed(H100, memory=2.6e9, context=1e8, communicator=1e7)
    found, cluster = searched("--global_batch_size=8", "--max_length=512", source=SOURCE, ranks=4, machine=machine)
    pricer = Pricer(cluster)
    pruned = Plan.of(found, pricer.price(found.candidates), steps=1)
    full = [Pricer(cluster).price_in_full(candidate) for candidate in found.candidates]
    dropped = {one.name for one in pruned.others if one.memory is None}
    assert 0 < len(dropped) < len(found.candidates)
    by_name = {one.name: one for one in full}
    assert all(by_name[name].needed > capacity(cluster) for name in dropped)
    fitting = sorted((one for one in full if one.fits), key=lambda one: (one.step.total, one.needed))
    for rows, is_ranked in ((pruned.rows, True), (pruned.elsewhere, False)):
        assert [(one.name, one.needed, one.step) for one in rows] == [
            (one.name, one.needed, one.step) for one in fitting if (one.candidate.storage == Storage()) == is_ranked
        ]
        assert len(rows) > 10
    assert len(pruned.all_rows) == len(found.candidates)


# Terms by hand ------------------------------------------------------------------------------------------------------


def test_products_and_attention_are_those_of_the_samples() -> None:
    """Without recompute they are the FLOPs of MFU, divided by the rates."""
    one, _ = priced(*ONE, "--global_batch_size=4")
    flops = step_flops(
        SOURCE.shape,
        one.candidate.layout.adapters[0],
        num_tokens=4 * 4096,
        squared_lengths=4 * 4096**2,
        num_after=4 * 4096,
        num_supervised=4 * 4095,
    )
    products = (flops.matmuls + flops.adapter + flops.head) / (989.4e12 * 0.72)
    assert one.step.matmuls == pytest.approx(products, rel=1e-3)
    assert one.step.attention == pytest.approx(flops.attention / (989.4e12 * 0.26), rel=1e-9)
    assert one.step.launches == 0, "4,096 tokens of 7B take a card longer than launching them"
    assert one.mfu == pytest.approx(one.work.flops / 989.4e12 / one.step.total)


def test_reading_beside_computing_is_charged_where_it_is_measured() -> None:
    """Weights of a block forward and, but the first QKV's, back; the head's twice in 4 parts; queries three times."""
    slow = changed(H100, weights__bf16=1e9, queries__bf16=1e6)
    plain, read = (priced(*ONE, "--global_batch_size=4", machine=machine)[0].step for machine in (H100, slow))
    shape = SOURCE.shape
    blocks = 2 * 6 * shape.block.num_weights - shape.block.qkv.num_weights
    head = 2 * 4 * shape.vocab_size * shape.hidden_size
    assert read.matmuls - plain.matmuls == pytest.approx(4 * (blocks + head) / 1e9)
    assert read.attention - plain.attention == pytest.approx(4 * 4096 * 6 * 3 * shape.hidden_size / 1e6)


@pytest.mark.parametrize("machine", [H100, CPU], ids=["gpu", "cpu"])
@pytest.mark.parametrize("keeps", [False, True])
def test_fp8_products_transpose_on_a_gpu_only(machine: Machine, keeps: bool) -> None:
    """Half of the matmuls read transposed codes: one byte read and one written. What all of them multiply is rounded:
    35 bytes a number forward and 49 backward, where the first QKV needs none. On a CPU both are in the emulation."""
    flags = ("--base=fp8", "--products=fp8", f"--keep_transposed={keeps}", "--global_batch_size=1")
    one, _ = priced(*flags, *ONE[:3], "--max_length=512", machine=machine)
    blocks = 6 * SOURCE.shape.block.num_weights - SOURCE.shape.block.qkv.num_weights
    forward, backward = 6 * (3 * 4096 + 11008), 6 * (12288 + 4096 + 2 * 11008 + 4096) - 12288
    rounded = 512 * (35 * forward + 49 * backward)
    moved = (0 if keeps else 2 * blocks) + rounded
    assert one.step.dequantised == pytest.approx(moved / (3350e9 * 0.8) if machine.on_gpu else 0)


def test_recompute_is_charged() -> None:
    """Selective: gate and up once more in all blocks but the last. Full: all of a block's matmuls, of the last QKV."""
    plain, selective, full = (
        priced(*ONE, f"--recompute={kind}", "--global_batch_size=4")[0].step for kind in ("none", "selective", "full")
    )
    linears, rate, tokens = SOURCE.shape.block.adaptable, 989.4e12 * 0.72, 4 * 4096
    gate_up = 2 * tokens * linears["gate_up"].num_weights
    assert selective.matmuls - plain.matmuls == pytest.approx(5 * gate_up / rate, rel=2e-3)
    whole = sum(2 * tokens * linear.num_weights for linear in linears.values())
    of_last = 2 * tokens * linears["qkv"].num_weights
    assert full.matmuls - plain.matmuls == pytest.approx((5 * whole + of_last) / rate, rel=2e-3)
    assert full.attention == pytest.approx(4 / 3 * plain.attention)
    assert full.elementwise > selective.elementwise > plain.elementwise


def test_messages_are_charged_once() -> None:
    """The tensor group's bytes over a ring of two, and 15 us for each message; nothing hides them."""
    one, _ = priced(*ONE, "--tensor_parallel=2", "--sequence_parallel=true", "--global_batch_size=4", ranks=2)
    stages = plan_stages(SOURCE.shape, one.candidate.layout)
    traffic = step_traffic(stages[0], one.candidate.step.batches.shapes)
    messages, size = traffic.of_group(TENSOR)
    # u's sum is the tensor group's too, but once a step
    once = 15e-6 + 4 * stages[0].shape.num_layers * 8 / 360e9
    assert one.step.tensor == pytest.approx(size / 2 / 360e9 + messages * 15e-6 - once, rel=1e-4)
    assert messages > 8 * 6 * 4


@pytest.mark.parametrize("overlaps", [False, True])
def test_gathers_are_hidden_only_where_the_engine_hides_them(tmp_path: Path, overlaps: bool) -> None:
    """Two passes gather each weight; with a stream of their own they take what is longer than the pass."""
    file = tmp_path / "zero3.json"
    overlap = "true" if overlaps else "false"
    file.write_text(f'{{"zero_optimization": {{"stage": 3, "overlap_comm": {overlap}}}}}')
    flags = (*ONE[1:], f"--ds_config={file}", "--global_batch_size=8")
    slow = changed(H100, network_bandwidth=2e8)  # a card's network takes far longer than the pass
    one, _ = priced(*flags, "--tensor_parallel=1", ranks=2, per_node=1, machine=slow)
    base = plan_stages(SOURCE.shape, one.candidate.layout)[0].local_base
    numbers = sum(number * tensor.size for tensor, number in base.items())
    gathers = 4 * 2 * (2 * numbers / 2) / (2e8 * 0.9)  # 4 micro-batches, 2 passes, half of 2 bytes a number
    compute = one.step.total - one.step.gathers - one.step.sums - one.step.outside
    expected = gathers - compute if overlaps else gathers
    assert one.step.gathers == pytest.approx(expected, rel=0.01)
    fast, _ = priced(*flags, "--tensor_parallel=1", ranks=2)
    assert (fast.step.gathers == 0) == overlaps


def test_the_bubble_of_a_pipeline() -> None:
    """Equal stages wait for (p - 1) / (m + p - 1) of the passes; unequal ones for more."""
    shape = SOURCE.shape
    one, pricer = priced(*ONE, "--pipeline_parallel=2", "--global_batch_size=6", ranks=2)
    parts = pricer.parts(one.candidate)
    passes = [sum(sum(each) for each in stage[0]) for stage in parts.stages]
    least = (6 + 1) * min(passes)
    assert least < one.step.total - one.step.sums - one.step.outside < (6 + 1) * max(passes)
    equal = replace(parts, stages=[parts.stages[0]] * 2)
    (found,) = step_seconds([equal])
    assert found.bubble / (found.total - found.sums - found.outside) == pytest.approx(1 / 7)
    assert one.step.bubble > 0 and shape.num_layers == 6
    alone, _ = priced(*ONE, "--pipeline_parallel=1", "--global_batch_size=6")
    assert alone.step.bubble == 0


def test_activations_are_of_all_micro_batches_in_flight() -> None:
    """The first of three stages has three of them in flight, the second two."""
    flags = (*ONE, "--pipeline_parallel=3", "--global_batch_size=12")
    one, pricer = priced(*flags, ranks=3)
    stages = [pricer.stage(one.candidate, index) for index in range(3)]
    assert [len(stage.blocks) for stage in stages] == [2, 2, 2]
    first, second = (stage_memory(stage, tokens=4096).activations for stage in stages[:2])
    saved = saved_per_token(SOURCE.shape, one.candidate.layout) * 4096 * 2
    assert first - second == pytest.approx(saved, rel=0.2), "a micro-batch of two blocks"
    assert one.stage == 0 and one.memory is not None and one.memory.activations == first
    assert first > 3 * saved * 0.8


def test_memory_has_every_part() -> None:
    """The sum is that of the fields, and reserves follow the machine."""
    flags = (*ONE, "--tensor_parallel=2", "--pipeline_parallel=1", "--sequence_parallel=true", "--global_batch_size=4")
    one, _ = priced(*flags, ranks=4)
    memory = one.memory
    assert memory is not None and memory.total == sum(memory) and all(size > 0 for size in memory[2:] if size)
    other = changed(H100, context=3e9, communicator=1e9, slack=0.1)
    heavier, _ = priced(*flags, ranks=4, machine=other)
    assert heavier.memory is not None
    assert heavier.memory.allocated == pytest.approx(memory.allocated)
    assert heavier.memory.libraries - memory.libraries == pytest.approx(2.5e9 + 4 * 0.5e9)
    assert heavier.memory.slack == pytest.approx(2 * memory.slack)
    assert memory.buffers > 0, "a bucket of gradients and gathered factors"


def test_real_samples_are_planned_for_every_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With data, the steps of --epochs and layouts that do not shard sequences have the dry run's micro-batches too."""
    base = write_base(tmp_path / "base", vocab_size=320)
    monkeypatch.setenv("MEGATRON_TIEDLORA_CACHE", str(base.cache))
    flags = base.arguments(global_batch_size=12, micro_batch_size=None, max_steps=None, warmup_steps=None, epochs=2)
    command = parse_plan([*flags, "--ranks_on_cpu=2", "--formats=none", "--ds_config=zero0.json"])
    made = make_plan(command)
    assert {row.candidate.layout.shards_sequences for row in made.plan.rows} == {True, False}
    for row in made.plan.rows:
        words = [*flags, "--dry_run", "--plan_for=cpu", "--world_size=2"]
        given = parse_settings(words, Settings).model_dump(exclude_unset=True)
        plan = plan_run(make_settings({**given, **row.candidate.flags}), rank=0, world_size=2, weights=False)
        data = prepare_data(plan)
        plan = plan.counted(len(data.train))
        first = StepPlan.first({"": plan}, {"": data}, shares=True)
        assert row.candidate.layout == first.layout and first.steps == 4 == made.plan.steps
        assert row.candidate.step.batches == first.batches
        memories = [first.largest.memory(stage, made.cluster.machine) for stage in first.stages]
        assert row.needed == max(memory.total for memory in memories), row.name


def test_hints_name_the_engine_file_and_no_ties(tmp_path: Path) -> None:
    content = json.loads((SHIPPED_CONFIGS / "zero3.json").read_text())
    spent = Seconds(matmuls=1.0, gathers=1.0)
    hidden, measured = "beyond what FILE hides behind computation", changed(H100, attention__bf16=0.3)
    for overlaps, words in ((False, "as nothing hides it in FILE"), (True, hidden)):
        file = tmp_path / f"mine-{overlaps}.json"
        content["zero_optimization"]["overlap_comm"] = overlaps
        file.write_text(json.dumps(content))
        flags = [f"--ds_config={file}" if "zero1" in flag else flag for flag in ONE]
        found, cluster = searched(*flags, "--global_batch_size=8", source=SOURCE, ranks=2, machine=measured)
        row = next(p for p in Pricer(cluster).price(found.candidates) if p.candidate.layout.dp_size == 2)
        plan = Plan.of(found, [replace(row, seconds=spent)], steps=1.0)
        assert hint_lines(plan) == [
            f"{row.name}: ZeRO-3 gathers weights for 50% of the time, {words.replace('FILE', str(file))}"
        ]
    flags = [flag for flag in ONE if "recompute" not in flag]
    found, cluster = searched(*flags, "--global_batch_size=8", source=SOURCE, ranks=1, machine=measured)
    again, plain = (
        next(p for p in Pricer(cluster).price(found.candidates) if p.candidate.layout.recompute == name)
        for name in ("selective", "none")
    )
    for seconds, hints in ((1.5, [f"{again.name} recomputes; {plain.name} does not, at 67% of its speed"]), (1.0, [])):
        rows = [replace(again, seconds=Seconds(1.0)), replace(plain, seconds=Seconds(seconds + 1e-6))]
        assert hint_lines(Plan.of(found, rows, steps=1.0)) == hints
