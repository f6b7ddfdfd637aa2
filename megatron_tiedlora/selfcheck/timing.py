"""Measures the times of steps that run in turn, the times of kernels by class, and the memory of a single step."""

import ctypes
import gc
import multiprocessing
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from megatron_tiedlora.base import installation, progress, shapes
from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.config.tool_settings import BenchSettings
from megatron_tiedlora.training.throughput import peak_memory_bytes, resident_bytes, timed

Value = TypeVar("Value")
_ALLOCATOR_SETTINGS = ("MALLOC_CONF", "MALLOC_MMAP_THRESHOLD_", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
CLASSES = ("matmul", "attention", "elementwise", "communication", "copies", "other")

# The first pattern that is found in a name decides. The order matters, because names of attention kernels also contain
# CUTLASS, a matmul split along its inner dimension ends in a reduction, and Inductor's names list all fused operations.
_PATTERNS = (
    ("communication", r"nccl"),
    ("copies", r"^mem(cpy|set)\b"),
    ("elementwise", r"^triton_(poi|red|per|for)_"),
    ("attention", r"flash|fmha|attention|mha_|sdpa"),
    ("matmul", r"gemm|gemv|nvjet|cutlass|xmma|splitk|^triton_tem_fused_\w*mm"),
    ("elementwise", r"elementwise|reduce|softmax|norm|at::native|^triton_"),
)


def take_turns(
    timers: Mapping[str, Callable[[], Value]], *, repeats: int, uncounted: int = 1, shows: bool = True
) -> dict[str, list[Value]]:
    """Call the timers in turn, and return their results (seconds, or several figures) by name. Every second round has
    the reverse order. The first `uncounted` rounds are not included."""
    figures: dict[str, list[Value]] = {name: [] for name in timers}
    for turn in progress.progress_bar("turns", "turn", range(uncounted + repeats), shows=shows):
        for name in list(timers)[:: -1 if turn % 2 else 1]:
            taken = timers[name]()
            if turn >= uncounted:
                figures[name].append(taken)
    return figures


def default_device() -> torch.device:
    """Return the GPU that a process without an engine uses, or the CPU if there is no GPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def about(
    settings: BenchSettings, base_format: str | None, device: torch.device, *names: str, **more: Any
) -> dict[str, Any]:
    """Return the first entries of every report: the named settings, dtype, `more`, device, allocator and versions.

    Args:
        base_format: the storage format of the base model.
    """
    return {
        **{name: getattr(settings, name) for name in names},
        "dtype": shapes.precision_in_words(settings.dtype, base_format, settings.products),
        **more,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "threads": torch.get_num_threads(),
        "allocator": describe_allocator(os.environ),
        "torch": torch.__version__,
        "versions": installation.installed_versions("torch", "deepspeed", "transformers", "peft", "vllm"),
    }


def describe_allocator(environment: Mapping[str, str]) -> str:
    """Return text that names the preloaded allocator and its settings, read from environment variables."""
    libraries = environment.get("LD_PRELOAD", "").replace(":", " ").split()
    found = [f"LD_PRELOAD {Path(library).name}" for library in libraries]
    found += [f"{name} {environment[name]}" for name in _ALLOCATOR_SETTINGS if environment.get(name)]
    return ", ".join(found) or "default malloc"


def kernel_class(name: str) -> str:
    """Return the kernel class (one of `CLASSES`) for a kernel name. Reductions count as elementwise."""
    return next((kind for kind, pattern in _PATTERNS if re.search(pattern, name, re.IGNORECASE)), "other")


def profiled(step: Callable[[], object], trace: Path | None = None) -> list[Any]:
    """Run `step` once under torch's profiler until the GPU has finished, and return the events.

    The trace is written to the file `trace`, NAME.json.gz, for https://ui.perfetto.dev, unless it is None.
    """
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    if trace is not None:
        profiler.export_chrome_trace(str(trace))
    return list(profiler.events() or ())


def seconds_by_kernel(events: Iterable[Any]) -> dict[str, tuple[float, int]]:
    """Return the seconds and the number of calls of each GPU kernel among the events by name, the longest first."""
    spent: dict[str, tuple[float, int]] = {}
    for event in events:
        # An annotation spans other kernels, so it is not counted.
        if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False):
            seconds, calls = spent.get(event.name, (0.0, 0))
            spent[event.name] = seconds + event.time_range.elapsed_us() / 1e6, calls + 1
    return dict(sorted(spent.items(), key=lambda item: item[1], reverse=True))


def kernel_seconds(step: Callable[[], object]) -> dict[str, float]:
    """Run `step` once under torch's profiler, and return the seconds of GPU kernels by class.

    The times of kernels that run at the same time are added.
    """
    spent = dict.fromkeys(CLASSES, 0.0)
    for name, (seconds, _) in seconds_by_kernel(profiled(step)).items():
        spent[kernel_class(name)] += seconds
    return spent


def shares_in_words(spent: Mapping[str, float]) -> str:
    """Return text with the share of each kernel class in their total time, or why there is none."""
    total = sum(spent.values())
    if not total:
        return "unknown: torch's profiler saw no kernel; CUPTI may not be allowed here"
    return ", ".join(f"{kind} {taken / total:.0%}" for kind, taken in spent.items() if taken)


def seconds_of_call(step: Callable[[], object], device: torch.device, *, calls: int = 5, repeats: int = 3) -> float:
    """Return the least average seconds of `calls` calls, which are queued before the device is waited for."""
    step()
    return min(timed(lambda: [step() for _ in range(calls)], device) for _ in range(repeats)) / calls


def in_own_process(name: str, measure: Callable[..., Value], *arguments: Any) -> Value:
    """Call `measure` in a new process, and return its result. Error messages name the measurement `name`.

    Raises:
        UserError: the process ended without a result, for example because the system ran out of memory and killed it.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as processes:
        try:
            return processes.submit(measure, *arguments).result()
        except BrokenProcessPool:
            raise UserError(
                f"{name}: the process that measures it was ended, probably because memory ran out; reduce --rows,"
                " --length or --num_layers, or --slots and --in_batch with --what serving"
            ) from None


@contextmanager
def saved_by_autograd(model: torch.nn.Module) -> Iterator[dict[int, torch.Tensor]]:
    """Yield a dict of the tensors that autograd saves in the block, by storage. It excludes the model's parameters."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    saved: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield saved


def storage_bytes(saved: Mapping[int, torch.Tensor]) -> int:
    """Return the total bytes of the storages of `saved`."""
    return sum(tensor.untyped_storage().nbytes() for tensor in saved.values())


def restart_peak(device: torch.device) -> int | None:
    """Reset the peak that `peak_bytes` returns. Return the bytes that are in use now, or None if unknown."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return int(torch.cuda.memory_allocated(device))
    before = idle_bytes()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:  # not Linux, or not allowed
        return None
    return before


def idle_bytes(kind: str = "RssAnon") -> int | None:
    """Return the current anonymous memory of this process, or another kind; None if the system does not report it.

    A step could reuse freed memory that is still resident, without a higher peak. Therefore glibc's malloc first
    returns freed memory to the system. Other allocators may keep it. The header of a report names the allocator.
    """
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    return resident_bytes(kind)


def peak_bytes(device: torch.device) -> int | None:
    """Return the peak bytes since `restart_peak`: of torch on a GPU, of anonymous memory on a CPU; None if unknown.

    Linux reports only the peak of all resident memory. The current size of files and shared memory is subtracted.
    """
    if device.type == "cuda":
        return peak_memory_bytes(device)
    parts = [resident_bytes(name) for name in ("VmHWM", "RssFile", "RssShmem")]
    if any(part is None for part in parts):
        return None
    most, *others = (part or 0 for part in parts)
    return most - sum(others)
