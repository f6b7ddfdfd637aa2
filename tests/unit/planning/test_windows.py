"""Windows of attention in plans: the pairs of tokens within them, which the stages, FLOPs and times count."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from support.planned import H100, changed, group_of, short, step_parts

from megatron_tiedlora.adapters.tied_adapter import AdapterConfig, make_adapter_config, targets_of
from megatron_tiedlora.base.presets import PRESETS
from megatron_tiedlora.base.shapes import QKV, AttentionKind, ModelShape, squared_length
from megatron_tiedlora.commands.front import call
from megatron_tiedlora.model.families import shape_from_hf
from megatron_tiedlora.model.weights import layer_costs, partition
from megatron_tiedlora.planning.layout import Layout, plan_stages, shared_shape
from megatron_tiedlora.planning.memory import LargestMicroBatch, attention_memory
from megatron_tiedlora.planning.passes import stage_work, step_flops
from megatron_tiedlora.planning.planned import Planned
from megatron_tiedlora.planning.report import attention_lines
from megatron_tiedlora.planning.step_time import Links

PLAIN = shape_from_hf({**PRESETS["llama2-7b"], "num_hidden_layers": 8})
WINDOWS = (64, 64, None, 64, 64, 64, None, 32)


def windowed(shape: ModelShape, *windows: int | None) -> ModelShape:
    """The model with the window of each block."""
    return replace(shape, kinds=tuple(AttentionKind(shape.heads.rope, window) for window in windows))


def adapter(*layers: int) -> AdapterConfig:
    return make_adapter_config("tl6", rank=8, layers=layers, targets=targets_of(PLAIN, (QKV,)), seed=0)


SHAPE, EVERY = windowed(PLAIN, *WINDOWS), adapter(*range(1, 9))


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 40])
@pytest.mark.parametrize("window", [None, 1, 3, 8, 100])
def test_pairs_are_those_of_the_mask(length: int, window: int | None) -> None:
    """Twice their number, with a half for a token and itself: exactly, where a window begins and ends."""
    query, key = np.mgrid[:length, :length]
    seen = (key <= query) & (query - key < (window or length))
    assert squared_length(length, window) == 2 * seen.sum() - min(length, window or length)


def test_costs_of_layers_are_those_of_their_windows() -> None:
    """LLaMA-2-7B's block with windows: s h becomes w (2 s - w) / s h. A window of the length changes no bit."""
    products, length, width = PLAIN.block.num_weights, 256, 4096
    costs = layer_costs(SHAPE, length=length, first_adapted=3)
    by_window = {None: length * width, 64: 64 * (512 - 64) / 256 * width, 32: 32 * (512 - 32) / 256 * width}
    attention = [by_window[window] for window in WINDOWS]
    assert costs[1:3] == tuple(products + one for one in attention[:2])
    assert costs[3:-1] == tuple(2 * products + 3 * one for one in attention[2:])
    for wide in (windowed(PLAIN, *[256] * 8), windowed(PLAIN, *[None] * 8)):
        assert layer_costs(wide, length=length, first_adapted=3) == layer_costs(PLAIN, length=length, first_adapted=3)


def test_stages_hold_more_blocks_with_windows() -> None:
    """At 128k tokens nearly all of the work is attention without a window."""
    shape = windowed(PLAIN, *[1024] * 6, None, None)
    stages = partition(layer_costs(shape, length=2**17, first_adapted=1), 2)
    assert stages == (range(7), range(7, 10)) and stages == tuple(
        stage.layers for stage in plan_stages(shape, Layout((EVERY,), length=2**17, pp_size=2))
    )


@pytest.mark.parametrize("lengths", [(256,), (256, 40, 64, 65, 1)])
def test_flops_count_each_block_s_window(lengths: tuple[int, ...]) -> None:
    """From the third block on with a backward pass, of twice the FLOPs; all other work is that of no window."""
    own = adapter(3, 4, 8)
    found, plain = (step_flops(shape, own, lengths, 100) for shape in (SHAPE, PLAIN))
    pairs = [sum(squared_length(length, window) for length in lengths) for window in WINDOWS]
    assert found["attention"] == 2 * 4096 * (sum(pairs[:2]) + 3 * sum(pairs[2:])) < plain["attention"]
    assert {**found, "attention": 0} == {**plain, "attention": 0}


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("changes", [{}, {"tp_size": 4}, {"tp_size": 2, "overlap": True}, {"pp_size": 4}])
def test_the_stages_of_a_layout_do_the_work_of_the_step(changes: dict[str, Any], recompute: str) -> None:
    """Ranks share the attention of the step; a recomputed block computes its own window again."""
    layout, lengths = replace(Layout((EVERY,), length=256, rows=2, recompute=recompute), **changes), (250, 99)
    batch = shared_shape(layout, [(0, [np.arange(length) > 0 for length in lengths])])._replace(lengths=lengths)
    works = [stage_work(stage, batch) for stage in plan_stages(SHAPE, layout)]
    once = 2 * 4096 * sum(squared_length(length, window) for length in lengths for window in WINDOWS)
    forward, backward, again = (
        layout.tp_size * sum(work["attention"] for work in passes) for passes in zip(*works, strict=True)
    )
    assert (forward, backward) == (once, 2 * once)
    assert again == (once if recompute == "full" else 0)


