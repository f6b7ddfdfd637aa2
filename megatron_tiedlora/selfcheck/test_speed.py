"""Checks speed: measures training steps like tiedlora bench, with the options that determine a run's speed."""

from statistics import median

import pytest
import torch

from megatron_tiedlora.selfcheck import parts, running, step_bench

pytestmark = pytest.mark.gpu

LENGTH = 4096
# Kinds of steps with their flags. The first one is compared with the others.
FORMS: dict[str, tuple[str, ...]] = {
    "1 x 4,096 tokens": (),
    "not compiled": ("--compile=false",),
    "20 documents a row": ("--documents=20",),
    "2 x 4,096 tokens": ("--rows=2",),
}
LEAST_MFU = 0.35  # of the data sheet's rate; about 0.5 was predicted for 7B on one H100 (docs/gpu.md)
MOST_PACKED = 1.1  # largest time of a packed step relative to an unpacked one
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


@pytest.mark.parametrize("name", FORMS)
def test_step(name: str, layers: int, token_seconds: dict[str, float], model: str, tell: parts.Tell) -> None:
    """Measure tokens/s, MFU and the GPU time per kernel class for one kind of step, like tiedlora bench."""
    running.release()
    base = ("--rows=1", f"--length={LENGTH}", "--supervised=1", "--micro_batches=2", "--compile=auto", "--repeats=5")
    settings = running.step_settings(model, f"--num_layers={layers}", *base, *FORMS[name])
    found, _ = step_bench.measure_layout(settings)
    assert found is not None, "this is rank 0"
    seconds = median(found["seconds"])
    token_seconds[name] = seconds / found["tokens"]
    tell(f"layers of {model}", layers)
    tell("tokens/s", found["tokens"] / seconds)
    tell("ms per step", f"{1e3 * min(found['seconds']):.0f} to {1e3 * max(found['seconds']):.0f}")
    tell("kernels", found["kernels"])
    tell("MFU", found["mfu"])
    tell("share of a bare matmul's speed in the same run", found["share_of_matmul"])
    spent = found["kernel_seconds"]
    total = sum(spent.values())
    if total:
        tell("the GPU's ms per micro-batch", 1e3 * total / found["micro_batches"])
        tell("of them", ", ".join(f"{kind} {taken / total:.0%}" for kind, taken in spent.items() if taken))
        tell("its kernels' time as a share of the step's time", total / seconds)
    else:
        tell("the GPU's time", "unknown: torch's profiler saw no kernel; CUPTI may not be allowed here")
    first = next(iter(FORMS))
    parts.warn_unless(name != first or found["mfu"] >= LEAST_MFU, tell, SLOW_FIX)
    if name != first and first in token_seconds:
        ratio = token_seconds[name] / token_seconds[first]
        tell(f"time per token, relative to {first}", ratio)
        parts.warn_unless(name != "20 documents a row" or ratio <= MOST_PACKED, tell, PACKED_FIX)
