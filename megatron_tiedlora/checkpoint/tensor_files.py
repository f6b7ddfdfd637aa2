"""Read safetensors files of known content: names, shapes and sizes are checked before a tensor is read.

Wrong files are rejected by their header alone, so a small file that claims to be huge costs no time or memory.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load

from megatron_tiedlora.base.checksums import check_file
from megatron_tiedlora.base.errors import UserError, as_given, shown

LARGEST_HEADER = 2**23  # bytes; an adapter on every linear of the deepest model needs a tenth of it
_MOST_TENSORS, _LARGEST_SIZE = 100_000, 2**62
FLOAT_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
BYTE_TYPES = {"U8": torch.uint8, "F8_E4M3": torch.uint8}  # codes of quantised weights
TYPE_NAMES = {dtype: name for name, dtype in FLOAT_TYPES.items()}


def read_tensors(
    file: Path, shapes: Mapping[str, tuple[int, ...]], *, sums: Mapping[str, str] | None = None
) -> dict[str, torch.Tensor]:
    """The tensors of a file in fp32; it must hold exactly those of `shapes`.

    Args:
        sums: checksums by file name; see `checksums.check_file`.

    Raises:
        UserError: the file is not a whole safetensors file or has another checksum; or a tensor is missing, unknown, of
            another shape, not floating point or not finite.
    """
    with _opened(file) as stream:
        header = _read_header(file, stream)
        _check_header(file, header, shapes)
        entries = header.entries.values()
        expected = header.begin + sum(FLOAT_TYPES[e["dtype"]].itemsize * math.prod(e["shape"]) for e in entries)
        stream.seek(0)
        raw = stream.read(expected + 1)
    if len(raw) != expected:
        much = "is longer than" if len(raw) > expected else "ends before"
        raise UserError(f"{file}: not a whole safetensors file (it {much} the {expected:,} bytes that its header says)")
    check_file(file, sums or {}, found=hashlib.sha256(raw).hexdigest())
    try:
        stored = load(raw)
    except SafetensorError as error:
        raise UserError(f"{file}: not a whole safetensors file ({error})") from None
    return {name: _fp32(file, name, stored[name]) for name in shapes}


@dataclass(frozen=True)
class Header:
    """The header of a file.

    Attributes:
        entries: `dtype`, `shape` and `data_offsets` (in bytes from `begin`), by tensor name.
        begin: offset of the values in the file, in bytes.
    """

    entries: Mapping[str, Any]
    begin: int

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes by tensor name."""
        return {name: tuple(entry["shape"]) for name, entry in self.entries.items()}


def read_header(file: Path) -> Header:
    """The header of a file.

    Raises:
        UserError: the header is invalid, or the file is truncated.
    """
    with _opened(file) as stream:
        header = _read_header(file, stream)
        end = header.begin + max((entry["data_offsets"][1] for entry in header.entries.values()), default=0)
        if (size := os.fstat(stream.fileno()).st_size) != end:
            raise UserError(f"{file}: not a whole safetensors file ({size:,} of {end:,} bytes are there)")
    return header


def read_runs(file: Path, header: Header, name: str, *, count: int, length: int) -> torch.Tensor:
    """Values of one tensor of a file: `count` runs of `length` consecutive values, spread evenly from its first value
    to its last; all values if it has no more than that.

    Only these values are read. Codes of quantised weights are bytes. A memory map would read ahead, by megabytes for
    each run on some systems.

    Raises:
        UserError: the file is not a whole safetensors file, or has no floating-point tensor of that name.
    """
    entry, begin = header.entries.get(name), header.begin
    with _opened(file) as stream:
        dtype = None if entry is None else (FLOAT_TYPES | BYTE_TYPES).get(entry["dtype"])
        if entry is None or dtype is None:
            raise UserError(f"{file}: {name} is missing, or not floating point")
        size = math.prod(entry["shape"])
        begin += entry["data_offsets"][0]
        starts, length = run_starts(size, count=count, length=length)
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        runs = [os.pread(stream.fileno(), length * dtype.itemsize, begin + start * dtype.itemsize) for start in starts]
    raw = bytearray().join(runs)
    if len(raw) != len(starts) * length * dtype.itemsize:
        raise UserError(f"{file}: not a whole safetensors file (it ends within {name})")
    return torch.frombuffer(raw, dtype=dtype) if raw else torch.zeros(0, dtype=dtype)


