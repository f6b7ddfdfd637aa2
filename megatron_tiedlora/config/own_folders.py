"""Folders for what is kept between runs: what is read back from them must not come from just anyone on the machine."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from megatron_tiedlora.config.errors import UserError


def make_own_folder(path: Path, *, mode: int = 0o755) -> None:
    """Make a folder, and those above it, that others cannot write. One that is there is left as it is.

    Who owns a folder says who may write in it: a group that may was let in by this user or by root, as for a team's
    cache, and is trusted as they are.

    Raises:
        UserError: it is there, and anyone may write in it, or it belongs to another user than this one or root.
        OSError: it cannot be made.
    """
    path.mkdir(mode=mode & ~stat.S_IWOTH, parents=True, exist_ok=True)
    found = path.stat()
    if found.st_uid not in (os.geteuid(), 0):
        raise UserError(
            f"{path}: belongs to user {found.st_uid}, and what is in it would be trusted; give it to this user or root"
            " (chown), or set MEGATRON_TIEDLORA_CACHE to a folder of your own"
        )
    if found.st_mode & stat.S_IWOTH:
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
