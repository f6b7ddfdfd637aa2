"""Reads rows from files, folders and hub data sets. Each row has a source, such as file and line, for messages.

This module reads the formats .jsonl, .json and .csv, also compressed as .gz, and lines of plain text. It finds the data
that a path, pattern or hub id names, and checks the fields of rows. The module `tables` reads binary tables, and the
modules in `tasks` interpret the fields.
"""

import csv
import gzip
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from glob import has_magic, iglob
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, cast

from megatron_tiedlora.base.child_process import limited
from megatron_tiedlora.base.messages import UserError, first_line, shown, user_path
from megatron_tiedlora.data import tables
from megatron_tiedlora.data.tables import HubData, Once, Row

SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".arrow")
_COMPRESSED = ".gz"
_EXPECTED = f"a {', '.join(SUFFIXES)} file or a hub id"

# No model reads a sample as long as _LONGEST_LINE, and the JSON of such a line needs at most some hundred MB as
# objects. A .json file is read as a whole and needs several times its size.
_LONGEST_LINE, _LARGEST_JSON = 2**24, 2**28  # bytes
_JSON_MEMORY, _JSON_RATIO = 2**28, 8  # in memory, text needs 1 to 4 times its bytes, and many small objects need more
_GZIP_MEMORY, _GZIP_RATIO = 2**28, 100  # compression makes text 3 to 20 times smaller


def is_rows_file(name: str) -> bool:
    """Return whether the name has the suffix of a data file, such as .jsonl."""
    return name.lower().removesuffix(_COMPRESSED).endswith(SUFFIXES)


def looks_like_path(path_or_hub: str) -> bool:
    """Return whether a string can only name local files: it has a data suffix, is a pattern, or begins like a path."""
    return is_rows_file(path_or_hub) or has_magic(path_or_hub) or path_or_hub.startswith(("/", ".", "~"))


def may_be_hub_id(name: str) -> bool:
    """Return whether `name` is valid by the hub's rules for ids, and does not look like a path."""
    if looks_like_path(name):
        return False
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


@dataclass(frozen=True)
class LocalData:
    """Local data: a file, all files of a folder or pattern, or a folder that `save_to_disk` wrote.

    A .json file contains a list of objects, or an object whose field `data` is such a list (nested SQuAD). Each of
    these objects is a row. The task unfolds nested rows. In a folder with several splits, only `split` is read."""

    name: str
    split: str

    def rows(self) -> Iterator[Row]:
        """Yield all rows. Only .json files are read into memory completely.

        Raises UserError if a file is missing, unreadable, broken (with file and line) or empty.
        """
        path = user_path(self.name)
        if tables.is_saved_folder(path):
            rows = tables.saved_folder_rows(path, split=self.split)
        else:
            rows = (row for file in named_files(path, self.name) for row in _file_rows(file))
        first = next(rows, None)
        if first is None:
            raise UserError(f"{self.name}: the data has no rows; give at least one row")
        yield first
        yield from rows

    def sha256(self, once: Once) -> str:
        """Return a hash of the files. Raises UserError if a file is missing or unreadable."""
        path = user_path(self.name)
        if tables.is_saved_folder(path):  # only the library knows which files have the split's rows
            return self.split + tables.names_and_contents(sorted(filter(Path.is_file, path.rglob("*"))), once)
        return tables.names_and_contents(checked_files(path, self.name), once)


def row_data(name: str, *, split: str) -> LocalData | HubData:
    """Return the local data or the hub data set that `name` refers to. A hub data set is written as
    `id[:config[:split]]`. If the name has no split, `split` is used."""
    if user_path(name).exists() or looks_like_path(name):
        return LocalData(name, split)
    hub_id, *more = name.split(":", 2)
    config_name, own_split = [*(part or None for part in more), None, None][:2]
    return HubData(hub_id, own_split or split, config_name)


