"""Writes and reads the index of the native adapters in a folder: one SQLite file, which other programs can read too.

The file may come from an untrusted source. So it is read only if it has exactly the schema that this module writes. A
limit on its size also limits the time and memory of reading. Every row is checked. SQLite's own check of a file is not
used, because it overflows the stack on deep trees.
"""

import os
import shlex
import sqlite3
import typing
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import astuple, fields
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from pydantic import AfterValidator, Field, ValidationError
from pydantic.dataclasses import dataclass

from megatron_tiedlora.base.files import Count, Real, Size, first_problem, new_file
from megatron_tiedlora.base.messages import UserError, as_given
from megatron_tiedlora.config.adapter_settings import FILTERS

INDEX_FILE = "adapters.sqlite"
FORMAT = 2  # version of the file's format, stored as SQLite's `user_version`
_LARGEST = 2**26  # bytes of the file: about 80,000 adapters with scores
_LONGEST_ROW = 2**18  # maximum bytes of a row, also in the schema; every valid entry is smaller
_SCHEMA_STEPS = 10_000  # steps of SQLite's virtual machine to read the schema; ours needs a few hundred


def _inside(path: str) -> str:
    if not path.isprintable():
        raise ValueError("it has characters that cannot be shown; rename the folder")
    if path.startswith("/") or ".." in path.split("/") or path != str(PurePosixPath(path)):
        raise ValueError("it is not a path in the indexed folder")
    return path


_Name = Annotated[str, Field(strict=True, max_length=255)]
_Long = Annotated[str, Field(strict=True, max_length=4000)]
_Path = Annotated[_Long, AfterValidator(_inside)]
_Scores = Annotated[str, Field(strict=True, max_length=100_000)]
_Hash = Annotated[str, Field(strict=True, min_length=64, max_length=64)]


@dataclass(frozen=True, slots=True)
class Entry:
    """A row of the index, which describes one adapter. A value of a wrong type raises ValidationError.

    Attributes:
        path: the adapter's folder, relative to the indexed folder.
        name: the name of the adapter's run, or of its folder.
        base_hash, weights_hash: hashes of the base's config and weights; `weights_hash` is None if it is unknown.
        targets: names of the targets, separated by commas.
        parameters: number of trained parameters.
        task: task of the adapter's run; None if the adapter is not in a run.
        scores: scores of its run after training, as JSON.
        sha256: hash of its tensor file, as recorded in its config.
        size: size of its files in bytes.
        date: when its config was written, in ISO 8601 and UTC.
    """

    path: _Path
    name: _Name
    base_model: _Long
    base_hash: _Name
    weights_hash: _Name | None
    method: _Name
    rank: Size
    alpha: Real
    targets: _Name
    layers: Size
    parameters: Count
    task: _Name | None
    scores: _Scores | None
    run: _Path | None
    sha256: _Hash
    size: Count
    date: _Name


_COLUMNS = tuple(field.name for field in fields(Entry))


def _column(name: str, kind: Any) -> str:
    plain, *optional = typing.get_args(kind) or (kind,)
    sql_type = {str: "TEXT", int: "INTEGER", float: "REAL"}[plain]
    return f"{name} {sql_type}{'' if optional else ' NOT NULL'}{' PRIMARY KEY' if name == 'path' else ''}"


# The statements that create the file. It has an index for each column that other programs may search.
_SCHEMA = (
    f"CREATE TABLE adapters ({', '.join(_column(*item) for item in typing.get_type_hints(Entry).items())})",
    *(f"CREATE INDEX adapters_{name} ON adapters ({name})" for name in FILTERS),
)


def write_index(root: Path, entries: Sequence[Entry]) -> None:
    """Write the index of `root` atomically, in place of an earlier one. Raise UserError if it cannot be written."""
    file = root / INDEX_FILE
    try:
        with new_file(file) as temporary, closing(sqlite3.connect(temporary)) as database:
            database.executescript(";".join((*_SCHEMA, f"PRAGMA user_version = {FORMAT}")))
            places = ", ".join("?" * len(_COLUMNS))
            database.executemany(f"INSERT INTO adapters VALUES ({places})", map(astuple, entries))
            database.commit()
            if temporary.stat().st_size > _LARGEST:
                raise UserError(f"{file}: {len(entries):,} adapters are too many for one index; index subfolders")
    except sqlite3.Error as error:
        raise UserError(f"{file}: cannot be written ({error}); check permissions and free space") from None


