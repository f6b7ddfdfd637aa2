"""Measures layers in each format, the matmuls of all shards, and the constants of the machine for the planner."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_tiedlora.base.files import write_json
from megatron_tiedlora.base.presets import PRESETS
from megatron_tiedlora.base.shapes import FP8_CAPABILITY, LinearShape
from megatron_tiedlora.checkpoint.sources import find_model
from megatron_tiedlora.model.batch import find_supervised
from megatron_tiedlora.model.families import shape_from_hf
from megatron_tiedlora.model.stage import Stage
from megatron_tiedlora.parallel.groups import TensorParallel
from megatron_tiedlora.parallel.quantise import CODE_TYPE
from megatron_tiedlora.parallel.shard_spec import weight_spec
from megatron_tiedlora.planning.counting import CountingGroup
from megatron_tiedlora.planning.passes import step_flops
from megatron_tiedlora.selfcheck import compare, machine_constants, parts, running, timing
from megatron_tiedlora.selfcheck.step_bench import plan_benchmark
from megatron_tiedlora.training.throughput import choose_kernels, find_peak

pytestmark = [pytest.mark.gpu, pytest.mark.if_time, pytest.mark.usefixtures("gpu")]

LARGE = "llama2-70b"
FLAGS = ("--length=4096", "--rows=1", "--supervised=1", "--compile=auto")
DEPTHS = (1, 5)  # layers of the two models whose times are compared
FORMATS: dict[str, tuple[str, ...]] = {
    "bf16": (),
    "fp8 matmuls": ("--base=fp8", "--products=fp8"),
    "nf4": ("--base=nf4",),
    "fp8 matmuls, transposed copies kept": ("--base=fp8", "--products=fp8", "--keep_transposed=true"),
    "fp8": ("--base=fp8",),
    "int8": ("--base=int8",),
    "adapter in the matmul": ("--adapter_in_matmul=true",),
}
MODEL = "model"  # stands for --model
SHARDS = [(preset, size) for size in (1, 8, 4, 2) for preset in (MODEL, LARGE)]  # whose matmuls are measured
COMMON, OTHERS = list(FORMATS)[:3], list(FORMATS)[3:]
# The layers of the short form, and those that only the long form measures.
SHORT = [(*shard, name) for shard in ((MODEL, 1), (LARGE, 8), (LARGE, 1)) for name in COMMON]
LONG = [*((LARGE, size, name) for size in (4, 2) for name in COMMON), *((MODEL, 1, name) for name in OTHERS)]
TOKENS = ((4096,), (2048, 4096, 8192, 16384))  # of a matmul, in the short and in the long form
APART = (0, 8, 16)  # elements between the rows of an input
RANK = 8  # of the adapter whose narrow matmuls are measured
SECONDS, CONSTANTS = (12.0, 60.0), "layers-constants.json"  # in the short and in the long form; the file
COMPILING = 20.0  # seconds beside them, for kernels that are compiled


@pytest.mark.parametrize(
    ("preset", "tp_size", "name"), [*SHORT, *(pytest.param(*case, marks=pytest.mark.long) for case in LONG)]
)
def test_layer(preset: str, tp_size: int, name: str, joined: torch.device, model: str, tell: parts.Tell) -> None:
    """Measure a layer without the messages of its shard, and how fast a model of such layers would be."""
    if "--products=fp8" in FORMATS[name] and torch.cuda.get_device_capability(joined) < FP8_CAPABILITY:
        pytest.skip("the GPU has no FP8 matmuls")
    running.release()
    try:
        measure_layer({MODEL: model}.get(preset, preset), tp_size, (*FLAGS, *FORMATS[name]), joined, tell)
    except torch.OutOfMemoryError:
        pytest.skip("these layers need more memory than the GPU has")


def measure_layer(model: str, tp_size: int, flags: tuple[str, ...], device: torch.device, tell: parts.Tell) -> None:
    """Record the time of a layer, which is the difference of two models, and the speed of the complete model.

    `flags` of `tiedlora bench --what layout` decide the format of the weights and the tokens of a micro-batch.
    """
    flags = (*flags, f"--tensor_parallel={tp_size}")
    settings = [running.step_settings(model, *flags, f"--num_layers={depth}") for depth in DEPTHS]
    plans = [plan_benchmark(each, world_size=tp_size) for each in settings]
    chosen = choose_kernels(plans[0], device)
    parts.tell_kernels(tell, chosen.description)
    group = TensorParallel(CountingGroup(None, 0, tp_size), plans[0].layout.sequence_parallel)
    taken, flops, length = [], [], settings[0].length
    for plan in plans:
        shape, kernels = plan.source.shape, chosen.kernels
        given: dict[str, Any] = {"dtype": plan.dtype, "device": device, "kernels": kernels, "tensor_parallel": group}
        stage = compare.random_stage(shape, plan.adapter, make_weight=plan.weight_maker(device, kernels), **given)
        step = partial(take_passes, stage, length, shape.vocab_size, device)
        taken.append(timing.seconds_of_call(step, device))
        flops.append(step_flops(shape, plan.adapter, (length,), length).total() / tp_size)
    layer = (taken[1] - taken[0]) / (DEPTHS[1] - DEPTHS[0])
    tell("ms of a layer", 1e3 * layer)
    tell("ms of embedding and head", 1e3 * (taken[0] - DEPTHS[0] * layer))
    layers = PRESETS[model]["num_hidden_layers"] if model in PRESETS else DEPTHS[1]
    whole = taken[0] + (layers - DEPTHS[0]) * layer
    tell(f"tokens/s per GPU of {layers} layers, without messages", length / whole / tp_size)
    rate = (flops[1] - flops[0]) / (taken[1] - taken[0])
    tell("TFLOP/s of a layer", rate / 1e12)
    tell("share of the bf16 peak", rate / find_peak(device, torch.bfloat16).flops_per_second)
    if device.type == "cuda":
        tell(f"time of kernels of {DEPTHS[1]} layers", timing.shares_in_words(timing.kernel_seconds(step)))


def take_passes(stage: Stage, length: int, vocab_size: int, device: torch.device) -> None:
    """Run the forward and backward passes of one row of `length` tokens, all of which have a label."""
    tokens = torch.arange(length)[None] % vocab_size
    labels = find_supervised(tokens, stage.tensor_parallel.sequence_parts).moved(lambda tensor: tensor.to(device))
    positions = torch.arange(length, device=device)[None]
    stage(tokens.to(device), positions, labels, documents=None).backward()


@pytest.mark.parametrize(("preset", "tp_size"), SHARDS)
def test_matmuls(preset: str, tp_size: int, joined: torch.device, model: str, is_long: bool, tell: parts.Tell) -> None:
    """Measure every matmul of a layer's shard, for each number of tokens."""
    running.release()
    shape = shape_from_hf(PRESETS[{MODEL: model}.get(preset, preset)], source=preset)
    for linear in shape.block.linears:
        for tokens in TOKENS[is_long]:
            measure_linear(linear, tp_size, tokens, joined, tell)


