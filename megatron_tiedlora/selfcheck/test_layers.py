"""Measures a layer, forwards and backwards, for each format of its weights and for ranks of several tensor-parallel
sizes, whose messages are not sent. The time of the complete model follows from the times of a short and a long one."""

from functools import partial
from typing import NamedTuple

import pytest
import torch

from megatron_tiedlora.base.shapes import FP8_CAPABILITY, PRESETS
from megatron_tiedlora.model.batch import find_supervised
from megatron_tiedlora.model.stage import Stage
from megatron_tiedlora.parallel.groups import TensorParallel
from megatron_tiedlora.planning.counting import CountingGroup
from megatron_tiedlora.planning.passes import step_flops
from megatron_tiedlora.selfcheck import compare, parts, running, timing
from megatron_tiedlora.selfcheck.step_bench import plan_benchmark
from megatron_tiedlora.training.throughput import choose_kernels, find_peak

pytestmark = pytest.mark.gpu

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
}


class Case(NamedTuple):
    """The layers of a preset ("": --model), a tensor-parallel size, and a format; whether only the long form has it."""

    model: str
    tp_size: int
    name: str
    is_long: bool = False


CASES = (
    *(Case("", 1, name) for name in ("bf16", "fp8 matmuls", "nf4")),
    *(Case(LARGE, 8, name) for name in ("bf16", "fp8 matmuls")),
    *(Case(LARGE, 1, name) for name in ("bf16", "fp8 matmuls", "nf4")),
    *(Case(LARGE, tp_size, name, is_long=True) for tp_size in (4, 2) for name in ("bf16", "fp8 matmuls")),
    *(Case("", 1, name, is_long=True) for name in list(FORMATS)[3:]),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.model or 'model'} TP{case.tp_size} {case.name}")
def test_layer(case: Case, gpu: torch.device, model: str, is_long: bool, tell: parts.Tell) -> None:
    """Measure a layer, and how fast a model of such layers would be."""
    if case.is_long and not is_long:
        pytest.skip(parts.LONG_FORM)
    if "--products=fp8" in FORMATS[case.name] and torch.cuda.get_device_capability(gpu) < FP8_CAPABILITY:
        pytest.skip("the GPU has no FP8 matmuls")
    running.release()
    try:
        measure_layer(case.model or model, case.tp_size, (*FLAGS, *FORMATS[case.name]), gpu, tell)
    except torch.OutOfMemoryError:
        pytest.skip("these layers need more memory than the GPU has")


def measure_layer(model: str, tp_size: int, flags: tuple[str, ...], device: torch.device, tell: parts.Tell) -> None:
    """Measure forward and backward passes of two models, and record the seconds of a layer and of the complete model.

    Args:
        flags: of `tiedlora bench --what layout`. They decide the format of the weights and the tokens of a micro-batch.
    """
    flags = (*flags, f"--tensor_parallel={tp_size}")
    settings = [running.step_settings(model, *flags, f"--num_layers={depth}") for depth in DEPTHS]
    short, long = (plan_benchmark(each, world_size=tp_size) for each in settings)
    chosen = choose_kernels(short, device)
    parts.tell_kernels(tell, chosen.description)
    group = TensorParallel(CountingGroup(None, 0, tp_size), short.layout.sequence_parallel) if tp_size > 1 else None
    taken = []
    for plan in (short, long):
        stage = compare.random_stage(
            plan.source.shape,
            plan.adapter,
            dtype=plan.dtype,
            make_weight=plan.weight_maker(device, chosen.kernels),
            device=device,
            kernels=chosen.kernels,
            tensor_parallel=group,
        )
        step = partial(take_passes, stage, settings[0].length, plan.source.shape.vocab_size, device)
        taken.append(timing.seconds_of_call(step, device))
        spent = timing.kernel_seconds(step) if device.type == "cuda" else {}
    layer = (taken[1] - taken[0]) / (DEPTHS[1] - DEPTHS[0])
    tell("ms of a layer", 1e3 * layer)
    tell("ms of embedding and head", 1e3 * (taken[0] - DEPTHS[0] * layer))
    tell(f"time of kernels of {DEPTHS[1]} layers", timing.shares_in_words(spent))
    layers = PRESETS[model]["num_hidden_layers"] if model in PRESETS else DEPTHS[1]
    whole, length = taken[0] + (layers - DEPTHS[0]) * layer, settings[0].length
    tell(f"tokens/s per GPU of {layers} layers, without messages", length / whole / tp_size)
    added = [step_flops(plan.source.shape, plan.adapter, length, length**2, length).total() for plan in (short, long)]
    rate = (added[1] - added[0]) / (taken[1] - taken[0]) / tp_size
    tell("TFLOP/s of a layer", rate / 1e12)
    tell("share of the bf16 peak", rate / find_peak(device, torch.bfloat16).flops_per_second)


def take_passes(stage: Stage, length: int, vocab_size: int, device: torch.device) -> None:
    """Run the forward and backward passes of one row of `length` tokens, all of which have a label."""
    tokens = torch.arange(length)[None] % vocab_size
    labels = find_supervised(tokens, stage.tensor_parallel.sequence_parts).moved(lambda tensor: tensor.to(device))
    positions = torch.arange(length, device=device)[None]
    stage(tokens.to(device), positions, labels, documents=None).backward()
