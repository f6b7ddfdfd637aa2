"""Writes and reads the index of the native adapters in a folder: one SQLite file, which other programs can read too.

The index also has aliases, which name adapters, and tags. Users give both, so they are kept if the index is written
anew. Only one process at a time changes the index (`changed_index`), so that no change is lost.

The file may come from an untrusted source. So it is read only if it has exactly the schema that this module writes. A
limit on its size also limits the time and memory of reading. Every row is checked. SQLite's own check of a file is not
used, because it overflows the stack on deep trees.
"""

import json
import os
import shlex
import sqlite3
import typing
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, astuple, field, fields
from dataclasses import dataclass as plain_dataclass
from fnmatch import fnmatchcase
from functools import cached_property, partial
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from megatron_tiedlora.base.files import Count, Guard, Real, Size, first_problem, new_file
from megatron_tiedlora.base.messages import UserError, as_given
from megatron_tiedlora.base.output_folder import take_output
from megatron_tiedlora.base.ownership import retried
from megatron_tiedlora.config.adapter_settings import FILTERS, LABEL

INDEX_FILE = "adapters.sqlite"
FORMAT = 3  # version of the file's format, stored as SQLite's `user_version`
KEEP = "keep"  # a tag: `gc` keeps the adapter
_LARGEST = 2**26  # bytes of the file: about 80,000 adapters with scores
_LONGEST_ROW = 2**19  # maximum bytes of a row, also in the schema; every valid entry is smaller
_LOCK_SECONDS = 30.0  # longest wait for another process that changes the index
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
_HASHES = TypeAdapter(dict[str, str])
_Hashes = Annotated[_Scores, AfterValidator(lambda text: json.dumps(_HASHES.validate_json(text), ensure_ascii=False))]
_Hash = Annotated[str, Field(strict=True, min_length=64, max_length=64)]
_Label = Annotated[str, Field(strict=True, pattern=LABEL)]


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
        init_from: the adapter with whose values its run started, as given to --init_from.
        init_sha256: hash of that adapter's tensor file.
        checkpoints: hashes of the tensor files in the checkpoints of its run, separated by commas.
        data: the hash of each source of its run's training and validation data by name, as JSON.
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
    init_from: _Long | None
    init_sha256: _Hash | None
    checkpoints: _Scores | None
    data: _Hashes | None
    size: Count
    date: _Name

    @property
    def held(self) -> tuple[str, ...]:
        """Return the hashes of the tensor files of the adapter and of its run's checkpoints."""
        return (self.sha256, *(self.checkpoints.split(",") if self.checkpoints else ()))

    @property
    def sources(self) -> list[str]:
        """Return the names and the hashes of its data."""
        return [text for pair in _HASHES.validate_json(self.data or "{}").items() for text in pair]


@dataclass(frozen=True, slots=True)
class Alias:
    """A row of the index: another name of the adapter with this path."""

    name: _Label
    path: _Path


@dataclass(frozen=True, slots=True)
class Tag:
    """A row of the index: a tag of the adapter with this path."""

    path: _Path
    tag: _Label


_TABLES: Mapping[str, type] = {"adapters": Entry, "aliases": Alias, "tags": Tag}
_COLUMNS = {table: [field.name for field in fields(kind)] for table, kind in _TABLES.items()}
_SEARCHED = [name for name in FILTERS if name in _COLUMNS["adapters"]]


def _table(name: str, kind: type, key: str) -> str:
    types = {str: "TEXT", int: "INTEGER", float: "REAL"}
    hints = ((column, typing.get_args(of) or (of,)) for column, of in typing.get_type_hints(kind).items())
    columns = (f"{column} {types[plain]}{'' if optional else ' NOT NULL'}" for column, (plain, *optional) in hints)
    return f"CREATE TABLE {name} ({', '.join(columns)}, PRIMARY KEY ({key}))"


# The statements that create the file. It has an index for each column that other programs may search.
_SCHEMA = (
    *(_table(*item) for item in zip(_TABLES, _TABLES.values(), ("path", "name", "path, tag"), strict=True)),
    *(f"CREATE INDEX adapters_{name} ON adapters ({name})" for name in _SEARCHED),
)


