"""Sorts the time on a GPU by the purpose of its kernels, which their names show, for tools/bench_step.py."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

CLASSES = ("matmul", "attention", "elementwise", "communication", "copies", "other")

# The first pattern that is found in a name decides. The order matters: attention kernels contain CUTLASS too, a matmul
# split along its inner dimension ends in a reduction, and Inductor names a fused kernel after everything in it.
_PATTERNS = (
    ("communication", r"nccl"),
    ("copies", r"^mem(cpy|set)\b"),
    ("elementwise", r"^triton_(poi|red|per|for)_"),
    ("attention", r"flash|fmha|attention|mha_|sdpa"),
    ("matmul", r"gemm|gemv|nvjet|cutlass|xmma|splitk|^triton_tem_fused_\w*mm"),
    ("elementwise", r"elementwise|reduce|softmax|norm|at::native|^triton_"),
)


def kernel_class(name: str) -> str:
    """The class of `CLASSES` that a kernel of this name belongs to. Reductions count as elementwise."""
    for kind, pattern in _PATTERNS:
        if re.search(pattern, name, re.IGNORECASE):
            return kind
    return "other"


def profiled(step: Callable[[], object]) -> list[Any]:
    """The events of `step`, which is run once under torch's profiler until the GPU has finished."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        step()
        torch.cuda.synchronize()
    return list(profiler.events() or ())


def kernel_seconds(step: Callable[[], object]) -> dict[str, float]:
    """The seconds that a GPU spends in kernels of each class during `step`, which is run once under torch's profiler.

    Kernels that run at the same time each count in full.
    """
    from torch.autograd import DeviceType

    spent = dict.fromkeys(CLASSES, 0.0)
    for event in profiled(step):
        # An annotation spans the kernels that it is about.
        if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False):
            spent[kernel_class(event.name)] += event.time_range.elapsed_us() / 1e6
    return spent
