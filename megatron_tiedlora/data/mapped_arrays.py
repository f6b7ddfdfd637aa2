"""Folders of NumPy arrays that are written piece by piece and mapped when they are read.

A mapped array takes no memory of its own: all processes of a host share the system's copy of the file. Every file has
its hash beside it, so that a damaged one is noticed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from io import BufferedRandom
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_tiedlora.base.atomic import Guard, new_folder, unguarded, write_json
from megatron_tiedlora.base.file_hash import file_sha256

_META_FILE = "content.json"


class ArrayWriter:
    """Appends to arrays of one dimension, each in its file."""

    def __init__(self, folder: Path, dtypes: Mapping[str, np.dtype[Any]], stack: ExitStack) -> None:
        self._dtypes, self._sizes = dtypes, dict.fromkeys(dtypes, 0)
        self._files: dict[str, BufferedRandom] = {}
        for name in dtypes:
            self._files[name] = stack.enter_context((folder / f"{name}.npy").open("w+b"))
            self._write_header(name)  # again at the end, when the size is known; it has room for any number

    def append(self, **arrays: NDArray[Any]) -> None:
        """Append values to the arrays of these names, (number of values,) each."""
        for name, values in arrays.items():
            self._files[name].write(np.ascontiguousarray(values, dtype=self._dtypes[name]).data)
            self._sizes[name] += len(values)

    def finish(self) -> dict[str, str]:
        """Write the sizes, and return the hash of each file."""
        sums = {}
        for name, file in self._files.items():
            file.seek(0)
            self._write_header(name)
            file.flush()
            sums[name] = file_sha256(Path(file.name))
        return sums

    def _write_header(self, name: str) -> None:
        shape = (self._sizes[name],)
        header = {"descr": np.lib.format.dtype_to_descr(self._dtypes[name]), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self._files[name], header)


@contextmanager
def written_arrays(
    folder: Path, dtypes: Mapping[str, Any], facts: dict[str, Any], *, guard: Guard = unguarded
) -> Iterator[ArrayWriter]:
    """Yield a writer of arrays of these dtypes. `folder` appears when the block ends without an error.

    Args:
        facts: JSON that belongs to the arrays; it may be filled in the block.
        guard: see `new_folder`.

    Raises:
        UserError: the disk is full or the folder's parent is not writable.
    """
    with new_folder(folder, guard=guard) as temporary:
        with ExitStack() as stack:
            writer = ArrayWriter(temporary, {name: np.dtype(dtype) for name, dtype in dtypes.items()}, stack)
            yield writer
            sums = writer.finish()
        write_json(temporary / _META_FILE, {"facts": facts, "sha256": sums})


def mapped_arrays(folder: Path, dtypes: Mapping[str, Any]) -> tuple[dict[str, NDArray[Any]], dict[str, Any]] | None:
    """(the arrays of a folder, what was written beside them); None if the folder is missing, damaged or another's."""
    if not (folder / _META_FILE).is_file():
        return None
    try:
        meta = json.loads((folder / _META_FILE).read_bytes())
        arrays = {}
        for name, dtype in dtypes.items():
            path = folder / f"{name}.npy"
            if not path.is_file():  # opening a pipe would wait
                return None
            if file_sha256(path) != meta["sha256"][name]:
                return None
            array = np.load(path, mmap_mode="r")
            if array.dtype != dtype or array.ndim != 1:
                return None
            arrays[name] = array.view(np.ndarray)
        return arrays, dict(meta["facts"])
    except (OSError, ValueError, KeyError, TypeError, EOFError, RecursionError):
        return None
