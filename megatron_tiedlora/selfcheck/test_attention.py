"""Checks attention: compares every attention kernel with plain attention in fp64, and measures its time."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from megatron_tiedlora.base.messages import first_line
from megatron_tiedlora.model.batch import find_documents, whole_rows
from megatron_tiedlora.model.cpu_attention import Scores, TiledRows, attend_by_tiles, find_query_tiles, tile_size
from megatron_tiedlora.model.fused_attention import CANDIDATES, Attend, attend_within, choose_attention, one_by_one
from megatron_tiedlora.parallel.kernels import EAGER
from megatron_tiedlora.selfcheck.parts import Tell, warn_unless
from megatron_tiedlora.selfcheck.reference import plain_attention, relative, worst_of
from megatron_tiedlora.selfcheck.running import compute_dtype
from megatron_tiedlora.selfcheck.timing import seconds_of_call
from megatron_tiedlora.training.throughput import find_peak, timed

pytestmark = pytest.mark.gpu

AttentionCall = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
"""A function of queries (b, heads, s, head_dim), keys and values (b, kv heads, s, head_dim), and document ids (b, s)
int64 on the CPU or None. It returns the attention output, (b, s, heads * head_dim)."""
Drawn = tuple[list[Tensor], Tensor]  # random queries, keys and values, and a random gradient of the output

CHOSEN = "chosen by the package"  # an error of any other kernel does not fail a test
ONE_BY_ONE = "one document after another"
# Relative errors (2-norms) due to rounding. A mask that is wrong by one token has an error of at least 0.3.
BOUNDS = {torch.bfloat16: 2e-2, torch.float32: 1e-4}
LEAST_SEEN = 0.05
WRONG_FIX = (
    "this kernel computes wrong values here: do not train with it; change the version of torch or flash_attn, and run"
    " `pytest -m gpu` for details"
)
SLOW_FIX = (
    "every new shape needs a new plan, as with cuDNN: export TORCH_CUDNN_SDPA_DEPRIORITIZED=1, or install flash_attn"
)
NEW_SHAPE_SECONDS = 5e-3  # a first call on a new length may take this much longer than a second one
LENGTHS_TIMED = (4096, 8192)
DOCUMENT_LENGTH = 200  # of the timed packed row


class Heads(NamedTuple):
    """The numbers and size of the attention heads in one comparison."""

    name: str
    heads: int
    kv_heads: int
    head_dim: int


HEADS, PLAIN = Heads("7B", 32, 32, 128), Scores(128**-0.5)  # whose time is measured
CASES = (Heads("MHA", 4, 4, 128), Heads("GQA", 8, 2, 128), Heads("MHA d64", 4, 4, 64), Heads("GQA d80", 4, 2, 80))
LENGTHS = (1, 130, 64, 333, 7, 200, 33)  # of the documents of a packed row


@pytest.mark.parametrize("kind", [(None, None), (100, None), (100, 5.0)], ids=["all tokens", "window", "capped window"])
@pytest.mark.parametrize("packed", [False, True], ids=["causal", "packed"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", BOUNDS, ids=["bf16", "fp32"])
def test_routes(dtype: torch.dtype, case: Heads, packed: bool, kind: Any, device: torch.device, tell: Tell) -> None:
    """Compare every kernel with plain attention in fp64. The package's choice is last: only its errors fail a test."""
    if dtype == torch.bfloat16 and device.type == "cpu":
        pytest.skip("a CPU may have no fast bf16")
    drawn, how = random_heads(case, 2, sum(LENGTHS), device, dtype), Scores(case.head_dim**-0.5, *kind)
    for name, route in reversed(attention_routes(device, dtype, case.head_dim, how).items()):
        compare(tell, name, route, drawn, LENGTHS if packed else (sum(LENGTHS),), how)


def test_control(device: torch.device, tell: Tell) -> None:
    """Check that the comparison detects a mask that wrongly hides one token."""
    (query, key, value), _ = random_heads(CASES[1], 2, 256, device, torch.float64)
    ids = torch.zeros(2, 256, dtype=torch.int64)
    shifted = ids.clone()
    shifted[:, 0] = 1
    found, expected = (plain_attention(query, key, value, which) for which in (shifted, ids))
    tell("relative error", error := relative(found, expected))
    assert error >= LEAST_SEEN, "this check computes wrong errors here: report this with the versions of part env"


def compare(tell: Tell, name: str, route: AttentionCall, drawn: Drawn, lengths: Sequence[int], how: Scores) -> None:
    """Compare the output and the gradients of a kernel with fp64, on rows of documents with these `lengths`."""
    heads, weight = drawn
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).expand(len(weight), -1)
    good = False
    with optional(tell, name, weight.device):
        found = results(route, heads, ids if len(lengths) > 1 else None, weight)
        wide = [tensor.detach().double().requires_grad_() for tensor in heads]
        expected = results(partial(plain_attention, how=how), wide, ids, weight.double())
        names = ("out", "dq", "dk", "dv")
        errors = {what: relative(a, b) for what, a, b in zip(names, found, expected, strict=True)}
        worst = worst_of(errors)
        tell(f"{name}: error of {worst}", errors[worst])
        good = errors[worst] <= BOUNDS[weight.dtype]
        warn_unless(good or name == CHOSEN, tell, WRONG_FIX)
    assert good or name != CHOSEN, WRONG_FIX


@contextmanager
def optional(tell: Tell, name: str, device: torch.device) -> Iterator[None]:
    """Record an error in the block without failing the test, unless the package uses the kernel `name`."""
    try:
        yield
    except Exception as error:
        if name == CHOSEN:
            raise
        tell(name, first_line(error))
        if device.type == "cuda":
            torch.cuda.synchronize()  # the device may be lost


