"""Read and check safetensors files, and write safetensors files from tensors that are computed block by block.

Names, shapes and sizes are checked before a tensor is read. So a wrong file is rejected after reading only its header,
and a small file whose header claims a huge size costs no time or memory. Writing needs memory for one block only, while
`safetensors.torch.save_file` needs all tensors of a file. Both write the header first and then the values.

Linears that are stored in nf4 or fp8 are read as codes, with one fp32 scale per block or row. A rank reads only the
rows that it needs. For a column shard in nf4, a rank reads all columns, because bitsandbytes stores a tensor as one
sequence of bytes. Quantised scales (bitsandbytes' double quantisation) are dequantised here without changing values.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from megatron_tiedlora.base.files import check_file, read_json_object, sync_path, write_json
from megatron_tiedlora.base.messages import UserError, as_given, os_errors, shown
from megatron_tiedlora.base.progress import progress_bar
from megatron_tiedlora.base.shapes import BASE_FORMATS
from megatron_tiedlora.config.batch import filled
from megatron_tiedlora.model.hf_config import BITSANDBYTES, StoredFormat
from megatron_tiedlora.parallel import quantise
from megatron_tiedlora.parallel.quantise import NF4_LEVELS, dequantise_rows, fp8_numbers, has_nan

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
LARGEST_HEADER = 2**23  # bytes; an adapter on every linear of the deepest model has a tenth of this size
_MOST_TENSORS, _LARGEST_SIZE = 100_000, 2**62
FLOAT_TYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
BYTE_TYPES = {"U8": torch.uint8, "F8_E4M3": torch.uint8}  # codes of quantised weights
TYPE_NAMES = {dtype: name for name, dtype in FLOAT_TYPES.items()}
COPIED_TYPES = TYPE_NAMES | {torch.int64: "I64", torch.int32: "I32", torch.bool: "BOOL"}  # of other towers
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}  # dtypes by their names in flags
SHARD_BYTES = 2 * 10**9
SAMPLED_RUNS, RUN_LENGTH = 8, 512  # number and length of the runs of consecutive values that identify a tensor

TensorShape = tuple[int, ...]
TensorShapes = Mapping[str, TensorShape]  # shapes by tensor name


def read_tensors(file: Path, shapes: TensorShapes, *, sums: Mapping[str, str] | None = None) -> dict[str, torch.Tensor]:
    """Return the tensors of a file in fp32. The file must contain exactly the tensors in `shapes`.

    Args:
        sums: checksums by file name (see `files.check_file`).

    Raises:
        UserError: the file is not a complete safetensors file or has a different checksum; or a tensor is missing or
            unknown, has a different shape, or is not floating point or not finite.
    """
    with _opened(file) as stream:
        header = _read_header(file, stream)
        check_tensors(file, header.shapes, shapes)
        for name, entry in header.entries.items():
            if entry["dtype"] not in FLOAT_TYPES:
                said = f"{file}: {name} is {as_given(entry['dtype'])}, not floating point"
                raise UserError(f"{said}; copy the file again")
        entries = header.entries.values()
        sizes = (FLOAT_TYPES[entry["dtype"]].itemsize * math.prod(entry["shape"]) for entry in entries)
        expected = header.begin + sum(sizes)
        stream.seek(0)
        raw = stream.read(expected + 1)
    if len(raw) != expected:
        much = "is longer than" if len(raw) > expected else "is shorter than"
        said = f"it {much} the {expected:,} bytes that its header requires"
        raise UserError(f"{file}: not a complete safetensors file ({said}); copy it again")
    check_file(file, sums or {}, found=hashlib.sha256(raw).hexdigest())
    try:
        stored = load(raw)
    except SafetensorError as error:
        raise UserError(f"{file}: not a complete safetensors file ({error}); copy it again") from None
    # The tensors are copied, because views would keep all bytes of the file in memory.
    values = {name: stored[name].to(torch.float32, copy=True) for name in shapes}
    for name in shapes:
        check_finite(file, name, values[name])
    return values


def damaged_model(said: str) -> UserError:
    """Return the error to raise for a model whose files are missing or wrong. `said` names the file or the tensor."""
    return UserError(f"{said}; download the model again")


def check_tensors(source: Path | str, found: TensorShapes, wanted: TensorShapes) -> None:
    """Raise UserError, which begins with `source`, unless `found` has the names and shapes in `wanted`."""
    for name, shape in wanted.items():
        if name not in found:
            raise UserError(f"{source}: tensor {name} is missing; give an intact copy")
        if found[name] != shape:
            raise UserError(f"{source}: {name} has shape {shown(found[name])}, expected {shape}; give an intact copy")
    for name in found:
        if name not in wanted:
            raise UserError(f"{source}: holds a tensor {shown(name)} that does not belong there; give an intact copy")


def check_finite(source: Path | str, name: str, values: torch.Tensor) -> None:
    """Raise UserError with `source` and the tensor's name if a value is not finite."""
    if not all_finite(values):
        raise UserError(f"{source}: {name} holds numbers that are not finite; give an intact copy")


