"""Bytes that an adapted QKV projection reads and writes, beside those of its two frozen products alone.

    make test PYTEST_ARGS=-s TESTS=tests/unit/model/test_bytes_touched.py

prints the table of docs/performance_log.md.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import pytest
import torch
from bytes_touched import BytesTouched, QkvShape, layer_bytes

WIDTHS = {"7B": (4096, (4096, 4096, 4096), 128), "SmolLM2-135M": (576, (576, 192, 192), 64)}
TOKENS = (1024, 2048, 4096)
RANKS = (8, 128)
METHODS = ("tl6", "lora", "vera")
LIMIT = 3.2
NORM = ("normalise", "apply_norm", "norm_gradient")


class Ratios(NamedTuple):
    """To the bytes of the bare products.

    Attributes:
        product: the two products with the update, forward and backward, and nothing else.
        with_norm_again: and what computes the norm's result a second time, for A's gradient.
        step: everything: norm, products, update, rotation.
        frozen_step: the same step without an adapter.
    """

    product: float
    with_norm_again: float
    step: float
    frozen_step: float


def ratios(shape: QkvShape, method: str, rank: int) -> Ratios:
    adapted, frozen = layer_bytes(shape, method, rank), layer_bytes(shape, None)
    added = Counter(adapted)
    added.subtract(frozen)
    again = sum(added.pop(name, 0) for name in NORM)
    bare = shape.bare_bytes
    product = 1 + added.total() / bare
    return Ratios(product, product + again / bare, adapted.total() / bare, frozen.total() / bare)


def shape_of(width: str, num_tokens: int) -> QkvShape:
    return QkvShape(*WIDTHS[width], num_tokens)


def plain_bytes(shape: QkvShape, rank: int) -> int:
    """Of the two products and a tied update written as plain operations, which autograd goes back through."""
    d, o = shape.hidden_size, sum(shape.rows)
    with torch.device("meta"):
        weight, gradient = (torch.empty(n, m, dtype=torch.bfloat16) for n, m in ((o, d), (shape.num_tokens, o)))
        hidden = torch.empty(shape.num_tokens, d, dtype=torch.bfloat16, requires_grad=True)
        factors = [torch.empty(size, requires_grad=True) for size in ((rank, d), (o, rank), (rank,), (o,))]
    with BytesTouched() as counter:
        a, b, u, v = (factor.to(torch.bfloat16) for factor in factors)
        product = hidden @ weight.t() + ((hidden @ a.t()) * u @ b.t()) * v
        torch.autograd.grad(product, [hidden, *factors], gradient)
    return counter.total


# At rank 128 of a width of 576 what has r columns is no longer small.
LIMITS = {("SmolLM2-135M", 128): 5.0}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("num_tokens", TOKENS)
@pytest.mark.parametrize("width", WIDTHS)
def test_an_adapted_projection_touches_at_most_3_2_times_the_bare_bytes(
    width: str, num_tokens: int, rank: int, method: str
) -> None:
    shape = shape_of(width, num_tokens)
    found, plain = ratios(shape, method, rank), plain_bytes(shape, rank) / shape.bare_bytes
    print(
        f"\n| {width} | {num_tokens:,} | {rank} | {method} | {found.product:.2f} | {found.with_norm_again:.2f}"
        f" | {found.step:.2f} | {found.frozen_step:.2f} | {plain:.2f} |"
    )
    assert 1 < found.product <= LIMITS.get((width, rank), LIMIT)
    assert width != "7B" or found.with_norm_again <= LIMIT
    assert found.product <= found.with_norm_again < found.step
    assert method != "vera" or found.product == found.with_norm_again, "a frozen A needs no norm again"
    assert found.product < plain


@pytest.mark.parametrize("num_tokens", [2048, 4096])
def test_plain_operations_are_over_the_limit(num_tokens: int) -> None:
    """The limit can be missed: tensors of tokens x o for the update alone are enough."""
    shape = shape_of("7B", num_tokens)
    assert plain_bytes(shape, 8) / shape.bare_bytes > LIMIT


def test_bare_products_by_count() -> None:
    shape = shape_of("7B", 1024)
    with torch.device("meta"):
        hidden, gradient = (torch.empty(1024, n, dtype=torch.bfloat16) for n in (4096, 3 * 4096))
        weight = torch.empty(3 * 4096, 4096, dtype=torch.bfloat16)
    with BytesTouched() as counter:
        _ = hidden @ weight.t(), gradient @ weight
    assert counter.total == shape.bare_bytes


def test_what_operations_touch() -> None:
    """By hand, in numbers of four bytes, of a (3, 4) tensor."""
    x, row, whole = torch.ones(3, 4), torch.ones(4), torch.ones(3, 8)
    cases = {
        "views": (lambda: x.t().view(4, 3)[1:].unsqueeze(0).expand(2, 3, 3).unbind(0), 0),
        "a sum": (lambda: x + x, 12 + 12 + 12),
        "a row for all": (lambda: x + row, 12 + 4 + 12),
        "the same, expanded": (lambda: x + row.expand(3, 4), 12 + 4 + 12),
        "a part of a tensor": (lambda: whole[:, :4] * 2, 12 + 12),
        "in place": (lambda: x.mul_(row), 12 + 4 + 12),
        "over it": (lambda: x.copy_(row), 4 + 12),
        "zeros over it": (lambda: x.zero_(), 12),
        "into another": (lambda: torch.mm(x, x.t(), out=whole[:, :3]), 12 + 12 + 9),
        "added into another": (lambda: torch.addmm(x, whole, torch.ones(8, 4), out=x), 12 + 24 + 32 + 12 + 32),
        "a list": (lambda: torch.cat([x, x]), 24 + 24),
        "two results": (lambda: x.max(dim=1), 12 + 3 + 2 * 3),
        "nothing yet": (lambda: torch.empty(3, 4), 0),
        "to 16 bits": (lambda: x.to(torch.bfloat16), 12 + 6),
    }
    for name, (work, numbers) in cases.items():
        with BytesTouched() as counter:
            work()
        assert counter.total == 4 * numbers, name


def test_kernels_count_as_one_operation() -> None:
    """By hand, of the frozen layer; its products are the bare ones."""
    shape = shape_of("7B", 1024)
    d, o, tokens = shape.hidden_size, sum(shape.rows), shape.num_tokens
    found = layer_bytes(shape, None)
    assert found["mm"] == shape.bare_bytes
    row, weight, root = 2 * tokens * d, 2 * d, 4 * tokens
    assert found["normalise"] == 2 * row + weight + root
    assert found["norm_gradient"] == 3 * row + weight + root
    # all heads read and written, with cos and sin
    rotation = 2 * 2 * tokens * o + 2 * 2 * tokens * shape.head_dim // 2
    assert found["rotate"] == found["rotate_gradient"] == rotation
    assert sum(found.values()) == found["mm"] + 2 * rotation + 5 * row + 2 * (weight + root), "and nothing else"
    assert found["apply_norm"] == 0
    assert layer_bytes(shape, "tl6", 8)["apply_norm"] == 2 * row + weight + root
