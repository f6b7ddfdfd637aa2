"""Writes one safetensors file of a merged model from the base's file, in the memory of some rows.

The kernel copies the bytes that stay: header, gaps and untouched tensors. Only the values of the others are read here,
some rows at a time (`merged_rows`). A file in another dtype has a header of its own, and all its values are computed.
"""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch

from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.checkpoint.base_weights import open_weights
from megatron_tiedlora.checkpoint.streamed_files import file_head
from megatron_tiedlora.checkpoint.tensor_files import FLOAT_TYPES, TYPE_NAMES, Header, all_finite, read_header
from megatron_tiedlora.convert.merged_rows import Change, Changes, row_blocks

_PIECE = 2**25  # bytes that are copied at a time
_BUFFER = 2**20  # and where the kernel cannot copy
_ALIGNED = 2**16  # ranges start at multiples of it: file systems share only whole blocks, of at most this size
# The system, or one of the two file systems, cannot copy within the kernel.
_REFUSALS = (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM)

Wrote = Callable[[int], object]


class _Range(NamedTuple):
    """Bytes that are copied: from `start` in the base's file to `target` in the merged one."""

    start: int
    target: int
    size: int


class _Tensor(NamedTuple):
    """A tensor that is computed, from the values at `start` in the base's file to those at `target`."""

    name: str
    shape: tuple[int, ...]
    stored: torch.dtype
    dtype: torch.dtype
    start: int
    target: int

    @property
    def num_bytes(self) -> int:
        """The size of the computed values."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class MergedFile:
    """How a merged file is made of the file `source` of the base.

    Attributes:
        size: of the merged file, in bytes.
        head: the header in front of the values; empty if the base's is copied.
        value_bytes: the size of its tensors.
    """

    source: Path
    size: int
    value_bytes: int
    head: bytes
    ranges: tuple[_Range, ...]
    tensors: tuple[_Tensor, ...]

    @staticmethod
    def of(source: Path, places: Mapping[str, Path], changed: Changes, dtype: torch.dtype | None) -> MergedFile:
        """Plan the merged file.

        Args:
            places: the file of every tensor.
            changed: what the adapter changes, in this file or in others.
            dtype: of all floating-point tensors; None if each keeps its own.

        Raises:
            UserError: `source` is not a whole safetensors file, or has a tensor that belongs to another file.
        """
        with open_weights(source):  # checks that shapes and sizes agree and that tensors do not overlap
            header = read_header(source)
        for name in changed.keys() & header.entries.keys():
            if places[name] != source:  # some programs would read this one
                raise UserError(f"{source}: holds {name} too, beside {places[name].name}; remove one of them")
        return _rewritten(source, header, changed) if dtype is None else _converted(source, header, dtype)

    @property
    def work(self) -> int:
        """The bytes that `write` reports."""
        return sum(part.size for part in self.ranges) + sum(tensor.num_bytes for tensor in self.tensors)

    def write(self, target: Path, changed: Changes, wrote: Wrote) -> None:
        """Write the file, without flushing it to the disk. `wrote` is called with numbers of bytes; it may raise.

        Raises:
            UserError: a computed number is not finite, or the base's file has become shorter.
            OSError: the disk is full.
        """
        with self.source.open("rb", buffering=0) as source, target.open("xb", buffering=0) as file:
            reader, writer = source.fileno(), file.fileno()
            _write(writer, memoryview(self.head), 0)
            for part in self.ranges:  # first, because a range starts before the end of the tensor in front of it
                self._copy(reader, writer, part, wrote)
            for tensor in self.tensors:
                self._compute(reader, writer, tensor, changed.get(tensor.name), wrote)

    def _copy(self, reader: int, writer: int, part: _Range, wrote: Wrote) -> None:
        start, target, left = part
        while left:
            done = _copied_by_kernel(reader, writer, min(left, _PIECE), start, target)
            if not done:
                buffer = memoryview(bytearray(min(left, _BUFFER)))
                done = self._read(reader, buffer, start)
                _write(writer, buffer, target)
            start, target, left = start + done, target + done, left - done
            wrote(done)

    def _compute(
        self, reader: int, writer: int, tensor: _Tensor, change: Callable[[], Change] | None, wrote: Wrote
    ) -> None:
        made = None if change is None else change()
        shape = tensor.shape if made is not None else (math.prod(tensor.shape),)
        start, target = tensor.start, tensor.target
        for block in row_blocks(shape):
            rows = torch.empty((block.stop - block.start, *shape[1:]), dtype=tensor.stored)
            start += self._read(reader, _bytes_of(rows), start)
            merged = rows.to(tensor.dtype) if made is None else made.rows(rows, block, tensor.dtype)
            if not all_finite(merged):
                wide = str(tensor.dtype).removeprefix("torch.")
                fits = f"merged, it does not fit {wide}; give --dtype bf16"
                why = fits if all_finite(rows) else "the base is broken"
                raise UserError(f"{self.source}: {tensor.name} holds numbers that are not finite ({why})")
            target += _write(writer, _bytes_of(merged), target)
            wrote(merged.nbytes)

    def _read(self, reader: int, buffer: memoryview, offset: int) -> int:
        done = 0
        while done < len(buffer):
            count = os.preadv(reader, [buffer[done:]], offset + done)
            if not count:
                raise UserError(f"{self.source}: not a whole safetensors file (it became shorter during the merge)")
            done += count
        return done


def _rewritten(source: Path, header: Header, changed: Changes) -> MergedFile:
    """The base's file with some tensors changed where they lie."""
    tensors = []
    for name, entry in sorted(header.entries.items(), key=lambda item: item[1]["data_offsets"]):
        if name in changed:
            start = header.begin + entry["data_offsets"][0]
            stored = FLOAT_TYPES[entry["dtype"]]
            tensors.append(_Tensor(name, tuple(entry["shape"]), stored, stored, start, start))
    value_bytes = max((entry["data_offsets"][1] for entry in header.entries.values()), default=0)
    size = header.begin + value_bytes
    ranges, end = [], 0
    for start, stop in [*((t.start, t.start + t.num_bytes) for t in tensors), (size, size)]:
        if start > end:
            aligned = end // _ALIGNED * _ALIGNED
            ranges.append(_Range(aligned, aligned, start - aligned))
        end = stop
    return MergedFile(source, size, value_bytes, b"", tuple(ranges), tuple(tensors))


