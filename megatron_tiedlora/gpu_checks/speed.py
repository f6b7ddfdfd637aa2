"""Part speed: training steps measured as in tiedlora bench, in the forms that determine a run's speed."""

from __future__ import annotations

from statistics import median
from typing import Any

from megatron_tiedlora.benchmark import layout
from megatron_tiedlora.gpu_checks.records import CheckOptions, Report
from megatron_tiedlora.gpu_checks.running import layers_that_fit, release, step_settings

LENGTH = 4096
# Forms of a step with their flags; the others are compared with the first.
FORMS: dict[str, tuple[str, ...]] = {
    "1 x 4,096 tokens": (),
    "not compiled": ("--compile=false",),
    "20 documents a row": ("--documents=20",),
    "2 x 4,096 tokens": ("--rows=2",),
}
LEAST_MFU = 0.35  # of the data sheet's rate; about 0.5 was predicted for 7B on one H100 (docs/gpu.md)
MOST_PACKED = 1.1  # time of a packed step relative to an unpacked one
SLOW_FIX = (
    "check `matmul ceiling` of part env (clocks, another process), then the shares of the kernels in this part: if"
    " attention is far above 15 %, install flash_attn; if elementwise is above 20 %, compile the kernels; part host"
    " shows whether the GPU waits for Python"
)
PACKED_FIX = "documents should cost nothing: see the attention for packed rows in part env, and install flash_attn"


def check(report: Report, options: CheckOptions) -> None:
    """All of the part; needs a GPU."""
    if not options.on_gpu:
        report.skip("training steps", "tiedlora bench measures a CPU's speed")
        return
    with report.attempt("layers that fit"):
        layers = layers_that_fit(options.model, "--rows=2", f"--length={LENGTH}", "--supervised=1")
        report.tell("layers", layers, why=f"of {options.model}, by the dry run's plan for 2 x {LENGTH} tokens")
        reports = {}
        for name, flags in FORMS.items():
            with report.attempt(name):
                reports[name] = measured(options.model, layers, *flags)
                tell(report, name, reports[name])
            release()
        _compare(report, reports)


def measured(model: str, layers: int, *flags: str) -> dict[str, Any]:
    """bench_step.py's report of one form."""
    base = ("--rows=1", f"--length={LENGTH}", "--supervised=1", "--micro_batches=2", "--compile=auto", "--repeats=5")
    found = layout.measure_layout(step_settings(model, f"--num_layers={layers}", *base, *flags))
    assert found is not None, "this is rank 0"
    return found


def tell(report: Report, name: str, figures: dict[str, Any]) -> None:
    """Report the figures of one form."""
    seconds = median(figures["seconds"])
    spread = f"{1e3 * min(figures['seconds']):.0f} to {1e3 * max(figures['seconds']):.0f} ms per step"
    report.tell(f"{name}: tokens/s", figures["tokens"] / seconds, why=f"{spread}; kernels {figures['kernels']}")
    why = f"{figures['share_of_matmul']:.0%} of a bare matmul's speed in the same run"
    if name == next(iter(FORMS)):
        report.at_least(f"{name}: MFU", figures["mfu"], LEAST_MFU, why=why, fix=SLOW_FIX, otherwise="warn")
    else:
        report.tell(f"{name}: MFU", figures["mfu"], why=why)
    spent = figures["kernel_seconds"]
    total = sum(spent.values())
    if total:
        shares = ", ".join(f"{kind} {taken / total:.0%}" for kind, taken in spent.items() if taken)
        report.tell(f"{name}: the GPU's time", 1e3 * total / figures["micro_batches"], "ms per micro-batch", why=shares)
        report.tell(f"{name}: GPU busy", total / seconds, why="its kernels' time as a share of the step's time")
    else:
        report.skip(f"{name}: the GPU's time", "torch's profiler saw no kernel; CUPTI may not be allowed here")


def _compare(report: Report, reports: dict[str, dict[str, Any]]) -> None:
    """Compare the forms with the first one, by seconds per token."""
    first = next(iter(FORMS))
    if first not in reports:
        return
    per_token = {name: median(found["seconds"]) / found["tokens"] for name, found in reports.items()}
    for name in reports:
        ratio = per_token[name] / per_token[first]
        if name == "20 documents a row":
            report.at_most(
                f"{name}: time per token, relative to {first}", ratio, MOST_PACKED, fix=PACKED_FIX, otherwise="warn"
            )
        elif name != first:
            report.tell(f"{name}: time per token, relative to {first}", ratio)
