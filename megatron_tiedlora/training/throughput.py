"""Measure the speed and memory of a run, compute its model FLOPs utilisation (MFU), compile kernels, and profile steps.

    MFU = FLOPs for the samples of a step / (seconds of the step x peak FLOP/s of all ranks)

`planning.passes` counts the FLOPs of tokens that are not padding, without recomputation. So padding, pipeline bubbles
and recomputed layers lower the MFU, and the FLOPs do not depend on the layout. The step time runs from the first
forward pass to the end of the optimizer step, without evaluations and saves. Every rank computes all counts from the
plan of the step. So no messages are sent, and no rank waits for its device.

--profile FIRST:LAST runs torch's profiler over these steps of a launch. It writes one trace per rank in Chrome's
format, for https://ui.perfetto.dev. The trace is written after step LAST, or at the end of a run that ends before step
LAST. Profiling makes the steps slower, and metrics.jsonl has the slower times.
"""

import itertools
import logging
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megatron_tiedlora.adapters import tied_adapter
from megatron_tiedlora.base.files import new_file
from megatron_tiedlora.base.messages import UserError, first_line, show
from megatron_tiedlora.base.output_folder import make_private_folder
from megatron_tiedlora.base.shapes import QKV, TARGET_NAMES, ModelShape
from megatron_tiedlora.config.fields import profiled_steps
from megatron_tiedlora.data.loader import TrainingStep
from megatron_tiedlora.model.batch import find_supervised
from megatron_tiedlora.model.layer_specs import layer_specs
from megatron_tiedlora.model.stage import Stage
from megatron_tiedlora.parallel.agreement import first_messages, sum_over_ranks
from megatron_tiedlora.parallel.frozen_weight import MESSAGE_MULTIPLE, FrozenWeight, WeightMaker, padded
from megatron_tiedlora.parallel.groups import TensorParallel
from megatron_tiedlora.parallel.kernels import EAGER, Kernels, marking
from megatron_tiedlora.parallel.quantise import slow_nf4
from megatron_tiedlora.planning.counting import CountingGroup
from megatron_tiedlora.planning.machines import listed_peak
from megatron_tiedlora.planning.passes import step_flops
from megatron_tiedlora.planning.run_plan import RunPlan
from megatron_tiedlora.runtime.launch_env import rank_number
from megatron_tiedlora.runtime.run_folder import RunFolder

# Approximate seconds for measuring a peak, and the seconds that a matmul must take to be timed reliably.
_MEASURING, _LONG_MATMUL = 0.25, 0.02
_SMALLEST, _LARGEST = 256, 4096  # sizes of these square matmuls; three of the largest matrices take 100 MB in bf16
_UNSHARDED = TensorParallel()

# Sources of a peak, as shown to the user.
DATA_SHEET, FASTEST_STEP = "data sheet", "the rate of the fastest step, which was faster than the measured matmuls"


class Peak(NamedTuple):
    """The peak FLOP/s of matmuls, and the source of this value."""

    flops_per_second: float
    source: str


