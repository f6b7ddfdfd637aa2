"""Reads rows from tables: parquet and arrow files, folders that `save_to_disk` wrote, and data sets of the hub."""

import hashlib
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_tiedlora.base.child_process import limited
from megatron_tiedlora.base.files import file_sha256
from megatron_tiedlora.base.messages import UserError, first_line

_PARQUET_BRANCH = "refs%2Fconvert%2Fparquet"

# Memory of a file as Python objects. Compression shrinks text 3 to 20 times, and a character takes up to 4 bytes. The
# constant is for small files of many short rows.
_MEMORY, _RATIO = 2**28, 100
_ROWS = 64  # rows decoded at a time; few, since one row can be large

_ARROW_FILE = b"ARROW1"  # at the start of Arrow's file format, not of its streams

Row = tuple[dict[str, Any], str]
"""A row's fields and its source ("train.jsonl:12"), for messages."""


def table_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a parquet or an Arrow file, of Arrow's stream or file format.

    Raises UserError if it is broken, or much larger as rows than as a file.
    """
    kind = path.suffix.lower().removeprefix(".")
    batches = _parquet_batches if kind == "parquet" else _arrow_batches
    starts = ((batch, start) for batch in batches(path) for start in range(0, batch.num_rows, _ROWS))
    parts = (batch.slice(start, _ROWS).to_pylist() for batch, start in starts)
    memory = _MEMORY + _RATIO * path.stat().st_size
    too_large = f"{path}: its rows need more than {memory:,} bytes; write it as .jsonl, or give a smaller part of it"
    number = size = 0
    while True:
        part: list[dict[str, Any]] | None = None
        reason = None
        try:
            with limited(memory=memory):
                part = next(parts, None)
        except MemoryError:  # raised below, outside the handler, so that what was read so far is freed
            reason = too_large
        except Exception as error:  # a broken file raises anything from OSError to UnicodeDecodeError
            reason = f"{path}: not a readable {kind} file ({first_line(error)})"
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
    """Memory of a value and everything in it."""
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return sys.getsizeof(value) + sum(map(num_bytes, parts))


def is_saved_folder(path: Path) -> bool:
    """Whether `save_to_disk` of `datasets` wrote the folder."""
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def saved_folder_rows(path: Path, *, split: str) -> Iterator[Row]:
    """Yield the rows of a folder that `save_to_disk` wrote, of one split if it has several. Raises UserError if it
    cannot be read, or has no such split."""
    import datasets

    try:
        data = datasets.load_from_disk(str(path))
        if isinstance(data, datasets.DatasetDict):
            if split not in data:
                names = ", ".join(data)
                raise UserError(f"{path}: has no split {split!r}, only {names}; give the folder of one of them")
            data = data[split]
        yield from numbered_rows(data, str(path))
    except UserError:
        raise
    except Exception as error:  # a broken folder raises many unrelated types
        raise UserError(f"{path}: not a readable folder of save_to_disk ({first_line(error)})") from error


@dataclass(frozen=True)
class HubData:
    """One split of a hub data set, which `datasets` downloads at the first use.

    parquet_branch: read the hub's parquet copy of the data set, whose folders are `config_name`/`split`. It is for
        repos with a loading script, which `datasets` no longer runs since version 4.
    """

    hub_id: str
    split: str
    config_name: str | None = None
    parquet_branch: bool = False

    @cached_property
    def data(self) -> Any:
        """The library's data set. Raises UserError with its reason if it cannot be loaded, or if it is empty."""
        import datasets

        hub_id, split = self.hub_id, self.split
        try:
            if self.parquet_branch:
                folder = f"hf://datasets/{hub_id}@{_PARQUET_BRANCH}/{self.config_name}/{split}"
                data = datasets.load_dataset("parquet", data_files={split: f"{folder}/*.parquet"}, split=split)
            else:
                data = datasets.load_dataset(hub_id, self.config_name, split=split)
        except Exception as error:  # the library raises many unrelated types, including network errors
            message = f"{hub_id}: no such file, and the hub's split {split!r} cannot be loaded ({first_line(error)})"
            raise UserError(f"{message}; give a local file, or ID:CONFIG:SPLIT of another data set") from error
        if not len(data):
            raise UserError(f"{hub_id}: the hub's split {split!r} holds no rows; give a local file or another hub id")
        return data

    def rows(self) -> Iterator[Row]:
        """Yield all rows. Raises UserError as `data` does."""
        yield from numbered_rows(self.data, f"{self.hub_id}[{self.split}]")

    def sha256(self) -> str:
        """Hash of the files to which the library has downloaded it; of the rows if there are none."""
        files = [Path(file["filename"]) for file in getattr(self.data, "cache_files", ())]
        content = files_sha256(files) if files else rows_sha256(self.rows())
        return f"{self.config_name} {self.split} {content}"  # splits may be parts of one file


def files_sha256(files: Iterable[Path]) -> str:
    """Hash of the content of files, in this order. Raises UserError if one cannot be read."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(bytes.fromhex(file_sha256(file)))
    return digest.hexdigest()


def names_and_contents(files: Iterable[Path]) -> str:
    """Names and hash of files. Names decide how a file is read, so they are in it; folders do not."""
    files = list(files)
    return " ".join([*(file.name for file in files), files_sha256(files)])


def rows_sha256(rows: Iterable[Row]) -> str:
    """Hash of the fields of rows, in this order."""
    digest = hashlib.sha256()
    for row, _ in rows:
        digest.update(json.dumps(row, default=str).encode() + b"\n")
    return digest.hexdigest()


def numbered_rows(rows: Iterable[Mapping[str, Any]], name: str) -> Iterator[Row]:
    """The rows with sources made of a name and their numbers, from 1 on."""
    return ((dict(row), f"{name}: row {number}") for number, row in enumerate(rows, start=1))
