"""Folders for files kept between runs. They are read back and trusted, so no other user may write there."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.base.paths import user_path

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
