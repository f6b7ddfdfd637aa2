"""Atomic writes: a file or folder is written under a temporary name, synced, and then renamed.

A `guard` is called right before the rename. It raises UserError if this process may no longer change the folder.
`ownership` explains why nothing can change after that, once the temporary files were removed.
"""

import ctypes
import json
import os
import shutil
import stat
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from megatron_tiedlora.base.messages import UserError, os_errors

TEMPORARY_PREFIX = ".writing-"
_ASIDE_PREFIX = f"{TEMPORARY_PREFIX}old-"
_HERE, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux's renameat2

Guard = Callable[[], None]


def unguarded() -> None:
    """The guard of a folder that nobody else writes to."""


def sync_path(path: Path) -> None:
    """Flush a file's or a folder's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def new_folder(path: Path, *, guard: Guard = unguarded, parent: Path | None = None) -> Iterator[Path]:
    """Yield a temporary folder beside `path`. It replaces `path` when the block ends without an error.

    If the process is killed before that, the folder at `path` is unchanged. An error removes the temporary folder.

    Args:
        parent: existing folder that holds the temporary one (default: the parent of `path`, which is created).

    Raises:
        UserError: the disk is full or the parent is not writable; the message names `path`.
    """
    name = path.name if parent is None else "output"  # short, since `path` may have the longest name allowed
    temporary = (parent or path.parent) / f"{TEMPORARY_PREFIX}{name}-{uuid.uuid4().hex[:8]}"
    try:
        guard()  # before mkdir, which would bring back a folder that was removed
        temporary.mkdir(parents=parent is None)
        yield temporary
        readable = temporary.stat().st_mode & 0o666
        for item in sorted(temporary.rglob("*")):
            if item.is_file() and item.stat().st_mode & 0o777 != readable:
                item.chmod(readable)  # safetensors creates files that only their owner can read
            sync_path(item)
        sync_path(temporary)
        guard()
        _put_in_place(temporary, path, guard)
    except (OSError, SafetensorError) as error:  # safetensors raises its own error if the disk is full
        shutil.rmtree(temporary, ignore_errors=True)
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be written ({reason}); nothing was changed") from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _put_in_place(temporary: Path, path: Path, guard: Guard) -> None:
    """Rename `temporary` to `path`. A folder that is already there is swapped out in one step, then removed."""
    if not os.path.lexists(path):
        os.rename(temporary, path)
        sync_path(path.parent)
        return
    old = temporary
    if not _exchange(temporary, path):
        # Some network file systems cannot swap, and a folder cannot be renamed over a non-empty one. So the old one is
        # moved aside first. After a kill between the two renames, `restore_interrupted` moves it back.
        old = path.parent / f"{_ASIDE_PREFIX}{path.name}-{uuid.uuid4().hex[:8]}"
        guard()
        os.rename(path, old)
        try:
            os.rename(temporary, path)
        except OSError:
            os.rename(old, path)
            raise
    sync_path(path.parent)
    remove(old)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two paths in one step. Returns False if the system or the file system cannot do it."""
    try:
        swap = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    return bool(swap(_HERE, os.fsencode(one), _HERE, os.fsencode(other), ctypes.c_uint(_EXCHANGE)) == 0)


def write_text(path: Path, text: str, *, guard: Guard = unguarded) -> None:
    """Replace a file's content atomically. Raises UserError naming the file."""
    with new_file(path, guard=guard) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def new_file(path: Path, *, guard: Guard = unguarded) -> Iterator[Path]:
    """Yield a temporary name beside `path`. The file replaces `path` when the block ends without an error.

    Raises:
        UserError: it cannot be written; the message names `path`.
    """
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{path.name}-{uuid.uuid4().hex[:8]}")
    try:
        with os_errors(f"{path}: cannot be written", fix="; nothing was changed"):
            yield temporary
            sync_path(temporary)
            guard()
            os.replace(temporary, path)
            sync_path(path.parent)
    finally:
        with suppress(OSError):  # it does not exist, or its name is too long
            temporary.unlink()


def write_json(path: Path, content: Any, *, guard: Guard = unguarded) -> None:
    """Replace a JSON file atomically. Raises UserError naming the file."""
    write_text(path, json.dumps(content, indent=2) + "\n", guard=guard)


def restore_interrupted(folder: Path) -> None:
    """Rename back the folders that a killed writer had moved aside and not replaced yet."""
    for aside in folder.glob(f"{_ASIDE_PREFIX}*"):
        path = folder / aside.name.removeprefix(_ASIDE_PREFIX).rpartition("-")[0]
        if not path.exists():
            with suppress(OSError):  # another rank was faster
                os.rename(aside, path)


def remove_leftovers(folder: Path, *, guard: Guard = unguarded) -> None:
    """Run `restore_interrupted`, then remove the temporary files of earlier writers. For a new owner of `folder`."""
    restore_interrupted(folder)
    found = list(folder.glob(f"{TEMPORARY_PREFIX}*"))
    guard()  # after the glob: this process owned the folder while these existed, so they are no later owner's
    for item in found:
        gone = folder / f"{TEMPORARY_PREFIX}gone-{uuid.uuid4().hex[:8]}"
        with suppress(OSError):
            os.rename(item, gone)  # atomic: a writer that wakes up meanwhile finds all of it or nothing
        remove(gone)


def discard(path: Path, *, guard: Guard = unguarded) -> None:
    """Remove a file or a folder if the guard allows it. What cannot be removed stays.

    It is moved into a temporary folder first. So a process that is suspended after the guard moves nothing later.
    """
    if not os.path.lexists(path):
        return
    away = path.parent / f"{TEMPORARY_PREFIX}gone-{uuid.uuid4().hex[:8]}"
    try:
        with suppress(OSError):
            away.mkdir()
            guard()
            os.rename(path, away / path.name)
    finally:
        remove(away)


def make_way_for_log(file: Path) -> None:
    """Remove `file`, to which a log is appended, if it is a link or a pipe: opening it would follow or block."""
    with suppress(FileNotFoundError):
        mode = file.lstat().st_mode
        if stat.S_ISLNK(mode) or stat.S_ISFIFO(mode):
            file.unlink()


def remove(path: Path) -> None:
    """Remove a file, a link (not its target) or a folder with its content, as far as possible."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
        return
    with suppress(OSError):
        path.unlink()
