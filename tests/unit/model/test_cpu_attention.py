"""Attention by tiles of queries on a CPU: values, gradients, what tiles leave out, and rounding in bf16."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.attention_oracle import assert_same, attended, heads
from torch.nn import functional

from megatron_tiedlora.model.cpu_attention import TiledRows, attend_by_tiles, find_query_tiles
from megatron_tiedlora.parallel.kernels import EAGER

# shared keys or not, lengths that blocks of 64 divide or not
SHAPES: dict[str, dict[str, Any]] = {
    "gqa": {"counts": (6, 2), "head_dim": 16, "shape": (2, 200)},
    "mha": {"counts": (4, 4), "head_dim": 8, "shape": (1, 40)},
    "mqa": {"counts": (3, 1), "head_dim": 8, "shape": (3, 128)},
}


@pytest.mark.parametrize("size", [64, 24])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_are_those_of_the_definition(shape: str, packed: bool, size: int) -> None:
    parts, (rows, length) = heads(torch.float64, **SHAPES[shape]), SHAPES[shape]["shape"]
    ids = None
    if packed:  # of each row other documents, some of one token, some longer than a block
        ids = torch.randint(0, 6, (rows, length), generator=torch.Generator().manual_seed(2)).sort(dim=1).values
    wanted = attended(*parts, torch.zeros(rows, length) if ids is None else ids)
    found = attend_by_tiles(*parts, [TiledRows(rows, length, find_query_tiles(ids, length, size=size))], EAGER)
    assert_same(found, wanted, parts, 1e-11)


def test_blocks_leave_out_what_no_row_sees() -> None:
    """Every query once; keys from the first that a row sees in it, so documents cost what they are long."""
    ids = torch.tensor([[0] * 30 + [1] * 40 + [2] * 30, [0] * 50 + [1] * 50])
    blocks = find_query_tiles(ids, 100, size=32)
    assert [block[:3] for block in blocks] == [(96, 100, 50), (64, 96, 30), (32, 64, 0), (0, 32, 0)]
    assert all(mask.shape == (2, 1, stop - start, stop - first) for start, stop, first, mask in blocks)
    assert all((block.mask == 0).any(-1).all() for block in blocks)  # every query sees itself
    whole = find_query_tiles(None, 100, size=32)
    assert [block.first for block in whole] == [0] * 4
    assert whole[0].mask.shape == (1, 1, 4, 100) and whole[0].mask.element_size() == 2


def test_bf16_rounds_no_worse_than_pytorchs_kernel() -> None:
    """Errors against fp64 by norm: the result within 1.5 times, all gradients together within 1.1 times of SDPA's.

    Scores and sums over blocks are fp32 here, while the exponentials are rounded before they are divided, and dO V^T is
    rounded once.
    """
    parts = heads(torch.bfloat16, **SHAPES["gqa"])
    wide = [part.detach().double().requires_grad_() for part in parts]
    wanted = attended(*wide, torch.zeros(2, 200))
    gradient = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(4)).bfloat16()
    truth = (wanted.detach(), *torch.autograd.grad(wanted, wide, gradient.double()))
    blocks = find_query_tiles(None, 200, size=64)
    mine = attend_by_tiles(*parts, [TiledRows(len(parts[0]), 200, blocks)], EAGER)
    theirs = functional.scaled_dot_product_attention(*parts, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(2)
    errors = []
    for found in (mine, theirs):
        values = (found.detach(), *torch.autograd.grad(found, parts, gradient))
        pairs = zip(values, truth, strict=True)
        errors.append([float((value.double() - true).norm() / true.norm()) for value, true in pairs])
    assert errors[0][0] <= 1.5 * errors[1][0]
    assert sum(errors[0][1:]) <= 1.1 * sum(errors[1][1:])
