"""Functions that run in a rank before launch/train.py, to slow it down or to end it at a given point.

As a script it is launch/train.py behind one of them: `run_preludes.py --prelude=slow_steps ARGUMENTS`.
"""

from __future__ import annotations

import functools
import importlib
import os
import runpy
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TRAIN = Path(__file__).resolve().parents[1] / "launch" / "train.py"


def slow_steps() -> None:
    """Every training step takes 0.3 s longer, so that a signal comes between two of them."""
    _before_call("megatron_tiedlora.training.loop", "Trainer._train_step", lambda *_: time.sleep(0.3))


def kill_at_step(step: int, number: int = signal.SIGTERM, *, rank: int | None = None) -> None:
    """The rank (or each) sends itself a signal as soon as it has finished training step `step`."""

    def look(trainer: Any, *_: Any) -> None:
        if trainer.progress.step == step and rank in (None, trainer.plan.grid.rank):
            os.kill(os.getpid(), number)

    _before_call("megatron_tiedlora.training.loop", "Trainer._report", look)


def kill_at_call(module: str, name: str, *, call: int = 1, number: int = signal.SIGKILL) -> None:
    """The rank sends itself a signal when `module.name` is called for the `call`-th time, before it does anything."""
    calls = iter(range(1, call + 1))

    def look(*_: Any) -> None:
        if next(calls, None) == call:
            os.kill(os.getpid(), number)

    _before_call(module, name, look)


def _before_call(module: str, name: str, look: Callable[..., Any]) -> None:
    holder: Any = importlib.import_module(module)
    *path, last = name.split(".")
    for part in path:
        holder = getattr(holder, part)
    original = getattr(holder, last)

    @functools.wraps(original)
    def watched(*positional: Any, **keywords: Any) -> Any:
        look(*positional)
        return original(*positional, **keywords)

    setattr(holder, last, watched)


if __name__ == "__main__":
    chosen = next(argument for argument in sys.argv[1:] if argument.startswith("--prelude="))
    sys.argv = [str(TRAIN), *(argument for argument in sys.argv[1:] if argument != chosen)]
    globals()[chosen.partition("=")[2]]()
    runpy.run_path(str(TRAIN), run_name="__main__")
