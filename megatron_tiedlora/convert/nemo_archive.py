"""Finds the files and tensors in a NeMo 1 `.nemo` archive. Nothing is unpacked, and nothing in it is executed.

A `.nemo` is a tar: settings, a tokenizer and one `.ckpt` for each rank. A `.ckpt` is a zip by `torch.save`: a pickle
that describes a state dict, and the uncompressed values. The pickle is read by an interpreter that knows only what the
pickle of a state dict is made of, and the tensors are mapped in place.
"""

from __future__ import annotations

import math
import mmap
import pickletools
import struct
import tarfile
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import torch

from megatron_tiedlora.base.errors import UserError, shown
from megatron_tiedlora.base.wording import first_line

# Bytes of a pickle, and of the list of an archive's files. A model of 96 layers needs a fifth of that.
_LARGEST_PICKLE, _LARGEST_LIST = 2**20, 2**22
_MOST_PAX_FIELDS, _MOST_AXES = 64, 8


class ByteRange(NamedTuple):
    """Bytes of the archive."""

    start: int
    size: int


class NemoArchive:
    """An open `.nemo` file.

    Attributes:
        path: the file, as messages name it.
        members: the place of each file in it, by its name without a leading `./`.
    """

    def __init__(self, path: Path) -> None:
        """Raises UserError: it is not a whole tar of plain files."""
        self.path = path
        with readable(path, "cannot be read as a .nemo archive"), path.open("rb") as stream:
            self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        if self._map[:2] == b"\x1f\x8b":
            raise UserError(f"{path}: is compressed with gzip. Decompress it first: gzip -dc {path} > NEW.nemo")
        with readable(path, "cannot be read as a .nemo archive"):
            self.members = dict(_tar_members(self._map))

    def read(self, member: str, *, largest: int) -> bytes:
        """The content of a file in the archive. Raises UserError if there is none, or it is larger than `largest`."""
        if member not in self.members:
            raise UserError(f"{self.path}: holds no {member}")
        start, size = self.members[member]
        if size > largest:
            raise UserError(f"{self.path}: {member} is larger than {largest:,} bytes")
        return self._map[start : start + size]

    def tensors(self, member: str) -> dict[str, torch.Tensor]:
        """The tensors of a `.ckpt` by their names. They are views of the mapped file, so they cannot be written.

        Raises:
            UserError: it is not a state dict, or a tensor does not lie in the file.
        """
        with readable(self.path, f"{member} cannot be read as a state dict"):
            files = _zip_members(self._map, self.members[member])
            folder = next(iter(files), "").partition("/")[0]
            if self._bytes(files.get(f"{folder}/byteorder"), default=b"little") != b"little":
                raise ValueError("its byte order is not little")
            table = _read_state_dict(self._bytes(files.get(f"{folder}/data.pkl")))
            found = {}
            for name, value in table.items():
                if not isinstance(value, _Described):
                    raise ValueError(f"{shown(name)} is not a tensor")
                found[name] = self._tensor(name, value, files.get(f"{folder}/data/{value.storage.key}"))
        return found

    def _bytes(self, place: ByteRange | None, *, default: bytes = b"") -> bytes:
        if place is None:
            return default
        if place.size > _LARGEST_PICKLE:
            raise ValueError(f"{place.size:,} bytes where at most {_LARGEST_PICKLE:,} belong")
        return self._map[place.start : place.start + place.size]

    def _tensor(self, name: str, described: _Described, place: ByteRange | None) -> torch.Tensor:
        (dtype, _, stored), offset, shape, stride = described
        count = math.prod(shape)
        if place is None or stored * dtype.itemsize != place.size or offset + count > stored:
            raise ValueError(f"the values of {shown(name)} are missing, or too few")
        row_major = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
        if any(ours != theirs for ours, theirs, size in zip(row_major, stride, shape, strict=True) if size > 1):
            raise ValueError(f"{shown(name)} is not stored row by row")
        if count == 0:
            return torch.empty(shape, dtype=dtype)
        with warnings.catch_warnings():  # torch warns about every buffer that cannot be written
            warnings.simplefilter("ignore", UserWarning)
            begin = place.start + offset * dtype.itemsize
            return torch.frombuffer(self._map, dtype=dtype, count=count, offset=begin).view(shape)


@contextmanager
def readable(path: Path, what: str) -> Iterator[None]:
    """Turn an error about broken content into one line: the file, `what` cannot be done, and the reason."""
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except BaseException as error:  # broken content raises anything from KeyError to a Rust panic
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{path}: {what} ({first_line(error)})") from None


# The two kinds of archive --------------------------------------------------------------------------------------------


class _Window:
    """A part of the mapped file as the file object that tarfile and zipfile read.

    They read the lists of members only, but what lists say of their own size may be anything. So the bytes read in all
    are bounded.
    """

    def __init__(self, mapped: mmap.mmap, place: ByteRange) -> None:
        self._map, self._place, self._at, self._left = mapped, place, 0, _LARGEST_LIST

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        at = (0, self._at, self._place.size)[whence] + offset
        if at < 0:
            raise OSError("before the first byte")
        self._at = at
        return at

    def read(self, size: int = -1) -> bytes:
        rest = max(0, self._place.size - self._at)
        size = rest if size < 0 else min(size, rest)
        self._left -= size
        if self._left < 0:
            raise ValueError(f"its list of files is longer than {_LARGEST_LIST:,} bytes")
        start = self._place.start + self._at
        self._at += size
        return self._map[start : start + size]


