"""Measures the matmuls of a model's layers, and the machine's constants for the planner."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from megatron_tiedlora.base.files import write_json
from megatron_tiedlora.base.shapes import FP8_CAPABILITY, PRESETS, LinearShape
from megatron_tiedlora.checkpoint.sources import find_model
from megatron_tiedlora.model.families import shape_from_hf
from megatron_tiedlora.parallel.quantise import CODE_TYPE
from megatron_tiedlora.parallel.shard_spec import weight_spec
from megatron_tiedlora.selfcheck import parts, running
from megatron_tiedlora.selfcheck.machine_constants import measure_machine
from megatron_tiedlora.selfcheck.timing import seconds_of_call
from megatron_tiedlora.training.throughput import find_peak

pytestmark = pytest.mark.gpu

SHARDS = [(model, tp_size) for tp_size in (1, 8, 4, 2) for model in ("", "llama2-70b")]  # "": --model
TOKENS = ((4096,), (2048, 4096, 8192, 16384))  # of a matmul, in the short and in the long form
APART = (0, 8, 16)  # elements between the rows of an input
RANK = 8  # of the adapter whose narrow matmuls are measured
SECONDS = (12.0, 60.0)  # for the constants, in the short and in the long form
FILE = "constants.json"


def test_constants(
    joined: torch.device, gpu: torch.device, model: str, is_long: bool, pytestconfig: pytest.Config, tell: parts.Tell
) -> None:
    """Measure the constants of this machine like `tiedlora plan --measure`, and write them to constants.json."""
    machine = measure_machine(find_model(model, weights=False), joined, seconds=SECONDS[is_long])
    if folder := parts.option(pytestconfig, "folder"):
        write_json(Path(folder) / FILE, machine.record())
        tell("for tiedlora plan --constants", FILE)
    for name, constant in machine.constants.items():
        tell(name, f"{constant.value:.4g} ({constant.source})")


@pytest.mark.parametrize(("preset", "tp_size"), SHARDS, ids=lambda value: str(value or "model"))
def test_matmuls(preset: str, tp_size: int, gpu: torch.device, model: str, is_long: bool, tell: parts.Tell) -> None:
    """Measure every matmul of a layer's shard, for each number of tokens."""
    running.release()
    shape = shape_from_hf(PRESETS[preset or model], source=preset or model)
    for linear in shape.block.linears:
        for tokens in TOKENS[is_long]:
            measure_linear(linear, tp_size, tokens, gpu, tell)


def measure_linear(linear: LinearShape, tp_size: int, tokens: int, device: torch.device, tell: parts.Tell) -> None:
    """Record the TFLOP/s of a linear's matmuls forwards (x W^T) and backwards (dy W), and the time of narrow ones.

    The rows of the inputs are d, d + 8 or d + 16 elements apart. FP8 matmuls add with few bits (fast) or with more.
    """
    rows, width = weight_spec(linear).local_shape((linear.out_size, linear.in_size), tp_size)
    dtype = running.compute_dtype(device)
    draw = partial(torch.randn, device=device, dtype=dtype)
    peak = find_peak(device, torch.bfloat16).flops_per_second if device.type == "cuda" else float("nan")
    weight, texts = draw(rows, width), list[str]()

    def measure(name: str, peak: float, *ways: Callable[[], object]) -> None:
        rates = [2 * tokens * rows * width / seconds_of_call(way, device) for way in ways]
        texts.append(f"{name} {' and '.join(f'{rate / 1e12:.0f} ({rate / peak:.0%})' for rate in rates)}")

    for apart in APART:
        x, grad = draw(tokens, width + apart)[:, :width], draw(tokens, rows + apart)[:, :rows]
        measure(f"d + {apart}", peak, partial(torch.mm, x, weight.t()), partial(torch.mm, grad, weight))
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= FP8_CAPABILITY:
        codes = [tensor.to(CODE_TYPE["fp8"]) for tensor in (x, weight, grad, weight.t().contiguous())]
        scales = torch.ones(max(tokens, rows, width), 1, device=device)

        def multiply(one: torch.Tensor, other: torch.Tensor, fast: bool) -> torch.Tensor:
            beside = {"scale_a": scales[: len(one)], "scale_b": scales[: len(other)].t()}
            return torch._scaled_mm(one, other.t(), **beside, out_dtype=dtype, use_fast_accum=fast)

        for fast in (True, False):  # a data sheet's rate in FP8 is twice that in bf16
            ways = (partial(multiply, *pair, fast) for pair in (codes[:2], codes[2:]))
            measure("fp8 fast" if fast else "fp8", 2 * peak, *ways)
    a, b, ax = draw(RANK, width), draw(rows, RANK), draw(tokens, RANK)
    narrow = {"A x": (x, a.t()), "B ax": (ax, b.t()), "dA": (ax.t(), x), "dB": (grad.t(), ax)}
    taken = {name: seconds_of_call(partial(torch.mm, *pair), device) for name, pair in narrow.items()}
    texts += [f"{name} {1e6 * seconds:.0f} us" for name, seconds in taken.items()]
    tell(f"{linear.name} {rows} x {width}, {tokens} tokens, TFLOP/s forwards and backwards", "; ".join(texts))