@plain_dataclass
class Index:
    """The content of an index: its entries, ordered by path, the path of each alias, and pairs of path and tag."""

    entries: Sequence[Entry]
    aliases: dict[str, str] = field(default_factory=dict)
    tags: set[tuple[str, str]] = field(default_factory=set)

    def matching(self, wanted: Mapping[str, Any]) -> list[tuple[Entry, dict[str, list[str]]]]:
        """Return the entries in which every column of `wanted` matches, each with its aliases (`alias`) and `tag`s.

        A text in `wanted` is a pattern with `*` and `?`. The targets must be exactly the same, and one name or hash of
        the data must match."""
        labels = defaultdict[str, dict[str, list[str]]](lambda: {"alias": [], "tag": []})
        for label, pairs in ("alias", ((path, name) for name, path in self.aliases.items())), ("tag", self.tags):
            for path, text in sorted(pairs):
                labels[path][label].append(text)
        rows = ((entry, asdict(entry) | labels[entry.path] | {"data": entry.sources}) for entry in self.entries)
        found = (entry for entry, row in rows if all(_matches(row[name], value) for name, value in wanted.items()))
        return [(entry, labels[entry.path]) for entry in found]

    def named(self, name: str) -> list[Entry]:
        """Return the adapter with this path, or else with this alias, or else all adapters with this name."""
        path = name if any(entry.path == name for entry in self.entries) else self.aliases.get(name)
        return [entry for entry in self.entries if (entry.name == name if path is None else entry.path == path)]

    @cached_property
    def _holders(self) -> Mapping[str, dict[str, Entry]]:
        """The adapters by hash and path: by the hash of their own tensor file, and after them by their checkpoints'."""
        found = defaultdict[str, dict[str, Entry]](dict)
        pairs = [(one.sha256, one) for one in self.entries]
        for sha256, entry in pairs + [(sha256, one) for one in self.entries for sha256 in one.held]:
            found[sha256].setdefault(entry.path, entry)
        return found

    def lineage(self, entry: Entry) -> Iterator[tuple[Entry, list[Entry]]]:
        """Yield the adapter whose run recorded from what `entry` or a copy of it was started, with the adapters that
        have that tensor file, also in checkpoints. Then yield the same for that file, and so on."""
        sha256, seen = entry.sha256, set[str]()
        while sha256 not in seen:
            seen.add(sha256)
            runs = [one for one in self._holders[sha256].values() if one.init_from is not None]
            sha256 = (runs[0].init_sha256 or "") if runs else sha256
            yield from [(run, list(self._holders[sha256].values())) for run in runs[:1]]

    def needed(self) -> set[str]:
        """Return the hashes of the tensor files of all adapters with an alias or the tag `keep`, and of what they were
        started from: of every adapter with its name, if their runs are of an earlier version, which recorded no hash.
        """
        roots = {*self.aliases.values(), *(path for path, tag in self.tags if tag == KEEP)}
        needed, left = set[str](), {entry.sha256 for entry in self.entries if entry.path in roots}
        while left:
            needed.add(sha256 := left.pop())
            for one in self._holders[sha256].values():
                names = PurePosixPath(one.init_from or "").parts if one.init_sha256 is None else ()
                left |= {other.sha256 for other in self.entries if other.name in names} - needed
                left |= {one.init_sha256} - needed if one.init_sha256 is not None else set()
        return needed

    def problems(self, file: Path) -> list[str]:
        """Return a sentence for each alias and each tag `keep` of an adapter that is not in this index, in `file`."""
        labels = [(f"the alias {name}", path) for name, path in sorted(self.aliases.items())]
        labels += [(f"the tag {KEEP}", path) for path, tag in sorted(self.tags) if tag == KEEP]
        there, fix = {entry.path for entry in self.entries}, "restore it, or move or remove the alias or tag"
        lost = (f"{what} is of {path}, which is not indexed" for what, path in labels if path not in there)
        return [f"{file}: {what}; {fix}" for what in lost]


def _matches(own: Any, wanted: Any) -> bool:
    values = own if isinstance(own, list) else [own]
    return any(fnmatchcase(one, wanted) if isinstance(one, str) else one == wanted for one in values)


@contextmanager
def changed_index(root: Path, read: Callable[[Path], Index] | None = None) -> Iterator[Index]:
    """Yield the index of `root`, as `read` [read_index] returns it. Write it with the changes of the block atomically,
    if this raises nothing. Only one process at a time runs the block. Raise UserError if another process runs it for a
    long time, or if the index cannot be written."""
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; give a folder with adapters")
    take = partial(take_output, root / INDEX_FILE, reject=lambda _: None, hint="wait until it ends")
    output = retried(take, seconds=_LOCK_SECONDS, pause=0.05)
    try:
        content = (read or read_index)(root)
        yield content
        _write(root / INDEX_FILE, content, output.guard)
    finally:
        output.release()


