"""Reads rows from files and hub data sets. Each row comes with its source, for messages.

Owns the formats (.jsonl, .json, .parquet, lines of plain text, a hub id through `datasets`) and their errors. Leaves
the meaning of the fields to `tasks`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.base.paths import user_path
from megatron_tiedlora.base.wording import first_line
from megatron_tiedlora.data.limits import limited

SUFFIXES = (".jsonl", ".json", ".parquet")

_PARQUET_BRANCH = "refs%2Fconvert%2Fparquet"

# No model reads a sample as long as _LONGEST_LINE, and its JSON becomes at most some hundred MB of objects. A .json
# file is read as a whole, into several times its size.
_LONGEST_LINE, _LARGEST_JSON = 2**24, 2**28  # bytes
_JSON_MEMORY, _JSON_RATIO = 2**28, 8  # text takes one to four times its bytes, lists of many small objects more
# Memory of a parquet file as Python objects. Compression shrinks text 3 to 20 times, and a character takes up to 4
# bytes. The constant is for small files of many short rows.
_PARQUET_MEMORY, _PARQUET_RATIO = 2**28, 100
_PARQUET_ROWS = 64  # rows decoded at a time; few, since one row can be large

Row = tuple[dict[str, Any], str]
"""A row's fields and its source ("train.jsonl:12"), for messages."""


def is_rows_file(name: str) -> bool:
    """Whether the name has the suffix of a file of rows."""
    return name.lower().endswith(SUFFIXES)


def looks_like_path(path_or_hub: str) -> bool:
    """Whether the string can only mean a local file: it has a data suffix or starts like a path."""
    return is_rows_file(path_or_hub) or path_or_hub.startswith(("/", ".", "~"))


def may_be_hub_id(name: str) -> bool:
    """Whether `name` can be a hub id by the hub's own rules, if no such path exists."""
    if looks_like_path(name):
        return False
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def read_rows(path_or_hub: str | Path, *, split: str = "train", limit: int | None = None) -> list[Row]:
    """Read all rows (at most `limit`) of a local file, or of one split of a hub data set.

    A .json file holds a list of objects, or an object whose `data` is such a list (nested SQuAD). The elements of the
    list are the rows, and the task unfolds them.

    Raises UserError if the file or data set is missing, unreadable, broken (naming file and line) or empty.
    """
    name = str(path_or_hub)
    path = user_path(name)
    if path.exists() or looks_like_path(name):
        rows = _read_file(path, limit=limit)
        if not rows:
            raise UserError(f"{name}: holds no rows; give a file with at least one")
        return rows
    return read_hub_rows(name, split=split, limit=limit)


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
        raise UserError(f"{message}; give a local file or another hub id") from error
    if not len(data):
        raise UserError(f"{hub_id}: the hub's split {split!r} holds no rows; give a local file or another hub id")
    if limit is not None:
        data = data.select(range(min(limit, len(data))))
    return _number_rows(data, f"{hub_id}[{split}]")


