"""Folders of NumPy arrays that are written piece by piece and mapped when they are read.

A mapped array takes no memory of its own: all processes of a host share the system's copy of the file. Every file has
its size and its hash beside it, and these have a hash of their own, so that damage is noticed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from io import BufferedWriter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_tiedlora.base.atomic import write_json
from megatron_tiedlora.base.checksums import check_seal, file_sha256, sealed
from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.base.json_files import read_json_object

_META_FILE = "content.json"


class ArrayWriter:
    """Appends to arrays of one dimension, each in its file."""

    def __init__(self, folder: Path, dtypes: Mapping[str, np.dtype[Any]], stack: ExitStack) -> None:
        self._dtypes, self._sizes = dtypes, dict.fromkeys(dtypes, 0)
        self._files: dict[str, BufferedWriter] = {}
        for name, file in _files(folder, dtypes).items():
            self._files[name] = stack.enter_context(file.open("wb"))
            self._write_header(name)  # again at the end, when the size is known; it has room for any number

    def append(self, **arrays: NDArray[Any]) -> None:
        """Append values to the arrays of these names, (number of values,) each."""
        for name, values in arrays.items():
            self._files[name].write(np.ascontiguousarray(values, dtype=self._dtypes[name]).data)
            self._sizes[name] += len(values)

    def finish(self) -> None:
        """Write the sizes."""
        for name, file in self._files.items():
            file.seek(0)
            self._write_header(name)

    def _write_header(self, name: str) -> None:
        shape = (self._sizes[name],)
        header = {"descr": np.lib.format.dtype_to_descr(self._dtypes[name]), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self._files[name], header)


@contextmanager
def written_arrays(folder: Path, dtypes: Mapping[str, Any], facts: dict[str, Any]) -> Iterator[ArrayWriter]:
    """Yield a writer of arrays of these dtypes in an existing folder, which is complete when the block has ended.

    Args:
        facts: JSON that belongs to the arrays; it may be filled in the block.
    """
    with ExitStack() as stack:
        writer = ArrayWriter(folder, {name: np.dtype(dtype) for name, dtype in dtypes.items()}, stack)
        yield writer
        writer.finish()
    files = _files(folder, dtypes)
    sizes = {name: file.stat().st_size for name, file in files.items()}
    write_json(folder / _META_FILE, sealed({"facts": facts, "sizes": sizes}, files=files.values()))


def mapped_arrays(folder: Path, dtypes: Mapping[str, Any]) -> tuple[dict[str, NDArray[Any]], dict[str, Any]] | None:
    """(the arrays of a folder, what was written beside them); None if the folder is missing, damaged or another's."""
    meta_file, files = folder / _META_FILE, _files(folder, dtypes)
    try:
        meta = read_json_object(meta_file, kind="a folder of arrays")
        sums = check_seal(meta_file, meta)
        # Opening a pipe would wait. A sparse file may be of any size, so sizes come before hashes.
        if any(not file.is_file() or file.stat().st_size != meta["sizes"][name] for name, file in files.items()):
            return None
        if any(file_sha256(file) != sums[file.name] for file in files.values()):
            return None
        arrays = {name: np.load(file, mmap_mode="r") for name, file in files.items()}
        if any(arrays[name].dtype != dtype or arrays[name].ndim != 1 for name, dtype in dtypes.items()):
            return None
        return {name: array.view(np.ndarray) for name, array in arrays.items()}, dict(meta["facts"])
    except (UserError, OSError, ValueError, KeyError, TypeError, EOFError):
        return None


def _files(folder: Path, names: Iterable[str]) -> dict[str, Path]:
    return {name: folder / f"{name}.npy" for name in names}