def test_stages_with_other_windows_take_their_own_time() -> None:
    """Four stages of as many blocks: those with no window in them are slower, in a plan as stage by stage."""
    source = short("llama2-7b", 8)
    source = replace(source, shape=windowed(source.shape, *[1024] * 4, *[None] * 4))
    step = group_of(source, 4, pipeline_parallel=4, ds_config="zero1.json", max_length=8192, global_batch_size=4)
    one = Planned(step=step, layout=step.layout, machine=H100)
    assert one.parts == step_parts(step.stages, step.batches, Links(step.layout, 8), one.machine)
    spent = [stage[step.batches[0]][0].attention for stage in one.parts.stages]
    assert spent[0] < 0.3 * spent[-1]


def test_windows_take_the_time_of_their_kernel() -> None:
    """At 4,096 tokens cuDNN's kernel, and PyTorch's flash kernel for windows; a measured machine has one for both."""
    source = short("llama2-7b", 8)
    source = replace(source, shape=windowed(source.shape, *[1024] * 4, *[None] * 4))
    step = group_of(source, 1, max_length=4096, global_batch_size=1)
    whole, part = (2 * 4096 * 4 * 3 * squared_length(4096, window) for window in (None, 1024))
    for machine, shares in ((step.shared.machine, (0.41, 0.26)), (changed(H100, attention__bf16=0.3), (0.3, 0.3))):
        one = Planned(step=step, layout=step.layout, machine=machine)
        assert one.seconds.attention == pytest.approx((whole / shares[0] + part / shares[1]) / 989.4e12)
        assert step_flops(source.shape, one.layout.adapters[0], (4096,), 1)["attention"] == whole + part
    (line,) = attention_lines(Planned(step=step, layout=step.layout, machine=step.shared.machine), "it")
    assert "cuDNN kernel (0.41 of the peak), which pip install of this project gives, and in windows by" in line
    faster = changed(H100, attention__bf16=0.45)
    rate = Planned(step=step, layout=step.layout, machine=faster).tokens_per_second
    assert line.endswith(f" it would do {rate:,.0f} tokens/s"), "in windows too"


def test_a_run_with_capped_scores_is_planned_by_tiles() -> None:
    """Without flash_attn no kernel has caps: a thirtieth of the peak, and FlashAttention 3 is named as the faster."""
    source = short("llama2-7b", 8)
    block = replace(source.shape.block, heads=replace(source.shape.heads, cap=50.0))
    step = group_of(replace(source, shape=replace(source.shape, block=block)), 1, max_length=4096, global_batch_size=1)
    one = Planned(step=step, layout=step.layout, machine=step.shared.machine)
    assert one.machine["attention.bf16"] == 0.03
    (line,) = attention_lines(one, "it")
    assert "by tiles of queries (0.03 of the peak)" in line and "with FlashAttention 3 (0.45;" in line


@pytest.mark.parametrize("windows", [(None,) * 8, (32,) * 8, (32, None) * 4, (500,) * 8])
def test_tiles_of_windows_are_small(windows: tuple[int | None, ...]) -> None:
    """A tile of 128 queries has as many keys as its longest row of them: 127 more than the window."""
    layout = Layout((EVERY,), length=512, rows=2, compiled=False)
    (stage,) = plan_stages(windowed(PLAIN, *windows), layout)
    keys = {(32,) * 8: 159}.get(windows, 512)
    tile, sums = 2 * 32 * 128 * keys * (4 + 2 * 2 + 4 * 3), 1024 * 4096 * 4 * 3
    assert attention_memory(stage, LargestMicroBatch(1024, 2, 512)) == (0, tile + sums)


