"""Reads the files and tensors in a NeMo 1 `.nemo` archive. No code in the archive is executed.

A `.nemo` file is a tar of settings, a tokenizer and one `.ckpt` file for each rank. A `.ckpt` file is a zip that
`torch.save` wrote. It contains a pickle that describes a state dict, and the uncompressed values. A copy of the
`.ckpt` file is checked, and then `torch.load` maps the copy's tensors with `weights_only`.
"""

import io
import pickletools
import tarfile
import tempfile
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from megatron_tiedlora.base.messages import UserError, library_errors, os_errors, shown

# Maximum bytes of a pickle, and of the list of an archive's files. A model of 96 layers needs a fifth of these.
_LARGEST_PICKLE, _LARGEST_LIST = 2**20, 2**22
_MOST_PAX_FIELDS = 64
_MOST_TUPLES = 20_000  # in a pickle; 96 layers have 4,000. Hashing so many nested tuples is possible
_PIECE = 2**24  # bytes that are copied at a time


class NemoArchive:
    """The files in a `.nemo` archive.

    Attributes:
        path: the path of the archive, which error messages name.
        members: the files in the archive by their names without a leading `./`.
    """

    def __init__(self, path: Path) -> None:
        """Read the list of files. Raise UserError if the archive is not a complete tar of regular files."""
        self.path = path
        with readable(path, "cannot be read as a .nemo archive"):
            with path.open("rb") as stream:
                if stream.read(2) == b"\x1f\x8b":
                    raise UserError(f"{path}: is compressed with gzip. Decompress it first: gzip -dc {path} > NEW.nemo")
            self.members = {str(PurePosixPath(member.name)): member for member in _tar_members(path)}

    def read(self, member: str, *, largest: int) -> bytes:
        """Return a file's content. Raise UserError if the file is missing or has more than `largest` bytes."""
        if member not in self.members:
            raise UserError(f"{self.path}: holds no {member}; give a complete NeMo 1 model")
        if self.members[member].size > largest:
            raise UserError(f"{self.path}: {member} is larger than {largest:,} bytes")
        return b"".join(self._content(member))

    def _content(self, member: str) -> Iterator[bytes]:
        found = self.members[member]
        with self.path.open("rb") as stream:
            stream.seek(found.offset_data)
            for left in range(found.size, 0, -_PIECE):
                yield stream.read(min(left, _PIECE))

    def tensors(self, member: str, folder: Path) -> dict[str, torch.Tensor]:
        """Return the tensors of a `.ckpt` file by their names. They are mapped from a copy in `folder`.

        The copy is already unlinked. The system frees its disk space after the last tensor is deleted.

        Raises:
            UserError: the file is not a state dict, or the values of a tensor are not complete.
            OSError: the copy cannot be written.
        """
        with tempfile.NamedTemporaryFile(dir=folder) as copy:
            copy.writelines(self._content(member))
            copy.flush()
            with readable(self.path, f"{member} cannot be read as a state dict"):
                sizes = _check_ckpt(copy.name)
                try:
                    found = torch.load(copy.name, map_location="cpu", mmap=True, weights_only=True)
                except Exception as error:
                    if type(error).__name__ != "UnpicklingError":
                        raise
                    # PyTorch's message explains how to load the file without the check, so it is not shown.
                    raise ValueError("its pickle is not a state dict") from None
                return _checked_tensors(found, sizes)


def _check_ckpt(file: str) -> list[int]:
    """Check the files and the pickle in a `.ckpt` file. Return the sizes of the files with tensor values, in order.

    Raises:
        ValueError, or zipfile's own errors: the file is not a state dict as `torch.save` writes it.
    """
    archive = zipfile.ZipFile(_Bounded(file))
    files = {entry.filename: entry for entry in archive.infolist()}
    if len(files) != len(archive.infolist()):
        raise ValueError("it holds a file twice")
    for entry in files.values():
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise ValueError(f"{shown(entry.filename)} is compressed")
    folder = next(iter(files), "").partition("/")[0]

    def content(name: str) -> bytes:
        size = files[f"{folder}/{name}"].file_size
        if size > _LARGEST_PICKLE:
            raise ValueError(f"{name} has {size:,} bytes, but at most {_LARGEST_PICKLE:,} are allowed")
        return archive.read(f"{folder}/{name}")

    if f"{folder}/byteorder" in files and content("byteorder") != b"little":
        raise ValueError("its byte order is not little")
    _check_pickle(content("data.pkl"))
    values = [entry for name, entry in files.items() if name.startswith(f"{folder}/data/") and entry.file_size]
    return [entry.file_size for entry in sorted(values, key=lambda entry: entry.header_offset)]


@contextmanager
def readable(path: Path, what: str) -> Iterator[None]:
    """Convert an error about broken content to a one-line UserError with the file, the text `what` and the reason."""
    with library_errors(f"{path}: {what}"), os_errors(f"{path}: cannot be read", fix="; check the file"):
        yield


