"""What a plan for GPUs has of its own, all of it on the CPU; and that --deterministic changes no bit there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from support.planned import H100, short, stage_memory
from support.run_files import assert_same_run
from support.run_helpers import Base, run

from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.config.batch import default_rows, plan_batches
from megatron_tiedlora.config.cli import parse_settings
from megatron_tiedlora.config.settings import Settings
from megatron_tiedlora.planning import memory, report
from megatron_tiedlora.planning import run_plan as plan
from megatron_tiedlora.planning.machines import CPU
from megatron_tiedlora.planning.passes import saved_per_token
from megatron_tiedlora.planning.run_plan import RunPlan, plan_run


def planned(*flags: str, ranks: int = 1, model: str = "llama2-7b", num_blocks: int | None = None) -> RunPlan:
    """The plan of a dry run of a preset, or of a shorter one."""
    settings = parse_settings([f"--model={model}", "--dry_run", *flags], Settings)
    source = None if num_blocks is None else short(model, num_blocks)
    return plan_run(settings, rank=0, world_size=ranks, weights=False, source=source)


# For GPUs or for CPUs -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("flags", "here", "on_gpu"), [
    ((), False, False), ((), True, True), (("--plan_for=gpu",), False, True), (("--plan_for=cpu",), True, False),
])  # fmt: skip
def test_a_plan_is_for_what_is_here_or_for_what_is_asked(
    monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...], here: bool, on_gpu: bool
) -> None:
    monkeypatch.setattr(plan, "uses_gpu", lambda: here)
    found = planned(*flags)
    assert found.on_gpu == on_gpu
    assert found.layout.pad_multiple == (128 if on_gpu else 8)
    assert found.batches.micro_batch_size == (2 if on_gpu else 1)


def test_only_a_dry_run_plans_for_another_machine() -> None:
    with pytest.raises(UserError, match="--plan_for needs --dry_run"):
        parse_settings(["--plan_for=gpu"], Settings)


@pytest.mark.parametrize(("parts", "on_cpu", "on_gpu"), [(1, 8, 128), (8, 8, 128), (3, 24, 384), (6, 24, 384)])
def test_lengths_divide_into_parts(parts: int, on_cpu: int, on_gpu: int) -> None:
    layout = replace(planned().layout, tp_size=parts, on_gpu=False)
    assert (layout.pad_multiple, replace(layout, on_gpu=True).pad_multiple) == (on_cpu, on_gpu)
    assert replace(layout, shards_sequences=False).pad_multiple == 8


def test_a_plan_for_gpus_plans_their_caches_and_kernels() -> None:
    """In bf16 a CPU decodes in fp32; in fp32 a GPU's kernel keeps keys and values for every query head."""
    caches = [
        memory.cache_bytes(planned(f"--plan_for={what}", "--dtype=bf16").stage, sequences=4, tokens=100)
        for what in ("cpu", "gpu")
    ]
    assert caches[0] == 2 * caches[1]
    plans = {
        (what, dtype): planned(f"--plan_for={what}", f"--dtype={dtype}", model="llama2-70b")
        for what in ("cpu", "gpu")
        for dtype in ("bf16", "fp32")
    }
    saved = {key: saved_per_token(found.source.shape, found.layout) for key, found in plans.items()}
    assert saved["gpu", "bf16"] == saved["cpu", "bf16"]
    assert saved["gpu", "fp32"] - saved["cpu", "fp32"] == 2 * 64 * 128 * 4


