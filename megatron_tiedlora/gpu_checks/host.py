"""Part host: launches and waits per micro-batch, and up to how many tokens the GPU waits for the host."""

from __future__ import annotations

import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from megatron_tiedlora.adapters.adapter_bank import ONLY
from megatron_tiedlora.benchmark.layout import Started
from megatron_tiedlora.benchmark.timing import profiled
from megatron_tiedlora.data.loader import TrainingStep
from megatron_tiedlora.data.shared import shared_micro_batch
from megatron_tiedlora.gpu_checks.records import CheckOptions, Report
from megatron_tiedlora.gpu_checks.running import layers_that_fit, loader_of, release, started, step_settings

MICRO_BATCHES = 2  # per step
LENGTHS = (256, 512, 1024, 2048, 4096)
REPEATS = 5
MOST_LAYERS = 8
BOUND = 1.1  # the GPU waits for the host if a micro-batch takes at most this multiple of the shortest one's time
SYNC_FIX = "a wait in a micro-batch leaves the GPU idle: report these lines"


def check(report: Report, options: CheckOptions) -> None:
    """All of the part; needs a GPU."""
    if not options.on_gpu:
        report.skip("launches and waits", "there is no GPU to wait for")
        return
    flags = ("--rows=1", f"--length={LENGTHS[-1]}", "--supervised=1", f"--micro_batches={MICRO_BATCHES}")
    for compiles, name in (("auto", "compiled"), ("false", "eager")):
        with report.attempt(name):
            layers = min(MOST_LAYERS, layers_that_fit(options.model, *flags))
            named = (*flags, f"--num_layers={layers}", f"--compile={compiles}")
            with started(step_settings(options.model, *named)) as run:
                loaders = {length: loader_of(run, np.full(MICRO_BATCHES, length)) for length in LENGTHS}
                for loader in (*loaders.values(), *loaders.values()):
                    run.take(next(loader))
                _counts(report, name, run, loaders[LENGTHS[-1]], layers)
                taken = {
                    length: median(_seconds(run, loader) for _ in range(REPEATS)) for length, loader in loaders.items()
                }
            _knee(report, name, taken, layers)
        release()


def micro_batches(run: Started, step: TrainingStep) -> Callable[[], Any]:
    """Only the forward and backward passes of a step."""
    inputs = [shared_micro_batch([(ONLY, batch)]) for batch in step.micro_batches]
    return lambda: run.runner.accumulate(inputs, {ONLY: (float(step.num_supervised),)}, lambda: None)


def use_up(run: Started) -> None:
    """Take a step with the gradients that there are, as an engine expects."""
    run.runner.optimizers.take(ONLY, 0.0)
    run.runner.optimizers.clear()


def _seconds(run: Started, loader: Iterator[TrainingStep]) -> float:
    """Seconds of one micro-batch in a step of several, until the GPU has finished."""
    step = next(loader)
    work = micro_batches(run, step)
    torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    torch.cuda.synchronize()
    taken = (time.perf_counter() - began) / len(step.micro_batches)
    use_up(run)
    return taken


def _knee(report: Report, name: str, taken: dict[int, float], layers: int) -> None:
    """The host's own time, and from how many tokens the GPU is slower than the host."""
    floor = min(taken.values())
    for length, seconds in taken.items():
        report.tell(f"{name}: micro-batch of {length:,} tokens", 1e3 * seconds, "ms", why=f"{layers} layers")
    report.tell(f"{name}: host, at least", 1e3 * floor / layers, "ms per layer and micro-batch")
    bound = [length for length, seconds in taken.items() if seconds <= BOUND * floor]
    report.tell(
        f"{name}: the GPU waits for the host up to",
        max(bound),
        "tokens per micro-batch",
        why="give micro-batches of more tokens (--packing, --max_length, --micro_batch_size)",
    )


def _counts(report: Report, name: str, run: Started, loader: Iterator[TrainingStep], layers: int) -> None:
    """Launches and waits of the micro-batches of one step."""
    step = next(loader)
    work, number = micro_batches(run, step), len(step.micro_batches)
    with waits() as seen:
        work()
    use_up(run)
    # One wait belongs to the step: its loss is read after all micro-batches.
    inside = sum(seen.values()) - 1
    report.at_most(
        f"{name}: waits in {number} micro-batches", inside, 0, why="; ".join(seen), fix=SYNC_FIX, otherwise="warn"
    )
    launches = sum("LaunchKernel" in event.name for event in profiled(micro_batches(run, next(loader))))
    use_up(run)
    if launches:
        report.tell(
            f"{name}: launches per layer and micro-batch", launches / number / layers, why="with head and embedding"
        )
    else:
        report.skip(f"{name}: launches", "torch's profiler saw no launch; CUPTI may not be allowed here")


@contextmanager
def waits() -> Iterator[Counter[str]]:
    """Count where the block waits for the GPU, by line: from torch's warnings and from calls of `synchronize`."""
    seen: Counter[str] = Counter()
    real = torch.cuda.synchronize

    def show(message: Any, category: Any, filename: str, lineno: int, *_: Any) -> None:
        if "called a synchronizing" in str(message):
            seen[_line(filename, lineno)] += 1

    def synchronize(*arguments: Any) -> None:
        caller = sys._getframe(1)
        seen[_line(caller.f_code.co_filename, caller.f_lineno)] += 1
        real(*arguments)

    with (
        warnings.catch_warnings(),
        patch("warnings.showwarning", show),
        patch("torch.cuda.synchronize", synchronize),
    ):
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield seen
        finally:
            torch.cuda.set_sync_debug_mode("default")


def _line(file: str, line: int) -> str:
    return f"{'/'.join(file.split('/')[-2:])}:{line}"
