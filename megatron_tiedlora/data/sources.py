"""What --train_file names: files, folders, patterns and hub data sets, one or several, with or without weights.

Owns the syntax NAME[:WEIGHT][,NAME[:WEIGHT]...], and how often rows of each source are used. Leaves formats to
`readers`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from glob import has_magic
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.base.paths import user_path
from megatron_tiedlora.data.order import permutation
from megatron_tiedlora.data.readers import hub_data, named_files

_WEIGHT = re.compile(r"(.+):([0-9]*\.?[0-9]+)")
_MIX_STREAM = 2**32 + 2  # differs from the streams of epochs, held-out rows and drawn samples
_MOST_REPEATS = 1000  # of a row in a mix; more are a mistake in a weight, and would fill the memory


@dataclass(frozen=True)
class Source:
    """One of the names in a data flag. weight: its share of the samples; None if no name has one."""

    name: str
    weight: float | None = None


def parse_sources(given: str, flag: str) -> tuple[Source, ...]:
    """The sources that a data flag's value names.

    Raises:
        UserError: a name is empty, only some have a weight, the weights do not sum to 1, or it is not the training
            part that has them.
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
    if flag != "--train_file":
        raise UserError(f"{flag} {given}: only --train_file takes weights; every row is evaluated once, so remove them")
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


@dataclass(frozen=True)
class Mix:
    """Which rows become training samples.

    rows: (n,) int64, the rows of the samples in order, as indices into the rows of all sources.
    lines: how often the rows of each source are used, in words; empty without weights.
    """

    rows: NDArray[np.int64]
    lines: tuple[str, ...] = ()


def mixed(sources: Sequence[Source], sizes: Sequence[int], held_out: NDArray[np.bool_], *, seed: int) -> Mix:
    """All rows that are not held out, in order. With weights, rows are repeated until the shares of the sources are
    the weights.

    Every row is used at least once. Which rows of a source are used once more than others depends on the seed alone.

    Args:
        sizes: number of rows of each source.
        held_out: (sum of the sizes,) bool, which rows are used for validation.

    Raises:
        UserError: a source has no row left, or its rows would be repeated very often.
    """
    edges = np.cumsum([0, *sizes])
    kept = [start + np.flatnonzero(~held_out[start:stop]) for start, stop in pairwise(edges)]
    for source, rows in zip(sources, kept, strict=True):
        if not len(rows):
            raise UserError(f"{source.name}: all of its rows became validation rows; give --validation_file")
    weights = [source.weight for source in sources if source.weight is not None]
    if not weights:
        return Mix(kept[0] if len(kept) == 1 else np.concatenate(kept))
    total = max(len(rows) / weight for rows, weight in zip(kept, weights, strict=True))
    lines = []
    for number, (source, weight, rows) in enumerate(zip(sources, weights, kept, strict=True)):
        wanted = round(total * weight)
        if wanted > _MOST_REPEATS * len(rows):
            raise UserError(
                f"--train_file: {source.name} is {weight:g} of the samples if each of its {len(rows):,} rows is used"
                f" {wanted // len(rows):,} times; lower its weight ({_MOST_REPEATS:,} times are the most)"
            )
        whole, rest = divmod(wanted, len(rows))
        once_more = np.sort(permutation(len(rows), seed=seed, stream=_MIX_STREAM + number)[:rest])
        kept[number] = np.concatenate([np.tile(rows, whole), rows[once_more]])
        lines.append(f"{source.name}: {len(rows):,} rows make {wanted:,} samples, {wanted / len(rows):.2f} of each")
    return Mix(np.concatenate(kept), tuple(lines))


def hub_ids(*given: str | None) -> list[str]:
    """The ids, without config and split, of the hub data sets among what these values of data flags name here."""
    found = (hub_data(name, split="") for value in given if value is not None for name in _names(value))
    return sorted({data.hub_id for data in found if data is not None})


def _names(given: str) -> list[str]:
    return [_parse_source(name.strip()).name for name in ([given] if _exists(given) else given.split(","))]


def local_files(given: str) -> dict[str, Path]:
    """The files that a data flag's value names on this host, by name; those of folders and patterns too."""
    found: dict[str, Path] = {}
    for name in _names(given):
        path = user_path(name)
        if path.is_file():
            found[name] = path
        elif path.is_dir():
            found |= {str(file): file for file in sorted(path.rglob("*")) if file.is_file()}
        elif has_magic(name):
            with suppress(UserError):
                found |= {str(file): file for file in named_files(path, name)}
    return found
