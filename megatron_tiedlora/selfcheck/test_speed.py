"""Checks speed: measures training steps like tiedlora bench, with the options that determine a run's speed."""

from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import pytest
import torch

from megatron_tiedlora.base.messages import bytes_in_words
from megatron_tiedlora.base.presets import PRESETS
from megatron_tiedlora.runtime.process_group import make_deterministic
from megatron_tiedlora.selfcheck import compare, parts, running, step_bench, timing
from megatron_tiedlora.training.step import GUARDED_STEPS

pytestmark = [pytest.mark.gpu, pytest.mark.if_time]

LENGTH = 4096
BASE = ("--rows=1", f"--length={LENGTH}", "--supervised=1", "--micro_batches=2", "--compile=auto", "--repeats=5")


class Form(NamedTuple):
    """A kind of training step."""

    flags: tuple[str, ...] = ()
    model: str = ""  # the preset whose layers are used; "" for --model
    layers: tuple[int, int] | None = None  # the most in both forms, recomputed if they do not fit otherwise
    changes: dict[str, Any] = {}  # noqa: RUF012 - never changed; values of settings that a benchmark does not have


# The first one is compared with the others of its model. Only the long form measures the last ones.
FORMS = {
    "1 x 4,096 tokens": Form(),
    "70B in nf4": Form(("--base=nf4",), "llama2-70b", (20, 80)),
    "20 documents a row": Form(("--documents=20",)),
    "not compiled": Form(("--compile=false",)),
    "2 x 4,096 tokens": Form(("--rows=2",)),
    "qk-norm": Form(model="qwen3-8b", layers=(8, 36)),
    "dropout": Form(changes={"dropout": 0.05}),
    "deterministic": Form(changes={"deterministic": True}),
}
LONG_FORMS = ("qk-norm", "dropout", "deterministic")
LEAST_MFU = 0.35  # of the data sheet's rate; about 0.5 was predicted for 7B on one H100 (docs/gpu.md)
MOST_PACKED = 1.1  # largest time of a packed step relative to an unpacked one
TRACE, MOST_TRACE = "speed-trace.json.gz", 2_000_000  # a file, and its largest size in bytes
LONGEST = 30  # kernels in the table of a trace
ADAPTERS = ("--what=step", "--adapters=4", "--rows=1", "--length=1024", "--supervised=1", "--num_layers=4")
SLOW_FIX = (
    "check `matmul ceiling` of part env (clocks, other processes), then the time shares of kernels in this part: if"
    " attention is far above 15 %, install flash_attn; if elementwise is above 20 %, compile the kernels; part host"
    " shows whether the GPU waits for Python"
)
PACKED_FIX = "packing should not slow down a step: check the attention kernel in part env, and install flash_attn"


@pytest.fixture(scope="module")
def layers(gpu: torch.device, model: str) -> int:
    """Return the number of layers that fit into the GPU's memory with 2 x 4,096 tokens, by the dry run's plan."""
    return running.layers_that_fit(model, "--rows=2", f"--length={LENGTH}", "--supervised=1")


@pytest.fixture(scope="module")
def token_seconds() -> dict[str, float]:
    """Return an empty dict, in which the tests store the seconds per token of each kind of step."""
    return {}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long) if name in LONG_FORMS else name for name in FORMS]
)
def test_step(
    name: str, layers: int, token_seconds: dict[str, float], model: str, is_long: bool, tell: parts.Tell
) -> None:
    """Measure tokens/s, MFU and the GPU time per kernel class for one kind of step, like `tiedlora bench`."""
    form = FORMS[name]
    running.release()
    flags = (f"--num_layers={layers}", *BASE, *form.flags)
    if form.layers is not None:
        flags = (*BASE, *form.flags, *flags_to_fit(form.model, form.layers[is_long], *BASE, *form.flags))
    if form.changes.get("deterministic"):
        make_deterministic()  # too late for bits, as the GPU is in use; the kernels are those of --deterministic
    try:
        settings = running.step_settings(form.model or model, *flags)
        found, _ = step_bench.measure_layout(settings, **form.changes)
    finally:
        torch.use_deterministic_algorithms(False)
    assert found is not None, "this is rank 0"
    judge_step(name, found, token_seconds, settings.num_layers or 0, tell)


