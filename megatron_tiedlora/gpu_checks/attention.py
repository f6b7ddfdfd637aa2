"""Part attention: every route against plain attention in fp64, forward and backward; its time; its first call."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import median
from typing import NamedTuple

import torch

from megatron_tiedlora.gpu_checks.package import (
    CHOSEN,
    CUDNN,
    Route,
    attention_obstacles,
    attention_routes,
    compute_dtype,
)
from megatron_tiedlora.gpu_checks.records import ERROR_FIX, CheckOptions, Report, error_line
from megatron_tiedlora.training.throughput import timed

# Relative errors (2-norms) due to rounding; a mask that is off by one token gives 0.3 and more.
BOUNDS = {torch.bfloat16: 2e-2, torch.float32: 1e-4}
LEAST_SEEN = 0.05
WRONG_FIX = (
    "this kernel gives wrong numbers here: do not train with it; use another version of torch or flash_attn, and run"
    " `pytest -m gpu` for details"
)
SLOW_FIX = (
    "a plan is built for every new shape, as cuDNN does: export TORCH_CUDNN_SDPA_DEPRIORITIZED=1, or install flash_attn"
)
NEW_SHAPE_SECONDS = 5e-3  # by which a first call may take longer than a second one
TIMED = (1, 32, 4096, 128)  # b, heads, s, head_dim
DOCUMENT_LENGTH = 200  # of the timed packed row


class Heads(NamedTuple):
    """The attention heads of one comparison."""

    name: str
    heads: int
    kv_heads: int
    head_dim: int


CASES = (Heads("MHA", 4, 4, 128), Heads("GQA", 8, 2, 128), Heads("MHA d64", 4, 4, 64), Heads("GQA d80", 4, 2, 80))
_NONE = "No available kernel"  # torch's message if a backend supports none of the shapes
LENGTHS = (1, 130, 64, 333, 7, 200, 33)  # of the documents of a packed row


def check(report: Report, options: CheckOptions) -> None:
    """All of the part."""
    device = torch.device(options.device)
    _control(report, device)
    dtypes = (torch.bfloat16, torch.float32) if options.on_gpu else (torch.float32,)
    for dtype in dtypes:
        for name, obstacle in attention_obstacles(device, dtype, TIMED[-1]).items():
            report.skip(f"{name}, {str(dtype).removeprefix('torch.')}", f"it {obstacle}")
        for case in CASES:
            for name, route in attention_routes(device, dtype, case.head_dim).items():
                for lengths in ((sum(LENGTHS),), LENGTHS):
                    compare(report, name, route, case, lengths, device=device, dtype=dtype)
    if options.on_gpu:
        for name, route in attention_routes(device, compute_dtype(device), TIMED[-1]).items():
            _time(report, name, route, device)


def _control(report: Report, device: torch.device) -> None:
    """Check that the comparison detects a mask that hides one token too many."""
    label = "control: a mask that is off by one token"
    with report.attempt(label):
        case, ids = CASES[1], torch.zeros(2, 256, dtype=torch.int64)
        heads = random_heads(case, ids.shape[1], device=device, dtype=torch.float64)
        shifted = ids.clone()
        shifted[:, 0] = 1
        query, key, value = heads
        found, expected = (plain_attention(query, key, value, which) for which in (shifted, ids))
        report.at_least(label, relative(found, expected), LEAST_SEEN, fix=ERROR_FIX, why="its relative error")


def compare(
    report: Report,
    name: str,
    route: Route,
    case: Heads,
    lengths: Sequence[int],
    *,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Compare output and gradients of one route with fp64, for two rows of documents of `lengths`."""
    packed = len(lengths) > 1
    if packed and name == CUDNN:  # it does not support packed rows
        return
    label = f"{name}, {case.name}, {'packed' if packed else 'causal'}, {str(dtype).removeprefix('torch.')}"
    with report.attempt(label):
        ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).expand(2, -1)
        heads = random_heads(case, ids.shape[1], device=device, dtype=dtype)
        weight = torch.randn(2, ids.shape[1], case.heads * case.head_dim, device=device, dtype=dtype)
        with optional(report, name, label):
            found = results(route, heads, ids if packed else None, weight)
            wide = [tensor.detach().double().requires_grad_() for tensor in heads]
            expected = results(plain_attention, wide, ids, weight.double())
            names = ("out", "dq", "dk", "dv")
            errors = {what: relative(a, b) for what, a, b in zip(names, found, expected, strict=True)}
            worst = worst_of(errors)
            report.at_most(
                label,
                errors[worst],
                BOUNDS[dtype],
                why=f"the largest is of {worst}",
                fix=WRONG_FIX,
                otherwise="fail" if name == CHOSEN else "warn",
            )


