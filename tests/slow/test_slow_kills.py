"""Series of SIGKILLs at random moments, each resumed: none costs more than one step, changes a bit or leaves a file.

Six are of twelve kills of a run of one adapter, in five layouts, five of eight kills of a run of three adapters, and
one of twenty kills while a start tokenises.

make test PYTEST_ARGS="-m slow -s" TESTS=tests/slow/test_slow_kills.py
"""

from __future__ import annotations

import random
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.kill_series import Layout, kill_series
from support.run_files import files_of
from support.run_helpers import Base, World, start_ranks, write_rows
from support.run_preludes import quick_start

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

TOKENISING_KILLS = 20


@pytest.mark.parametrize("name", [*SERIES, *GROUPS])
def test_kills_lose_no_more_than_a_step(base: Base, tmp_path: Path, name: str) -> None:
    """Of all ranks or of one; in steps, within saves, and after the last step.

    Of a run of three adapters between the saves of two of them, and between two exports, too.
    """
    layout, seed = (SERIES | GROUPS)[name]
    number = len(KINDS) if name in SERIES else 6
    kinds = random.Random(seed).sample(KINDS, number) + ENDS
    figures = kill_series(base, tmp_path, layout, kinds=kinds, seed=seed)
    assert figures.kills.total() == number + len(ENDS)
    assert name in GROUPS or figures.kills["in a save"] > 0, "no kill came within a save"
    counts = ", ".join(f"{count} {where}" for where, count in figures.kills.most_common())
    print(f"\n{name}: {counts}; slowest end {figures.slowest_end:.1f} s, {figures.seconds:.0f} s in all")


def test_twenty_kills_in_tokenising_leave_nothing(base: Base, tmp_path: Path) -> None:
    """Every other time the next start waits already for the one that is killed."""
    larger = replace(base, train=write_rows(tmp_path / "train.jsonl", 40_000, seed=3))
    draw, killed, waiting = random.Random(41), 0, 0
    tokens = tmp_path / "cache" / "tokens"

    def start(name: str) -> World:
        arguments = larger.arguments(output_dir=tmp_path / name, max_steps=1, warmup_steps=0, resume="auto")
        return start_ranks(arguments, folder=tmp_path / "work" / name, cache=tmp_path / "cache", prelude=quick_start)

    def wait_for(condition: Callable[[], bool], world: World) -> float:
        while not condition() and world.processes[0].exitcode is None:
            time.sleep(0.001)
        return time.monotonic()

    first = start("whole")
    begun = wait_for(lambda: any(tokens.glob(".*.partial")), first)
    seconds = wait_for(lambda: len(list(tokens.glob("*/content.json"))) == 3, first) - begun
    first.wait().expect(0)
    whole, left_folders = files_of(tokens), 0
    assert len([name for name in whole if name.endswith("content.json")]) == 3
    while killed < TOKENISING_KILLS:
        shutil.rmtree(tokens)
        world = start("killed")
        second = start(f"again{killed}") if killed % 2 else None
        wait_for(lambda: any(tokens.glob(".*.partial")), world)
        time.sleep(draw.uniform(0.0, seconds))
        in_files = bool(list(tokens.glob(".*.partial/.writing-*")))
        with suppress(ProcessLookupError):  # it is over
            world.signal(signal.SIGKILL)
        statuses = world.wait().statuses
        (second or start(f"again{killed}")).wait().expect(0)
        if statuses == [0]:  # a moment too late
            continue
        assert statuses == [-signal.SIGKILL]
        killed, left_folders, waiting = killed + 1, left_folders + in_files, waiting + (second is not None)
        assert files_of(tokens) == whole, f"kill {killed}"
        assert {path.name for path in tokens.iterdir()} == {Path(name).parts[0] for name in whole}
    assert left_folders > TOKENISING_KILLS // 2, "most kills came too late"
    print(f"\n{killed} kills in {seconds:.1f} s of tokenising, {left_folders} within files, {waiting} awaited")