def _write(file: Path, content: Index, guard: Guard) -> None:
    rows: dict[str, Iterable[tuple[Any, ...]]] = {"aliases": content.aliases.items(), "tags": content.tags}
    rows["adapters"] = map(astuple, content.entries)
    try:
        with new_file(file, guard=guard) as temporary, closing(sqlite3.connect(temporary)) as database:
            database.executescript(";".join((*_SCHEMA, f"PRAGMA user_version = {FORMAT}")))
            for table, names in _COLUMNS.items():
                places = ", ".join("?" * len(names))
                database.executemany(f"INSERT INTO {table} VALUES ({places})", sorted(rows[table]))
            database.commit()
            if temporary.stat().st_size > _LARGEST:
                number = f"{len(content.entries):,}"
                raise UserError(f"{file}: {number} adapters are too many for one index; index subfolders")
    except sqlite3.Error as error:
        raise UserError(f"{file}: cannot be written ({error}); check permissions and free space") from None


def find_entry(root: Path, name: str, content: Index | None = None) -> Entry:
    """Return the row of the adapter with this path, alias or name in `content`, the index of `root` [which is read].
    Raise UserError unless there is exactly one."""
    content = read_index(root) if content is None else content
    found = content.named(name)
    if len(found) != 1:
        what = f"{len(found)} adapters; give the path of one" if found else "no adapter; list them with `find`"
        if not found and name in content.aliases:
            what = f"{content.aliases[name]}, which is not in the index; move the alias, or index the folder again"
        raise UserError(f"{root / INDEX_FILE}: {as_given(name)} names {what}")
    return found[0]


def entry_folder(root: Path, entry: Entry) -> Path:
    """Return the folder of an adapter. Raise UserError if a link leads out of the indexed folder `root`."""
    folder = root / entry.path
    if not Path(os.path.realpath(folder)).is_relative_to(os.path.realpath(root)):
        raise UserError(f"{folder}: a link leads out of {root}; replace it with a copy of the adapter")
    return folder


class EarlierFormat(UserError):
    """The error that is raised for an index in an earlier format, which has no aliases and tags."""


def read_index(root: Path) -> Index:
    """Return the index of `root`. Raise UserError unless there is one in the format that `changed_index` writes."""
    file = root / INDEX_FILE
    try:
        if file.is_symlink() or not file.is_file():
            raise ValueError("is not a plain file" if os.path.lexists(file) else "no such file")
        if (size := file.stat().st_size) > _LARGEST:
            raise ValueError(f"is larger than {_LARGEST:,} bytes")
        # With immutable=1 SQLite opens no journal and no log next to the file.
        address = f"{file.absolute().as_uri()}?mode=ro&immutable=1"
        with closing(sqlite3.connect(address, uri=True)) as database:
            rows = list(_checked_rows(database, most_text=size))
    except (OSError, sqlite3.Error, ValueError) as error:  # SQLite's messages may be a UnicodeDecodeError
        why = first_problem(error) if isinstance(error, ValidationError) else error
        kind = EarlierFormat if isinstance(error, EarlierFormat) else UserError
        raise kind(f"{file}: {why}; write it with `tiedlora index {shlex.quote(str(root))}`") from None
    entries = sorted((row for row in rows if isinstance(row, Entry)), key=lambda entry: entry.path)
    aliases = {row.name: row.path for row in rows if isinstance(row, Alias)}
    return Index(entries, aliases, {(row.path, row.tag) for row in rows if isinstance(row, Tag)})


def _checked_rows(database: sqlite3.Connection, *, most_text: int) -> Iterator[Entry | Alias | Tag]:
    """Yield the rows of a database after checking that its schema is the schema of an index.

    A malicious file can refer to one page many times, so it can have any number of rows. Every row has some text, so an
    index cannot have more text than the file has bytes (`most_text`). Raise ValueError or SQLite's errors.
    """
    database.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _LONGEST_ROW)
    database.set_progress_handler(lambda: True, _SCHEMA_STEPS)
    (version,) = database.execute("PRAGMA user_version").fetchone()
    if version != FORMAT:
        raise (EarlierFormat if 0 < version < FORMAT else ValueError)(f"has format {version}, not {FORMAT}")
    schema = [sql for (sql,) in database.execute("SELECT sql FROM sqlite_master") if sql is not None]
    if schema != list(_SCHEMA):
        raise ValueError("is a different database, not an index of adapters")
    database.set_progress_handler(None, 0)
    for table, kind in _TABLES.items():
        for row in database.execute(f"SELECT {', '.join(_COLUMNS[table])} FROM {table} NOT INDEXED"):
            most_text -= sum(len(value) for value in row if isinstance(value, str))
            if most_text < 0:
                raise ValueError("has more text than bytes")
            yield kind(*row)