@dataclass
class Meter:
    """Computes the speed of each step, and the mean speed of this launch. The mean excludes the first step, a warm-up.

    If a step reaches a higher rate than the measured peak, this rate becomes the new peak.

    Attributes:
        peak: the sum of the peak FLOP/s of all ranks.
        steps: the numbers of the first and the last step in the mean; None before the second step.
    """

    config: ModelShape
    adapter: tied_adapter.AdapterConfig
    peak: Peak
    steps: tuple[int, int] | None = None
    _total: dict[str, float] | None = None  # sums over the counted steps; None before the first step

    def add(self, number: int, step: TrainingStep, seconds: float) -> dict[str, float]:
        """Add step `number`, which took `seconds`. Return the rates of this step by their keys in metrics.jsonl."""
        flops = step_flops(self.config, self.adapter, step.lengths, step.num_supervised).total()
        if flops > seconds * self.peak.flops_per_second and self.peak.source != DATA_SHEET:
            self.peak = Peak(flops / seconds, FASTEST_STEP)
        work = {
            "tokens": step.num_tokens,
            "supervised": step.num_supervised,
            "positions": step.num_positions,
            "flops": flops,
            "seconds": seconds,
        }
        if self._total is None:
            self._total = dict.fromkeys(work, 0)
        else:
            self._total = {name: self._total[name] + amount for name, amount in work.items()}
            self.steps = (number if self.steps is None else self.steps[0], number)
        return self._rates(work)

    def mean(self) -> dict[str, float] | None:
        """Return the mean rates of the steps after the first; None if there are no such steps."""
        return None if self._total is None or self.steps is None else self._rates(self._total)

    def _rates(self, work: Mapping[str, float]) -> dict[str, float]:
        return {
            "tokens_per_second": work["tokens"] / work["seconds"],
            "supervised_tokens_per_second": work["supervised"] / work["seconds"],
            "mfu": work["flops"] / work["seconds"] / self.peak.flops_per_second,
            "padding": 1 - work["tokens"] / work["positions"],
        }


def find_peak(device: torch.device, dtype: torch.dtype) -> Peak:
    """Return the peak FLOP/s of one device for matmuls in `dtype`.

    The value comes from the data sheet for bf16 on known GPUs, and is measured otherwise. It is always measured for
    fp32, because the rate of fp32 depends on TF32.
    """
    if device.type == "cuda" and dtype == torch.bfloat16:
        listed = listed_peak(torch.cuda.get_device_name(device))
        if listed is not None:
            return Peak(listed, DATA_SHEET)
    return Peak(measured_peak(device, dtype), "measured")


def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Return the best measured FLOP/s of square matmuls. Their size grows until they can be timed reliably."""
    best, size, started = 0.0, _SMALLEST, time.perf_counter()
    while best == 0 or time.perf_counter() - started < _MEASURING:
        best = max(best, matmul_rate(size, size, size, dtype=dtype, device=device, repeats=2))
        if 2 * size**3 / best < _LONG_MATMUL:
            size = min(2 * size, _LARGEST)
    return best


def matmul_rate(
    rows: int, inner: int, columns: int, *, dtype: torch.dtype, device: torch.device, repeats: int
) -> float:
    """Return the best FLOP/s in `repeats` matmuls of a (rows, inner) matrix by a transposed (columns, inner) matrix."""
    draw = torch.Generator(device).manual_seed(0)  # leaves the run's own random stream unchanged
    left, right = (torch.randn(size, inner, generator=draw, device=device, dtype=dtype) for size in (rows, columns))
    product = left.new_empty(rows, columns)
    with torch.no_grad():
        taken = [timed(lambda: torch.mm(left, right.t(), out=product), device) for _ in range(repeats)]
    return 2 * rows * inner * columns / min(taken)


def timed(step: Callable[[], object], device: torch.device) -> float:
    """Call `step` once, and return the seconds until the device has finished."""
    started = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak memory of this process in bytes: allocated GPU memory on CUDA, otherwise resident memory."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    most = resident_bytes("VmHWM")
    if most is not None:
        return most
    # This counter starts at the memory of the launcher that forked this process, so it is the last choice.
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024  # macOS counts in bytes


def resident_bytes(name: str) -> int | None:
    """Return the memory of this process in bytes: VmRSS (current) or VmHWM (peak). Return None if not on Linux."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    found = next((line.split()[1] for line in lines if line.startswith(name)), None)
    return None if found is None else int(found) * 1024


# --profile ------------------------------------------------------------------------------------------------------------


