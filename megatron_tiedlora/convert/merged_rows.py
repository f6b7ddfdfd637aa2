"""The values of a merged weight, some rows at a time: W' = W + B' A', added in fp32 and cast once; and its files.

In a merge onto the base that training saw, W stands for what the storage format of that base makes of it. Merging
writes what this module computes, and the check of a merged folder computes it again. The last bits of a matmul can
depend on its number of rows. So both take the same blocks of rows.

A file of a base that is not quantised keeps its name and the order of its tensors; with the dtype it keeps its whole
header, and tensors that the adapter does not change keep their bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

from megatron_tiedlora.base.base_formats import BASE_FORMATS
from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.base.shapes import ModelShape
from megatron_tiedlora.checkpoint.base_weights import BaseWeights, open_weights
from megatron_tiedlora.checkpoint.native_adapter import NativeAdapter, changed_weights
from megatron_tiedlora.checkpoint.tensor_files import (
    FLOAT_TYPES,
    TYPE_NAMES,
    StreamedFile,
    StreamedTensor,
    all_finite,
    file_head,
    read_bytes,
    read_header,
)
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


def merged_rows(rows: torch.Tensor, a: torch.Tensor, b_rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rows (n, in) of W' in `dtype`, from the same rows of W as stored, A' (r, in) and the same rows (n, r) of B'."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    return rows.to(wide, copy=True).add_(b_rows @ a).to(dtype)


class Merge:
    """What a merge makes of the stored tensors of a base.

    Attributes:
        names: the tensors that it changes.
    """

    def __init__(self, adapter: NativeAdapter | None, shape: ModelShape, *, base_format: str | None = None) -> None:
        """The merge of an adapter; None for what `base_format` alone changes.

        Args:
            base_format: of the base that the adapter is merged onto; None for the stored one.
        """
        self._adapter, self._base_format = adapter, base_format
        changed = () if adapter is None else changed_weights(adapter.config, shape)
        self._places = {name: (rule, target) for rule, target in changed for name in rule.hf_names}
        self._quantised = () if base_format is None else stored_shapes(quantised_rules(shape)).keys()
        self.names = frozenset((*self._places, *self._quantised))

    def reader(self, read: ReadRows) -> Callable[[str, slice, torch.dtype], torch.Tensor]:
        """A function that gives some rows of a merged tensor in a dtype; `read` gives the rows of the base.

        It keeps the factors of the last tensor, so the rows of a tensor are best read one after another. Those of all
        layers at once would take memory for each layer.
        """
        factors_of = lru_cache(maxsize=1)(self._factors)

        def merged(name: str, rows: slice, dtype: torch.dtype) -> torch.Tensor:
            values = read(name, rows)
            if name in self._quantised:
                values = quantised_rows(values, BASE_FORMATS[str(self._base_format)])
            if name not in self._places:
                return values.to(dtype)
            a, b = factors_of(name)
            return merged_rows(values, a, b[rows], dtype)

        return merged

    def _factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A' (r, in) and the rows (rows, r) of B' that belong to a stored tensor, fp32."""
        assert self._adapter is not None
        rule, target = self._places[name]
        a, b = self._adapter.factors(rule, target)
        return a, rule.by_stored_tensor(b)[name]