def measure_linear(linear: LinearShape, tp_size: int, tokens: int, device: torch.device, tell: parts.Tell) -> None:
    """Record the TFLOP/s of a linear's matmuls forwards (x W^T) and backwards (dy W), and the time of narrow ones.

    The rows of the inputs are d, d + 8 or d + 16 elements apart. FP8 matmuls add with few bits (fast) or with more.
    """
    rows, width = weight_spec(linear).local_shape((linear.out_size, linear.in_size), tp_size)
    draw = partial(torch.randn, device=device, dtype=running.compute_dtype(device))
    peak = find_peak(device, torch.bfloat16).flops_per_second if device.type == "cuda" else float("nan")
    weight, texts = draw(rows, width), list[str]()

    def measure(name: str, peak: float, *ways: Callable[[], object]) -> None:
        rates = [2 * tokens * rows * width / timing.seconds_of_call(way, device) for way in ways]
        texts.append(f"{name} {' and '.join(f'{rate / 1e12:.0f} ({rate / peak:.0%})' for rate in rates)}")

    for apart in APART:
        x, grad = draw(tokens, width + apart)[:, :width], draw(tokens, rows + apart)[:, :rows]
        measure(f"d + {apart}", peak, partial(torch.mm, x, weight.t()), partial(torch.mm, grad, weight))
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= FP8_CAPABILITY:
        codes = [tensor.to(CODE_TYPE["fp8"]) for tensor in (x, weight, grad, weight.t().contiguous())]
        scales = torch.ones(max(tokens, rows, width), 1, device=device)

        def multiply(one: torch.Tensor, other: torch.Tensor, fast: bool) -> torch.Tensor:
            by_row = scales[: len(one)], scales[: len(other)].t()
            return torch._scaled_mm(one, other.t(), *by_row, out_dtype=torch.bfloat16, use_fast_accum=fast)

        for name, fast in (("fp8 fast", True), ("fp8", False)):  # a data sheet's rate in FP8 is twice that in bf16
            ways = (partial(multiply, one, other, fast=fast) for one, other in (codes[:2], codes[2:]))
            measure(name, 2 * peak, *ways)
    a, b, ax = draw(RANK, width), draw(rows, RANK), draw(tokens, RANK)
    for name, pair in {"A x": (x, a.t()), "B ax": (ax, b.t()), "dA": (ax.t(), x), "dB": (grad.t(), ax)}.items():
        texts.append(f"{name} {1e6 * timing.seconds_of_call(partial(torch.mm, *pair), device):.0f} us")
    tell(f"{linear.name} {rows} x {width}, {tokens} tokens, TFLOP/s forwards and backwards", "; ".join(texts))


@pytest.mark.if_time(*(seconds + COMPILING for seconds in SECONDS))
def test_constants(
    joined: torch.device, model: str, is_long: bool, pytestconfig: pytest.Config, tell: parts.Tell
) -> None:
    """Measure the constants of this machine like `tiedlora plan --measure`, and write its file."""
    torch._dynamo.reset()  # so many shapes were compiled before that PyTorch would refuse further ones
    source = find_model(model, weights=False)
    machine = machine_constants.measure_machine(source, joined, seconds=SECONDS[is_long])
    if folder := parts.option(pytestconfig, "folder"):
        write_json(Path(folder) / CONSTANTS, machine.record())
        tell("for tiedlora plan --constants", CONSTANTS)
    for name, constant in machine.constants.items():
        tell(name, f"{constant.value:.4g} ({constant.source})")