def worst_of(errors: Mapping[str, float]) -> str:
    """The name with the largest error; nan counts as the largest."""
    return max(errors, key=lambda name: math.inf if math.isnan(errors[name]) else errors[name])


@contextmanager
def optional(report: Report, name: str, label: str) -> Iterator[None]:
    """A kernel that the package does not use may not support these shapes, or fail: it is reported as skipped."""
    try:
        yield
    except Exception as error:
        if name == CHOSEN:
            raise
        report.skip(label, "no such kernel for these shapes" if _NONE in str(error) else error_line(error))
        report.is_alive()


def random_heads(case: Heads, length: int, *, device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
    """Queries, keys and values of two rows, with gradients."""
    draw = torch.Generator(device).manual_seed(length)
    return [
        torch.randn(2, heads, length, case.head_dim, generator=draw, device=device, dtype=dtype).requires_grad_()
        for heads in (case.heads, case.kv_heads, case.kv_heads)
    ]


def results(
    route: Route, heads: Sequence[torch.Tensor], ids: torch.Tensor | None, weight: torch.Tensor
) -> list[torch.Tensor]:
    """The output and the gradients of query, key and value for the loss sum(output * weight)."""
    query, key, value = heads
    output = route(query, key, value, ids)
    return [output.detach(), *torch.autograd.grad(output, (query, key, value), weight)]


def plain_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, ids: torch.Tensor | None
) -> torch.Tensor:
    """Causal attention within documents, written out; a `Route`."""
    assert ids is not None
    length, groups = query.shape[2], query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    positions = torch.arange(length)
    sees = (ids[:, :, None] == ids[:, None, :]) & (positions[:, None] >= positions)
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    scores = scores.masked_fill(~sees[:, None].to(scores.device), float("-inf"))
    return (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """||found - expected|| / ||expected||, nan if `expected` is zero.

    Computed on the CPU, because the device under test may compute nothing.
    """
    found, expected = found.detach().cpu().double(), expected.detach().cpu().double()
    return float((found - expected).norm() / expected.norm())


def _time(report: Report, name: str, route: Route, device: torch.device) -> None:
    """Milliseconds of forward and backward at a 7B layer's size, and the extra cost of a new shape."""
    size, heads, length, head_dim = TIMED
    packed = torch.arange(length)[None] // DOCUMENT_LENGTH

    def call(length: int, ids: torch.Tensor | None) -> float:
        draw = [
            torch.randn(size, heads, length, head_dim, device=device, dtype=torch.bfloat16).requires_grad_()
            for _ in range(3)
        ]
        weight = torch.randn(size, length, heads * head_dim, device=device, dtype=torch.bfloat16)
        torch.cuda.synchronize()
        return timed(lambda: results(route, draw, ids, weight), device)

    for ids in (None, packed) if name != CUDNN else (None,):
        label = f"{name}, {'documents of 200' if ids is not None else 'causal'}, 32 heads of 128, 4,096 tokens"
        with report.attempt(label), optional(report, name, label):
            taken = min(call(length, ids) for _ in range(5))
            report.tell(label, 1e3 * taken, "ms", why="forward and backward")
    label = f"{name}, first call on a new length"
    with report.attempt(label), optional(report, name, label):
        started, first, again = time.perf_counter(), [], []
        for number in range(6):
            new = 1000 + 24 * number
            first.append(call(new, None))
            again.append(call(new, None))
            if time.perf_counter() - started > 3:
                break
        cost = 1e3 * median(a - b for a, b in zip(first, again, strict=True))
        why = "more than the second call; the median of several lengths"
        if name == CHOSEN:
            limit = 1e3 * NEW_SHAPE_SECONDS
            report.at_most(label, cost, limit, unit="ms", why=why, fix=SLOW_FIX, otherwise="warn")
        else:
            report.tell(label, cost, "ms", why=why)
