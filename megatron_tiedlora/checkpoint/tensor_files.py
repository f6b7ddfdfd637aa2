"""Reads safetensors files of known content, and writes some of tensors that are made block by block.

Names, shapes and sizes are checked before a tensor is read: wrong files are rejected by their header alone, so a small
file that claims to be huge costs no time or memory. Writing needs the memory of one block, where
`safetensors.torch.save_file` takes all tensors of a file at once. The files are alike: a header, and the values.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from megatron_tiedlora.base.atomic import sync_path, write_json
from megatron_tiedlora.base.errors import UserError, as_given, shown
from megatron_tiedlora.base.progress import progress_bar
from megatron_tiedlora.base.text_files import check_file

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
LARGEST_HEADER = 2**23  # bytes; an adapter on every linear of the deepest model needs a tenth of it
_MOST_TENSORS, _LARGEST_SIZE = 100_000, 2**62
FLOAT_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
BYTE_TYPES = {"U8": torch.uint8, "F8_E4M3": torch.uint8}  # codes of quantised weights
TYPE_NAMES = {dtype: name for name, dtype in FLOAT_TYPES.items()}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}  # as flags name them
SHARD_BYTES = 2 * 10**9


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
        entries = header.entries

        def check_type(name: str) -> None:
            if entries[name]["dtype"] not in FLOAT_TYPES:
                raise UserError(f"{file}: {name} is {as_given(entries[name]['dtype'])}, not floating point")

        check_tensors(file, header.shapes, shapes, check_type)
        expected = header.begin + sum(
            FLOAT_TYPES[entry["dtype"]].itemsize * math.prod(entry["shape"]) for entry in entries.values()
        )
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
    # Copies, because views would keep the whole file's buffer.
    values = {name: stored[name].to(torch.float32, copy=True) for name in shapes}
    for name in shapes:
        check_finite(file, name, values[name])
    return values


def check_tensors(
    source: Path | str,
    found: Mapping[str, tuple[int, ...]],
    wanted: Mapping[str, tuple[int, ...]],
    check: Callable[[str], object] = str,
) -> None:
    """Raise UserError, naming `source`, unless tensors have the names and the shapes `wanted`; `check` checks one more
    thing of each."""
    for name, shape in wanted.items():
        if name not in found:
            raise UserError(f"{source}: tensor {name} is missing")
        if found[name] != shape:
            raise UserError(f"{source}: {name} has shape {shown(found[name])}, expected {shape}")
        check(name)
    for name in found:
        if name not in wanted:
            raise UserError(f"{source}: holds a tensor {shown(name)} that does not belong there")


def check_finite(source: Path | str, name: str, values: torch.Tensor) -> None:
    """Raise UserError, naming `source` and the tensor, for numbers that are not finite."""
    if not all_finite(values):
        raise UserError(f"{source}: {name} holds numbers that are not finite")


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


def all_finite(values: torch.Tensor) -> bool:
    """Whether no value is infinite or NaN, in one pass over them: NaN is their minimum and their maximum."""
    return not values.numel() or all(math.isfinite(bound.item()) for bound in values.aminmax())


@dataclass(frozen=True)
class StreamedTensor:
    """A tensor that is made block by block.

    Attributes:
        blocks: makes the blocks; their values follow each other as in the whole tensor of `shape`.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    blocks: Callable[[], Iterable[torch.Tensor]]

    @property
    def num_bytes(self) -> int:
        """The size of its values."""
        return math.prod(self.shape) * self.dtype.itemsize


class StreamedFile(NamedTuple):
    """A file of a model's folder.

    Attributes:
        head: what stands in front of the values; see `file_head`.
        tensors: whose values follow each other.
    """

    name: str
    head: bytes
    tensors: Sequence[StreamedTensor]

    @property
    def value_bytes(self) -> int:
        """The size of its values."""
        return sum(tensor.num_bytes for tensor in self.tensors)


def sharded(tensors: Sequence[StreamedTensor], shard_bytes: int = SHARD_BYTES) -> list[StreamedFile]:
    """The files of a Hugging Face folder's weights: one, or shards of `shard_bytes`.

    A tensor is not divided, so a larger one is a shard of its own.
    """
    shards: list[list[StreamedTensor]] = []
    left = 0
    for tensor in tensors:
        if not shards or tensor.num_bytes > left:
            shards.append([])
            left = shard_bytes
        shards[-1].append(tensor)
        left -= tensor.num_bytes
    files = []
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else SINGLE_FILE
        head = file_head((tensor.name, TYPE_NAMES[tensor.dtype], tensor.shape, tensor.num_bytes) for tensor in shard)
        files.append(StreamedFile(name, head, shard))
    return files


def write_files(folder: Path, files: Sequence[StreamedFile], *, bar: str = "weights", progress: bool = False) -> None:
    """Write files in which each tensor's values are made as they are written, and the index if they are several.

    Args:
        bar: what the progress bar says.
    """
    total = sum(file.value_bytes for file in files)
    with progress_bar(bar, "B", total=total, shows=progress) as shown, ThreadPoolExecutor(1) as thread:
        flushed = []
        for file in files:
            _write_file(folder / file.name, file, shown.update)
            flushed.append(thread.submit(sync_path, folder / file.name))  # while the next one is written
        for flush in flushed:
            flush.result()
    if len(files) > 1:
        found = {tensor.name: file.name for file in files for tensor in file.tensors}
        write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": found})


def file_head(tensors: Iterable[tuple[str, str, Sequence[int], int]]) -> bytes:
    """What stands in front of the values in a file: the header, and its length.

    Args:
        tensors: name, type as headers name it, shape and bytes of each, in the order of their values.
    """
    entries, end = {}, 0
    for name, kind, shape, size in tensors:
        start, end = end, end + size
        entries[name] = {"dtype": kind, "shape": shape, "data_offsets": (start, end)}
    raw = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
    raw += b" " * (-len(raw) % 8)  # the values begin at a multiple of 8, as safetensors' own do
    return len(raw).to_bytes(8, "little") + raw


def _write_file(path: Path, file: StreamedFile, wrote: Callable[[int], object]) -> None:
    with path.open("wb") as stream:
        stream.write(file.head)
        for tensor in file.tensors:
            size = 0
            for block in tensor.blocks():
                assert block.dtype == tensor.dtype, tensor.name
                size += stream.write(block.contiguous().view(-1).view(torch.uint8).numpy().data)
                wrote(block.nbytes)
            assert size == tensor.num_bytes, tensor.name
