"""Paths as users and files give them."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_tiedlora.base.errors import UserError, shown

_LONGEST_NAME, _LONGEST_PATH = 255, 4000  # bytes that Linux takes
_LONGEST_PART = 80  # bytes of a name that becomes a part of a longer one


def user_path(given: str | Path, *, flag: str = "") -> Path:
    """The path that `given` names, with ~ and ~USER expanded; nothing else is looked up. `flag` is for the message.

    Raises:
        UserError: it cannot name a file on any system.
    """
    said = f"{flag} {shown(str(given))}".lstrip()
    try:
        path = Path(given).expanduser()
        raw = os.fsencode(path)
    except (RuntimeError, UnicodeEncodeError) as error:
        raise UserError(f"{said}: is not a path ({error})") from None
    if b"\0" in raw or len(raw) > _LONGEST_PATH or any(len(part) > _LONGEST_NAME for part in raw.split(b"/")):
        raise UserError(f"{said}: is not a path (too long, or with characters that a file name cannot have)")
    return path


@dataclass(frozen=True)
class PathIn:
    """A class attribute that is a path in the folder `path` of each instance: `NAME = PathIn("name")`."""

    name: str

    def __get__(self, owner: Any, kind: type | None = None) -> Path:
        path: Path = owner.path
        return path / self.name


def last_name(given: str) -> str:
    """The last part of a path or a hub id, for folders named after it. A very long one is cut short."""
    name = given.rstrip("/").rsplit("/", 1)[-1]
    raw = os.fsencode(name)
    return name if len(raw) <= _LONGEST_PART else raw[:_LONGEST_PART].decode(errors="ignore")


def numbered(path: Path) -> Iterator[Path]:
    """PATH, PATH-2, PATH-3, ..."""
    yield path
    yield from (path.with_name(f"{path.name}-{number}") for number in itertools.count(2))


def first_free(path: Path) -> Path:
    """The first of `numbered` that does not exist."""
    return next(one for one in numbered(path) if not os.path.lexists(one))
