"""The speed of a run: tokens per second, model FLOPs utilisation (MFU), padding and memory.

    MFU = FLOPs for the samples of a step / (seconds of the step x peak FLOP/s of all ranks)

`planning.passes` counts the FLOPs of real tokens without recompute. Padding, pipeline bubbles and recomputed layers
therefore lower the MFU, and the FLOPs do not depend on the layout. Steps are timed from the first forward pass to the
end of the optimizer step, without evaluations and saves. All amounts follow from the plan of the step, which every rank
has, so nothing is sent and no rank waits for its device.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from megatron_tiedlora.adapters.tied_adapter import AdapterConfig
from megatron_tiedlora.base.shapes import ModelShape
from megatron_tiedlora.data.loader import TrainingStep
from megatron_tiedlora.parallel.agreement import sum_over_ranks
from megatron_tiedlora.planning.machines import listed_peak
from megatron_tiedlora.planning.passes import training_flops
from megatron_tiedlora.planning.run_plan import RunPlan

# Seconds for measuring a peak, approximately, and for a matmul that is long enough to be timed.
_MEASURING, _LONG_MATMUL = 0.25, 0.02
_SMALLEST, _LARGEST = 256, 4096  # rows and columns of such matmuls; three of the largest matrices are 100 MB in bf16

# Sources of a peak.
DATA_SHEET, FASTEST_STEP = "data sheet", "of the fastest step: matmuls were measured slower before it"


class Peak(NamedTuple):
    """FLOP/s of plain matmuls, and the source of the figure."""

    flops_per_second: float
    source: str


class _Work(NamedTuple):
    """The amounts of work in some steps."""

    tokens: float
    supervised: float
    positions: float
    flops: float
    seconds: float


@dataclass
class Meter:
    """Rates of each step, and of all steps of this start except the first, which warms up.

    A step that computes faster than a measured peak is itself a better measurement of it.

    Attributes:
        peak: of all ranks together.
        steps: (first, last) step of the mean; None before the second step.
    """

    config: ModelShape
    adapter: AdapterConfig
    peak: Peak
    steps: tuple[int, int] | None = None
    _is_warm: bool = False
    _total: _Work | None = None

    def add(self, number: int, step: TrainingStep, seconds: float) -> dict[str, float]:
        """Count step `number`, which took `seconds`; returns its rates by their keys in metrics.jsonl."""
        flops = training_flops(self.config, self.adapter, step)
        if flops > seconds * self.peak.flops_per_second and self.peak.source != DATA_SHEET:
            self.peak = Peak(flops / seconds, FASTEST_STEP)
        work = _Work(step.num_tokens, step.num_supervised, step.num_positions, flops, seconds)
        if self._is_warm:
            self._total = work if self._total is None else _Work(*map(sum, zip(self._total, work, strict=True)))
            self.steps = (number if self.steps is None else self.steps[0], number)
        self._is_warm = True
        return self._rates(work)

    def mean(self) -> dict[str, float] | None:
        """The mean rates of the counted steps; None if there are none."""
        return None if self._total is None else self._rates(self._total)

    def _rates(self, work: _Work) -> dict[str, float]:
        return {
            "tokens_per_second": work.tokens / work.seconds,
            "supervised_tokens_per_second": work.supervised / work.seconds,
            "mfu": work.flops / work.seconds / self.peak.flops_per_second,
            "padding": 1 - work.tokens / work.positions,
        }


def start_meter(plan: RunPlan, device: torch.device) -> Meter:
    """A meter for the run. All ranks call it, each with its own device's peak.

    Ranks that share a processor measure at the same time, so each measures about its share.
    """
    sum_over_ranks([0.0])  # start together
    mine = find_peak(device, plan.dtype)
    total = sum_over_ranks([mine.flops_per_second])[0]
    return Meter(plan.source.shape, plan.adapter, Peak(total, mine.source))


def find_peak(device: torch.device, dtype: torch.dtype) -> Peak:
    """The peak of one device for matmuls in this dtype: from the data sheet if its name is known, else measured.

    Other devices are measured, and so is fp32, whose rate depends on whether TF32 is allowed.
    """
    if device.type == "cuda" and dtype == torch.bfloat16:
        listed = listed_peak(torch.cuda.get_device_name(device))
        if listed is not None:
            return Peak(listed, DATA_SHEET)
    return Peak(measured_peak(device, dtype), "measured")


def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of square matmuls, whose size grows until they can be timed well; the best rate seen."""
    best, size, started = 0.0, _SMALLEST, time.perf_counter()
    while best == 0 or time.perf_counter() - started < _MEASURING:
        best = max(best, matmul_rate(size, size, size, dtype=dtype, device=device, repeats=2))
        if 2 * size**3 / best < _LONG_MATMUL:
            size = min(2 * size, _LARGEST)
    return best


def matmul_rate(
    rows: int, inner: int, columns: int, *, dtype: torch.dtype, device: torch.device, repeats: int
) -> float:
    """FLOP/s of a plain matmul, (rows, inner) by (columns, inner) transposed; the best of `repeats`."""
    draw = torch.Generator(device).manual_seed(0)  # the run's own random stream is not advanced
    left, right = (torch.randn(size, inner, generator=draw, device=device, dtype=dtype) for size in (rows, columns))
    product = left.new_empty(rows, columns)
    with torch.no_grad():
        taken = [timed(lambda: torch.mm(left, right.t(), out=product), device) for _ in range(repeats)]
    return 2 * rows * inner * columns / min(taken)


def timed(step: Callable[[], object], device: torch.device) -> float:
    """The seconds that one call of `step` takes, until the device has finished."""
    started = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def peak_memory_bytes(device: torch.device) -> int:
    """The peak memory of this process: allocated by torch on CUDA, else resident."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    most = resident_bytes("VmHWM")
    if most is not None:
        return most
    # This counter starts at what the launcher held when it started this process, so it is the last resort.
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024  # macOS counts in bytes


def resident_bytes(name: str) -> int | None:
    """VmRSS (current) or VmHWM (peak) of this process in bytes; None if the system does not tell (only Linux does)."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    found = next((line.split()[1] for line in lines if line.startswith(name)), None)
    return None if found is None else int(found) * 1024