# Micro-batches of 8,192 packed tokens ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "ranks", "rows", "steps"),
    [
        ((), 1, 2, 128),
        (("--max_length=512",), 1, 16, 16),
        (("--max_length=3000",), 1, 2, 128),
        (("--max_length=512", "--global_batch_size=24"), 1, 12, 2),  # the largest divisor of a rank's share
        ((), 256, 1, 1),  # where the global batch has no more samples
        (("--packing=false",), 1, 1, 256),
        (("--micro_batch_size=4",), 1, 4, 64),  # what a user says wins
        (("--pipeline_parallel=2", "--ds_config=zero1.json"), 2, 2, 128),
        (("--pipeline_parallel=2", "--ds_config=zero1.json"), 64, 1, 8),  # a pipeline stays as full as it can be
        (("--max_length=512", "--pipeline_parallel=2", "--ds_config=zero1.json"), 32, 2, 8),
    ],
)
def test_micro_batches_on_gpus(flags: tuple[str, ...], ranks: int, rows: int, steps: int) -> None:
    batches = planned("--plan_for=gpu", *flags, ranks=ranks).batches
    assert (batches.micro_batch_size, batches.accumulation_steps) == (rows, steps)


def test_what_was_chosen_is_told() -> None:
    why = "up to 2 rows (for 8,192 tokens on a GPU; --micro_batch_size changes it), 1 data-parallel"
    assert why in planned("--plan_for=gpu").batches_in_words
    short = "one row (for 8,192 tokens on a GPU more are needed, but a rank's share of 127 allows no more"
    assert short in planned("--plan_for=gpu", "--global_batch_size=635", "--max_length=500", ranks=5).batches_in_words
    for flags in (("--plan_for=cpu",), ("--plan_for=gpu", "--micro_batch_size=2"), ("--plan_for=gpu", "--packing=0")):
        assert "on a GPU" not in planned(*flags).batches_in_words
    text = report.dry_run_report(parse_settings(["--model=llama2-7b", "--dry_run", "--plan_for=gpu"], Settings)).text
    assert why in text and "micro-batches of up to 2 x 4096 tokens, on GPUs" in text


def test_defaults_on_cpus_are_as_they_were() -> None:
    assert planned("--plan_for=cpu").batches.micro_batch_size == 1
    assert planned("--plan_for=cpu", "--task=demo").batches.micro_batch_size == 4
    assert default_rows(max_length=512, packing=True, on_gpu=False, otherwise=4) == 4
    assert plan_batches(24, None, 1, max_rows=4).micro_batch_size == 4


# Memory ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recompute", "rows", "length", "compiled", "eager"),
    [  # GB that PyTorch's allocator gave out in a step, torch 2.11: `python tests/null_gpu/null_gpu_figures.py planned`
        ("full", 8, 4096, 27.10, 27.38),
        ("selective", 4, 4096, 41.34, 41.61),
        ("none", 2, 2048, 26.09, 26.36),
        ("none", 4, 2048, 38.63, 38.91),
    ],
)
def test_planned_memory_is_what_a_step_allocates(
    recompute: str, rows: int, length: int, compiled: float, eager: float
) -> None:
    for compile_, measured in (("true", compiled), ("false", eager)):
        found = planned("--plan_for=gpu", f"--recompute={recompute}", f"--compile={compile_}", "--ds_config=zero1.json")
        needed = stage_memory(found.stage, tokens=rows * length)
        assert needed.allocated / 1e9 == pytest.approx(measured, rel=0.012)
        assert needed.libraries == H100["context"]  # one rank sends nothing
        assert needed.total - needed.allocated == pytest.approx(needed.libraries + H100["slack"] * needed.allocated)


def blocks_of_7b(num_blocks: int, *flags: str, ranks: int = 1) -> RunPlan:
    """The plan of a shorter llama2-7b, compiled, on GPUs."""
    return planned("--plan_for=gpu", "--compile=true", *flags, ranks=ranks, num_blocks=num_blocks)