def _tar_members(mapped: mmap.mmap) -> Iterator[tuple[str, ByteRange]]:
    """The names and places of the files in a tar. Raises ValueError, or tarfile's errors, as for a truncated file."""
    seen: set[str] = set()
    with tarfile.open(fileobj=_Window(mapped, ByteRange(0, len(mapped))), mode="r:") as tar:  # type: ignore[call-overload]
        for member in tar:
            path = PurePosixPath(member.name)
            if len(member.pax_headers) > _MOST_PAX_FIELDS:  # each member would get a copy of global ones
                raise ValueError(f"{shown(member.name)} has {len(member.pax_headers):,} extended fields")
            if path.is_absolute() or ".." in path.parts:
                raise ValueError(f"the name {shown(member.name)} leads out of it")
            if member.isdir():
                continue
            if not member.isreg() or member.issparse():
                raise ValueError(f"{shown(member.name)} is not a plain file")
            if str(path) in seen:
                raise ValueError(f"it holds {shown(str(path))} twice")
            seen.add(str(path))
            yield str(path), ByteRange(member.offset_data, member.size)


def _zip_members(mapped: mmap.mmap, place: ByteRange) -> dict[str, ByteRange]:
    """The places of the files in a zip that lies in the archive. Raises ValueError or zipfile's own errors."""
    found = {}
    for entry in zipfile.ZipFile(_Window(mapped, place)).infolist():
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise ValueError(f"{shown(entry.filename)} is compressed")
        header = place.start + entry.header_offset
        # The lengths of the name and of the extra field, which torch.save pads so that the values are aligned.
        signature, name_size, extra_size = struct.unpack("<4s22xHH", mapped[header : header + 30])
        start = header + 30 + name_size + extra_size
        if signature != b"PK\3\4" or start + entry.file_size > place.start + place.size:
            raise ValueError(f"{shown(entry.filename)} does not lie in it")
        found[entry.filename] = ByteRange(start, entry.file_size)
    return found


# The pickle of a state dict ------------------------------------------------------------------------------------------


class _Storage(NamedTuple):
    dtype: torch.dtype
    key: str
    size: int


class _Described(NamedTuple):
    """A tensor: its storage, its first value there, and its shape and strides."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def _new_table() -> dict[str, Any]:
    """Stands for an OrderedDict, which is pickled as an empty one and its items."""
    return {}


def _describe(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> _Described:
    """Takes the arguments of torch's `_rebuild_tensor_v2`; the other ones are about gradients."""
    numbers = (offset, *shape, *stride)
    if not isinstance(storage, _Storage) or any(type(number) is not int or number < 0 for number in numbers):
        raise ValueError("the description of a tensor has the wrong types")
    if len(shape) != len(stride) or len(shape) > _MOST_AXES:
        raise ValueError(f"a tensor has {len(shape)} axes and {len(stride)} strides")
    return _Described(storage, offset, tuple(shape), tuple(stride))


def _storage(kind: Any, dtype: Any, key: Any, location: Any, size: Any) -> _Storage:
    if kind != "storage" or not isinstance(dtype, torch.dtype) or type(key) is not str or type(size) is not int:
        raise ValueError("the description of a storage has the wrong types")
    return _Storage(dtype, key, size)


_NAMES: Mapping[str, Any] = {
    "collections OrderedDict": _new_table,
    "torch._utils _rebuild_tensor_v2": _describe,
    "torch FloatStorage": torch.float32,
    "torch HalfStorage": torch.float16,
    "torch BFloat16Storage": torch.bfloat16,
}
_CONSTANTS: Mapping[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_VALUES = ("BININT", "BININT1", "BININT2", "LONG1", "BINUNICODE")
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


def _read_state_dict(pickled: bytes) -> dict[str, Any]:
    """The table that a pickle of protocol 2 describes, without its attributes. Tensors are `_Described`.

    Only the operations and names that a state dict needs exist here. Nothing is imported, and no object is made but
    tables, tuples, numbers, texts and descriptions.

    Raises:
        ValueError: it asks for another name, or has another operation; the message names it.
        LookupError, TypeError, AttributeError: it is not the pickle of a state dict.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def since(start: int) -> tuple[Any, ...]:
        items = tuple(stack[start:])
        del stack[start:]
        return items

    operations: Iterable[tuple[Any, Any, Any]] = pickletools.genops(pickled)
    for operation, argument, _ in operations:
        name = operation.name
        if name in _VALUES:
            if isinstance(argument, str) and argument.endswith("_extra_state"):
                raise ValueError(f"{shown(argument)} is TransformerEngine's extra state")
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name == "GLOBAL":
            if argument not in _NAMES:
                raise ValueError(f"its pickle asks for {shown(argument)}, which no state dict needs; nothing was run")
            stack.append(_NAMES[argument])
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "MARK":
            marks.append(len(stack))
        elif name == "TUPLE":
            stack.append(since(marks.pop()))
        elif name in _TUPLES:
            stack.append(since(len(stack) - _TUPLES[name]))
        elif name == "BINPERSID":
            stack.append(_storage(*stack.pop()))
        elif name == "REDUCE":
            function, arguments = since(len(stack) - 2)
            if function is not _new_table and function is not _describe:
                raise ValueError("its pickle calls what is not a function")
            stack.append(function(*arguments))
        elif name in ("SETITEM", "SETITEMS"):
            items = since(marks.pop() if name == "SETITEMS" else len(stack) - 2)
            for key, value in zip(items[::2], items[1::2], strict=True):
                if type(key) is not str:  # it would be hashed, and a deep tuple's hash ends the process
                    raise ValueError("a name is not text")
                stack[-1][key] = value
        elif name == "BUILD":
            stack.pop()  # attributes: the versions of the modules
        elif name not in ("PROTO", "STOP"):
            raise ValueError(f"its pickle has the operation {name}")
    (table,) = stack
    if not isinstance(table, dict):
        raise ValueError("its pickle is not a table")
    return table