def flags_to_fit(model: str, most: int, *flags: str) -> tuple[str, str]:
    """Return the flags with which `most` layers fit, or else as many as possible, with as little recomputed."""
    for how in ("none", "selective", "full"):
        layers = running.layers_that_fit(model, *flags, f"--recompute={how}", most=most)
        if layers == most:
            break
    return f"--num_layers={layers}", f"--recompute={how}"


def judge_step(
    name: str, found: dict[str, Any], token_seconds: dict[str, float], layers: int, tell: parts.Tell
) -> None:
    """Record what `measure_layout` has found for a kind of step with so many layers, and warn if it is slow."""
    form, model, seconds = FORMS[name], found["model"], median(found["seconds"])
    token_seconds[name] = seconds / found["tokens"]
    tell(f"layers of {model}", layers)
    tell("tokens/s", found["tokens"] / seconds)
    if model in PRESETS and layers < (of_all := PRESETS[model]["num_hidden_layers"]):
        tell(f"tokens/s with {of_all} layers, about", found["tokens"] / seconds * layers / of_all)
    tell("ms per step", f"{1e3 * min(found['seconds']):.0f} to {1e3 * max(found['seconds']):.0f}")
    parts.tell_kernels(tell, found["kernels"])
    tell("recompute", found["layout"]["recompute"])
    tell("MFU", found["mfu"])
    tell("share of a bare matmul's speed in the same run", found["share_of_matmul"])
    if (peak := found["ranks"][0]["peak"]) is not None:
        tell("most memory allocated", bytes_in_words(peak))
    spent = found["kernel_seconds"]
    tell("the GPU's ms per micro-batch", 1e3 * sum(spent.values()) / found["micro_batches"])
    tell("of them", timing.shares_in_words(spent))
    tell("its kernels' time as a share of the step's time", sum(spent.values()) / seconds)
    first = next(iter(FORMS))
    parts.warn_unless(name != first or found["mfu"] >= LEAST_MFU, tell, SLOW_FIX)
    if name != first and first in token_seconds and form.layers is None:
        ratio = token_seconds[name] / token_seconds[first]
        tell(f"time per token, relative to {first}", ratio)
        parts.warn_unless(name != "20 documents a row" or ratio <= MOST_PACKED, tell, PACKED_FIX)


def test_trace(gpu: torch.device, model: str, pytestconfig: pytest.Config, tmp_path: Path, tell: parts.Tell) -> None:
    """Write a trace of two steps of a few layers, and record the kernels that take most of their time."""
    folder = Path(parts.option(pytestconfig, "folder") or tmp_path)
    with running.started_to_fit(model, BASE) as (run, _):
        record_steps(run, folder / TRACE, tell)


def record_steps(run: step_bench.Started, file: Path, tell: parts.Tell) -> None:
    """Run two steps under torch's profiler, write the trace to `file`, and record the longest kernels."""
    steps = [next(run.loader) for _ in range(GUARDED_STEPS + 2)]
    for step in steps[:-2]:
        run.take(step)
    spent = timing.seconds_by_kernel(timing.profiled(lambda: [run.take(step) for step in steps[-2:]], file))
    tell(f"{file.name} for https://ui.perfetto.dev", bytes_in_words(file.stat().st_size))
    parts.warn_unless(file.stat().st_size <= MOST_TRACE, tell, "the trace is large: mail report.md without it")
    total = sum(seconds for seconds, _ in spent.values())
    for kernel, (seconds, calls) in islice(spent.items(), LONGEST):
        tell(kernel[:120], f"{1e3 * seconds:.3g} ms, {seconds / total:.1%}, {calls} calls")


@pytest.mark.long
def test_adapters(gpu: torch.device, model: str, tell: parts.Tell) -> None:
    """Measure how much faster several adapters train together than one after another, like `bench --adapters`."""
    running.release()
    found = compare.measure_sides(running.step_settings(model, *ADAPTERS))
    tell("speed together, relative to one after another", found["ratio"])
    tell("speed together, relative to one adapter with all tokens", found["of_one_adapter"])