@dataclass(frozen=True)
class Header:
    """The header of a safetensors file.

    Attributes:
        entries: the `dtype`, `shape` and `data_offsets` (in bytes from `begin`) of each tensor, by name.
        begin: offset of the first value in the file, in bytes.
    """

    entries: Mapping[str, Any]
    begin: int

    @property
    def shapes(self) -> dict[str, TensorShape]:
        """Return the shape of each tensor, by name."""
        return {name: tuple(entry["shape"]) for name, entry in self.entries.items()}


def read_header(file: Path) -> Header:
    """Return the header of a file. Raise UserError if the header is invalid, or if the file has the wrong size."""
    with _opened(file) as stream:
        header = _read_header(file, stream)
        end = header.begin + max((entry["data_offsets"][1] for entry in header.entries.values()), default=0)
        if (size := os.fstat(stream.fileno()).st_size) != end:
            said = f"it has {size:,} bytes, but its header requires {end:,}"
            raise UserError(f"{file}: not a complete safetensors file ({said}); copy it again")
    return header


def read_runs(file: Path, header: Header, name: str) -> torch.Tensor:
    """Return `SAMPLED_RUNS` runs of `RUN_LENGTH` consecutive values of a tensor, evenly spaced from its first value to
    its last, or all values of a smaller tensor.

    Only these values are read, while a memory map would read megabytes more for each run on some systems. Codes of
    quantised weights are returned as bytes. Raise UserError if the file is not a complete safetensors file, or if it
    has no tensor `name` of floats or codes.
    """
    entry, begin = header.entries.get(name), header.begin
    with _opened(file) as stream:
        dtype = None if entry is None else (FLOAT_TYPES | BYTE_TYPES).get(entry["dtype"])
        if entry is None or dtype is None:
            raise UserError(f"{file}: {name} is missing, or not floating point; copy the file again")
        size = math.prod(entry["shape"])
        begin += entry["data_offsets"][0]
        starts, length = run_starts(size)
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        runs = [os.pread(stream.fileno(), length * dtype.itemsize, begin + start * dtype.itemsize) for start in starts]
    raw = bytearray().join(runs)
    if len(raw) != len(starts) * length * dtype.itemsize:
        raise UserError(f"{file}: not a complete safetensors file (it ends within {name}); copy it again")
    return torch.frombuffer(raw, dtype=dtype) if raw else torch.zeros(0, dtype=dtype)


