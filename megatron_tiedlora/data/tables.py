"""Reads rows from tables: parquet and arrow files, folders that `save_to_disk` wrote, and data sets of the hub."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.base.wording import first_line
from megatron_tiedlora.data.limits import limited

_PARQUET_BRANCH = "refs%2Fconvert%2Fparquet"

# Memory of a file as Python objects. Compression shrinks text 3 to 20 times, and a character takes up to 4 bytes. The
# constant is for small files of many short rows.
_MEMORY, _RATIO = 2**28, 100
_ROWS = 64  # rows decoded at a time; few, since one row can be large

_ARROW_FILE = b"ARROW1"  # at the start of Arrow's file format, not of its streams

Row = tuple[dict[str, Any], str]
"""A row's fields and its source ("train.jsonl:12"), for messages."""


def read_parquet(path: Path, *, limit: int | None) -> list[Row]:
    """The rows of a parquet file. Raises UserError if it is broken, or its rows do not fit into memory."""
    import pyarrow.parquet

    def rows() -> Iterator[dict[str, Any]]:
        with pyarrow.parquet.ParquetFile(path, buffer_size=2**20) as file:
            size = _ROWS if limit is None else min(max(limit, 1), _ROWS)
            for batch in file.iter_batches(batch_size=size, use_threads=False):
                yield from batch.to_pylist()

    return _bounded(rows(), path, limit, "parquet")


def read_arrow(path: Path, *, limit: int | None) -> list[Row]:
    """The rows of an Arrow file, of its stream or its file format. Raises UserError as `read_parquet` does."""
    import pyarrow

    def rows() -> Iterator[dict[str, Any]]:
        with pyarrow.OSFile(str(path)) as file:
            is_file_format = file.read(len(_ARROW_FILE)) == _ARROW_FILE
            file.seek(0)
            if is_file_format:
                whole = pyarrow.ipc.open_file(file)
                batches: Iterable[Any] = map(whole.get_batch, range(whole.num_record_batches))
            else:
                batches = pyarrow.ipc.open_stream(file)
            for batch in batches:
                for start in range(0, batch.num_rows, _ROWS):
                    yield from batch.slice(start, _ROWS).to_pylist()

    return _bounded(rows(), path, limit, "arrow")


def _bounded(rows: Iterator[dict[str, Any]], path: Path, limit: int | None, kind: str) -> list[Row]:
    memory = _MEMORY + _RATIO * path.stat().st_size
    reason = f"its rows need more than {memory:,} bytes; write it as .jsonl, or give a smaller part of it"
    try:
        with limited(memory=memory):
            return _number_rows(islice(rows, limit), str(path))
    except MemoryError:  # raised below, outside the handler, so that the rows read so far are freed
        pass
    except Exception as error:  # a broken file raises anything from OSError to UnicodeDecodeError
        reason = f"not a readable {kind} file ({first_line(error)})"
    raise UserError(f"{path}: {reason}")


def is_saved_folder(path: Path) -> bool:
    """Whether `save_to_disk` of `datasets` wrote the folder."""
    return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()


def read_saved_folder(path: Path, *, split: str, limit: int | None) -> list[Row]:
    """The rows of a folder that `save_to_disk` wrote, of one split if it has several.

    Raises:
        UserError: it cannot be read, or has no such split.
    """
    import datasets

    try:
        data = datasets.load_from_disk(str(path))
        if isinstance(data, datasets.DatasetDict):
            if split not in data:
                names = ", ".join(data)
                raise UserError(f"{path}: has no split {split!r}, only {names}; give the folder of one of them")
            data = data[split]
        return _number_rows(data if limit is None else data.select(range(min(limit, len(data)))), str(path))
    except UserError:
        raise
    except Exception as error:  # a broken folder raises many unrelated types
        raise UserError(f"{path}: not a readable folder of save_to_disk ({first_line(error)})") from error


def read_hub_rows(
    hub_id: str, *, split: str, config_name: str | None = None, parquet_branch: bool = False, limit: int | None = None
) -> list[Row]:
    """Read all rows (at most `limit`) of one split of a hub data set.

    parquet_branch: read the hub's parquet copy of the data set, whose folders are `config_name`/`split`. It is for
        repos with a loading script, which `datasets` no longer runs since version 4.

    Raises UserError with the library's reason if the split cannot be loaded, or if it is empty.
    """
    import datasets

    try:
        if parquet_branch:
            folder = f"hf://datasets/{hub_id}@{_PARQUET_BRANCH}/{config_name}/{split}"
            data = datasets.load_dataset("parquet", data_files={split: f"{folder}/*.parquet"}, split=split)
        else:
            data = datasets.load_dataset(hub_id, config_name, split=split)
    except Exception as error:  # the library raises many unrelated types, including network errors
        message = f"{hub_id}: no such file, and the hub's split {split!r} cannot be loaded ({first_line(error)})"
        raise UserError(f"{message}; give a local file, or ID:CONFIG:SPLIT of another data set") from error
    if not len(data):
        raise UserError(f"{hub_id}: the hub's split {split!r} holds no rows; give a local file or another hub id")
    if limit is not None:
        data = data.select(range(min(limit, len(data))))
    return _number_rows(data, f"{hub_id}[{split}]")


def _number_rows(rows: Iterable[dict[str, Any]], name: str) -> list[Row]:
    return [(dict(row), f"{name}: row {number}") for number, row in enumerate(rows, start=1)]
