"""The values of a merged weight, some rows at a time: W' = W + B' A', added in fp32 and cast once.

Merging writes what this module computes, and the check of a merged folder computes it again. The last bits of a matmul
can depend on its number of rows. So both take the same blocks of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch

from megatron_tiedlora.adapters.targets import Target
from megatron_tiedlora.base.shapes import ModelShape
from megatron_tiedlora.checkpoint.native_adapter import NativeAdapter
from megatron_tiedlora.model.weights import WeightRule

BLOCK_ELEMENTS = 2**19  # of a block of rows: 2 MiB in fp32, and as much again for its update; it stays in the caches
_FEWEST_ROWS = 16  # of a block: a matmul of a few rows sums in another order than one of many

Factors = tuple[torch.Tensor, torch.Tensor]  # A' (r, in) and B' (rows, r), fp32


def row_blocks(shape: tuple[int, ...]) -> Iterator[slice]:
    """Slices of about `BLOCK_ELEMENTS` elements that cover the rows of a stored tensor of this shape.

    None has fewer than 16 rows, unless the tensor has.
    """
    num_rows, width = shape[0], max(torch.Size(shape[1:]).numel(), 1)
    size = max(BLOCK_ELEMENTS // width // _FEWEST_ROWS, 1) * _FEWEST_ROWS
    start = 0
    while start < num_rows:
        stop = num_rows if num_rows - start < size + _FEWEST_ROWS else start + size
        yield slice(start, stop)
        start = stop


def merged_rows(rows: torch.Tensor, a: torch.Tensor, b_rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rows (n, in) of W' in `dtype`, from the same rows of W as stored, A' (r, in) and the same rows (n, r) of B'."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    return rows.to(wide, copy=True).add_(b_rows @ a).to(dtype)


def stored_factors(adapter: NativeAdapter, shape: ModelShape) -> Mapping[str, Callable[[], Factors]]:
    """Functions that compute the factors of every stored tensor that the adapter changes, by its name.

    Factors of all layers at once would take memory for each layer.
    """
    return {
        name: partial(_factors, adapter, rule, target, name)
        for rule, target in adapter.changed(shape)
        for name in rule.hf_names
    }


def _factors(adapter: NativeAdapter, rule: WeightRule, target: Target, name: str) -> Factors:
    a, b = adapter.factors(rule, target)
    return a, rule.by_stored_tensor(b)[name]
