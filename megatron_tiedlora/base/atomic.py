"""Files and folders that are there whole or not at all: written under a temporary name, synced, renamed.

A `guard` is called right before the rename, and raises UserError where this process may change the folder no longer.
See `ownership` for why no change can follow on it once the temporary files were removed.
"""

from __future__ import annotations

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

from megatron_tiedlora.base.errors import UserError

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
def new_folder(path: Path, *, guard: Guard = unguarded, place: Path | None = None) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its name when the block ends well, replacing what was there.

    Killed at any point before, the folder at `path` is as it was; an error removes the temporary one.

    Args:
        place: the folder, which is there, for the temporary one (default: that of `path`, which is made).

    Raises:
        UserError: the disk is full or the place cannot be written, naming `path`.
    """
    name = path.name if place is None else "output"  # with which the longest name still is one
    temporary = (place or path.parent) / f"{TEMPORARY_PREFIX}{name}-{uuid.uuid4().hex[:8]}"
    try:
        guard()  # before a folder that was removed comes back
        temporary.mkdir(parents=place is None)
        yield temporary
        readable = temporary.stat().st_mode & 0o666
        for item in sorted(temporary.rglob("*")):
            if item.is_file():
                item.chmod(readable)  # safetensors makes files that only their owner reads
            sync_path(item)
        sync_path(temporary)
        guard()
        _put_in_place(temporary, path, guard)
    except (OSError, SafetensorError) as error:  # safetensors tells of a full disk by an error of its own
        shutil.rmtree(temporary, ignore_errors=True)
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be written ({reason}); nothing was changed") from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _put_in_place(temporary: Path, path: Path, guard: Guard) -> None:
    """Rename `temporary` to `path`; a folder that was there is swapped out at once, then removed."""
    if not os.path.lexists(path):
        os.rename(temporary, path)
        sync_path(path.parent)
        return
    old = temporary
    if not _exchange(temporary, path):
        # Some network file systems cannot swap, and a folder cannot be renamed over a full one: step aside first. A
        # kill between the two renames leaves the old one under a name from which `restore_interrupted` gets it back.
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
    """Swap two paths in one step; False where the system or the file system cannot."""
    try:
        swap = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    return bool(swap(_HERE, os.fsencode(one), _HERE, os.fsencode(other), ctypes.c_uint(_EXCHANGE)) == 0)


def write_text(path: Path, text: str, *, guard: Guard = unguarded) -> None:
    """Replace a file's content at once. Raises UserError naming the file."""
    with new_file(path, guard=guard) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def new_file(path: Path, *, guard: Guard = unguarded) -> Iterator[Path]:
    """A temporary name beside `path` for a file that takes its place when the block ends well.

    Raises:
        UserError: it cannot be written, naming `path`.
    """
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{path.name}-{uuid.uuid4().hex[:8]}")
    try:
        yield temporary
        sync_path(temporary)
        guard()
        os.replace(temporary, path)
        sync_path(path.parent)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error}); nothing was changed") from error
    finally:
        with suppress(OSError):  # it is not there, or its name is too long
            temporary.unlink()


def write_json(path: Path, content: Any, *, guard: Guard = unguarded) -> None:
    """Replace a JSON file at once. Raises UserError naming the file."""
    write_text(path, json.dumps(content, indent=2) + "\n", guard=guard)


def restore_interrupted(folder: Path) -> None:
    """Give back their names to folders that a killed writer had moved aside and not replaced yet."""
    for aside in folder.glob(f"{_ASIDE_PREFIX}*"):
        path = folder / aside.name.removeprefix(_ASIDE_PREFIX).rpartition("-")[0]
        if not path.exists():
            with suppress(OSError):  # another rank was faster
                os.rename(aside, path)


def remove_leftovers(folder: Path, *, guard: Guard = unguarded) -> None:
    """Remove what earlier writers left in `folder`, after `restore_interrupted`; for its owner as it begins."""
    restore_interrupted(folder)
    found = list(folder.glob(f"{TEMPORARY_PREFIX}*"))
    guard()  # after the look: what is removed was there while this process owned the folder, so it is no later owner's
    for item in found:
        gone = folder / f"{TEMPORARY_PREFIX}gone-{uuid.uuid4().hex[:8]}"
        with suppress(OSError):
            os.rename(item, gone)  # at once: a writer that wakes up meanwhile finds all of it or nothing
        remove(gone)


def discard(path: Path, *, guard: Guard = unguarded) -> None:
    """Remove a file or a folder where the guard allows it; what cannot be removed stays.

    It is moved into a temporary folder first, so that a process that was stopped after the guard moves nothing.
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
    """Remove a link or a pipe in the place of a file that is added to: one would be followed, the other waited for."""
    with suppress(FileNotFoundError):
        mode = file.lstat().st_mode
        if stat.S_ISLNK(mode) or stat.S_ISFIFO(mode):
            file.unlink()


def remove(path: Path) -> None:
    """Remove a file, a link (not what it leads to) or a folder with all in it, as far as that can be done."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
        return
    with suppress(OSError):
        path.unlink()
