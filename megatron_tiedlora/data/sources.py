"""Finds the rows of a split: in files, folders, patterns and hub data sets, or in the task's own source.

This module parses the values of data flags, NAME[:WEIGHT][,NAME[:WEIGHT]...], and determines how often the rows of each
source are used. It also applies --columns and hashes the data. The module `readers` reads the file formats.
"""

import hashlib
import math
import re
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from glob import has_magic
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from megatron_tiedlora.base.messages import UserError, nearest_name, shown, user_path
from megatron_tiedlora.data.readers import about_num_rows, describe_fields, is_empty, named_files, row_data
from megatron_tiedlora.data.tables import HubData, Once, Row, names_and_contents, rows_sha256
from megatron_tiedlora.data.task import Reading, Split, Task
from megatron_tiedlora.data.token_dataset import permutation

Files = Mapping[str, str | Path | None]
"""The value of each split's data flag, by split name. A missing key or None means that the flag was not given."""

_WEIGHT = re.compile(r"(.+):([0-9]*\.?[0-9]+)")
_MIX_STREAM = 2**32 + 2  # a random stream other than those of epochs, held-out rows and drawn samples
_MOST_REPEATS = 1000  # maximum uses of a row in a mix; more would fill the memory, and a weight is probably wrong


@dataclass(frozen=True)
class Source:
    """A source of rows in a data flag. weight: its fraction of the samples; None if the flag has no weights."""

    name: str
    weight: float | None = None


def parse_sources(given: str, flag: str) -> tuple[Source, ...]:
    """Return the sources in the value of a data flag. Raises UserError if a name is empty, or if only some names have a
    weight. Also raises UserError if the weights do not sum to 1, or if a flag other than --train_file has weights."""
    sources = _sources(given)
    if len(sources) > 1 and not all(source.name for source in sources):
        raise UserError(f"{flag} {given}: a name between the commas is empty; remove a comma")
    weights = [source.weight for source in sources if source.weight is not None]
    if not weights:
        return sources
    if len(weights) < len(sources):
        without = next(source.name for source in sources if source.weight is None)
        raise UserError(f"{flag} {given}: {without} has no weight, but others do; give all or none, as NAME:WEIGHT")
    if flag != "--train_file":
        raise UserError(f"{flag} {given}: only --train_file takes weights; remove them (each row is evaluated once)")
    if not all(weights) or not math.isclose(sum(weights), 1, abs_tol=1e-6):
        said = f"{flag} {given}: the weights are {' + '.join(f'{weight:g}' for weight in weights)} = {sum(weights):g}"
        raise UserError(f"{said}; give weights above 0 that sum to 1")
    return sources


def _sources(given: str) -> tuple[Source, ...]:
    """Return the sources in a flag's value, without checks. An existing path is one source, even if it has commas."""
    return (Source(given),) if _exists(given) else tuple(parse_source(name.strip()) for name in given.split(","))


def parse_source(name: str) -> Source:
    """Return the source that a name describes, with or without a weight."""
    found = None if _exists(name) else _WEIGHT.fullmatch(name)
    return Source(name) if found is None else Source(found[1], float(found[2]))


def _exists(name: str) -> bool:
    try:
        return user_path(name).exists()
    except (OSError, UserError):  # too long for a path, for example
        return False


def hub_ids(*given: str | None) -> list[str]:
    """Return the ids (without config and split) of all hub data sets in these values of data flags."""
    sources = (source for value in given if value is not None for source in _sources(value))
    found = (row_data(source.name, split="") for source in sources)
    return sorted({data.hub_id for data in found if isinstance(data, HubData)})


def local_files(given: str) -> dict[str, Path]:
    """Return the local files in the value of a data flag, by file name, including files of folders and patterns."""
    found: dict[str, Path] = {}
    for name in (source.name for source in _sources(given)):
        path = user_path(name)
        if path.is_file():
            found[name] = path
        elif path.is_dir():
            found |= {str(file): file for file in sorted(path.rglob("*")) if file.is_file()}
        elif has_magic(name):
            with suppress(UserError):
                found |= {str(file): file for file in named_files(path, name)}
    return found


# How often rows are used ----------------------------------------------------------------------------------------------