def random_heads(case: Heads, rows: int, length: int, device: torch.device, dtype: torch.dtype) -> Drawn:
    """Return `Drawn` values of some rows. The queries, keys and values require gradients."""
    draw = partial(torch.randn, generator=torch.Generator(device).manual_seed(length), device=device, dtype=dtype)
    counts = (case.heads, case.kv_heads, case.kv_heads)
    heads = [draw(rows, number, length, case.head_dim).requires_grad_() for number in counts]
    return heads, draw(rows, length, case.heads * case.head_dim)


def results(route: AttentionCall, heads: Sequence[Tensor], ids: Tensor | None, weight: Tensor) -> list[Tensor]:
    """Return the output and the gradients of query, key and value for the loss sum(output * weight)."""
    query, key, value = heads
    output = route(query, key, value, ids)
    return [output.detach(), *torch.autograd.grad(output, heads, weight)]


@pytest.mark.parametrize("length", LENGTHS_TIMED)
@pytest.mark.parametrize("packed", [False, True], ids=["causal", "documents of 200"])
def test_time(packed: bool, length: int, gpu: torch.device, tell: Tell) -> None:
    """Measure each kernel with 32 heads, as in a 7B model, and record which one is chosen and why."""
    tell("chosen", choose_attention(gpu, compute_dtype(gpu), HEADS.head_dim))
    peak = find_peak(gpu, torch.bfloat16).flops_per_second
    for name, route in attention_routes(gpu, compute_dtype(gpu), HEADS.head_dim, PLAIN).items():
        with optional(tell, name, gpu):
            tell(name, speed(route, length, DOCUMENT_LENGTH if packed else length, peak, gpu))


def speed(route: AttentionCall, length: int, document: int, peak: float, device: torch.device) -> str:
    """Return text with a kernel's milliseconds, TFLOP/s and share of the peak FLOP/s.

    The backward pass computes five matmuls of scores, and the forward pass two. The planner counts it as twice the
    forward pass, so its share is lower. Only scores within documents of so many tokens are computed.
    """
    ids = torch.arange(length)[None] // document if document < length else None
    heads, weight = random_heads(HEADS, 1, length, device, compute_dtype(device))
    query, key, value = heads
    forward = partial(route, query, key, value, ids)
    backward = partial(torch.autograd.grad, forward(), heads, weight, retain_graph=True)
    seconds = [seconds_of_call(step, device) for step in (forward, backward)]
    lengths = [min(document, length - start) for start in range(0, length, document)]
    flops = 2 * HEADS.heads * HEADS.head_dim * sum(part**2 for part in lengths)
    pairs = zip(("forwards", "backwards"), seconds, (flops, 2.5 * flops), strict=True)
    rates = (f"{way} {1e3 * taken:.3g} ms = {work / taken / 1e12:.0f} TFLOP/s" for way, taken, work in pairs)
    return f"{', '.join(rates)}; the planner's share {3 * flops / sum(seconds) / peak:.3f}"


def test_first_call_on_a_new_length(gpu: torch.device, tell: Tell) -> None:
    """Measure how much longer the first call on a length takes than the second, as the median over several lengths."""
    for name, route in attention_routes(gpu, compute_dtype(gpu), HEADS.head_dim, PLAIN).items():
        with optional(tell, name, gpu):
            started, costs = time.perf_counter(), []
            for length in range(1000, 1144, 24):
                heads, weight = random_heads(HEADS, 1, length, gpu, compute_dtype(gpu))
                torch.cuda.synchronize()
                first, again = (timed(partial(results, route, heads, None, weight), gpu) for _ in range(2))
                costs.append(first - again)
                if time.perf_counter() - started > 3:
                    break
            tell(f"{name}: ms", 1e3 * median(costs))
            warn_unless(name != CHOSEN or median(costs) <= NEW_SHAPE_SECONDS, tell, SLOW_FIX)


def attention_routes(device: torch.device, dtype: torch.dtype, head_dim: int, how: Scores) -> dict[str, AttentionCall]:
    """Return every attention kernel that works on the device, by name. The package's choice is the first."""
    needs: dict[str, Any] = {"window": how.window is not None, "cap": how.cap}
    chosen, tiles = choose_attention(device, dtype, head_dim, **needs), partial(_by_tiles, how=how)
    others = {} if any(how[1:]) else {ONE_BY_ONE: _within(one_by_one, how)}
    if chosen.attend is None:
        return {CHOSEN: tiles, **others}
    routes, capability = {CHOSEN: _within(chosen.attend, how)}, torch.cuda.get_device_capability(device)
    for candidate in CANDIDATES:
        if candidate.name != chosen.name and candidate.obstacle(capability, dtype, head_dim, **needs) is None:
            # created when it is called, because its library may fail
            routes[candidate.name] = lambda *heads, make=candidate.make: _within(make(False), how)(*heads)
    return {**routes, **others}


def _by_tiles(query: Tensor, key: Tensor, value: Tensor, ids: Tensor | None, how: Scores) -> Tensor:
    size, length = tile_size(query.shape[1], key.shape[1]), query.shape[2]
    tiles = find_query_tiles(ids, length, size=size, window=how.window, device=query.device)
    return attend_by_tiles(query, key, value, [TiledRows(len(query), length, tiles)], how, EAGER)


def _within(attend: Attend, how: Scores) -> AttentionCall:
    def route(query: Tensor, key: Tensor, value: Tensor, ids: Tensor | None) -> Tensor:
        size, _, length, _ = query.shape
        documents = whole_rows(size, length, query.device) if ids is None else find_documents([ids], query.device)
        return attend_within(query, key, value, documents, how, attend)

    return route
