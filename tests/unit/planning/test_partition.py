"""The cut into stages against all cuts there are, and what it makes of real models."""

from __future__ import annotations

import random
from typing import Any

import pytest
from support.planned import all_cuts, cost_key

from megatron_tiedlora.base.presets import PRESETS
from megatron_tiedlora.base.shapes import ModelShape
from megatron_tiedlora.model.families import shape_from_hf
from megatron_tiedlora.model.weights import Stages, layer_costs, partition


def best_cut(costs: tuple[float, ...], num_stages: int) -> Stages:
    """The cut, in which every stage has a block; none that there is would be better."""
    stages, num_layers = partition(costs, num_stages), len(costs)
    assert len(stages) == num_stages
    assert [index for stage in stages for index in stage] == list(range(num_layers))
    for stage in stages:
        assert any(0 < index < num_layers - 1 for index in stage), stages
    least = min(cost_key(costs, cut) for cut in all_cuts(num_layers, num_stages))
    assert cost_key(costs, stages) == least, (costs, stages)
    return stages


@pytest.mark.parametrize("seed", range(12))
def test_no_cut_is_better(seed: int) -> None:
    draw = random.Random(seed)
    for num_layers in range(3, 11):
        for num_stages in range(1, num_layers - 1):
            # Whole numbers, so that sums are exact and ties are ties.
            best_cut(tuple(float(draw.choice((0, 1, 2, 3, 5, 9))) for _ in range(num_layers)), num_stages)


def test_the_most_even_whole_is_not_made_of_the_best_beginnings() -> None:
    """1 | 5 is the better beginning of three stages, but the last costs 6 anyhow, and then 6 | 2 | 3 is more even."""
    assert partition((0.0, 1.0, 5.0, 2.0, 3.0, 5.0, 1.0, 0.0), 4) == (range(3), range(3, 4), range(4, 5), range(5, 8))


def model(name: str, **changes: Any) -> ModelShape:
    return shape_from_hf({**PRESETS[name], **changes})


def num_blocks(stages: Stages, shape: ModelShape) -> list[int]:
    return [sum(0 < index <= shape.num_layers for index in stage) for stage in stages]


def test_costs_are_multiplications_per_token() -> None:
    """LLaMA-2-7B by hand: 4 d^2 + 3 d f for a block's products, s d for causal attention; 70B has an eighth of keys."""
    d, f, length = 4096, 11008, 1024
    products, attention = 4 * d * d + 3 * d * f, length * d
    costs = list(layer_costs(model("llama2-7b"), length=length, first_adapted=3))
    assert costs[0] == 0 and costs[-1] == 2 * 32000 * d and len(costs) == 34
    assert costs[1:3] == [products + attention] * 2
    assert costs[3:-1] == [2 * products + 3 * attention] * 30
    d, f = 8192, 28672
    costs = list(layer_costs(model("llama2-70b"), length=length, first_adapted=1))
    assert costs[1] == 2 * (2 * d * d + 2 * d * 1024 + 3 * d * f) + 3 * length * d
    # Where nothing is trained, nothing has a backward pass: neither a block nor the head.
    costs = list(layer_costs(model("llama2-70b"), length=length, first_adapted=None))
    assert costs[1:-1] == [2 * d * d + 2 * d * 1024 + 3 * d * f + length * d] * 80 and costs[-1] == 32000 * d


@pytest.mark.parametrize(
    ("vocab_size", "num_stages", "expected"),
    [
        (32000, 2, [16, 16]),  # a head of 0.6 blocks
        (32000, 8, [4] * 8),
        (32000, 3, [11, 11, 10]),  # the last stage is one of those with fewer
        (32000, 5, [7, 7, 6, 6, 6]),
        (64000, 2, [17, 15]),  # 1.2 blocks: 17 and 15 + 1.2, not 16 and 16 + 1.2
        (128256, 4, [9, 9, 8, 6]),  # 2.4 blocks, as in Llama 3
        (128256, 8, [5, 5, 4, 4, 4, 4, 4, 2]),  # 2 + 2.4; with 3 it would be the dearest
    ],
)
def test_a_dear_head_takes_layers_off_the_last_stage(vocab_size: int, num_stages: int, expected: list[int]) -> None:
    config = model("llama2-7b", vocab_size=vocab_size)
    stages = partition(layer_costs(config, length=2048, first_adapted=1), num_stages)
    counts = num_blocks(stages, config)
    assert (sorted(counts[:-1]), counts[-1]) == (sorted(expected[:-1]), expected[-1])


@pytest.mark.parametrize("layer", [1, 8, 16, 24, 32])
def test_one_adapted_layer_shifts_the_cut(layer: int) -> None:
    """Nothing below the adapted layer has a backward pass, so the stages of that part take about twice as many."""
    config = model("llama2-7b")
    counts = num_blocks(best_cut(layer_costs(config, length=2048, first_adapted=layer), 4), config)
    if layer == 1:
        assert counts == [8, 8, 8, 8]
    elif layer == 16:
        assert counts[0] > counts[1] > counts[3]
    elif layer == 32:
        assert counts == [8, 9, 9, 6]  # head and adapted layer together cost as much as three that only go forward


@pytest.mark.parametrize("num_stages", [4, 5, 100])
def test_more_stages_than_blocks_are_refused(num_stages: int) -> None:
    with pytest.raises(ValueError, match=f"3 layers cannot be partitioned into {num_stages} stages"):
        partition((0.0, 1.0, 1.0, 1.0, 5.0), num_stages)
    assert partition((0.0, 1.0, 1.0, 1.0, 5.0), 3) == (range(2), range(2, 3), range(3, 5))


def test_neither_embedding_nor_head_stands_alone() -> None:
    """However dear they are."""
    for costs in ((100.0, 1.0, 1.0, 100.0), (0.0, 9.0, 9.0, 100.0), (100.0, 1.0, 1.0, 1.0, 1.0, 0.0)):
        best_cut(costs, 2)
    assert partition((100.0, 1.0, 1.0, 1.0, 1.0, 0.0), 2) == (range(2), range(2, 6))
