"""Six series of twelve SIGKILLs at random moments, in five layouts: none costs more than one step, nor changes a bit.

make test PYTEST_ARGS="-m slow -s" TESTS=tests/slow/test_slow_kills.py
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from kill_series import Layout, kill_series
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
    counts = ", ".join(f"{count} {where}" for where, count in figures.kills.most_common())
    print(f"\n{name}: {counts}; slowest end {figures.slowest_end:.1f} s, {figures.seconds:.0f} s in all")