def find_entries(root: Path, wanted: Mapping[str, Any]) -> list[Entry]:
    """Return the rows of the index of `root` in which every column of `wanted` matches, ordered by path.

    A text in `wanted` is a pattern with `*` and `?`. The targets must be exactly the same.

    Raises:
        UserError: there is no index, or it does not have the format that `write_index` writes.
    """
    found = []
    for entry in _entries(root):
        values = ((getattr(entry, name), value) for name, value in wanted.items())
        if all(fnmatchcase(own, value) if isinstance(own, str) else own == value for own, value in values):
            found.append(entry)
    return sorted(found, key=lambda entry: entry.path)


def find_entry(root: Path, name: str) -> Entry:
    """Return the row of the adapter with this path or name. Raise UserError unless there is exactly one such row."""
    entries = list(_entries(root))
    found = [entry for entry in entries if entry.path == name] or [entry for entry in entries if entry.name == name]
    if len(found) != 1:
        what = f"{len(found)} adapters; give the path of one" if found else "no adapter; list them with `find`"
        raise UserError(f"{root / INDEX_FILE}: {as_given(name)} names {what}")
    return found[0]


def entry_folder(root: Path, entry: Entry) -> Path:
    """Return the folder of an adapter. Raise UserError if a link leads out of the indexed folder `root`."""
    folder = root / entry.path
    if not Path(os.path.realpath(folder)).is_relative_to(os.path.realpath(root)):
        raise UserError(f"{folder}: a link leads out of {root}; replace it with a copy of the adapter")
    return folder


def _entries(root: Path) -> Iterator[Entry]:
    """Yield the rows of the index of `root`. Raise UserError as `find_entries` does."""
    file = root / INDEX_FILE
    try:
        if file.is_symlink() or not file.is_file():
            raise ValueError("is not a plain file" if os.path.lexists(file) else "no such file")
        if (size := file.stat().st_size) > _LARGEST:
            raise ValueError(f"is larger than {_LARGEST:,} bytes")
        # With immutable=1 SQLite opens no journal and no log next to the file.
        address = f"{file.absolute().as_uri()}?mode=ro&immutable=1"
        with closing(sqlite3.connect(address, uri=True)) as database:
            yield from _checked_rows(database, most_text=size)
    except (OSError, sqlite3.Error, ValueError) as error:  # SQLite's messages may be a UnicodeDecodeError
        why = first_problem(error) if isinstance(error, ValidationError) else error
        raise UserError(f"{file}: {why}; write it with `tiedlora index {shlex.quote(str(root))}`") from None


def _checked_rows(database: sqlite3.Connection, *, most_text: int) -> Iterator[Entry]:
    """Yield the rows of a database after checking that its schema is the schema of an index.

    A malicious file can refer to one page many times, so it can have any number of rows. Every row has some text, so an
    index cannot have more text than the file has bytes (`most_text`). Raise ValueError or SQLite's errors.
    """
    database.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _LONGEST_ROW)
    database.set_progress_handler(lambda: True, _SCHEMA_STEPS)
    (version,) = database.execute("PRAGMA user_version").fetchone()
    if version != FORMAT:
        raise ValueError(f"has format {version}, not {FORMAT}")
    schema = [sql for (sql,) in database.execute("SELECT sql FROM sqlite_master") if sql is not None]
    if schema != list(_SCHEMA):
        raise ValueError("is a different database, not an index of adapters")
    database.set_progress_handler(None, 0)
    for row in database.execute(f"SELECT {', '.join(_COLUMNS)} FROM adapters NOT INDEXED"):
        most_text -= sum(len(value) for value in row if isinstance(value, str))
        if most_text < 0:
            raise ValueError("has more text than bytes")
        yield Entry(*row)