def mixed(
    sources: Sequence[Source], sizes: Sequence[int], held_out: NDArray[np.bool_], *, seed: int
) -> tuple[NDArray[np.int64], list[str]]:
    """Return all rows that are not held out, in order. If sources have weights, rows are repeated accordingly.

    Every row is used at least once. The seed determines which rows of a source are used once more than its other rows.
    Raises UserError if no row of a source is left, or if its rows would be repeated more than `_MOST_REPEATS` times.

    Args:
        sizes: the number of rows of each source.
        held_out: (sum of the sizes,) bool, whether each row is used for validation.

    Returns:
        (n,) int64, the row of each training sample in order, as an index into the rows of all sources. Also one line of
        text per source about how often its rows are used, or no lines without weights.
    """
    edges = np.cumsum([0, *sizes])
    kept = [start + np.flatnonzero(~held_out[start:stop]) for start, stop in pairwise(edges)]
    for source, rows in zip(sources, kept, strict=True):
        if not len(rows):
            raise UserError(f"{source.name}: all rows were selected for validation; give --validation_file")
    weights = [source.weight for source in sources if source.weight is not None]
    if not weights:
        return kept[0] if len(kept) == 1 else np.concatenate(kept), []
    total = max(len(rows) / weight for rows, weight in zip(kept, weights, strict=True))
    lines = []
    for number, (source, weight, rows) in enumerate(zip(sources, weights, kept, strict=True)):
        wanted = round(total * weight)
        if wanted > _MOST_REPEATS * len(rows):
            raise UserError(
                f"--train_file: for weight {weight:g} of {source.name}, each of its {len(rows):,} rows would be used"
                f" {wanted // len(rows):,} times; lower its weight (the maximum is {_MOST_REPEATS:,} times)"
            )
        whole, rest = divmod(wanted, len(rows))
        once_more = np.sort(permutation(len(rows), seed=seed, stream=_MIX_STREAM + number)[:rest])
        kept[number] = np.concatenate([np.tile(rows, whole), rows[once_more]])
        lines.append(f"{source.name}: {len(rows):,} rows make {wanted:,} samples, {wanted / len(rows):.2f} of each")
    return np.concatenate(kept), lines


# Rows -----------------------------------------------------------------------------------------------------------------


NumberedRow = tuple[int, int, Row]
"""The index of a row's source, the index of its sample, and the row."""


_SourceRows = tuple[Source, Callable[[], Iterable[Row]], Callable[[Once], str]]
"""A source, a function that reads its rows, and a function that returns a hash of its data."""


@dataclass(frozen=True)
class RowStream:
    """The rows of one split of a task in order, without nesting, and with the task's field names.

    Each iteration reads the files again. It raises UserError, with the line, if a file is missing, unreadable, empty or
    broken. Rows with the same value of the field `Task.merge_by` belong to one sample.
    """

    task: Task
    reading: Reading
    _parts: tuple[_SourceRows, ...]

    @property
    def sources(self) -> tuple[Source, ...]:
        """Return the sources from which the rows are read, in order."""
        return tuple(source for source, _, _ in self._parts)

    @property
    def names(self) -> str:
        """Return the names of `sources`, for messages."""
        return ", ".join(source.name for source in self.sources)

    def __iter__(self) -> Iterator[NumberedRow]:
        """Yield (index of the source, index of the sample, row) for each row. Indices begin at 0."""
        field, total, seen = self.task.merge_by, 0, dict[Hashable, int]()
        for number, (source, rows, _) in enumerate(self._parts):
            before = total
            with _readable(source.name):
                for row in self._flat(rows()):
                    sample = total
                    if field is not None:
                        key = row[0].get(field)
                        sample = seen.setdefault(key if isinstance(key, str) else total, len(seen))
                    total += 1
                    yield number, sample, row
                if total == before:
                    raise UserError(f"{source.name}: has no samples for task {self.task.name}; give another file")

    def about_num_rows(self) -> int | None:
        """Return the approximate number of rows for a progress bar, or None if the number is not known."""
        if self.task.unfold is not None:
            return None
        counts = [about_num_rows(source.name) for source in self.sources]
        return None if None in counts else sum(count or 0 for count in counts)

    def sha256(self, once: Once = lambda work, *_: work()) -> str:
        """Return a hash of the names and contents of all data files, or of the generated rows. `once` calls the
        functions that read them. Raises UserError if a file is missing or unreadable."""
        return sources_sha256(self.contents(once))

    def contents(self, once: Once) -> list[tuple[str, str]]:
        """Return the name of each source with a text about its data, whose last word is the hash of the content (of
        a single file: its SHA-256). Raises UserError as `sha256` does."""
        found = []
        for source, _, content in self._parts:
            with _readable(source.name):
                found.append((source.name, content(once)))
        return found

    def _flat(self, rows: Iterable[Row]) -> Iterator[Row]:
        task, columns = self.task, self.reading.columns
        for row, source in rows:
            ours = row if columns is None else _renamed(row, columns, source, known=task.known_fields)
            yield from ((ours, source),) if task.unfold is None else task.unfold(ours, source)


