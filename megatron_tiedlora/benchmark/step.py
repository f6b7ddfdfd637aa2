"""Measures a step in one process. Our side and those that it is compared with take turns."""

from __future__ import annotations

import statistics
from typing import Any

from megatron_tiedlora.base.base_formats import precision_in_words
from megatron_tiedlora.benchmark.kernel_classes import kernel_seconds
from megatron_tiedlora.benchmark.plan import base_matmul_rate, make_plan, saved_formula
from megatron_tiedlora.benchmark.sides import OURS, make_sides
from megatron_tiedlora.benchmark.timing import describe_setup, in_own_process, peak_of, take_turns
from megatron_tiedlora.config.bench_settings import BenchSettings
from megatron_tiedlora.model.stage import Stage
from megatron_tiedlora.training.plan import RunPlan
from megatron_tiedlora.training.throughput import find_peak


def measure(settings: BenchSettings) -> dict[str, Any]:
    """The report of one process."""
    plan = make_plan(settings)
    makers = make_sides(plan, settings)
    memory = {name: in_own_process(name, memory_of, plan, settings, name) for name in makers}
    sides = {name: make() for name, make in makers.items()}
    seconds = take_turns({name: side.seconds for name, side in sides.items()}, repeats=settings.repeats)
    ours = sides[OURS]
    assert isinstance(ours.model, Stage)
    formula = saved_formula(plan, ours.batches)
    memory[OURS] |= {"saved_formula": formula, "saved_ratio": memory[OURS]["saved"] / formula}
    report = {
        **{name: getattr(settings, name) for name in ("model", "method", "targets", "rank", "recompute")},
        "dtype": precision_in_words(settings.dtype, plan.settings.base, settings.products),
        "kernels": ours.kernels,
        **describe_setup(ours.device),
        "matmul_flops_per_second": base_matmul_rate(plan, ours.model, ours.batches, ours.device),
        "sides": {
            name: {
                "seconds": seconds[name],
                "tokens": side.num_tokens,
                "supervised": side.num_supervised,
                "positions": side.num_positions,
                "model_flops": side.flops,
                **memory[name],
            }
            for name, side in sides.items()
        },
    }
    if ours.device.type == "cuda":
        peak = find_peak(ours.device, plan.dtype).flops_per_second
        for name, side in sides.items():
            mfu = None if side.flops is None else side.flops / statistics.median(seconds[name]) / peak
            report["sides"][name] |= {"mfu": mfu, "kernel_seconds": kernel_seconds(side.step)}
    return report


def memory_of(plan: RunPlan, settings: BenchSettings, name: str) -> dict[str, Any]:
    """The bytes `peak` and `saved` of a side's step. Call it in a fresh process."""
    side = make_sides(plan, settings)[name]()
    return {"peak": peak_of(side.step, side.device), "saved": side.saved_bytes()}
