"""Folders for what is kept between runs: what is read back from them must not come from just anyone on the machine."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from megatron_tiedlora.base.errors import UserError


def make_own_folder(path: Path, *, mode: int = 0o755) -> None:
    """Make a folder, and those above it, that others cannot write. One that is there is left as it is.

    Raises:
        UserError: it is there, and anyone may write in it.
        OSError: it cannot be made.
    """
    path.mkdir(mode=mode & ~stat.S_IWOTH, parents=True, exist_ok=True)
    if path.stat().st_mode & stat.S_IWOTH:
        raise UserError(f"{path}: anyone may put files there, and they would be trusted; run chmod o-w on it")


def make_private_folder(path: Path) -> None:
    """Make a folder in a place that others write in too (the temporary folder), under a name that they can guess.

    Raises:
        UserError: it is there, and is a link, another user's, or one that anyone may write in.
        OSError: it cannot be made.
    """
    path.mkdir(mode=0o700, exist_ok=True)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & stat.S_IWOTH:
        raise UserError(f"{path}: is not this user's own folder, so what is in it is not trusted; remove it")