def steps_over(profile: str | None, step: int) -> str:
    """Return a message with the steps of --profile that a resume after `step` skips; '' if there are none."""
    steps = profiled_steps(profile)
    if not steps or steps[0] > step:
        return ""
    last = min(steps[-1], step)
    which = f"step {last} is" if steps[0] == last else f"steps {steps[0]} to {last} are"
    return f"--profile {profile}: the run continues after step {step}, so {which} not recorded"


class StepProfiler:
    """Records the steps of --profile on one rank, and writes RUN/profile/rank_N.json.gz."""

    def __init__(self, profile: str | None, folder: RunFolder, *, rank: int) -> None:
        self._steps = profiled_steps(profile)
        self._folder, self._rank = folder, rank
        self._recording: Any = None

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Profile the block if --profile selects step `number`."""
        if number not in self._steps:
            yield
            return
        if self._recording is None:
            kinds = [torch.profiler.ProfilerActivity.CPU]
            if torch.cuda.is_available():
                kinds.append(torch.profiler.ProfilerActivity.CUDA)
            self._recording = torch.profiler.profile(activities=kinds)
            self._recording.start()
        with torch.profiler.record_function(f"step {number}"):
            yield
        if number == self._steps[-1]:
            self.finish(last_step=number)

    def finish(self, *, last_step: int) -> None:
        """Write the trace, if one was recorded. Rank 0 prints a note if the run ended before the first profiled step.

        A write error does not end the run, since the run folder may be read-only on some hosts.
        """
        if self._steps and last_step < self._steps[0] and self._rank == 0:
            first = self._steps[0]
            show(f"note: --profile: the run ended after step {last_step}, before step {first}", file=sys.stderr)
        if self._recording is None:
            return
        recording, self._recording = self._recording, None
        target = self._folder.profile / f"rank_{self._rank}.json.gz"
        try:
            recording.stop()
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory() as scratch, new_file(target, guard=self._folder.guard) as unfinished:
                trace = Path(scratch, target.name)
                recording.export_chrome_trace(str(trace))  # compressed, by its name
                shutil.copyfile(trace, unfinished)
        except (OSError, UserError, RuntimeError) as error:
            show(f"note: --profile: {target} cannot be written ({first_line(error)})", file=sys.stderr)


# Compiled kernels -----------------------------------------------------------------------------------------------------

# The kernels of a run are compiled before its first step, so that compilation is shown to the user and fails early.
# torch.compile caches compiled code on disk, and a later run on the same machine loads it in seconds.
#
# On a CPU one graph serves all sizes above 1. The warm-up runs a small model, whose sizes are all different. Remaining
# shapes are compiled when they occur: single tokens while one answer is generated, and rows of more than 4,096 tokens.
#
# On a GPU every size except the number of tokens is a constant. The warm-up runs two layers with the widths of the run.
# It uses enough tokens for Triton to time its variants, and then one token, as in generation.

_LOGGER = logging.getLogger(__name__)
_CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
# If one of these variables is 1, torch.compile returns functions unchanged.
_SWITCHES = ("TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE")


@dataclass(frozen=True)
class ChosenKernels:
    """The kernels for the layers, and a text that tells the user whether they are compiled and why."""

    kernels: Kernels
    description: str


def choose_kernels(plan: RunPlan, device: torch.device, *, ranks: Collection[int] = ()) -> ChosenKernels:
    """Return the kernels that --compile selects. They are compiled on all ranks or on none.

    All ranks must call this function. With `auto`, kernels are compiled only for long runs, and the run continues with
    uncompiled kernels if compilation fails.

    Raises:
        UserError: on every rank, if --compile is true and a rank cannot compile.
    """
    slow = f"; {text}" if plan.settings.base == "nf4" and (text := slow_nf4(device, plan.dtype)) else ""
    if plan.settings.compile == "false":
        return ChosenKernels(EAGER, f"not compiled{slow}")
    if not plan.layout.compiled:
        return ChosenKernels(EAGER, f"not compiled, as the run is short (--compile true compiles anyway){slow}")
    if plan.grid.rank == 0:
        _LOGGER.info("compiling the kernels ...")
    started = time.monotonic()
    kernels, failure = EAGER, None
    group = TensorParallel(CountingGroup(None, 0, plan.grid.tp_size), plan.layout.sequence_parallel)
    # On CPUs one rank of each host compiles first and fills the cache for the rest. On GPUs all ranks compile at once.
    for turn in (True, False) if device.type == "cpu" else (None,):
        if turn is None or (rank_number(local=True) == 0) == turn:
            try:
                kernels = compiled_kernels(
                    plan.source.shape,
                    dtype=plan.dtype,
                    device=device,
                    tensor_parallel=group,
                    ranks=ranks or (plan.adapter.rank,),
                    weight_maker=partial(plan.weight_maker, device),
                )
            except UserError as error:
                failure = str(error)
        sum_over_ranks([0.0])  # wait for all ranks
    (failure,) = first_messages([failure])
    if failure is None:
        slow = slow if device.type == "cpu" else ""  # compiled for a GPU, the plain code is one kernel
        return ChosenKernels(kernels, f"compiled in {time.monotonic() - started:.1f} s{slow}")
    if plan.settings.compile == "true":
        raise UserError(f"--compile true: {failure}. Fix the cause (often no C++ compiler), or give --compile auto")
    return ChosenKernels(EAGER, f"not compiled: {failure}{slow}")


def compiled_kernels(
    shape: ModelShape,
    *,
    dtype: torch.dtype,
    device: torch.device,
    tensor_parallel: TensorParallel = _UNSHARDED,
    ranks: Collection[int] = (4,),
    weight_maker: Callable[[Kernels], WeightMaker] | None = None,
) -> Kernels:
    """Compile and return the kernels for the layers of a model.

    Args:
        tensor_parallel: the ranks over which the model is sharded. Their messages are counted and not sent.
        ranks: the ranks r of the adapters.
        weight_maker: returns the function that makes the linears' weights; None for plain weights.

    Raises:
        UserError: compilation failed, or another user owns the cache folder. The message has the reason in one line.
    """
    for name in _SWITCHES:
        if os.environ.get(name) == "1":
            raise UserError(f"{name} is 1")
    try:
        use_private_cache()
        kernels = Kernels().compiled(static_widths=device.type != "cpu")
        given: dict[str, Any] = {"weight_maker": weight_maker, "dtype": dtype, "device": device}
        if device.type != "cpu":
            warm_up_widths(kernels, shape, tensor_parallel, ranks=ranks, **given)
            return kernels
        # Every kernel is called, forwards and backwards, with each kind of shapes in training. The hidden size and a
        # rank's shard of the vocabulary are those of the run, since compilers treat long and short rows differently.
        # All other sizes are small and different from each other. This includes 14: a head of 28 has 14 rotated pairs.
        small = shape.resized(
            vocab_size=-(-shape.vocab_size // tensor_parallel.group.size),
            intermediate_size=88,
            num_layers=2,
            heads=shape.heads.resized(num=6, num_kv=2, dim=28),
        )
        _call_all(kernels, small, 3, 152, documents=(None, torch.arange(152) // 40), **given)
    except UserError:
        raise
    except Exception as error:  # compilers, or a missing one, can raise anything
        raise UserError(f"{type(error).__name__}: {first_line(error)}") from error
    return kernels


def use_private_cache() -> None:
    """Make torch.compile of this process use a folder that only this user can write. Raise UserError if it cannot."""
    if _CACHE_VARIABLE not in os.environ:
        # torch.compile runs the code in its cache, and any user could create its default folder.
        folder = Path(tempfile.gettempdir()) / f"megatron_tiedlora-kernels-{os.getuid()}"
        make_private_folder(folder)
        os.environ[_CACHE_VARIABLE] = str(folder)


def warm_up_widths(
    kernels: Kernels, shape: ModelShape, own: TensorParallel, *, ranks: Collection[int] = (4,), **others: Any
) -> None:
    """Call every kernel with the widths and strides of a rank, so that no step compiles another one.

    The layers are those of a rank whose messages are counted and not sent. Forward and backward passes have a variable
    number of rows. A second forward pass has one row.

    Args:
        own: as in `compiled_kernels`.
        ranks: the ranks r of the adapters. Under sequence parallelism they decide strides (`beside`).
        others: as in `_call_all`.
    """
    short = shape.resized(
        vocab_size=shape.vocab_size, intermediate_size=shape.intermediate_size, num_layers=2, heads=shape.heads
    )
    columns = {padded(rank, MESSAGE_MULTIPLE) for rank in ranks} if own.sequence_parts > 1 else {MESSAGE_MULTIPLE}
    length = padded(696, own.group.size)
    for rank in sorted(columns):
        _call_all(kernels.by_rows(marking), short, 3, length, tensor_parallel=own, rank=rank, **others)
    with torch.no_grad():
        _call_all(kernels, short, 1, 1, tensor_parallel=own.whole_sequences(), **others)


def _call_all(
    kernels: Kernels,
    shape: ModelShape,
    num_rows: int,
    length: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    weight_maker: Callable[[Kernels], WeightMaker] | None = None,
    documents: Sequence[torch.Tensor | None] = (None,),
    tensor_parallel: TensorParallel = _UNSHARDED,
    rank: int = 4,
) -> None:
    """Run models of `shape` with zero weights on `num_rows` x `length` tokens, once for each item of `documents`.

    The backward pass runs only if gradients are enabled. Without gradients the forward pass ends at the logits.
    """
    from torch._inductor import config as inductor

    tp_size = tensor_parallel.group.size
    with device:
        make = FrozenWeight.empty if weight_maker is None else weight_maker(kernels)
        stages, weight = [], make(1, 1, dtype=dtype, after_norm=True)
        # If an adapted linear has other kernels than the rest, the first and the second layer must have each kind.
        alike = weight.gradient_factors is None and not weight.spare
        adapted: list[tuple[tuple[int, ...], Sequence[str]]] = [((1, 2), (QKV,))]
        for layers, names in adapted if alike else [((2,), (QKV,)), ((1, 2), TARGET_NAMES)]:
            targets = tied_adapter.targets_of(shape, names)
            config = tied_adapter.make_adapter_config("tl6", rank=rank, layers=layers, targets=targets, seed=0)
            adapter = tied_adapter.TiedAdapter(tied_adapter.AdapterShard(config, layers, 0, tp_size))
            specs = layer_specs(shape, dtype=dtype, tp_size=tp_size, kernels=kernels, make_weight=make)
            stages.append(Stage(specs, adapter, tensor_parallel=tensor_parallel))
    for parameter in (parameter for stage in stages for parameter in stage.parameters()):
        torch.nn.init.zeros_(parameter)
    ids = torch.arange(length).expand(num_rows, length)
    labels = find_supervised(ids % shape.vocab_size, tensor_parallel.sequence_parts)
    labels = labels.moved(lambda tensor: tensor.to(device))
    tokens, positions = (ids % shape.vocab_size).to(device), ids.to(device)
    # Both passes run on this thread, since the patch is thread-local. It prevents compile workers from staying alive.
    with ExitStack() as patches:
        patches.enter_context(inductor.patch(compile_threads=1))
        # A kernel has a graph for each width and distance of rows.
        patches.enter_context(torch._dynamo.config.patch(recompile_limit=64))
        patches.enter_context(torch.autograd.set_multithreading_enabled(False))
        for stage, found in itertools.product(stages, documents):
            packed = None if found is None else found.expand(num_rows, length)
            if torch.is_grad_enabled():
                stage(tokens, positions, labels, documents=packed).backward()
            else:
                stage.predict(tokens, positions, documents=packed)
