"""The rows of a data flag, or of the task's own source, read one by one and as often as needed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Literal

from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.base.paths import user_path
from megatron_tiedlora.data.readers import about_num_rows, checked_files, hub_data, iter_rows
from megatron_tiedlora.data.reading import Reading
from megatron_tiedlora.data.shapes import OUR_FIELDS, renamed
from megatron_tiedlora.data.sources import Source, local_files, parse_sources
from megatron_tiedlora.data.tables import HubData, Row, files_sha256, is_saved_folder, rows_sha256
from megatron_tiedlora.data.task import Split, Task

Files = Mapping[str, str | Path | None]
"""Split name -> what `sources` reads. A missing key or None means that none was given."""


@dataclass(frozen=True)
class _SourceRows:
    """The rows of one source, and the hash of what they are read from."""

    source: Source
    rows: Callable[[], Iterable[Row]]
    sha256: Callable[[], str]


@dataclass(frozen=True)
class RowStream:
    """Rows of one part of a task's data, in order, flat and under our names.

    Iterating reads the files anew. It raises UserError if one is missing, unreadable, broken (naming file and line) or
    has no rows.
    """

    task: Task
    reading: Reading
    _parts: tuple[_SourceRows, ...]

    @property
    def sources(self) -> tuple[Source, ...]:
        """What the rows are read from, one after another."""
        return tuple(part.source for part in self._parts)

    @property
    def names(self) -> str:
        """The names of `sources`, for messages."""
        return ", ".join(source.name for source in self.sources)

    def __iter__(self) -> Iterator[tuple[int, Row]]:
        """Yield (number of the source, row)."""
        for number, part in enumerate(self._parts):
            with _readable(part.source.name):
                rows = self._flat(part.rows())
                first = next(rows, None)
                if first is None:
                    raise UserError(f"{part.source.name}: holds no samples of task {self.task.name}; give another file")
                yield number, first
                yield from ((number, row) for row in rows)

    def about_num_rows(self) -> int | None:
        """About how many rows there are, for a progress bar; None: not known."""
        if self.task.unfold is not None:
            return None
        counts = [about_num_rows(source.name) for source in self.sources]
        return None if None in counts else sum(count or 0 for count in counts)

    def sha256(self) -> str:
        """Hash of the names and contents of all files that are read, and of generated rows.

        Raises:
            UserError: a file is missing or unreadable.
        """
        found = []
        for part in self._parts:
            with _readable(part.source.name):
                found.append(part.sha256())
        return hashlib.sha256(" ".join(found).encode()).hexdigest()

    def _flat(self, rows: Iterable[Row]) -> Iterator[Row]:
        task, columns = self.task, self.reading.columns
        known = frozenset() if task.fields else OUR_FIELDS
        for row, source in rows:
            ours = row if columns is None else renamed(row, columns, source, known=known)
            yield from ((ours, source),) if task.unfold is None else task.unfold(ours, source)


def source_kind(task: Task, split: Split, files: Files) -> Literal["file", "own", "carve"] | None:
    """Where a split's rows are: in its own file, in the task's source, or among the training rows; None: nowhere."""
    if files.get(split):
        return "file"
    if any(files.get(name) for name in ("train", "validation", "test")):
        # A run on the user's own files never mixes them with the hub's rows.
        return "carve" if split == "validation" and files.get("train") else None
    own = task.hub.splits if task.hub else {}
    if task.generate or split in own:
        return "own"
    return "carve" if split == "validation" and "train" in own else None


def row_stream(task: Task, split: Split, *, files: Files, reading: Reading) -> RowStream:
    """The rows of a split's file or of the task's own source, before some are taken out for validation.

    Raises:
        UserError: the split has neither, or the names of its files are not valid.
    """
    if source_kind(task, split, files) not in ("file", "own"):
        raise UserError(f"--task {task.name} has no {split} data; give --{split}_file")
    given, flag = str(files.get(split) or ""), f"--{split}_file"
    own_id = task.hub is not None and given == task.hub.id and split in task.hub.splits
    with _readable(given):
        pair = task.read_files(given, flag) if given and task.read_files else None
    parts: tuple[_SourceRows, ...]
    if pair is not None:
        parts = (_SourceRows(Source(given), pair, lambda: _names_and_contents(local_files(given).values())),)
    elif given and not own_id:
        parts = tuple(_part_of(source, split) for source in parse_sources(given, flag))
    elif task.generate is not None:
        generated = partial(task.generate, split)
        parts = (_SourceRows(Source(task.name), generated, cache(lambda: rows_sha256(generated()))),)
    else:
        assert task.hub is not None
        hub = HubData(task.hub.id, task.hub.splits[split], task.hub.config, task.hub.parquet_branch)
        parts = (_SourceRows(Source(given or task.name), hub.rows, hub.sha256),)
    return RowStream(task, reading, parts)


def _part_of(source: Source, split: Split) -> _SourceRows:
    with _readable(source.name):
        hub = hub_data(source.name, split=split)
    if hub is not None:
        return _SourceRows(source, hub.rows, hub.sha256)
    return _SourceRows(source, partial(iter_rows, source.name, split=split), partial(_files_sha256, source.name, split))


def _files_sha256(name: str, split: Split) -> str:
    """Hash of the files that a name stands for."""
    path = user_path(name)
    if path.is_dir() and is_saved_folder(path):  # which of its files have the split's rows, the library knows
        return split + _names_and_contents(sorted(file for file in path.rglob("*") if file.is_file()))
    return _names_and_contents(checked_files(path, name))


def _names_and_contents(files: Iterable[Path]) -> str:
    """Names decide how a file is read, so they are in the hash; folders do not."""
    files = list(files)
    return " ".join([*(file.name for file in files), files_sha256(files)])


@contextmanager
def _readable(name: str) -> Iterator[None]:
    """Turns errors of the file system into one line."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename or name}: cannot be read ({error.strerror or error})") from error