def read_lines(name: str | Path) -> list[str]:
    r"""Read the lines of a UTF-8 text file without their ends (\n or \r\n).

    Raises UserError naming the file if it is missing, unreadable or empty, and also the line if that is not UTF-8.
    """
    path = user_path(name)
    _check_file(path, "a text file")
    lines = []
    try:
        with path.open("rb") as file:
            for number, line in _lines(file, path):
                raw = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                lines.append(_decode(raw.removesuffix(b"\n"), f"{path}:{number}").removesuffix("\r"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({first_line(error)})") from error
    if not any(line.strip() for line in lines):
        raise UserError(f"{path}: holds no lines; give a file with at least one")
    return lines


def _lines(file: BinaryIO, path: Path) -> Iterator[tuple[int, bytes]]:
    r"""Yield number and bytes of each line. Only \n ends a line; `splitlines` would also split inside sentences.

    Raises UserError if a line is too long.
    """
    number = 0
    while line := file.readline(_LONGEST_LINE + 1):
        number += 1
        if len(line) > _LONGEST_LINE:
            raise UserError(f"{path}:{number}: is longer than {_LONGEST_LINE:,} bytes; remove or shorten the line")
        yield number, line


def _check_file(path: Path, expected: str) -> None:
    if not path.exists():
        raise UserError(f"{path}: no such file; check the path")
    if path.is_dir():
        raise UserError(f"{path}: is a folder; give {expected}")
    if not path.is_file():  # reading a pipe may never end, and files are read more than once
        raise UserError(f"{path}: is not a regular file; give {expected}")


def _read_file(path: Path, *, limit: int | None) -> list[Row]:
    _check_file(path, f"a {', '.join(SUFFIXES)} file or a hub id")
    suffix = path.suffix.lower()
    try:
        if suffix == ".jsonl":
            return _read_jsonl(path, limit=limit)
        if suffix == ".json":
            return _read_json(path, limit=limit)
        if suffix == ".parquet":
            return _read_parquet(path, limit=limit)
    except MemoryError:
        raise UserError(f"{path}: does not fit into memory; give a smaller part of it") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({first_line(error)})") from error
    raise UserError(f"{path}: unknown suffix {suffix!r}; data files are {', '.join(SUFFIXES)}")


def _read_jsonl(path: Path, *, limit: int | None) -> list[Row]:
    rows: list[Row] = []
    with path.open("rb") as file:  # as bytes, so that a message can name the line of a wrong encoding
        for number, line in _lines(file, path):
            if limit is not None and len(rows) >= limit:
                break
            source = f"{path}:{number}"
            row = _parse_json(line, source)
            if row is _BLANK:
                continue
            rows.append((_object(row, source), source))
    return rows


def _read_json(path: Path, *, limit: int | None) -> list[Row]:
    if path.stat().st_size > _LARGEST_JSON:
        raise UserError(f"{path}: is larger than {_LARGEST_JSON:,} bytes; write it as .jsonl, which is read by lines")
    memory = _JSON_MEMORY + _JSON_RATIO * path.stat().st_size
    try:
        with limited(memory=memory):
            content = _parse_json(_json_bytes(path), str(path))
    except MemoryError:
        content = None
    if content is None:
        raise UserError(f"{path}: needs more than {memory:,} bytes; write it as .jsonl, which is read by lines")
    if content is _BLANK:
        return []
    if isinstance(content, dict) and isinstance(content.get("data"), list):
        content = content["data"]
    if not isinstance(content, list):
        raise UserError(f"{path}: holds {_kind(content)}; expected a list of objects, or an object with a `data` list")
    rows = []
    for number, row in enumerate(content[:limit], start=1):
        source = f"{path}: item {number}"
        rows.append((_object(row, source), source))
    return rows


def _json_bytes(path: Path) -> bytes:
    """The file's bytes up to the first chunk with a NUL, which JSON never has; a sparse file has gigabytes."""
    pieces = []
    with path.open("rb") as file:
        while piece := file.read(2**20):
            pieces.append(piece)
            if b"\0" in piece:
                break
    return b"".join(pieces)


def _read_parquet(path: Path, *, limit: int | None) -> list[Row]:
    import pyarrow.parquet

    memory = _PARQUET_MEMORY + _PARQUET_RATIO * path.stat().st_size
    reason = f"its rows need more than {memory:,} bytes; write it as .jsonl, or give a smaller part of it"
    try:
        with limited(memory=memory), pyarrow.parquet.ParquetFile(path, buffer_size=2**20) as file:
            size = _PARQUET_ROWS if limit is None else min(max(limit, 1), _PARQUET_ROWS)
            batches = file.iter_batches(batch_size=size, use_threads=False)
            rows = (row for batch in batches for row in batch.to_pylist())
            return _number_rows(islice(rows, limit), str(path))
    except MemoryError:  # raised below, outside the handler, so that the rows read so far are freed
        pass
    except Exception as error:  # a broken file raises anything from OSError to UnicodeDecodeError
        reason = f"not a readable parquet file ({first_line(error)})"
    raise UserError(f"{path}: {reason}")


def _number_rows(rows: Iterable[dict[str, Any]], name: str) -> list[Row]:
    return [(dict(row), f"{name}: row {number}") for number, row in enumerate(rows, start=1)]


_BLANK = object()


def _parse_json(raw: bytes, source: str) -> Any:
    """Return the JSON value in `raw`, or `_BLANK` if there is only white space."""
    text = _decode(raw, source).removeprefix("\ufeff")
    if not text.strip():
        return _BLANK
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        # The source of a .jsonl line already has its number; for a .json file the line is added here.
        where = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}, column {error.colno}"
        raise UserError(f"{source}: broken JSON: {error.msg} at {where}") from error
    except (RecursionError, ValueError) as error:
        raise UserError(f"{source}: broken JSON: {first_line(error)}") from error


def _decode(raw: bytes, source: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{source}: not UTF-8 (byte {raw[error.start]:#04x} at byte {error.start + 1})") from error


def _object(value: Any, source: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{source}: holds {_kind(value)}; expected a JSON object with the sample's fields")
    return value


def _kind(value: Any) -> str:
    names = {list: "a list", dict: "an object", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
