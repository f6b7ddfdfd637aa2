"""Reads rows from tables: parquet and arrow files, folders that `save_to_disk` wrote, and data sets of the hub."""

import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from megatron_tiedlora.base.child_process import limited
from megatron_tiedlora.base.files import file_sha256
from megatron_tiedlora.base.messages import UserError, first_line

_PARQUET_BRANCH = "refs%2Fconvert%2Fparquet"

# As Python objects, a file's rows must fit into `_MEMORY` bytes plus `_RATIO` times the file's size. Compression makes
# text 3 to 20 times smaller, and a character needs up to 4 bytes. `_MEMORY` is for small files with many short rows.
_MEMORY, _RATIO = 2**28, 100
_ROWS = 64  # rows decoded at a time; few, since one row can be large

_ARROW_FILE = b"ARROW1"  # the first bytes of Arrow's file format; its stream format does not have them

Row = tuple[dict[str, Any], str]
"""The fields of a row, and the source of the row for messages, such as "train.jsonl:12"."""

Once = Callable[..., str]
"""A function of (another function, its key) that calls the other function, or returns what it returned elsewhere."""


def table_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a parquet file or of an Arrow file in Arrow's stream or file format.

    Raises UserError if the file is broken, or if its rows need much more memory than the file's size.
    """
    kind = path.suffix.lower().removeprefix(".")
    batches = _parquet_batches if kind == "parquet" else _arrow_batches
    starts = ((batch, start) for batch in batches(path) for start in range(0, batch.num_rows, _ROWS))
    parts = (batch.slice(start, _ROWS).to_pylist() for batch, start in starts)
    memory = _MEMORY + _RATIO * path.stat().st_size
    too_large = f"{path}: its rows need more than {memory:,} bytes of memory; write it as .jsonl, or give fewer rows"
    number = size = 0
    while True:
        part: list[dict[str, Any]] | None = None
        reason = None
        try:
            with limited(memory=memory):
                part = next(parts, None)
        except MemoryError:  # the error is raised below, outside the handler, so that rows read so far are freed
            reason = too_large
        except Exception as error:  # a broken file raises anything from OSError to UnicodeDecodeError
            reason = f"{path}: the {kind} file is not readable ({first_line(error)}); write it again"
        if reason is not None:
            raise UserError(reason)
        if part is None:
            return
        for row in part:
            number += 1
            size += num_bytes(row)
            if size > memory:
                raise UserError(too_large)
            yield row, f"{path}: row {number}"


def _parquet_batches(path: Path) -> Iterator[Any]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path, buffer_size=2**20) as file:
        yield from file.iter_batches(batch_size=_ROWS, use_threads=False)


def _arrow_batches(path: Path) -> Iterator[Any]:
    import pyarrow

    with pyarrow.OSFile(str(path)) as file:
        is_file_format = file.read(len(_ARROW_FILE)) == _ARROW_FILE
        file.seek(0)
        if is_file_format:
            whole = pyarrow.ipc.open_file(file)
            yield from map(whole.get_batch, range(whole.num_record_batches))
        else:
            yield from pyarrow.ipc.open_stream(file)


def num_bytes(value: Any) -> int:
    """Return the memory that a value and all values inside it use, in bytes."""
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return sys.getsizeof(value) + sum(map(num_bytes, parts))


def is_saved_folder(path: Path) -> bool:
    """Return whether the folder was written by `save_to_disk` of the library `datasets`."""
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def saved_folder_rows(path: Path, *, split: str) -> Iterator[Row]:
    """Yield the rows of a folder that `save_to_disk` wrote. If it has several splits, only `split` is read. Raises
    UserError if the folder cannot be read, or has no such split."""
    import datasets

    try:
        data = datasets.load_from_disk(str(path))
        if isinstance(data, datasets.DatasetDict):
            if split not in data:
                names = ", ".join(data)
                raise UserError(f"{path}: has no split {split!r}, only {names}; give the folder of one split")
            data = data[split]
        yield from numbered_rows(data, str(path))
    except UserError:
        raise
    except Exception as error:  # a broken folder raises many unrelated types
        raise UserError(f"{path}: save_to_disk's folder is broken ({first_line(error)}); save it again") from error


@dataclass(frozen=True)
class HubData:
    """One split of a hub data set. The library `datasets` downloads it when it is first used.

    parquet_branch: whether to read the hub's parquet copy of the data set, whose folders are `config_name`/`split`.
        Data sets with a loading script need it, because `datasets` 4 and later do not run such scripts.
    """

    hub_id: str
    split: str
    config_name: str | None = None
    parquet_branch: bool = False

    @cached_property
    def data(self) -> Any:
        """Return the loaded data set. Raises UserError with the reason if it is empty or cannot be loaded."""
        import datasets

        hub_id, split = self.hub_id, self.split
        try:
            if self.parquet_branch:
                folder = f"hf://datasets/{hub_id}@{_PARQUET_BRANCH}/{self.config_name}/{split}"
                data = datasets.load_dataset("parquet", data_files={split: f"{folder}/*.parquet"}, split=split)
            else:
                data = datasets.load_dataset(hub_id, self.config_name, split=split)
        except Exception as error:  # the library raises many unrelated types, including network errors
            message = f"{hub_id}: no such file, and split {split!r} cannot be loaded from the hub ({first_line(error)})"
            raise UserError(f"{message}; give a local file, or ID:CONFIG:SPLIT of another data set") from error
        if not len(data):
            raise UserError(f"{hub_id}: split {split!r} on the hub has no rows; give a local file or another hub id")
        return data

    def rows(self) -> Iterator[Row]:
        """Yield all rows. Raises UserError as `data` does."""
        yield from numbered_rows(self.data, f"{self.hub_id}[{self.split}]")

    def sha256(self, once: Once) -> str:
        """Return a hash of the files that the library has downloaded, or of the rows if there are no files."""

        def content() -> str:
            files = [Path(file["filename"]) for file in getattr(self.data, "cache_files", ())]
            return files_sha256(files, once) if files else rows_sha256(self.rows())

        # Several splits may be in one file.
        return f"{self.config_name} {self.split} {once(content, self.hub_id, self)}"


def file_key(file: Path) -> tuple[object, ...]:
    """Return the path of a file and everything that changes when the file is written, as a key for `Once`."""
    found = file.stat()
    return file, found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def files_sha256(files: Iterable[Path], once: Once) -> str:
    """Return the hash of a file, or a hash of the hashes of several files, in the given order. Raises UserError if a
    file cannot be read."""
    hashes = [once(partial(file_sha256, file), *file_key(file)) for file in files]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256(bytes.fromhex("".join(hashes))).hexdigest()


def names_and_contents(files: Iterable[Path], once: Once) -> str:
    """Return the names of files and a hash of their contents. Names are included because suffixes select the reader."""
    files = list(files)
    return " ".join([*(file.name for file in files), files_sha256(files, once)])


def rows_sha256(rows: Iterable[Row]) -> str:
    """Return a hash of the fields of rows, in the given order."""
    digest = hashlib.sha256()
    for row, _ in rows:
        digest.update(json.dumps(row, default=str).encode() + b"\n")
    return digest.hexdigest()


def numbered_rows(rows: Iterable[Mapping[str, Any]], name: str) -> Iterator[Row]:
    """Return the rows with their sources. A source has `name` and the number of the row, which begins at 1."""
    return ((dict(row), f"{name}: row {number}") for number, row in enumerate(rows, start=1))