def run_starts(size: int) -> tuple[list[int], int]:
    """Return the first indices and the length of the runs that `read_runs` reads from a tensor of `size` values."""
    if size <= SAMPLED_RUNS * RUN_LENGTH:
        return [0], size
    return [index * (size - RUN_LENGTH) // (SAMPLED_RUNS - 1) for index in range(SAMPLED_RUNS)], RUN_LENGTH


def stored_names(folder: Path) -> Collection[str]:
    """Return the names of the tensors in a model's folder, from its index or single file, or () without them."""
    with suppress(UserError):
        index = folder / INDEX_FILE
        found = read_json_object(index, kind="an index").get("weight_map") if index.is_file() else None
        return found if isinstance(found, dict) else read_header(folder / SINGLE_FILE).entries
    return ()


@contextmanager
def _opened(file: Path) -> Iterator[BinaryIO]:
    if not file.is_file():
        raise UserError(f"{file}: not a complete safetensors file (no such file); copy it again")
    fix = "; check its permissions, or copy it again"
    with os_errors(f"{file}: not a complete safetensors file", fix=fix), file.open("rb") as stream:
        yield stream


def _read_header(file: Path, stream: BinaryIO) -> Header:
    """Return the header without its metadata, and check the types of its entries."""
    length = int.from_bytes(stream.read(8), "little")
    raw = stream.read(length) if length <= LARGEST_HEADER else b""
    try:
        if len(raw) != length:
            limit = f"the file's size or the limit of {LARGEST_HEADER:,} bytes"
            raise ValueError(f"its header length, {length:,} bytes, exceeds {limit}")
        content = json.loads(raw)
        if not isinstance(content, dict):
            raise ValueError("its header is not a table of tensors")
        content.pop("__metadata__", None)
        if len(content) > _MOST_TENSORS:
            raise ValueError(f"its header lists {len(content):,} tensors, but the limit is {_MOST_TENSORS:,}")
        for name, entry in content.items():
            sizes = [*entry["shape"], entry["data_offsets"][0], entry["data_offsets"][1]]
            in_range = all(type(size) is int and 0 <= size < _LARGEST_SIZE for size in sizes)
            if not isinstance(entry["dtype"], str) or not in_range:
                raise ValueError(f"the header's entry {shown(name)} has the wrong type")
    except (ValueError, TypeError, LookupError, RecursionError) as error:
        said = f"{file}: not a complete safetensors file ({error or type(error).__name__})"
        raise UserError(f"{said}; copy it again") from None
    return Header(content, 8 + length)


def all_finite(values: torch.Tensor) -> bool:
    """Return whether all values are finite, in one pass. If a value is NaN, the minimum and the maximum are NaN."""
    return not values.numel() or all(math.isfinite(bound.item()) for bound in values.aminmax())


@dataclass(frozen=True)
class StreamedTensor:
    """A tensor of `shape` that is computed block by block. `blocks` returns its values in row-major order."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    blocks: Callable[[], Iterable[torch.Tensor]]

    @property
    def num_bytes(self) -> int:
        """Return the size of the tensor's values in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


class StreamedFile(NamedTuple):
    """A weights file of a model's folder.

    Attributes:
        head: the bytes before the values (see `file_head`).
        tensors: the tensors of the file, in the order of their values.
    """

    name: str
    head: bytes
    tensors: Sequence[StreamedTensor]

    @property
    def value_bytes(self) -> int:
        """Return the size in bytes of all values in the file."""
        return sum(tensor.num_bytes for tensor in self.tensors)


def sharded(tensors: Sequence[StreamedTensor], shard_bytes: int = SHARD_BYTES) -> list[StreamedFile]:
    """Return the weights files of a Hugging Face folder: one file, or several files of at most `shard_bytes` each.

    A tensor is never divided, so a tensor that is larger than `shard_bytes` has its own file.
    """
    shards = list(filled((tensor, tensor.num_bytes, shard_bytes) for tensor in tensors))
    files = []
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else SINGLE_FILE
        head = file_head((tensor.name, COPIED_TYPES[tensor.dtype], tensor.shape, tensor.num_bytes) for tensor in shard)
        files.append(StreamedFile(name, head, shard))
    return files


def write_files(folder: Path, files: Sequence[StreamedFile], *, bar: str = "weights") -> None:
    """Write weights files, and an index if there are several files. Tensors are computed while they are written. `bar`
    is the text of the progress bar."""
    total = sum(file.value_bytes for file in files)
    with progress_bar(bar, "B", total=total) as shown, ThreadPoolExecutor(1) as thread:
        flushed = []
        for file in files:
            _write_file(folder / file.name, file, shown.update)
            flushed.append(thread.submit(sync_path, folder / file.name))  # flushed while the next file is written
        for flush in flushed:
            flush.result()
    if len(files) > 1:
        found = {tensor.name: file.name for file in files for tensor in file.tensors}
        write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": found})


def file_head(tensors: Iterable[tuple[str, str, Sequence[int], int]]) -> bytes:
    """Return the bytes before the values of a file: the length of the header, and the header. `tensors` has the name,
    safetensors type name, shape and number of bytes of each tensor, in the order of the values."""
    entries, end = {}, 0
    for name, kind, shape, size in tensors:
        start, end = end, end + size
        entries[name] = {"dtype": kind, "shape": shape, "data_offsets": (start, end)}
    raw = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
    raw += b" " * (-len(raw) % 8)  # the values begin at a multiple of 8, as in files that safetensors writes
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


# Linears that are stored in nf4 or fp8 --------------------------------------------------------------------------------


# Suffixes of the tensors that are stored in addition to X.weight. Their names are X.weight plus a suffix.
_STATE = ".quant_state.bitsandbytes__nf4"
_ABSMAX, _LEVELS, _NESTED_ABSMAX, _NESTED_LEVELS = ".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map"
_ROW_SCALE = "_scale"
_LARGEST_STATE = 2**16  # bytes of JSON
_LARGEST_BLOCK, _LARGEST_OFFSET = 2**30, 1e30  # largest block size and offset in this JSON

SliceOf = Callable[[str], Any]  # returns the stored tensor with this name, or None if it does not exist
QuantisedRows = tuple[torch.Tensor, torch.Tensor, int]  # codes, scales, number of bytes that were read


class StoredWeights:
    """The quantised tensors of a folder. Error messages name the tensor, and the caller adds the name of the file."""

    def __init__(self, kind: StoredFormat, slice_of: SliceOf) -> None:
        self.kind, self._slice_of = kind, slice_of
        self._block = BASE_FORMATS[kind.base_format].block or 0  # weights that share a scale; 0: one scale per row

    def names(self, name: str) -> tuple[str, ...]:
        """Return the names of the stored tensors that contain the codes and scales of the linear `name`."""
        if self.kind.method != BITSANDBYTES:
            return name, name + _ROW_SCALE
        nested = self._slice_of(name + _NESTED_ABSMAX) is not None
        return name, name + _ABSMAX, *([name + _NESTED_ABSMAX] if nested else [])

    def check(self, name: str, shape: TensorShape) -> None:
        """Raise UserError if the linear `name` is not stored in the folder's format with this shape."""
        if self.kind.method == BITSANDBYTES:
            self._check_nf4(name, shape)
            return
        stored = self._slice_of(name)
        if stored.get_dtype() != "F8_E4M3":
            raise damaged_model(f"{name} is {as_given(stored.get_dtype())}, but other linears are fp8")
        if tuple(stored.get_shape()) != shape:
            raise damaged_model(f"{name} has shape {tuple(stored.get_shape())}, but config.json requires {shape}")
        scale = self._needed(name, _ROW_SCALE)
        by_row, found = ((shape[0], 1), (shape[0],)), tuple(scale.get_shape())
        if found not in ((), (1,), (1, 1), *by_row) or scale.get_dtype() not in FLOAT_TYPES:
            said = f"{name}{_ROW_SCALE} is {as_given(scale.get_dtype())} {found}"
            raise damaged_model(f"{said}, not one value, or one per row")

    def read(self, name: str, shape: TensorShape, rows: slice, columns: slice) -> QuantisedRows:
        """Return the codes and scales of a range of rows and columns, and the number of bytes that were read.

        In nf4, the range of columns must consist of complete blocks.
        """
        if self.kind.method == BITSANDBYTES:
            return self._read_nf4(name, shape, rows, columns)
        codes = self._slice_of(name)[rows, columns].view(torch.uint8)
        stored = self._slice_of(name + _ROW_SCALE)
        whole = stored[...] if len(stored.get_shape()) == 0 else stored[:]
        scales = whole.float().view(-1, 1)
        scales = scales.expand(codes.shape[0], 1) if len(scales) == 1 and shape[0] != 1 else scales[rows]
        return codes, scales.contiguous(), codes.nbytes + scales.shape[0] * whole.element_size()

    def values(self, name: str, shape: TensorShape, rows: slice) -> tuple[torch.Tensor, int]:
        """Return all columns of these rows, dequantised to fp32, and the number of bytes that were read."""
        codes, scales, num_bytes = self.read(name, shape, rows, slice(0, shape[1]))
        if has_nan(codes, self.kind.base_format) or not scales.isfinite().all():
            raise damaged_model(f"{name} has numbers that are not finite")
        if not self._block:
            return dequantise_rows(fp8_numbers(codes), scales[:, 0]), num_bytes
        levels = quantise.levels_of(self.kind.base_format, codes.device)
        return quantise.dequantise_blocks(codes, scales, levels, shape[1], self._block), num_bytes

    def _needed(self, name: str, part: str) -> Any:
        found = self._slice_of(name + part)
        if found is None:
            raise damaged_model(f"{name} is quantised, but tensor {name}{part} is missing")
        return found

    def _check_nf4(self, name: str, shape: TensorShape) -> None:
        stored = self._slice_of(name)
        if stored.get_dtype() != "U8":
            raise damaged_model(f"{name} is {as_given(stored.get_dtype())}, but other linears are nf4")
        block, nested = self._state(name, shape)
        size = shape[0] * shape[1]
        counts = [("", "U8", size // 2), (_ABSMAX, "F32" if nested is None else "U8", size // block)]
        if nested is not None:
            counts.append((_NESTED_ABSMAX, "F32", -(-size // block // nested[0])))
            counts.append((_NESTED_LEVELS, "F32", 256))
        counts.append((_LEVELS, "F32", 16))
        for part, dtype, count in counts:
            tensor = self._needed(name, part)
            found = torch.Size(tensor.get_shape()).numel()
            if tensor.get_dtype() != dtype or found != count:
                said = f"{name}{part} has {found:,} values of type {as_given(tensor.get_dtype())}"
                raise damaged_model(f"{said}, not {count:,} of type {dtype}")
            # Codes may be stored as one column or one row. Rows are sliced from this sequence of codes.
            sizes = list(tensor.get_shape())
            if sizes not in ([count], *([] if part else ([count, 1], [1, count]))):
                other = "" if part else f" or [{count}, 1]"
                raise damaged_model(f"{name}{part} has shape {sizes}, not [{count}]{other}")
        if not torch.equal(self._needed(name, _LEVELS)[:], torch.tensor(NF4_LEVELS)):
            raise UserError(f"{name}{_LEVELS} does not have the levels of nf4; give a model in nf4 or in bf16")

    def _state(self, name: str, shape: TensorShape) -> tuple[int, tuple[int, float] | None]:
        """Return the number of weights in a block of a bitsandbytes tensor, and, if its scales are quantised too, the
        tuple (number of scales in a block of scales, offset of the scales), else None."""
        raw = self._needed(name, _STATE)
        try:
            if raw.get_dtype() != "U8" or torch.Size(raw.get_shape()).numel() > _LARGEST_STATE:
                raise ValueError("it is not JSON stored as bytes")
            fields = json.loads(bytes(raw[:].tolist()))
            kind, block, found = fields["quant_type"], fields["blocksize"], fields["shape"]
            nested = (fields["nested_blocksize"], fields["nested_offset"]) if "nested_blocksize" in fields else None
            sizes = [block, *([] if nested is None else nested[:1])]
            if any(type(number) is not int or not 1 <= number <= _LARGEST_BLOCK for number in sizes):
                raise ValueError(f"its block sizes are not integers from 1 to {_LARGEST_BLOCK:,}")
            if nested is not None and (type(nested[1]) not in (int, float) or not abs(nested[1]) < _LARGEST_OFFSET):
                raise ValueError("its nested_offset is not a number, or is too large")
        except (ValueError, TypeError, LookupError, RecursionError) as error:
            raise damaged_model(f"{name}{_STATE} is not the state of an nf4 tensor ({error})") from None
        if kind != "nf4" or found != list(shape):
            raise damaged_model(f"{name} is {shown(kind)} of shape {shown(found)}, not 'nf4' of shape {list(shape)}")
        if block % self._block or shape[1] % block:
            odd = f"weights, which is not a multiple of {self._block}"
            crossing = f"that cross its rows of {shape[1]} weights, so it cannot be sharded"
            said = f"{name} has blocks of {block} {odd if block % self._block else crossing}"
            raise UserError(f"{said}; give the model with weights in bf16, fp16 or fp32, and --base nf4")
        # The offset becomes a float, because torch cannot add an integer above 2^63.
        return block, None if nested is None else (nested[0], float(nested[1]))

    def _read_nf4(self, name: str, shape: TensorShape, rows: slice, columns: slice) -> QuantisedRows:
        (block, nested), width = self._state(name, shape), shape[1]
        start, stop, _ = rows.indices(shape[0])
        stored = self._slice_of(name)
        # The bytes are stored one after another, in a tensor with one column (in some files with one row).
        one_row = len(stored.get_shape()) == 2 and stored.get_shape()[0] == 1 != shape[0] * width // 2
        first, last = start * width // 2, stop * width // 2
        codes = (stored[:, first:last] if one_row else stored[first:last]).reshape(stop - start, width // 2)
        per_row = width // block
        blocks = slice(start * per_row, stop * per_row)
        scales = self._slice_of(name + _ABSMAX)[blocks]
        num_bytes = codes.nbytes + scales.nbytes
        if nested is not None:  # the scales are quantised too: they are codes with their own scales
            size, offset = nested
            levels, of_groups = self._slice_of(name + _NESTED_LEVELS)[:], self._slice_of(name + _NESTED_ABSMAX)[:]
            num_bytes += of_groups.nbytes
            groups = torch.arange(blocks.start, blocks.stop) // size
            scales = levels[scales.int()] * of_groups[groups] + offset
        scales = scales.view(stop - start, per_row)
        scales = scales.repeat_interleave(block // self._block, dim=1)
        own = codes[:, columns.start // 2 : columns.stop // 2]
        return own, scales[:, columns.start // self._block : columns.stop // self._block], num_bytes
