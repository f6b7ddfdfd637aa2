"""Checks the host: counts launches and synchronisations, and finds at which batch sizes the GPU waits for Python."""

import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from megatron_tiedlora.adapters.adapter_groups import ONLY
from megatron_tiedlora.data.loader import TrainingStep, shared_micro_batch
from megatron_tiedlora.selfcheck import parts, running, step_bench, timing
from megatron_tiedlora.training.throughput import timed

pytestmark = pytest.mark.gpu

MICRO_BATCHES = 2  # per step
LENGTHS = (256, 512, 1024, 2048, 4096)
REPEATS = 5
BOUND = 1.1  # the GPU waits for the host if a micro-batch takes at most this multiple of the shortest one's time
SYNC_FIX = "the host waits for the GPU in a micro-batch, so the GPU idles later: report these lines"


@pytest.mark.parametrize("compiles", ["auto", "false"], ids=["compiled", "eager"])
def test_host(compiles: str, gpu: torch.device, model: str, tell: parts.Tell) -> None:
    """Count launches and synchronisations per micro-batch, and time micro-batches of several lengths."""
    flags = ("--rows=1", f"--length={LENGTHS[-1]}", "--supervised=1", f"--micro_batches={MICRO_BATCHES}")
    with running.started_to_fit(model, flags, f"--compile={compiles}") as (run, layers):
        loaders = {length: running.loader_of(run, np.full(MICRO_BATCHES, length)) for length in LENGTHS}
        for loader in (*loaders.values(), *loaders.values()):
            run.take(next(loader))
        _counts(tell, run, loaders[LENGTHS[-1]], layers)
        taken = {length: median(_seconds(run, loader) for _ in range(REPEATS)) for length, loader in loaders.items()}
    floor = min(taken.values())
    for length, seconds in taken.items():
        tell(f"ms of a micro-batch of {length:,} tokens in {layers} layers", 1e3 * seconds)
    tell("the host's ms per layer and micro-batch, at least", 1e3 * floor / layers)
    bound = max(length for length, seconds in taken.items() if seconds <= BOUND * floor)
    tell("tokens of a micro-batch up to which the GPU waits for the host (give more: --packing, --max_length)", bound)


def micro_batches(run: step_bench.Started, step: TrainingStep) -> Callable[[], Any]:
    """Return a function that runs only the forward and backward passes of a step."""
    inputs = [shared_micro_batch([(ONLY, batch)]) for batch in step.micro_batches]
    return lambda: run.runner.accumulate(inputs, {ONLY: (float(step.num_supervised),)}, lambda: None)


def use_up(run: step_bench.Started) -> None:
    """Run the optimizer with the current gradients, and clear them. The engine expects this after a backward pass."""
    run.runner.optimizers.take(ONLY, 0.0)
    run.runner.optimizers.clear([ONLY])


def _seconds(run: step_bench.Started, loader: Iterator[TrainingStep]) -> float:
    """Return the average seconds of a micro-batch of a step, measured until the GPU has finished the step."""
    step = next(loader)
    work = micro_batches(run, step)
    torch.cuda.synchronize()
    taken = timed(work, run.runner.device) / len(step.micro_batches)
    use_up(run)
    return taken


def _counts(tell: parts.Tell, run: step_bench.Started, loader: Iterator[TrainingStep], layers: int) -> None:
    """Record the kernel launches of a step's micro-batches, and how often the host waits for the GPU."""
    step = next(loader)
    work, number = micro_batches(run, step), len(step.micro_batches)
    with waits() as seen:
        work()
    use_up(run)
    # One wait belongs to the step, because its loss is read after all micro-batches.
    inside = sum(seen.values()) - 1
    tell(f"waits in {number} micro-batches", f"{inside} ({', '.join(seen)})")
    parts.warn_unless(inside <= 0, tell, SYNC_FIX)
    launches = sum("LaunchKernel" in event.name for event in timing.profiled(micro_batches(run, next(loader))))
    use_up(run)
    per_layer = launches / number / layers if launches else "unknown: torch's profiler saw none; is CUPTI allowed?"
    tell("launches per layer and micro-batch, with head and embedding", per_layer)


@contextmanager
def waits() -> Iterator[Counter[str]]:
    """Count how often each source line in the block waits for the GPU, by torch's warnings and `synchronize` calls."""
    seen: Counter[str] = Counter()
    real = torch.cuda.synchronize

    def show(message: Any, category: Any, filename: str, lineno: int, *_: Any) -> None:
        if "called a synchronizing" in str(message):
            seen[_line(filename, lineno)] += 1

    def synchronize(*arguments: Any) -> None:
        caller = sys._getframe(1)
        seen[_line(caller.f_code.co_filename, caller.f_lineno)] += 1
        real(*arguments)

    with warnings.catch_warnings(), patch("warnings.showwarning", show), patch("torch.cuda.synchronize", synchronize):
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield seen
        finally:
            torch.cuda.set_sync_debug_mode("default")


def _line(file: str, line: int) -> str:
    return f"{'/'.join(file.split('/')[-2:])}:{line}"
