"""The values of a merged weight, some rows at a time: W' = W + B' A', added in fp32 and cast once.

In a merge onto the base that training saw, W stands for what the storage format of that base makes of it.
Merging writes what this module computes, and the check of a merged folder computes it again. The last bits of a matmul
can depend on its number of rows. So both take the same blocks of rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial

import torch

from megatron_tiedlora.adapters.targets import Target
from megatron_tiedlora.base.base_formats import BASE_FORMATS
from megatron_tiedlora.base.shapes import ModelShape
from megatron_tiedlora.checkpoint.native_adapter import NativeAdapter
from megatron_tiedlora.model.weights import WeightRule, quantised_rules, stored_shapes
from megatron_tiedlora.parallel.quantise import quantised_rows

BLOCK_ELEMENTS = 2**19  # of a block of rows: 2 MiB in fp32, and as much again for its update; it stays in the caches
_FEWEST_ROWS = 16  # of a block: a matmul of a few rows sums in another order than one of many

Factors = tuple[torch.Tensor, torch.Tensor]  # A' (r, in) and B' (rows, r), fp32
ReadRows = Callable[[str, slice], torch.Tensor]  # of a stored tensor, by its name


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


@dataclass(frozen=True)
class Change:
    """What a merge makes of a stored tensor.

    Attributes:
        factors: None if there is no adapter, or if it does not change the tensor.
        base_format: the storage format whose values stand for W; None for W itself.
    """

    factors: Factors | None
    base_format: str | None = None

    def rows(self, values: torch.Tensor, block: slice, dtype: torch.dtype) -> torch.Tensor:
        """Rows `block` of W' in `dtype`, from the same rows of W as stored."""
        if self.base_format is not None:
            values = quantised_rows(values, BASE_FORMATS[self.base_format])
        if self.factors is None:
            return values.to(dtype)
        a, b = self.factors
        return merged_rows(values, a, b[block], dtype)


Changes = Mapping[str, Callable[[], Change]]  # by the name of the stored tensor


def merged_reader(read: ReadRows, changes: Changes) -> Callable[[str, slice, torch.dtype], torch.Tensor]:
    """A function that gives some rows of a merged tensor in a dtype; `read` gives the rows of the base.

    It keeps the factors of the last tensor, so the rows of a tensor are best read one after another.
    """
    change_of = lru_cache(maxsize=1)(lambda name: changes[name]() if name in changes else Change(None))
    return lambda name, rows, dtype: change_of(name).rows(read(name, rows), rows, dtype)


def stored_changes(adapter: NativeAdapter | None, shape: ModelShape, *, base_format: str | None = None) -> Changes:
    """Functions that compute the change of every stored tensor that a merge changes.

    Factors of all layers at once would take memory for each layer.

    Args:
        adapter: None for what `base_format` alone changes.
        base_format: of the base that the adapter is merged onto; None for the stored one.
    """
    found: dict[str, Callable[[], Change]] = {}
    if base_format is not None:
        found = dict.fromkeys(stored_shapes(quantised_rules(shape)), lambda: Change(None, base_format))
    if adapter is not None:
        for rule, target in adapter.changed(shape):
            for name in rule.hf_names:
                found[name] = partial(_change, adapter, rule, target, name, base_format)
    return found


def _change(adapter: NativeAdapter, rule: WeightRule, target: Target, name: str, base_format: str | None) -> Change:
    a, b = adapter.factors(rule, target)
    return Change((a, rule.by_stored_tensor(b)[name]), base_format)