def test_tiles_of_capped_scores_need_one_more_while_compiled() -> None:
    """The derivative of the cap reads capped scores again, which a compiler therefore writes to memory."""
    block = replace(PLAIN.block, heads=replace(PLAIN.heads, cap=50.0))
    shapes, largest = (PLAIN, replace(PLAIN, block=block)), LargestMicroBatch(512, 1, 512)
    for compiled, more in ((True, 1), (False, 2)):
        layout = Layout((EVERY,), length=512, rows=1, compiled=compiled)
        plain, capped = (attention_memory(plan_stages(one, layout)[0], largest)[1] for one in shapes)
        assert capped - plain == 32 * 128 * 512 * 4 * more


@pytest.mark.parametrize(
    ("windows", "keys"), [((512, None), 512 + 127), ((2**15, None), 0), ((512, 2**14, None, None), 2**14 + 127)]
)
def test_gpus_compute_tiles_only_within_windows_of_long_rows(windows: tuple[int | None, ...], keys: int) -> None:
    """In fp32, other blocks and shorter rows have PyTorch's memory-efficient kernel; it needs more than small tiles."""
    layout, largest = Layout((EVERY,), length=2**15, dtype=torch.float32, on_gpu=True), LargestMicroBatch(2, 1, 2**15)
    shapes = windowed(PLAIN, *windows * (8 // len(windows))), PLAIN
    needed, plain = (attention_memory(plan_stages(one, layout)[0], largest)[1] for one in shapes)
    assert needed == max(plain, bool(keys) * (32 * 128 * keys * (4 + 2 * 4 + 12) + 2 * 4096 * 4 * 2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("cap", [None, 50.0])
def test_gpus_have_memory_for_tiles_that_no_kernel_replaces(dtype: torch.dtype, cap: float | None) -> None:
    """A cap, or a window in fp32: for long rows tiles of scores need most, and are not compiled."""
    shape = windowed(PLAIN, *[512] * 8)
    shapes = [replace(one, block=replace(one.block, heads=replace(one.heads, cap=cap))) for one in (shape, PLAIN)]
    layout = Layout((EVERY,), length=2**15, dtype=dtype, on_gpu=True)
    largest = LargestMicroBatch(2**15, 1, 2**15)
    needed = [attention_memory(plan_stages(one, layout)[0], largest)[1] for one in shapes]
    by_kernel = attention_memory(plan_stages(PLAIN, layout)[0], largest)[1]
    tiles = [32 * 128 * keys * (4 + 2 * dtype.itemsize + (12 if cap is None else 20)) for keys in (512 + 127, 2**15)]
    sums = 2**15 * 4096 * 4 * (2 + (dtype == torch.bfloat16))
    tiled = cap is not None, cap is not None
    if dtype == torch.float32:
        tiled = True, cap is not None
    expected = [max(by_kernel, one + sums) if so else by_kernel for one, so in zip(tiles, tiled, strict=True)]
    assert needed == expected


# Presets --------------------------------------------------------------------------------------------------------------


def test_gemma_3_27b_at_8k_by_hand() -> None:
    """Five of six of 62 layers attend to 1,024 tokens: 8,192^2 - 7,168^2 instead of 8,192^2, 4,096 numbers each."""
    shape = shape_from_hf(PRESETS["gemma3-27b"])
    own = make_adapter_config("tl6", rank=8, layers=range(1, 63), targets=targets_of(shape, (QKV,)), seed=0)
    flops = step_flops(shape, own, (8192, 8192), 100)
    assert flops["attention"] == 2 * 3 * 2 * 4096 * (52 * (8192**2 - 7168**2) + 10 * 8192**2)


FLASH = "PyTorch's flash kernel"
CUDNN = "PyTorch's cuDNN kernel (0.41 of the peak), which pip install of this project"


@pytest.mark.parametrize(
    ("name", "length", "kernels"),
    [
        ("gemma3-12b", 8192, f"{FLASH} (0.26 of the peak), which"),  # heads of 256
        (
            "gemma3-27b",
            8192,
            f"{CUDNN} gives, and in windows by {FLASH} (0.26); with",
        ),
        ("olmo3-7b", 4096, f"{CUDNN} gives; with"),
        (
            "olmo3-32b",
            8192,
            f"{CUDNN} gives, and in windows by {FLASH} (0.26); with",
        ),
        ("qwen3-14b", 8192, f"{CUDNN} gives; with"),
        ("mistral-small-24b", 8192, f"{CUDNN} gives; with"),
        ("granite-8b", 8192, f"{CUDNN} gives; with"),
    ],
)
def test_presets_are_planned(name: str, length: int, kernels: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A dry run, in a second or two."""
    flags = [f"--max_length={length}", "--tensor_parallel=2", "--world_size=8", "--gpu=h100", "--dry_run"]
    assert call("train", [f"--model={name}", *flags]) == 0
    text = capsys.readouterr().out
    assert f"attention is planned by {kernels}" in text
