"""Checks memory: compares the allocated memory of training steps with the dry run's plan and the reserved memory."""

from collections.abc import Mapping

import numpy as np
import pytest
import torch

from megatron_tiedlora.base.messages import bytes_in_words
from megatron_tiedlora.selfcheck import parts, running

pytestmark = pytest.mark.gpu

# Relative to the plan. A plan that is too low accepts runs that do not fit; one that is too high rejects runs that do.
CLOSE, TOO_MUCH = 0.07, 1.15
RECOMPUTES = {"none": 1, "selective": 2, "full": 4}  # rows of 4,096 tokens; more rows if fewer activations are saved
LENGTH = 4096
NUM_STEPS, ROWS, SHORTEST = 100, 4, 128
MOST_RESERVED = 1.3  # relative to the allocated memory
PLAN_FIX = "the dry run's memory plan is wrong for this GPU: leave this difference free, and report this table"
FRAGMENTS_FIX = (
    "export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True (the default of tiedlora train), and make sure that"
    " nothing overrides it"
)


@pytest.mark.parametrize("how", RECOMPUTES)
@pytest.mark.parametrize("compiles", ["auto", "false"], ids=["compiled", "eager"])
def test_plan(compiles: str, how: str, gpu: torch.device, model: str, tell: parts.Tell) -> None:
    """Check that training steps allocate about as many bytes as the dry run plans."""
    rows = RECOMPUTES[how]
    flags = (f"--rows={rows}", f"--length={LENGTH}", "--supervised=1", f"--recompute={how}", f"--compile={compiles}")
    with running.started_to_fit(model, flags, "--micro_batches=1") as (run, layers):
        torch.cuda.reset_peak_memory_stats()
        for _ in range(3):
            run.take(next(run.loader))
        planned, allocated = running.planned_bytes(run.plan), torch.cuda.max_memory_allocated()
        reserved = torch.cuda.max_memory_reserved()
    judge_plan(tell, layers, {"planned": planned, "allocated": allocated, "reserved": reserved})


def judge_plan(tell: parts.Tell, layers: int, sizes: Mapping[str, float]) -> None:
    """Compare the allocated bytes with the planned bytes, and warn or fail if they differ too much."""
    _tell_sizes(tell, layers, sizes)
    ratio = sizes["allocated"] / sizes["planned"]
    tell("allocated per planned", ratio)
    assert ratio <= TOO_MUCH, PLAN_FIX
    parts.warn_unless(abs(ratio - 1) <= CLOSE, tell, PLAN_FIX)


def test_rows_of_many_lengths(gpu: torch.device, model: str, tell: parts.Tell) -> None:
    """Compare reserved and allocated bytes over 100 micro-batches of 4 samples with 128 to 2,048 tokens each."""
    flags = (f"--rows={ROWS}", "--length=2048", "--supervised=1", "--micro_batches=1")
    with running.started_to_fit(model, flags, "--compile=false") as (run, layers):
        torch.cuda.reset_peak_memory_stats()
        draw = np.random.default_rng(0)
        loader = running.loader_of(run, draw.integers(SHORTEST, run.plan.settings.max_length + 1, NUM_STEPS * ROWS))
        for _ in range(NUM_STEPS):
            run.take(next(loader))
        allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    _tell_sizes(tell, layers, {"allocated": allocated, "reserved": reserved})
    tell("reserved per allocated", reserved / allocated)
    parts.warn_unless(reserved / allocated <= MOST_RESERVED, tell, FRAGMENTS_FIX)


def _tell_sizes(tell: parts.Tell, layers: int, sizes: Mapping[str, float]) -> None:
    tell("layers", layers)
    for name, size in sizes.items():
        tell(name, bytes_in_words(size))