def read_rows(path_or_hub: str | Path, *, split: str = "train", limit: int | None = None) -> list[Row]:
    """Return all rows that a path or hub id names, or the first `limit` rows. Raises UserError if reading fails."""
    try:
        return list(islice(row_data(str(path_or_hub), split=split).rows(), limit))
    except MemoryError:
        raise UserError(f"{path_or_hub}: the data does not fit into memory; give fewer rows") from None


def about_num_rows(path_or_hub: str | Path) -> int | None:
    """Return the number of lines of local .jsonl and .csv files, which a progress bar uses as the number of rows.
    Return None for other data."""
    path = user_path(path_or_hub)
    try:
        files = named_files(path, str(path_or_hub))
        if not all(file.is_file() and file.suffix.lower() in (".jsonl", ".csv") for file in files):
            return None
        lines = 0
        for one in files:
            with one.open("rb", buffering=0) as file:
                lines += sum(piece.count(b"\n") for piece in iter(partial(file.read, 2**20), b""))
        return lines
    except (OSError, UserError):  # the error is reported later, when the rows are read
        return None


def named_files(path: Path, name: str) -> list[Path]:
    """Return the files that a path or pattern names, sorted by name. Raises UserError if a folder has no file with a
    data suffix, or if no file matches the pattern."""
    if path.is_dir():
        found = sorted(file for file in path.iterdir() if is_rows_file(file.name) and file.is_file())
        if not found:
            raise UserError(f"{name}: the folder has no {', '.join(SUFFIXES)} file; give a folder with data files")
        return found
    if path.exists() or not has_magic(name):
        return [path]
    found = sorted(Path(file) for file in iglob(str(path), recursive=True) if os.path.isfile(file))
    if not found:
        raise UserError(f"{name}: no file matches this pattern; check the path")
    return found


def checked_files(path: Path, name: str) -> list[Path]:
    """Return `named_files(path, name)`. Raises UserError if one of the files is missing or is not a regular file."""
    files = named_files(path, name)
    for file in files:
        _check_file(file, _EXPECTED)
    return files


