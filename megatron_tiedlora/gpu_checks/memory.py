"""Part memory: what steps allocate compared with the dry run's plan, and what rows of varying lengths reserve."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from megatron_tiedlora.base.wording import bytes_in_words
from megatron_tiedlora.gpu_checks.package import planned_bytes
from megatron_tiedlora.gpu_checks.records import CheckOptions, Report
from megatron_tiedlora.gpu_checks.running import layers_that_fit, loader_of, release, started, step_settings

# Relative to the plan: too low a plan accepts a run that does not fit, too high a plan rejects one that does.
CLOSE, TOO_MUCH = 0.07, 1.15
RECOMPUTES = {"none": 1, "selective": 2, "full": 4}  # rows of 4,096 tokens, more if fewer activations are saved
LENGTH, MOST_LAYERS = 4096, 8
NUM_STEPS, ROWS, SHORTEST = 100, 4, 128
MOST_RESERVED = 1.3  # relative to the allocated memory
PLAN_FIX = "the dry run's figures are wrong for this GPU: leave that much memory free, and report this table"
FRAGMENTS_FIX = (
    "export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True (the default of tiedlora train), and make sure that"
    " nothing overrides it"
)


def check(report: Report, options: CheckOptions) -> None:
    """Run the part; it needs a GPU, whose allocator it checks."""
    if not options.on_gpu:
        report.skip("memory", "tiedlora bench measures a CPU's memory")
        return
    for compiles, kernels in (("auto", "compiled"), ("false", "eager")):
        for how, rows in RECOMPUTES.items():
            label = f"{rows} x {LENGTH} tokens, recompute {how}, {kernels}"
            with report.attempt(label):
                flags = (f"--rows={rows}", f"--length={LENGTH}", f"--recompute={how}", f"--compile={compiles}")
                _beside_plan(report, label, options.model, flags)
            release()
    label = f"{NUM_STEPS} micro-batches of {ROWS} x {SHORTEST} to 2,048 tokens"
    with report.attempt(label):
        _fragments(report, label, options.model)


def _beside_plan(report: Report, label: str, model: str, flags: tuple[str, ...]) -> None:
    layers = min(MOST_LAYERS, layers_that_fit(model, *flags, "--supervised=1"))
    with started(step_settings(model, *flags, "--supervised=1", f"--num_layers={layers}", "--micro_batches=1")) as run:
        torch.cuda.reset_peak_memory_stats()
        for _ in range(3):
            run.take(next(run.loader))
        planned, allocated = planned_bytes(run.plan), torch.cuda.max_memory_allocated()
        reserved = torch.cuda.max_memory_reserved()
    sizes = {"planned": planned, "allocated": allocated, "reserved": reserved}
    ratio = allocated / planned
    report.expect(
        f"{label}: allocated per planned",
        abs(ratio - 1) <= CLOSE,
        ratio,
        expected=f"within {CLOSE:.0%} of 1",
        otherwise="fail" if ratio > TOO_MUCH else "warn",
        why=_words(layers, sizes),
        fix=PLAN_FIX,
    )


def _fragments(report: Report, label: str, model: str) -> None:
    flags = (f"--rows={ROWS}", "--length=2048", "--supervised=1", "--micro_batches=1")
    layers = min(MOST_LAYERS, layers_that_fit(model, *flags))
    with started(step_settings(model, *flags, f"--num_layers={layers}", "--compile=false")) as run:
        torch.cuda.reset_peak_memory_stats()
        draw = np.random.default_rng(0)
        loader = loader_of(run, draw.integers(SHORTEST, run.plan.settings.max_length + 1, NUM_STEPS * ROWS))
        for _ in range(NUM_STEPS):
            run.take(next(loader))
        allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    report.at_most(
        f"{label}: reserved per allocated",
        reserved / allocated,
        MOST_RESERVED,
        why=_words(layers, {"allocated": allocated, "reserved": reserved}),
        fix=FRAGMENTS_FIX,
        otherwise="warn",
    )


def _words(layers: int, sizes: Mapping[str, float]) -> str:
    return f"{layers} layers; " + ", ".join(f"{bytes_in_words(size)} {name}" for name, size in sizes.items())
