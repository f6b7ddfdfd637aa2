"""What --train_file names: files, folders, patterns and hub data sets, one or several, with or without weights.

Owns the syntax NAME[:WEIGHT][,NAME[:WEIGHT]...], and how often rows of each source are used. Leaves formats to
`readers`.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from glob import has_magic
from pathlib import Path

from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.base.paths import user_path
from megatron_tiedlora.data.order import permutation
from megatron_tiedlora.data.readers import Row, named_files, read_rows

_WEIGHT = re.compile(r"(.+):([0-9]*\.?[0-9]+)")
_MIX_STREAM = 2**32 + 2  # differs from the streams of epochs, held-out rows and drawn samples


@dataclass(frozen=True)
class Source:
    """One of the names in a data flag. weight: its share of the samples; None if no name has one."""

    name: str
    weight: float | None = None


@dataclass(frozen=True)
class Group:
    """The rows of one source."""

    source: Source
    rows: list[Row]


def parse_sources(given: str, flag: str) -> tuple[Source, ...]:
    """The sources that a data flag's value names.

    Raises:
        UserError: a name is empty, only some have a weight, or the weights do not sum to 1.
    """
    if _exists(given):
        return (Source(given),)
    names = [name.strip() for name in given.split(",")]
    if not all(names):
        raise UserError(f"{flag} {given}: one of the names between the commas is empty; remove a comma")
    sources = tuple(map(_parse_source, names))
    weights = [source.weight for source in sources if source.weight is not None]
    if not weights:
        return sources
    if len(weights) < len(sources):
        without = next(source.name for source in sources if source.weight is None)
        raise UserError(f"{flag} {given}: {without} has no weight, others have one; give all or none, as NAME:WEIGHT")
    if not all(weights) or not math.isclose(sum(weights), 1, abs_tol=1e-6):
        raise UserError(
            f"{flag} {given}: the weights are {' + '.join(f'{weight:g}' for weight in weights)} ="
            f" {sum(weights):g}; give weights above 0 that sum to 1"
        )
    return sources


def _parse_source(name: str) -> Source:
    found = None if _exists(name) else _WEIGHT.fullmatch(name)
    return Source(name) if found is None else Source(found[1], float(found[2]))


def without_weight(name: str) -> str:
    """A name of a data flag without its weight."""
    return _parse_source(name).name


def _exists(name: str) -> bool:
    try:
        return user_path(name).exists()
    except (OSError, UserError):  # too long for a path, for example
        return False


def read_sources(sources: Sequence[Source], *, split: str) -> list[Group]:
    """The rows of each source, in order. Raises UserError as `read_rows` does."""
    return [Group(source, read_rows(source.name, split=split)) for source in sources]


def mixed(groups: Sequence[Group], *, seed: int) -> list[Row]:
    """The rows of all groups, in order. With weights, rows are repeated until the shares of the groups are the weights.

    Every row is used at least once. Which rows of a group are used once more than others depends on the seed alone.
    """
    rows = [row for group in groups for row in group.rows]
    if groups[0].source.weight is None:
        return rows
    total = max(len(group.rows) / _weight(group) for group in groups)
    result: list[Row] = []
    for number, group in enumerate(groups):
        wanted = round(total * _weight(group))
        whole, rest = divmod(wanted, len(group.rows))
        chosen = sorted(permutation(len(group.rows), seed=seed, stream=_MIX_STREAM + number)[:rest].tolist())
        result += group.rows * whole + [group.rows[index] for index in chosen]
    return result


def mix_lines(places: Iterable[str]) -> list[str]:
    """How often rows are used, by file, for the first lines of a run; nothing if none is used twice.

    Args:
        places: where each sample was read, as in `Example.source`.
    """
    used: dict[str, Counter[str]] = {}
    for place in places:
        used.setdefault(place.rpartition(":")[0], Counter())[place] += 1
    if all(len(counts) == counts.total() for counts in used.values()):
        return []
    return [
        f"{file}: {len(counts):,} rows make {counts.total():,} samples, {counts.total() / len(counts):.2f} of each"
        for file, counts in used.items()
    ]


def _weight(group: Group) -> float:
    assert group.source.weight is not None
    return group.source.weight


def without_rows(groups: Sequence[Group], held_out: Sequence[bool]) -> list[Group]:
    """The groups without the rows that are held out; `held_out` has one entry per row of all groups."""
    taken = iter(held_out)
    kept = [replace(group, rows=[row for row in group.rows if not next(taken)]) for group in groups]
    for group in kept:
        if not group.rows:
            raise UserError(f"{group.source.name}: all of its rows became validation rows; give --validation_file")
    return kept


def local_files(given: str) -> dict[str, Path]:
    """The files that a data flag's value names on this host, by name; those of folders and patterns too."""
    found: dict[str, Path] = {}
    for name in (source.name for source in map(_parse_source, [given] if _exists(given) else given.split(","))):
        name, path = name.strip(), user_path(name.strip())
        if path.is_file():
            found[name] = path
        elif path.is_dir():
            found |= {str(file): file for file in sorted(path.rglob("*")) if file.is_file()}
        elif has_magic(name):
            with suppress(UserError):
                found |= {str(file): file for file in named_files(path, name)}
    return found
