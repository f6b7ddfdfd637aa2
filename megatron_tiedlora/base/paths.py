"""Paths as users and files give them."""

from __future__ import annotations

import itertools
import os
import stat
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


# Folders of one user --------------------------------------------------------------------------------------------------


CACHE_VARIABLE = "MEGATRON_TIEDLORA_CACHE"


def user_cache() -> Path:
    """The folder for what is downloaded or made once; it may not exist yet.

    `$MEGATRON_TIEDLORA_CACHE`, else `~/.cache/megatron_tiedlora`.
    """
    configured = os.environ.get(CACHE_VARIABLE)
    return user_path(configured).absolute() if configured else Path.home() / ".cache" / "megatron_tiedlora"


def make_own_folder(path: Path, *, mode: int = 0o755) -> None:
    """Create a folder and its parents, not writable by others. An existing one is left as it is.

    Raises:
        UserError: it exists, and anyone may write in it.
        OSError: it cannot be created.
    """
    path.mkdir(mode=mode & ~stat.S_IWOTH, parents=True, exist_ok=True)
    if path.stat().st_mode & stat.S_IWOTH:
        raise UserError(f"{path}: anyone may write files there, and they would be trusted; run chmod o-w on it")


def make_private_folder(path: Path) -> None:
    """Create a folder with a predictable name in one that others can write to, such as the temporary folder.

    Raises:
        UserError: it exists and is a link, another user's, or writable by anyone.
        OSError: it cannot be created.
    """
    path.mkdir(mode=0o700, exist_ok=True)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & stat.S_IWOTH:
        raise UserError(f"{path}: is not this user's own folder, so its content is not trusted; remove it")
