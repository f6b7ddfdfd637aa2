"""Fifty SIGKILLs at random moments of a run that saves after every step: none costs more than one step."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pytest
from run_files import assert_same_run
from run_helpers import Base, World, run, start_ranks, wait_for, write_base

from megatron_tiedlora.checkpoint.native_adapter import load_adapter
from megatron_tiedlora.checkpoint.resume import latest_checkpoint, load_checkpoint

pytestmark = [pytest.mark.distributed, pytest.mark.slow, pytest.mark.timeout(1800)]
KILLS, SAVE_INTERVAL, SEED = 50, 1, 20
LONGEST = 1.2  # seconds of training before a kill
SETTINGS = {
    "ranks": 2,
    "tensor_parallel": 2,
    "ds_config": "zero1.json",
    "max_steps": 150,
    "eval_interval": 10,
    "save_interval": SAVE_INTERVAL,
}


def test_fifty_kills_lose_no_more_than_the_save_interval(tmp_path: Path) -> None:
    """Of all ranks or of one; in steps, in saves, and before the first step. A run that is over starts anew."""
    base, draw = write_base(tmp_path / "base"), random.Random(SEED)
    whole, runs = tmp_path / "whole", [tmp_path / "run0"]
    run(base, whole, **SETTINGS)
    kills, in_saves, started = 0, 0, time.monotonic()
    while kills < KILLS:
        world = _start(base, runs[-1])
        early = draw.random() < 0.2
        _train_for(world, runs[-1], -draw.uniform(0.0, 3.0) if early else draw.uniform(0.0, LONGEST))
        # Before they have met a rank waits for its peers, and it is the launcher that ends it.
        one = None if early else draw.choice((None, None, 0, 1))
        world.signal(signal.SIGKILL, rank=one)
        ended = world.wait()
        if 0 in ended.statuses:  # it was over
            assert_same_run(runs[-1], whole)
            runs.append(tmp_path / f"run{len(runs)}")
            continue
        kills += 1
        assert ended.statuses.count(-signal.SIGKILL) == (2 if one is None else 1), ended.tail()
        in_saves += bool(list(runs[-1].rglob(".writing*")))
        _assert_nothing_lost(runs[-1])
    run(base, runs[-1], resume="auto", **SETTINGS)
    assert_same_run(runs[-1], whole)
    assert in_saves > 0, "no kill came within a save"
    print(f"\n{kills} kills, {in_saves} within a save, {len(runs)} runs, {time.monotonic() - started:.0f} s")


def _start(base: Base, folder: Path) -> World:
    settings = {name: value for name, value in SETTINGS.items() if name != "ranks"}
    arguments = base.arguments(output_dir=folder, resume="auto", **settings)
    return start_ranks(arguments, folder=folder.parent / f"{folder.name}-work", cache=base.cache, ranks=2)


def _train_for(world: World, folder: Path, seconds: float) -> None:
    """Wait until ranks have trained for `seconds`, or are over; negative: that long since their start."""
    wait_for(lambda: all(path.exists() for files in world.files for path in files), "the ranks' first lines")
    before, until = _last_step(folder), time.monotonic() - seconds if seconds < 0 else None
    while (until is None or time.monotonic() < until) and all(p.exitcode is None for p in world.processes):
        if until is None and _last_step(folder) > before:
            until = time.monotonic() + seconds
        time.sleep(0.002)


def _last_step(folder: Path) -> int:
    """The last step in metrics.jsonl; a line may be half written."""
    file = folder / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return sum('"split": "train"' in line for line in lines)


def _assert_nothing_lost(folder: Path) -> None:
    """The checkpoint and the adapter can be read, and the former is of the last logged step but the save interval."""
    if not (folder / "metrics.jsonl").exists():  # it was killed before the run began
        return
    logged = _last_step(folder)
    latest = latest_checkpoint(folder / "checkpoints") if (folder / "checkpoints").exists() else None
    saved = load_checkpoint(latest).progress.step if latest is not None else 0
    assert saved >= logged - SAVE_INTERVAL, f"step {logged} was done, step {saved} was saved"
    if (folder / "adapter").exists():
        load_adapter(folder / "adapter")
    if latest is not None:
        load_adapter(latest)