# The tar -----------------------------------------------------------------------------------------------------------


class _Bounded(io.FileIO):
    """A file from which tarfile and zipfile read the list of archived files.

    A malicious list may claim any size, so the total number of bytes that can be read is limited.
    """

    left = _LARGEST_LIST

    def read(self, size: int | None = -1) -> bytes:
        """Return `size` bytes, or the rest of the file. Raise ValueError beyond the limit."""
        most = self.left + 1
        found = super().read(most if size is None or size < 0 else min(size, most)) or b""
        self.left -= len(found)
        if self.left < 0:
            raise ValueError(f"its list of files is longer than {_LARGEST_LIST:,} bytes")
        return found


def _tar_members(file: Path) -> Iterator[tarfile.TarInfo]:
    """Yield the files in a tar. Raise ValueError or tarfile's errors, for example if the tar is truncated."""
    seen: set[str] = set()
    with _Bounded(file) as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
        for member in tar:
            path = PurePosixPath(member.name)
            if len(member.pax_headers) > _MOST_PAX_FIELDS:  # each member has its own copy of the global fields
                raise ValueError(f"{shown(member.name)} has {len(member.pax_headers):,} extended fields")
            if path.is_absolute() or ".." in path.parts:
                raise ValueError(f"the name {shown(member.name)} leads out of the archive")
            if member.isdir():
                continue
            if not member.isreg() or member.issparse():
                raise ValueError(f"{shown(member.name)} is not a plain file")
            if str(path) in seen:
                raise ValueError(f"it holds {shown(str(path))} twice")
            seen.add(str(path))
            yield member


# The pickle of a state dict ------------------------------------------------------------------------------------------

_NAMES = {
    *("collections OrderedDict", "torch._utils _rebuild_tensor_v2"),
    *("torch FloatStorage", "torch HalfStorage", "torch BFloat16Storage"),
}
_TUPLES = {"TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"}
_SHARED = {"GLOBAL", "BINUNICODE", "EMPTY_DICT", "REDUCE"}  # operations whose results may be used more than once
_KEPT, _FETCHED = {"BINPUT", "LONG_BINPUT"}, {"BINGET", "LONG_BINGET"}
_OPERATIONS = {
    *("PROTO", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1"),
    *("GLOBAL", "BINPERSID", "REDUCE", "BUILD", "EMPTY_TUPLE", "EMPTY_DICT", "SETITEM", "SETITEMS"),
    "BINUNICODE",
    *(_TUPLES | _KEPT | _FETCHED),
}


def _check_pickle(pickled: bytes) -> None:
    """Raise ValueError if a pickle has an operation or a name that a state dict does not need.

    `torch.load` accepts more operations and names. It also hashes the keys of dicts, and hashing a tuple needs stack
    for each level and time for each element. So the number of tuples is limited, and no tuple may be used twice.
    """
    before, num_tuples, tuples = "", 0, set()
    operations: Iterable[tuple[Any, Any, Any]] = pickletools.genops(pickled)
    for operation, argument, _ in operations:
        name = operation.name
        if name not in _OPERATIONS:
            raise ValueError(f"its pickle has the operation {name}")
        if name == "GLOBAL" and argument not in _NAMES:
            raise ValueError(f"its pickle asks for {shown(argument)}, which no state dict needs; nothing was run")
        if name == "BINUNICODE" and argument.endswith("_extra_state"):
            raise ValueError(f"{shown(argument)} is TransformerEngine's extra state")
        num_tuples += name in _TUPLES
        if num_tuples > _MOST_TUPLES:
            raise ValueError(f"its pickle has more than {_MOST_TUPLES:,} tuples")
        if name in _KEPT and before not in _SHARED:
            tuples.add(argument)
        if name in _FETCHED and argument in tuples:
            raise ValueError("its pickle uses a tuple twice")
        before = name


def _checked_tensors(table: Any, sizes: list[int]) -> dict[str, torch.Tensor]:
    """Return the tensors of a loaded state dict, after checking their sizes.

    `torch.load` does not compare the size of a mapped file with the size in the pickle. `sizes` are the sizes of the
    files with tensor values, in order.

    Raises:
        ValueError: `table` is not a dict of row-major tensors, or a tensor's size differs from its file's size.
    """
    if not isinstance(table, dict):
        raise ValueError("its pickle is not a dict")
    storages: dict[int, int] = {}
    for name, tensor in table.items():
        if type(name) is not str:
            raise ValueError("a name is not text")
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{shown(name)} is not a tensor")
        if not tensor.is_contiguous():
            raise ValueError(f"{shown(name)} is not stored row by row")
        storage = tensor.untyped_storage()
        if storage.nbytes():
            storages[storage.data_ptr()] = storage.nbytes()
    if [storages[place] for place in sorted(storages)] != sizes:
        raise ValueError("some values of a tensor are missing")
    return dict(table)
