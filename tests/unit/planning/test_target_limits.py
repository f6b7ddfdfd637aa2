"""Saved bytes and operations of adapters on other linears than QKV: those of the formulas, by counts."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_tiedlora.adapters.tied_adapter import AdapterPart, TiedAdapter, make_adapter_config, targets_of
from megatron_tiedlora.base.shapes import TARGET_NAMES, ModelShape
from megatron_tiedlora.benchmark.timing import saved_by_autograd, storage_bytes
from megatron_tiedlora.model.batch import find_supervised
from megatron_tiedlora.model.families import shape_from_hf
from megatron_tiedlora.model.layer_specs import layer_specs
from megatron_tiedlora.model.stage import Stage
from megatron_tiedlora.parallel.frozen_weight import padded
from megatron_tiedlora.planning.layout import Layout, MicroBatchShape, plan_stages
from megatron_tiedlora.planning.passes import saved_bytes, saved_per_token, step_flops

RANK, ROWS, LENGTH, LAST = 5, 2, 96, 4
SHAPE: ModelShape = shape_from_hf(
    {"model_type": "llama", "vocab_size": 512, "num_key_value_heads": 2, "hidden_size": 96, "intermediate_size": 256}
    | {"num_attention_heads": 6, "num_hidden_layers": LAST}
)
SUBSETS = (*((name,) for name in TARGET_NAMES), ("o_proj", "down_proj"), TARGET_NAMES)
LAYERS = ((1, 2, 3, 4), (2, 4), (4,), (1,))


def stage_of(
    method: str, names: tuple[str, ...], layers: tuple[int, ...], dtype: torch.dtype, recompute: str = "none"
) -> tuple[Stage, Layout]:
    """The model with random weights, and its layout."""
    adapter = make_adapter_config(method, rank=RANK, layers=layers, targets=targets_of(SHAPE, names), seed=0)
    specs = layer_specs(SHAPE, dtype=dtype, recomputes_gate=recompute == "selective")
    stage = Stage(specs, TiedAdapter(AdapterPart.whole(adapter)), recompute=recompute)
    generator = torch.Generator().manual_seed(1)
    for parameter in stage.parameters():
        parameter.data.normal_(0.0, 0.05, generator=generator)
    return stage, Layout((adapter,), length=LENGTH, dtype=dtype, recompute=recompute)


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(tokens, positions, labels); half of the positions have a label."""
    tokens = torch.randint(512, (ROWS, LENGTH), generator=torch.Generator().manual_seed(2))
    labels = tokens.roll(-1, dims=1)
    labels[:, : LENGTH // 2] = -100
    return tokens, torch.arange(LENGTH).expand(ROWS, LENGTH), labels


def saved_cases() -> Iterator[Any]:
    for recompute in ("none", "selective", "full"):
        for method in ("tl6", "tl1", "tl3", "lora"):  # of tl1 F is frozen, of tl3 A
            for names in SUBSETS if method == "tl6" else (("o_proj", "gate_up"), ("down_proj",), TARGET_NAMES):
                yield pytest.param(method, names, recompute, id=f"{method}-{'+'.join(names)}-{recompute}")


@pytest.mark.parametrize(("method", "names", "recompute"), saved_cases())
def test_saved_bytes_are_the_formula_s(method: str, names: tuple[str, ...], recompute: str) -> None:
    """To the byte, but for cos and sin, which attention's layers share, and the 8 bytes of each index."""
    inputs = batch()
    after = len(find_supervised(inputs[2]).rows)
    for index, layers in enumerate(LAYERS):
        dtype = (torch.bfloat16, torch.float32)[index % 2]
        stage, layout = stage_of(method, names, layers, dtype, recompute)
        with saved_by_autograd(stage) as saved:
            stage(*inputs)
        planned = saved_bytes(plan_stages(SHAPE, layout)[0], MicroBatchShape((0,), (ROWS * LENGTH,), (after,), after))
        passes_attention = "qkv" in names or layers[0] < LAST  # the last block's attention has a backward pass
        indices = 8 * after * (passes_attention + (layers[0] < LAST))  # of rows of attention's output, and of hidden's
        in_any = "qkv" in names or layers[0] < LAST
        tables = ROWS * LENGTH * SHAPE.heads.dim * dtype.itemsize if in_any and recompute != "full" else 0
        assert storage_bytes(saved) - planned == indices + tables, layers


@pytest.mark.parametrize("recompute", ["none", "selective"])
def test_a_target_costs_r_numbers_a_token_and_nothing_else(recompute: str) -> None:
    """4 d + 2 k + 2 f + 4 r with all four, and without 2 f and a norm's number where gate and up are recomputed."""
    d, k, f = SHAPE.hidden_size, SHAPE.heads.rows[1], SHAPE.intermediate_size
    _, layout = stage_of("tl6", TARGET_NAMES, LAYERS[0], torch.bfloat16, recompute)
    numbers, scalars = 4 * d + 2 * k + 4 * RANK, 1 + SHAPE.heads.num
    if recompute == "none":
        numbers, scalars = numbers + 2 * f, scalars + 1
    assert saved_per_token(SHAPE, layout) == 2 * numbers + 4 * scalars


def operation_cases() -> Iterator[Any]:
    """All methods, targets and layers, by default a third of them, in which each pair of these occurs."""
    for (i, method), (j, names), (k, layers) in product(
        *map(enumerate, (("tl6", "lora", "vera", "tl1", "tl3"), SUBSETS, LAYERS[:3]))
    ):
        name = f"{method}-{'+'.join(names)}-{''.join(map(str, layers))}"
        yield pytest.param(method, names, layers, id=name, marks=[pytest.mark.slow] if (i + j + k) % 3 else [])


@pytest.mark.parametrize(("method", "names", "layers"), operation_cases())
def test_operations_are_those_of_the_formula(method: str, names: tuple[str, ...], layers: tuple[int, ...]) -> None:
    stage, layout = stage_of(method, names, layers, torch.bfloat16)
    tokens, positions, labels = batch()
    rows = find_supervised(labels)
    with FlopCounterMode(display=False) as counter:
        stage(tokens, positions, labels).backward()
    counts = tokens.numel(), ROWS * LENGTH**2, padded(len(rows.labels))
    flops = step_flops(SHAPE, layout.adapters[0], *counts, num_after=len(rows.rows))
    counted = counter.get_flop_counts()["Global"]
    for operation in (torch.ops.aten.bmm, torch.ops.aten.baddbmm):  # attention's, which a CPU computes in tiles
        counted.pop(operation, None)
    assert sum(counted.values()) == pytest.approx(flops.total() - flops["attention"], rel=1e-3)