def _converted(source: Path, header: Header, dtype: torch.dtype) -> MergedFile:
    """A file with all floating-point tensors in `dtype`; others, such as integers, keep their bytes."""

    def item_size(entry: Mapping[str, Any]) -> int:
        begin, end = entry["data_offsets"]
        return dtype.itemsize if entry["dtype"] in FLOAT_TYPES else (end - begin) // max(math.prod(entry["shape"]), 1)

    # Readers want every tensor at a multiple of its item's size.
    ordered = sorted(header.entries.items(), key=lambda item: (-item_size(item[1]), item[1]["data_offsets"]))
    kinds = {name: TYPE_NAMES[dtype] if entry["dtype"] in FLOAT_TYPES else entry["dtype"] for name, entry in ordered}
    sizes = {name: item_size(entry) * math.prod(entry["shape"]) for name, entry in ordered}
    *starts, value_bytes = accumulate(sizes.values(), initial=0)
    placed = dict(zip(sizes, starts, strict=True))
    head = file_head(
        {
            name: {"dtype": kinds[name], "shape": entry["shape"], "data_offsets": (start, start + sizes[name])}
            for (name, entry), start in zip(ordered, starts, strict=True)
        }
    )
    ranges, tensors = [], []
    for name, entry in ordered:
        start, target = header.begin + entry["data_offsets"][0], len(head) + placed[name]
        if entry["dtype"] in FLOAT_TYPES:
            tensors.append(_Tensor(name, tuple(entry["shape"]), FLOAT_TYPES[entry["dtype"]], dtype, start, target))
        else:
            ranges.append(_Range(start, target, sizes[name]))
    return MergedFile(source, len(head) + value_bytes, value_bytes, head, tuple(ranges), tuple(tensors))


def _copied_by_kernel(reader: int, writer: int, size: int, start: int, target: int) -> int:
    """Copy up to `size` bytes within the kernel; returns how many. 0: it cannot, or the file ends."""
    copy = getattr(os, "copy_file_range", None)  # missing where Python was built for an old system
    try:
        return 0 if copy is None else int(copy(reader, writer, size, start, target))
    except OSError as error:
        if error.errno in _REFUSALS:
            return 0
        raise


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return tensor.view(-1).view(torch.uint8).numpy().data if tensor.numel() else memoryview(b"")


def _write(writer: int, buffer: memoryview, offset: int) -> int:
    done = 0
    while done < len(buffer):
        done += os.pwrite(writer, buffer[done:], offset + done)
    return done