@dataclass(frozen=True)
class MergedTensors:
    """The tensors of a merged model, whose values are computed as they are written.

    Attributes:
        dtype: of all floating-point tensors; None if each keeps its own.
        between: called for each block of rows.
    """

    merge: Merge
    dtype: torch.dtype | None
    between: Callable[[], object]

    def of_file(self, file: Path, places: Mapping[str, Path]) -> StreamedFile:
        """What becomes of one file of a base that is not quantised. `places` has the file of every tensor.

        Raises:
            UserError: it is not a whole safetensors file, or has a tensor that belongs to another file.
        """
        with open_weights(file):  # checks that shapes and sizes agree and that the tensors lie side by side
            header = read_header(file)
        begin, stored = header.begin, header.entries
        for name in self.merge.names & stored.keys():
            if places[name] != file:  # some programs would read this one
                raise UserError(f"{file}: holds {name} too, beside {places[name].name}; remove one of them")
        found = {name: self._of_entry(file, begin, name, entry) for name, entry in stored.items()}
        if self.dtype is None:
            head = read_bytes(file, 0, begin).numpy().tobytes()
            ordered = sorted(found, key=lambda name: stored[name]["data_offsets"])
            return StreamedFile(file.name, head, [found[name] for name in ordered])
        # Readers want every tensor at a multiple of its item's size.
        items = {name: found[name].num_bytes // max(math.prod(stored[name]["shape"]), 1) for name in found}
        ordered = sorted(found, key=lambda name: (-items[name], stored[name]["data_offsets"]))
        starts = accumulate((found[name].num_bytes for name in ordered), initial=0)
        entries = {}
        for name, start in zip(ordered, starts, strict=False):
            entry = stored[name]
            kind = TYPE_NAMES[self.dtype] if entry["dtype"] in FLOAT_TYPES else entry["dtype"]
            span = (start, start + found[name].num_bytes)
            entries[name] = {"dtype": kind, "shape": entry["shape"], "data_offsets": span}
        return StreamedFile(file.name, file_head(entries), [found[name] for name in ordered])

    def _of_entry(self, file: Path, begin: int, name: str, entry: Any) -> StreamedTensor:
        """A tensor of a merged file, from its entry in the header, and where the values begin in the base's file.

        One that is neither changed nor cast is given as its bytes.
        """
        start, stop = (begin + offset for offset in entry["data_offsets"])
        changed = name in self.merge.names
        if not changed and (self.dtype is None or entry["dtype"] not in FLOAT_TYPES):

            def unchanged() -> Iterator[torch.Tensor]:
                for part in row_blocks((stop - start,)):
                    self.between()
                    yield read_bytes(file, start + part.start, part.stop - part.start)

            return StreamedTensor(name, torch.uint8, (stop - start,), unchanged)
        stored = FLOAT_TYPES[entry["dtype"]]
        shape = tuple(entry["shape"]) if changed else (math.prod(entry["shape"]),)
        row_bytes = math.prod(shape[1:]) * stored.itemsize

        def read(_: str, rows: slice) -> torch.Tensor:
            raw = read_bytes(file, start + rows.start * row_bytes, (rows.stop - rows.start) * row_bytes)
            return raw.view(stored).view(-1, *shape[1:])

        return self._computed(name, shape, self.dtype or stored, read, str(file))

    def of_quantised(self, weights: BaseWeights, shape: ModelShape, *, source: str) -> list[StreamedTensor]:
        """Every tensor of a merge onto a folder that is quantised.

        They have new files with new names: the folder's own do not fit, because its tensors have other sizes and names.
        Without a dtype each is as stored, and those that are quantised as the embedding is. `source` names the folder
        in messages.
        """
        quantised = stored_shapes(quantised_rules(shape))
        embedding = weights.rules[0].hf_names[0]
        return [
            self._computed(
                name,
                size,
                self.dtype or weights.dtype(embedding if name in quantised else name),
                weights.read,
                source,
            )
            for name, size in stored_shapes(weights.rules).items()
        ]

    def _computed(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, read: ReadRows, source: str
    ) -> StreamedTensor:
        """A tensor of which `read` gives some rows of the base. A number that is not finite raises UserError."""

        def blocks() -> Iterator[torch.Tensor]:
            merged_rows = self.merge.reader(read)
            for rows in row_blocks(shape):
                self.between()
                merged = merged_rows(name, rows, dtype)
                if not all_finite(merged):
                    fits = f"merged, it does not fit {str(dtype).removeprefix('torch.')}; give --dtype bf16"
                    why = fits if all_finite(read(name, rows)) else "the base is broken"
                    raise UserError(f"{source}: {name} holds numbers that are not finite ({why})")
                yield merged

        return StreamedTensor(name, dtype, shape, blocks)