@pytest.mark.parametrize(
    ("num_blocks", "flags", "documents", "measured"),
    [  # GB, as above; micro-batches of 4,096 tokens
        (8, ("--recompute=none",), 1, 7.20),
        (8, ("--recompute=none",), 128, 7.19),
        (8, ("--recompute=none",), 256, 7.463),
        (8, ("--recompute=full",), 256, 5.022),
        (8, ("--recompute=selective",), 256, 6.200),
        (4, ("--dtype=fp32",), 256, 7.968),
    ],
)
def test_planned_memory_of_many_documents(
    num_blocks: int, flags: tuple[str, ...], documents: int, measured: float
) -> None:
    """Attention's workspace is what a step needs most of from documents of about 20 tokens on."""
    found = blocks_of_7b(num_blocks, "--ds_config=zero1.json", *flags)
    needed = stage_memory(found.stage, tokens=4096, documents=documents, longest=4096 // documents)
    assert needed.allocated / 1e9 == pytest.approx(measured, rel=0.016)


def test_attention_in_fp32_keeps_rows_as_long_as_the_longest_document() -> None:
    found = blocks_of_7b(2, "--dtype=fp32")
    even, uneven = (
        memory.attention_memory(found.stage, memory.LargestMicroBatch(4096, 64, longest)) for longest in (64, 2048)
    )
    assert even[0] == 0 and uneven[0] == 4 * 32 * (64 * 2048 - 4096)
    assert uneven[1] - even[1] == 4 * 4096 * (64 * 2048 - 4096)


def test_sums_in_one_order_take_more_workspace() -> None:
    """A copy of the fp32 gradient of the queries for each part of the keys: 132 multiprocessors over 32 heads."""
    plans = [blocks_of_7b(2, *flags) for flags in ((), ("--deterministic",))]
    plain, ordered = (
        memory.attention_memory(found.stage, memory.LargestMicroBatch(4096, 1, 4096))[1] for found in plans
    )
    assert ordered - plain == 4 * 4 * 32 * (4096 + 128) * 128


def test_weights_that_zero_3_gathers_are_planned() -> None:
    """GB, as above: 4 blocks are gathered whole, of 12 a thousand million numbers and a weight."""
    for num_blocks, measured in ((4, 3.420), (12, 5.328)):
        found = blocks_of_7b(num_blocks, "--ds_config=zero3.json", ranks=8)
        needed = stage_memory(found.stage, tokens=2048)
        assert needed.allocated / 1e9 == pytest.approx(measured, rel=0.03)
    # An MLP reads the weights of its linears itself, so it is gathered at once.
    mlp, most = 3 * 4096 * 11008, needed.engine / 2 - found.layout.live_parameters
    assert most == mlp
    alone = blocks_of_7b(4, "--ds_config=zero3.json")
    assert stage_memory(alone.stage, tokens=2048).engine == 0  # measured: 3.137, planned 3.148


@pytest.mark.parametrize(
    ("tp", "pp", "dp", "counts"),
    [(1, 1, 1, [0]), (1, 1, 4, [1]), (8, 1, 1, [2]), (1, 4, 1, [5, 6, 6, 5]), (8, 2, 32, [8, 8]), (2, 1, 2, [4])],
)
def test_communicators(tp: int, pp: int, dp: int, counts: list[int]) -> None:
    layout = (f"--tensor_parallel={tp}", f"--pipeline_parallel={pp}", "--ds_config=zero1.json")
    on_gpu, on_cpu = (planned(f"--plan_for={kind}", *layout, ranks=tp * pp * dp) for kind in ("gpu", "cpu"))
    assert [memory.num_communicators(stage) for stage in on_gpu.stages] == counts
    for stage, other, count in zip(on_gpu.stages, on_cpu.stages, counts, strict=True):
        found = stage_memory(stage, tokens=4096).libraries
        assert found == H100["context"] + count * H100["communicator"]
        assert stage_memory(other, tokens=4096).libraries == CPU["context"], "what an idle process holds"


@pytest.mark.distributed
def test_a_deterministic_run_on_a_cpu_is_the_run(base: Base, tmp_path: Path) -> None:
    for folder in ("with", "without"):
        run(base, tmp_path / folder, ranks=2, max_steps=4, deterministic=folder == "with")
    assert_same_run(tmp_path / "without", tmp_path / "with")
    assert "deterministic: true" in (tmp_path / "with" / "run.yaml").read_text()