def sources_sha256(contents: Iterable[tuple[str, str]]) -> str:
    """Return a hash of the texts that `RowStream.contents` returns."""
    return hashlib.sha256(" ".join(text for _, text in contents).encode()).hexdigest()


def _renamed(
    row: Mapping[str, Any], columns: Mapping[str, str], source: str, *, known: Collection[str]
) -> dict[str, Any]:
    """Return the row with the fields in --columns renamed to the task's names. Other fields keep their names. `known`
    has the task's field names; it is empty if any name is allowed. Raises UserError if the row lacks a field, if a new
    name is unknown, or if the row already has a field with a new name."""
    for ours, theirs in columns.items():
        if known and ours not in known:
            turned = f"; did you mean {theirs}={ours}?" if theirs in known else ""
            said = f"--columns {ours}={theirs}: the task has no field {ours!r}{nearest_name(ours, known)}{turned}"
            raise UserError(f"{said}; its fields are {', '.join(sorted(known))}")
        if theirs not in row:
            raise UserError(
                f"{source}: --columns {ours}={theirs}: the row has no field {theirs!r}, only"
                f" {describe_fields(row)}; use one of these, or write {theirs!r}: null in rows without it"
            )
        if ours not in columns.values() and not is_empty(row.get(ours)):
            said = f"{source}: --columns {ours}={theirs}: the row also has a field {ours!r} ({shown(row[ours])})"
            raise UserError(f"{said}; rename it in the file, or read it under another name with --columns")
    others = {name: value for name, value in row.items() if name not in columns.values()}
    return {**others, **{ours: row[theirs] for ours, theirs in columns.items()}}


def source_kind(task: Task, split: Split, files: Files) -> Literal["file", "own", "carve"] | None:
    """Return where the rows of a split are: in its file ("file"), in the task's own source ("own"), or among the
    training rows ("carve"). Return None if the split has no rows."""
    if files.get(split):
        return "file"
    if any(files.get(name) for name in ("train", "validation", "test")):
        # If the user gives files, the hub's rows are never used.
        return "carve" if split == "validation" and files.get("train") else None
    own = task.hub or {}
    if task.generate or split in own:
        return "own"
    return "carve" if split == "validation" and "train" in own else None


def row_stream(task: Task, split: Split, *, files: Files, reading: Reading) -> RowStream:
    """Return the rows of a split's file or of the task's own source, before validation rows are removed. Raises
    UserError if the split has no source, or if the names of its files are not valid."""
    if source_kind(task, split, files) not in ("file", "own"):
        raise UserError(f"--task {task.name} has no {split} data; give --{split}_file")
    given, flag = str(files.get(split) or ""), f"--{split}_file"
    hub = (task.hub or {}).get(split)
    with _readable(given):
        pair = task.read_files(given, flag) if given and task.read_files else None
    parts: tuple[_SourceRows, ...]
    if pair is not None:
        parts = ((Source(given), pair, lambda once: names_and_contents(local_files(given).values(), once)),)
    elif given and (hub is None or given != hub.hub_id):
        with _readable(given):
            named = [(source, row_data(source.name, split=split)) for source in parse_sources(given, flag)]
        parts = tuple((source, data.rows, data.sha256) for source, data in named)
    elif task.generate is not None:
        generated = partial(task.generate, split)
        content = cache(lambda: rows_sha256(generated()))
        parts = ((Source(task.name), generated, lambda _: content()),)
    else:
        assert hub is not None
        hub = replace(hub)  # a copy, so that loaded data is freed with the stream
        parts = ((Source(given or task.name), hub.rows, hub.sha256),)
    return RowStream(task, reading, parts)


@contextmanager
def _readable(name: str) -> Iterator[None]:
    """Convert errors of the file system to UserErrors with a message of one line."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{error.filename or name}: cannot be read ({error.strerror or error}); check it") from error