def read_bytes(file: Path, start: int, size: int) -> torch.Tensor:
    """The bytes of a file from `start`, as uint8 numbers. Raises UserError if it has become too short for them."""
    raw = torch.from_numpy(np.fromfile(file, np.uint8, count=size, offset=start))
    if len(raw) != size:
        raise UserError(f"{file}: not a whole safetensors file (it became shorter meanwhile)")
    return raw


def run_starts(size: int, *, count: int, length: int) -> tuple[list[int], int]:
    """The first positions, and the length, of `count` runs of `length` among `size` values; one run if they are few."""
    if size <= count * length:
        return [0], size
    return [index * (size - length) // (count - 1) for index in range(count)], length


@contextmanager
def _opened(file: Path) -> Iterator[BinaryIO]:
    if not file.is_file():
        raise UserError(f"{file}: not a whole safetensors file (no such file)")
    try:
        with file.open("rb") as stream:
            yield stream
    except OSError as error:
        raise UserError(f"{file}: not a whole safetensors file ({error.strerror or error})") from None


def _read_header(file: Path, stream: BinaryIO) -> Header:
    """The header without its metadata, with the types of its entries checked."""
    length = int.from_bytes(stream.read(8), "little")
    raw = stream.read(length) if length <= LARGEST_HEADER else b""
    try:
        if len(raw) != length:
            raise ValueError(f"a header of {length:,} bytes")
        content = json.loads(raw)
        if not isinstance(content, dict):
            raise ValueError("its header is not a table of tensors")
        content.pop("__metadata__", None)
        if len(content) > _MOST_TENSORS:
            raise ValueError(f"a header of {len(content):,} tensors")
        for name, entry in content.items():
            sizes = [*entry["shape"], entry["data_offsets"][0], entry["data_offsets"][1]]
            if not isinstance(entry["dtype"], str) or any(
                type(size) is not int or not 0 <= size < _LARGEST_SIZE for size in sizes
            ):
                raise ValueError(f"the header's entry {shown(name)} has the wrong type")
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        raise UserError(f"{file}: not a whole safetensors file ({error or type(error).__name__})") from None
    return Header(content, 8 + length)


def _check_header(file: Path, header: Header, shapes: Mapping[str, tuple[int, ...]]) -> None:
    entries = header.entries
    for name, shape in shapes.items():
        if name not in entries:
            raise UserError(f"{file}: tensor {name} is missing")
        found = tuple(entries[name]["shape"])
        if found != shape:
            raise UserError(f"{file}: {name} has shape {shown(found)}, expected {shape}")
        if entries[name]["dtype"] not in FLOAT_TYPES:
            raise UserError(f"{file}: {name} is {as_given(entries[name]['dtype'])}, not floating point")
    for name in entries:
        if name not in shapes:
            raise UserError(f"{file}: holds a tensor {shown(name)} that does not belong there")


def _fp32(file: Path, name: str, stored: torch.Tensor) -> torch.Tensor:
    values = stored.to(torch.float32, copy=True)  # a copy, because a view would keep the whole file's buffer
    if not all_finite(values):
        raise UserError(f"{file}: {name} holds numbers that are not finite")
    return values


def all_finite(values: torch.Tensor) -> bool:
    """Whether no value is infinite or NaN, in one pass over them: NaN is their minimum and their maximum."""
    return not values.numel() or all(math.isfinite(bound.item()) for bound in values.aminmax())
