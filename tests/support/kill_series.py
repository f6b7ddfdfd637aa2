"""Series of SIGKILLs at random moments of a run, each followed by `--resume auto`; what is lost, and what it ends with.

The run saves after every step, decodes before and after training, and exports: a kill falls into a step, into a save,
or into what comes after the last step.
"""

from __future__ import annotations

import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_tiedlora.checkpoint.native_adapter import load_native_adapter
from megatron_tiedlora.checkpoint.resume import find_newest_checkpoint
from support.run_files import assert_same_run, files_of, status
from support.run_helpers import Base, World, run, start_run
from support.run_preludes import quick_start

STEPS_APART = 6  # at most, of two kills
LONGEST_END = 0.8  # seconds between the last step and a kill after it


@dataclass(frozen=True)
class Layout:
    """How a series trains: ranks, and the settings that say how they share the work.

    Attributes:
        adapters: by name the own settings of each adapter of a run of several; none for a run of one.
    """

    ranks: int
    settings: Mapping[str, Any]
    adapters: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def run_folders(self, run: Path) -> list[Path]:
        """The run folders of the adapters; or that of the run, if there is only one."""
        return [run / name for name in self.adapters] or [run]


@dataclass
class Figures:
    """What a series came to: kills by where they fell, and seconds."""

    kills: Counter[str] = field(default_factory=Counter)
    slowest_end: float = 0.0  # of a rank whose peer was killed
    seconds: float = 0.0


def kill_series(base: Base, folder: Path, layout: Layout, *, kinds: list[str], seed: int) -> Figures:
    """Start, kill, resume; after each kill no more than one step is lost, and the end is that of an undisturbed run.

    Args:
        kinds: where the kills are to fall, in this order: "step", "save" or "end".
    """
    draw, figures, started = random.Random(seed), Figures(), time.monotonic()
    settings = {
        **layout.settings,
        "max_steps": STEPS_APART * len(kinds) + 2,
        "eval_interval": 10,
        "save_interval": 1,
        "test_file": base.validation,
        "max_new_tokens": 12,
        "adapters": layout.adapters or None,
    }
    whole, killed = folder / "whole", folder / "killed"
    runs = layout.run_folders(killed)
    run(base, whole, ranks=layout.ranks, prelude=quick_start, **settings)
    for kind in kinds:
        while True:  # what was over before its kill is started again
            world = start_run(base, killed, ranks=layout.ranks, prelude=quick_start, resume="auto", **settings)
            _wait_for(kind, world, runs, draw, last=int(settings["max_steps"]))
            one = draw.choice([None, *range(layout.ranks)])
            with suppress(ProcessLookupError):  # it may be over
                world.signal(signal.SIGKILL, rank=one)
            signalled = time.monotonic()
            ended = world.wait()
            if -signal.SIGKILL in ended.statuses:
                break
            assert kind == "end", ended.tail()
        figures.slowest_end = max(figures.slowest_end, time.monotonic() - signalled)
        figures.kills[_where(runs, last=int(settings["max_steps"]))] += 1
        if kind != "end":  # there a rank may have been over before
            assert ended.statuses.count(-signal.SIGKILL) == (layout.ranks if one is None else 1), ended.tail()
        for own in runs:
            _assert_nothing_lost(own)
    run(base, killed, ranks=layout.ranks, prelude=quick_start, resume="auto", **settings)
    for own, expected in zip(runs, layout.run_folders(whole), strict=True):
        assert_same_run(own, expected)
        for name in ("adapter", "peft"):
            assert files_of(own / name) == files_of(expected / name), name
    for file in (*whole.rglob("scores.json"), *whole.rglob("halving.json"), *whole.glob("table.csv")):
        assert (killed / file.relative_to(whole)).read_bytes() == file.read_bytes(), file
    ends = [{**status(folder), "step": None} for folder in (killed, whole)]  # turns of all; each adapter's is compared
    assert ends[0] == ends[1]
    assert _names(killed) == _names(whole), "something is left behind"
    figures.seconds = time.monotonic() - started
    return figures


def _names(folder: Path) -> set[str]:
    """Everything in a folder, but for the logs of TensorBoard, of which each start has its own."""
    found = (path for path in folder.rglob("*") if path.parent.name != "tensorboard")
    return {str(path.relative_to(folder)) for path in found}


def _wait_for(kind: str, world: World, runs: list[Path], draw: random.Random, *, last: int) -> None:
    """Wait for a moment of this kind, or until ranks are over; never before they have met: there they wait for long."""
    shown = world.files[0][0]
    _poll(world, lambda: shown.exists() and "\nrun folder " in shown.read_text(errors="replace"))
    target = last if kind == "end" else _last_step(runs) + draw.randint(1, STEPS_APART)
    delay = draw.uniform(0.0, LONGEST_END if kind == "end" else 0.1)
    _poll(world, lambda: _last_step(runs) >= target)
    if kind == "save":
        _poll(world, lambda: any(_unfinished(own / "checkpoints") for own in runs))
    else:
        time.sleep(delay)


def _poll(world: World, condition: Callable[[], bool]) -> None:
    while not condition() and all(process.exitcode is None for process in world.processes):
        time.sleep(0.0005)


def _unfinished(folder: Path) -> list[Path]:
    return list(folder.glob(".writing*"))


def _where(runs: list[Path], *, last: int) -> str:
    if _last_step(runs) >= last:
        return "after the last step"
    saving = any(_unfinished(own) or _unfinished(own / "checkpoints") for own in runs)
    return "in a save" if saving else "in steps"


def _last_step(runs: list[Path]) -> int:
    """The last step in a metrics.jsonl; a line may be half written."""
    files = [own / "metrics.jsonl" for own in runs]
    rows = [file.read_text().splitlines() if file.exists() else [] for file in files]
    return max(sum('"split": "train"' in line for line in lines) for lines in rows)


def _assert_nothing_lost(folder: Path) -> None:
    """The checkpoint and the adapter can be read, and no more than one logged step is not in the former."""
    logged, saved = _last_step([folder]), find_newest_checkpoint(folder / "checkpoints")
    step = saved.progress.step if saved is not None else 0
    assert step >= logged - 1, f"step {logged} was done, step {step} was saved"
    # Between the renames of a checkpoint and of `latest` there is one more, which is not used.
    later = "is later than the checkpoint in latest"
    notes = [] if saved is None else [note for note in saved.notes if later not in note]
    assert not notes, notes
    if (folder / "adapter").exists():
        load_native_adapter(folder / "adapter")
