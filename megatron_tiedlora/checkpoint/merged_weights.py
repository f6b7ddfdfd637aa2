"""A base's weights as a merge makes them, while they are read: W' = D(W) + B' A', added in fp32.

D(W) is W, or in a merge onto the base that training saw what the storage format of that base makes of W. A merge writes
what is read here, the check of a merged folder reads it again, and a model with a merged adapter is loaded from it. The
last bits of a matmul can depend on its number of rows, so merge and check read the same `row_blocks`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from megatron_tiedlora.base.shapes import BASE_FORMATS
from megatron_tiedlora.checkpoint.base_weights import BaseWeights
from megatron_tiedlora.checkpoint.native_adapter import NativeAdapter, changed_tensors
from megatron_tiedlora.checkpoint.sources import ModelSource
from megatron_tiedlora.model.weights import quantised_rules, stored_shapes
from megatron_tiedlora.parallel.quantise import quantised_rows

BLOCK_ELEMENTS = 2**19  # of a block of rows: 2 MiB in fp32, and as much again for its update; it stays in the caches
_FEWEST_ROWS = 16  # of a block: a matmul of a few rows sums in another order than one of many

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


def merged_rows(rows: torch.Tensor, a: torch.Tensor, b_rows: torch.Tensor) -> torch.Tensor:
    """Rows (n, in) of W', from the same rows of W as stored, A' (r, in) and the same rows (n, r) of B'; in fp32, or in
    fp64 if W is."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    return rows.to(wide, copy=True).add_(b_rows @ a)


class MergedWeights(BaseWeights):
    """A base checkpoint, read with an adapter merged into it.

    It keeps the factors of the last tensor, so the rows of a tensor are best read one after another. Those of all
    layers at once would take memory for each layer.

    Attributes:
        changed: the stored tensors whose values the merge changes.
    """

    def __init__(self, source: ModelSource, adapter: NativeAdapter | None, *, base_format: str | None = None) -> None:
        """Open the files of `source`.

        Args:
            adapter: None for what `base_format` alone changes.
            base_format: of the base that the adapter is merged onto; None for the stored one.
        """
        super().__init__(source.weights_folder(), source.shape, source.stored)
        self._adapter, self._base_format = adapter, None if base_format is None else BASE_FORMATS[base_format]
        self._places = {} if adapter is None else changed_tensors(adapter.config, source.shape)
        requantised = () if base_format is None else stored_shapes(quantised_rules(source.shape)).keys()
        self.changed = frozenset((*self._places, *requantised))
        self._requantised = frozenset(requantised)
        self._last: tuple[str, torch.Tensor, torch.Tensor] | None = None

    def read(self, name: str, part: slice | None = None, dim: int = 0) -> torch.Tensor:
        """The tensor `name` of the merged model, or a slice of it along `dim`: in fp32 or fp64 if the merge changes it,
        else as it is stored."""
        values = super().read(name, part, dim)
        if name in self._requantised:
            assert self._base_format is not None and dim == 0, "scales are those of whole rows"
            values = quantised_rows(values, self._base_format)
        if name not in self._places:
            return values
        a, b = self._factors(name)
        if part is not None:
            a, b = (a, b[part]) if dim == 0 else (a[:, part], b)
        return merged_rows(values, a, b)

    def read_base(self, name: str, part: slice) -> torch.Tensor:
        """Some rows of the tensor `name` as they are without the merge."""
        return super().read(name, part)

    def _factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A' (r, in) and the rows of B' that belong to a tensor."""
        if self._last is None or self._last[0] != name:
            assert self._adapter is not None
            self._last = name, *self._places[name].factors(self._adapter.config, self._adapter.state)
        return self._last[1:]
