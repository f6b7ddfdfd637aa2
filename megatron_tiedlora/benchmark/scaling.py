"""Measures how a step's time grows with layers, length, rank and supervised tokens. One of them changes at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from megatron_tiedlora.base.base_formats import precision_in_words
from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.benchmark import timing
from megatron_tiedlora.benchmark.plan import make_plan
from megatron_tiedlora.benchmark.sides import OURS, make_sides
from megatron_tiedlora.config.bench_settings import BenchSettings
from megatron_tiedlora.training.compiling import ChosenKernels, choose_kernels
from megatron_tiedlora.training.plan import RunPlan

# The setting of a step that each flag gives values for.
AXES = {"layers": "num_layers", "lengths": "length", "ranks": "rank", "shares": "supervised"}


def measure(settings: BenchSettings) -> dict[str, Any]:
    """The report. It has the values of each quantity, with the tokens and the seconds of a step.

    Raises:
        UserError: a value does not fit. The message names its flag. Nothing has been measured yet.
    """
    device, plan = timing.default_device(), make_plan(settings.one_step())
    axes = {flag: [_step(settings, flag, value) for value in getattr(settings, flag)] for flag in AXES}
    chosen = choose_kernels(plan, device)
    return {
        **{name: getattr(settings, name) for name in ("model", "method", "targets")},
        "dtype": precision_in_words(settings.dtype, plan.settings.base, settings.products),
        "kernels": chosen.description,
        **timing.describe_setup(device),
        "axes": {
            AXES[flag]: _measure(getattr(settings, flag), steps, chosen, repeats=settings.repeats)
            for flag, steps in axes.items()
            if steps
        },
    }


def _step(settings: BenchSettings, flag: str, value: Any) -> tuple[RunPlan, BenchSettings]:
    """The step in which one quantity has another value, which `flag` gave."""
    name = AXES[flag]
    try:
        step = settings.one_step(**{name: value})
        return make_plan(step), step
    except UserError as error:
        raise UserError(str(error).replace(f"--{name} ", f"--{flag} ", 1)) from None


def _measure(
    values: Sequence[float], steps: Sequence[tuple[RunPlan, BenchSettings]], chosen: ChosenKernels, *, repeats: int
) -> list[dict[str, Any]]:
    sides = [make_sides(plan, step, chosen)[OURS]() for plan, step in steps]
    seconds = timing.take_turns({str(index): side.seconds for index, side in enumerate(sides)}, repeats=repeats)
    return [
        {"value": value, "tokens": side.num_tokens, "seconds": taken}
        for value, side, taken in zip(values, sides, seconds.values(), strict=True)
    ]


def scaling_table(report: Mapping[str, Any]) -> list[str]:
    """The figures as lines. The last column has the additional seconds per unit, compared with the value before."""
    adapter = f"{report['method']} of {', '.join(report['targets'])}"
    first = f"{report['model']}, {adapter}, {report['dtype']} on {report['device']}"
    lines = [f"{first}; kernels {report['kernels']}", timing.setup_line(report)]
    for name, measured in report["axes"].items():
        lines.append(f"{name:<12}{'tokens':>8}{timing.SPEED_HEADER}{'more, for 1 more':>18}")
        for before, found in zip([None, *measured], measured, strict=False):
            slope = "" if before is None else f"{_slope(before, found):.4f}"
            columns = timing.speed_columns(found["seconds"], found["tokens"])
            lines.append(f"{found['value']!s:<12}{found['tokens']:>8}{columns}{slope:>18}")
    return lines


def _slope(before: Mapping[str, Any], found: Mapping[str, Any]) -> float:
    more = median(found["seconds"]) - median(before["seconds"])
    return float(more / (found["value"] - before["value"]))
