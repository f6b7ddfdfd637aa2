"""Paths as users and files give them."""

from __future__ import annotations

import os
from pathlib import Path

from megatron_tiedlora.base.errors import UserError, shown

_LONGEST_NAME, _LONGEST_PATH = 255, 4000  # bytes that Linux takes
_LONGEST_PART = 80  # bytes of a name that a longer one is made of


def user_path(given: str | Path, *, flag: str = "") -> Path:
    """The path that `given` (to `flag`, for the message) names, with ~ and ~USER replaced; nothing is looked up but the
    user's home.

    Raises:
        UserError: it can name no file on any system.
    """
    said = f"{flag} {shown(str(given))}".lstrip()
    try:
        path = Path(given).expanduser()
        raw = os.fsencode(path)
    except (RuntimeError, UnicodeEncodeError) as error:
        raise UserError(f"{said}: is no path ({error})") from None
    if b"\0" in raw or len(raw) > _LONGEST_PATH or any(len(part) > _LONGEST_NAME for part in raw.split(b"/")):
        raise UserError(f"{said}: is no path (too long, or with characters that no file's name has)")
    return path


def last_name(given: str) -> str:
    """The last name of a path or a hub id, for folders that are called after it: of a very long one the beginning."""
    name = given.rstrip("/").rsplit("/", 1)[-1]
    raw = os.fsencode(name)
    return name if len(raw) <= _LONGEST_PART else raw[:_LONGEST_PART].decode(errors="ignore")