def read_lines(name: str | Path) -> list[str]:
    r"""Return the lines of a UTF-8 text file without their line endings (\n or \r\n).

    Raises UserError if the file is missing, unreadable or empty, or if a line is not UTF-8.
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
        raise UserError(f"{path}: cannot be read ({first_line(error)}); check the file") from error
    if not any(line.strip() for line in lines):
        raise UserError(f"{path}: the file has no text; give a file with at least one line")
    return lines


def _lines(file: BinaryIO, path: Path) -> Iterator[tuple[int, bytes]]:
    r"""Yield each line's number and bytes. A line ends only at \n; `splitlines` would also split inside sentences.

    Raises UserError if a line is too long, or if `_pieces` raises it.
    """
    for number, line in enumerate(_pieces(partial(file.readline, _LONGEST_LINE + 1), path), start=1):
        if len(line) > _LONGEST_LINE:
            raise UserError(f"{path}:{number}: the line is longer than {_LONGEST_LINE:,} bytes; remove or shorten it")
        yield number, line


def _pieces(read: Callable[[], bytes], path: Path) -> Iterator[bytes]:
    """Yield the chunks that `read` returns. Raises UserError if an unpacked .gz file is too large."""
    total, packed = 0, path.suffix.lower() == _COMPRESSED
    most = _GZIP_MEMORY + _GZIP_RATIO * path.stat().st_size
    for piece in iter(read, b""):
        total += len(piece)
        if packed and total > most:
            raise UserError(f"{path}: the file unpacks to more than {most:,} bytes; give a smaller file")
        yield piece


def _check_file(path: Path, expected: str) -> None:
    if not path.exists():
        raise UserError(f"{path}: no such file; check the path")
    if not path.is_file():  # reading a pipe may never end, and files are read more than once
        raise UserError(f"{path}: is {'a folder' if path.is_dir() else 'not a regular file'}; give {expected}")


def _file_rows(path: Path) -> Iterator[Row]:
    _check_file(path, _EXPECTED)
    packed = path.suffix.lower() == _COMPRESSED
    suffix = Path(path.stem).suffix.lower() if packed else path.suffix.lower()
    readers = {".jsonl": _jsonl_rows, ".json": _json_rows, ".csv": _csv_rows}
    if suffix not in (readers if packed else SUFFIXES):
        names = f"{', '.join(SUFFIXES)}, or {', '.join(readers)} followed by {_COMPRESSED}"
        text = '; write each text as a row {"text": ...} of a .jsonl file' if suffix == ".txt" else ""
        raise UserError(f"{path}: unknown suffix {suffix + _COMPRESSED * packed!r}; use {names}{text}")
    try:
        yield from readers.get(suffix, tables.table_rows)(path)
    except MemoryError:
        raise UserError(f"{path}: the file does not fit into memory; give a smaller file") from None
    except (zlib.error, EOFError, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: the .gz file is not readable ({first_line(error)}); compress it again") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({first_line(error)}); check the file") from error


def _open(path: Path) -> BinaryIO:
    packed = path.suffix.lower() == _COMPRESSED
    return cast(BinaryIO, gzip.GzipFile(path, "rb")) if packed else path.open("rb")


def _jsonl_rows(path: Path) -> Iterator[Row]:
    with _open(path) as file:  # read as bytes, so that a message can name the line with a wrong encoding
        for number, line in _lines(file, path):
            source = f"{path}:{number}"
            row = _parse_json(line.rstrip(b"\r\n"), source)  # stripped, so that an error is at a column of this line
            if row is not _BLANK:
                yield _object(row, source), source


def _csv_rows(path: Path) -> Iterator[Row]:
    """Yield the rows of a .csv table. The first line has the names of the fields. Every value is text."""
    csv.field_size_limit(_LONGEST_LINE)
    with _open(path) as file:
        lines = (_decode(line, f"{path}:{number}") for number, line in _lines(file, path))
        reader = csv.reader((line.removeprefix("\ufeff") for line in lines), strict=True)
        header: list[str] = []
        first = 1  # the line on which a row begins
        try:
            for values in reader:
                source = f"{path}:{first}"
                if not header:
                    header = values
                    if len(set(header)) < len(header):
                        raise UserError(f"{path}:1: the first line names a field twice; rename one of the two")
                elif values and len(values) != len(header):
                    found = f"{source}: has {len(values)} fields, but the first line names {len(header)}"
                    raise UserError(f"{found}; put quotes around values with commas, or remove the line")
                elif values:  # a blank line is no row
                    yield dict(zip(header, values, strict=True)), source
                first = reader.line_num + 1
        except csv.Error as error:
            raise UserError(f"{path}:{reader.line_num}: broken CSV: {error}; correct or remove the line") from error


def _json_rows(path: Path) -> Iterator[Row]:
    if path.stat().st_size > _LARGEST_JSON:
        raise UserError(f"{path}: the file is larger than {_LARGEST_JSON:,} bytes; write it as .jsonl instead")
    memory = _JSON_MEMORY + _JSON_RATIO * path.stat().st_size
    try:
        with limited(memory=memory):
            content = _parse_json(_json_bytes(path), str(path))
    except MemoryError:
        content = None
    if content is None:
        raise UserError(f"{path}: the file needs more than {memory:,} bytes of memory; write it as .jsonl instead")
    if isinstance(content, dict) and isinstance(content.get("data"), list):
        content = content["data"]
    if not isinstance(content, list):
        raise UserError(f"{path}: contains {_kind(content)}; give a list of objects, or an object with a `data` list")
    for number, row in enumerate(content, start=1):
        source = f"{path}: item {number}"
        yield _object(row, source), source


def _json_bytes(path: Path) -> bytes:
    """Return a file's bytes. Stop after a chunk with a NUL byte: JSON has none, a sparse file may have gigabytes."""
    pieces = []
    with _open(path) as file:
        for piece in _pieces(partial(file.read, 2**20), path):
            pieces.append(piece)
            if b"\0" in piece:
                break
    return b"".join(pieces)


_BLANK: list[Any] = []  # the content of a .json file without rows


