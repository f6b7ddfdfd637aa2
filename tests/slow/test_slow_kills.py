"""Series of SIGKILLs at random moments, each resumed: none costs more than one step, changes a bit or leaves a file.

Six are of twelve kills of a run of one adapter, in five layouts, and five of eight kills of a run of three adapters.

make test PYTEST_ARGS="-m slow -s" TESTS=tests/slow/test_slow_kills.py
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from kill_series import Figures, Layout, kill_series
from run_helpers import Base, write_base

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(1800)]

ZERO1 = {"ds_config": "zero1.json"}
TP2 = Layout(2, {"tensor_parallel": 2, **ZERO1})
SERIES: dict[str, tuple[Layout, int]] = {
    "tp2": (TP2, 31),
    "tp2 again": (TP2, 32),
    "dp2 ZeRO-2": (Layout(2, {"ds_config": "zero2.json"}), 33),
    "dp2 ZeRO-3": (Layout(2, {"ds_config": "zero3.json"}), 34),
    "pp2": (Layout(2, {"pipeline_parallel": 2, **ZERO1}), 35),
    "tp2 x dp2": (Layout(4, {"tensor_parallel": 2, **ZERO1}), 36),
}
# What adapters share decides how their gradients are rounded over tensor-parallel ranks, if sequences are sharded; and
# after a kill between two saves they share other micro-batches (docs/many_adapters.md). So either is turned off there.
THREE: dict[str, dict[str, Any]] = {
    "a": {"method": "tl6", "targets": "all"},
    "b": {"method": "lora", "rank": 2, "global_batch_size": 6, "max_steps": 20, "seed": 7},
    "c": {"method": "tl5", "eval_interval": 3, "patience": 3, "learning_rate": 1e-4},
}
RIVALS: dict[str, dict[str, Any]] = {"a": {}, "b": {"learning_rate": 1e-5}, "c": {"method": "vera", "max_steps": 30}}
WHOLE_SEQUENCES = {"tensor_parallel": 2, "sequence_parallel": False}
GROUPS: dict[str, tuple[Layout, int]] = {
    "three": (Layout(1, {}, THREE), 41),
    "three with --halving": (Layout(1, {"halving": True, "micro_batch_size": 1}, RIVALS), 42),
    "three, tp2": (Layout(2, WHOLE_SEQUENCES, THREE), 43),
    "three with --halving, tp2": (Layout(2, {"halving": True, "micro_batch_size": 1, **WHOLE_SEQUENCES}, RIVALS), 44),
    "three, tp2, sequences sharded": (Layout(2, {"tensor_parallel": 2, "share_micro_batches": False}, THREE), 45),
}
KINDS = ["step"] * 7 + ["save"] * 3  # in any order, and then
ENDS = ["end"] * 2


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("name", SERIES)
def test_twelve_kills_lose_no_more_than_a_step(base: Base, tmp_path: Path, name: str) -> None:
    """Of all ranks or of one; in steps, within saves, and after the last step."""
    layout, seed = SERIES[name]
    kinds = random.Random(seed).sample(KINDS, len(KINDS)) + ENDS
    figures = kill_series(base, tmp_path, layout, kinds=kinds, seed=seed)
    assert figures.kills.total() == 12
    assert figures.kills["in a save"] > 0, "no kill came within a save"
    show(name, figures)


@pytest.mark.parametrize("name", GROUPS)
def test_eight_kills_of_a_run_of_three_adapters(base: Base, tmp_path: Path, name: str) -> None:
    """Between the saves of two adapters, and between two exports, too."""
    layout, seed = GROUPS[name]
    kinds = random.Random(seed).sample(KINDS, 6) + ENDS
    figures = kill_series(base, tmp_path, layout, kinds=kinds, seed=seed)
    assert figures.kills.total() == 8
    show(name, figures)


def show(name: str, figures: Figures) -> None:
    """Print what a series came to."""
    counts = ", ".join(f"{count} {where}" for where, count in figures.kills.most_common())
    print(f"\n{name}: {counts}; slowest end {figures.slowest_end:.1f} s, {figures.seconds:.0f} s in all")
