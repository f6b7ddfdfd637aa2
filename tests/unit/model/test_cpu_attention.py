"""Attention by tiles of queries on a CPU: values, gradients, what tiles leave out, and rounding in bf16."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.attention_oracle import assert_same, attended, heads
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from megatron_tiedlora.model.cpu_attention import Scores, TiledRows, attend_by_tiles, find_query_tiles
from megatron_tiedlora.parallel.kernels import EAGER

# shared keys or not, lengths that blocks of 64 divide or not
SHAPES: dict[str, dict[str, Any]] = {
    "gqa": {"counts": (6, 2), "head_dim": 16, "shape": (2, 200)},
    "mha": {"counts": (4, 4), "head_dim": 8, "shape": (1, 40)},
    "mqa": {"counts": (3, 1), "head_dim": 8, "shape": (3, 128)},
}


# windows of one token, within a tile, across tiles, and longer than every row; small caps bend all scores
HOWS = [
    Scores(0.3),
    *(Scores(0.3, window) for window in (1, 7, 30, 100, 1000)),
    Scores(1.5, None, 2.0),
    Scores(1.5, 30, 0.5),
    Scores(0.7, 1, 2.0),
]


@pytest.mark.parametrize("how", HOWS, ids=str)
@pytest.mark.parametrize("size", [64, 24])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients_are_those_of_the_definition(shape: str, packed: bool, size: int, how: Scores) -> None:
    parts, (rows, length) = heads(torch.float64, **SHAPES[shape]), SHAPES[shape]["shape"]
    ids = None
    if packed:  # of each row other documents, some of one token, some longer than a block
        ids = torch.randint(0, 6, (rows, length), generator=torch.Generator().manual_seed(2)).sort(dim=1).values
    wanted = attended(*parts, torch.zeros(rows, length) if ids is None else ids, how)
    tiles = find_query_tiles(ids, length, size=size, window=how.window)
    assert_same(attend_by_tiles(*parts, [TiledRows(rows, length, tiles)], how, EAGER), wanted, parts, 1e-11)


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


def test_a_windowed_tile_multiplies_only_with_keys_of_its_window() -> None:
    """Keys start at the window of a tile's first query, so a long row's matmuls grow with it, not with its square."""
    parts = heads(torch.float64, counts=(6, 2), head_dim=16, shape=(2, 1000))
    tiles = find_query_tiles(None, 1000, size=64, window=100)
    assert [tile.first for tile in tiles] == [max(0, tile.start - 99) for tile in tiles]
    assert all(tile.mask.shape == (1, 1, tile.stop - tile.start, tile.stop - tile.first) for tile in tiles)
    pairs = sum(tile.mask.numel() for tile in tiles)
    assert pairs <= 1000 * (64 + 99)
    with FlopCounterMode(display=False) as counter:
        attend_by_tiles(*parts, [TiledRows(2, 1000, tiles)], Scores(0.25, 100), EAGER).sum().backward()
    assert counter.get_total_flops() == 7 * 2 * pairs * 2 * 6 * 16  # seven matmuls of 2 rows and 6 heads of 16


def test_a_window_that_no_document_exceeds_changes_no_bits() -> None:
    """Nor do a window of the longest document's length, and masks that are made for another device."""
    ids = torch.tensor([[0] * 30 + [1] * 40 + [2] * 30, [0] * 50 + [1] * 50])
    plain, windowed = (find_query_tiles(ids, 100, size=32, window=window) for window in (None, 50))
    elsewhere = find_query_tiles(ids, 100, size=32, window=49, device=torch.device("meta"))
    for one, other, meta in zip(plain, windowed, elsewhere, strict=True):
        assert one[:3] == other[:3] and torch.equal(one.mask, other.mask)
        assert meta.mask.is_meta and meta.mask.dtype == one.mask.dtype
    (last, *_) = find_query_tiles(ids, 100, size=32, window=49)
    assert (last.mask != plain[0].mask[..., last.first - plain[0].first :]).sum() == 1  # row 2, token 100: one less


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
    mine = attend_by_tiles(*parts, [TiledRows(len(parts[0]), 200, blocks)], Scores(16**-0.5), EAGER)
    theirs = functional.scaled_dot_product_attention(*parts, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(2)
    errors = []
    for found in (mine, theirs):
        values = (found.detach(), *torch.autograd.grad(found, parts, gradient))
        pairs = zip(values, truth, strict=True)
        errors.append([float((value.double() - true).norm() / true.norm()) for value, true in pairs])
    assert errors[0][0] <= 1.5 * errors[1][0]
    assert sum(errors[0][1:]) <= 1.1 * sum(errors[1][1:])