def _parse_json(raw: bytes, source: str) -> Any:
    """Return the JSON value in `raw`, or `_BLANK` if `raw` has only white space."""
    text = _decode(raw, source).removeprefix("\ufeff")
    if not text.strip():
        return _BLANK
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        # The source of a .jsonl line already has its number; for a .json file the line is added here.
        where = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}, column {error.colno}"
        lines = error.lineno > 1 and error.msg == "Extra data"
        fix = "; if each line is an object, name the file .jsonl" if lines else "; correct it"
        raise UserError(f"{source}: broken JSON: {error.msg} at {where}{fix}") from error
    except (RecursionError, ValueError) as error:
        raise UserError(f"{source}: broken JSON: {first_line(error)}; correct or remove it") from error


def _decode(raw: bytes, source: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        found = f"{source}: not UTF-8 (byte {raw[error.start]:#04x} at byte {error.start + 1})"
        raise UserError(f"{found}; save the file as UTF-8") from error


def _object(value: Any, source: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{source}: the row is {_kind(value)}; give a JSON object with the fields of a sample")
    return value


def _kind(value: Any) -> str:
    names = {list: "a list", dict: "an object", str: "a string", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")


# Fields of rows -------------------------------------------------------------------------------------------------------
#
# All tasks use these functions to check and change fields.


# The lookbehind lets a match start only where white space starts; a search from every blank would be quadratic.
_LINE_BREAK = re.compile(r"(?<!\s)\s*[\r\n]\s*")


def required_text(row: Mapping[str, Any], name: str, source: str) -> str:
    """Return the text of the field `name`. Raises UserError, with source and field, if it is missing or empty."""
    value = row.get(name)
    if value is None:
        found = f"{source}: field {name!r} is missing; the row has {describe_fields(row)}"
        raise UserError(f"{found}; add the field, or remove the row")
    return checked_text(value, name, source)


def checked_text(value: Any, name: str, source: str, *, allow_empty: bool = False) -> str:
    """Return `value` if it is text that can be tokenised. Otherwise raise UserError with source and field."""
    if not isinstance(value, str):
        fix = "put it in quotes" if isinstance(value, int | float) else "give a text, or remove the row"
        raise UserError(f"{source}: field {name!r} is {shown(value)} ({type(value).__name__}), not text; {fix}")
    if not allow_empty and not value.strip():
        raise UserError(f"{source}: field {name!r} is empty; give a text, or remove the row")
    if not is_text(value):
        raise UserError(f"{source}: field {name!r} has an invalid character (an unpaired surrogate); remove it")
    return value


def is_text(value: str) -> bool:
    """Return whether a string can be encoded as UTF-8. Strings from JSON or the command line may be invalid."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def required_texts(value: Any, name: str, source: str) -> tuple[str, ...]:
    """Return the texts of the list in field `name`. Raises UserError if the list or one of its texts is empty."""
    if not isinstance(value, list | tuple):
        said = f"{source}: field {name!r} is {shown(value)}, not a list of texts"
        raise UserError(f"{said}; give a list of at least one text")
    if not value:
        raise UserError(f"{source}: field {name!r} is an empty list; add at least one text, or remove the row")
    return tuple(checked_text(text, name, source) for text in value)


def without(row: Mapping[str, Any], *names: str) -> dict[str, Any]:
    """Return the fields of a row except `names`. A prompt may use all fields except the answer."""
    return {name: value for name, value in row.items() if name not in names}


def without_line_breaks(text: str) -> str:
    """Return the text with each line break and the white space around it replaced by one space."""
    return _LINE_BREAK.sub(" ", text.strip())


def describe_fields(row: Mapping[str, Any]) -> str:
    """Return the names of a row's fields as text for messages."""
    return ", ".join(repr(str(name)) for name in row) or "no fields"


def is_empty(value: Any) -> bool:
    """Return whether the value of a field is empty. Rows of a table have all columns, so some values are empty."""
    return value is None or (isinstance(value, str | list | tuple | Mapping) and not value)
