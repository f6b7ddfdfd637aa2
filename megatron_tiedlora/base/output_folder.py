"""Choose and create the cache folder of a user and the output folders of commands. Before a command does any work, it
checks that its output folder is free and writable."""

import hashlib
import itertools
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megatron_tiedlora.base.files import new_folder, remove_leftovers
from megatron_tiedlora.base.messages import UserError, bytes_in_words, user_path
from megatron_tiedlora.base.ownership import FolderLock, FolderTaken, take_folder

_LONGEST_PART = 80  # the maximum bytes of a name that is used inside a longer name


@dataclass(frozen=True)
class PathIn:
    """A descriptor that returns a path inside an instance's folder `path`: `NAME = PathIn("name")`."""

    name: str

    def __get__(self, owner: Any, kind: type | None = None) -> Path:
        path: Path = owner.path
        return path / self.name


def last_name(given: str) -> str:
    """Return the last component of a path or a Hub id, for use in a folder's name. A very long name is shortened."""
    name = given.rstrip("/").rsplit("/", 1)[-1]
    raw = os.fsencode(name)
    return name if len(raw) <= _LONGEST_PART else raw[:_LONGEST_PART].decode(errors="ignore")


def numbered(path: Path) -> Iterator[Path]:
    """Yield the paths PATH, PATH-2, PATH-3 and so on, without an end."""
    yield path
    yield from (path.with_name(f"{path.name}-{number}") for number in itertools.count(2))


CACHE_VARIABLE = "MEGATRON_TIEDLORA_CACHE"


def user_cache() -> Path:
    """Return this user's cache folder for downloads and converted models. It may not exist yet.

    The folder is `$MEGATRON_TIEDLORA_CACHE` if this is set, and otherwise `~/.cache/megatron_tiedlora`.
    """
    configured = os.environ.get(CACHE_VARIABLE)
    return user_path(configured).absolute() if configured else Path.home() / ".cache" / "megatron_tiedlora"


def make_own_folder(path: Path, *, mode: int = 0o755) -> None:
    """Create a folder and its parents. Users outside its group cannot write there. An existing folder is unchanged.

    Raises:
        UserError: the folder exists and is writable by anyone.
        OSError: the folder cannot be created.
    """
    path.mkdir(mode=mode & ~stat.S_IWOTH, parents=True, exist_ok=True)
    if path.stat().st_mode & stat.S_IWOTH:
        raise UserError(f"{path}: is writable by anyone, so its files cannot be trusted; run chmod o-w on it")


def make_private_folder(path: Path) -> None:
    """Create a private folder with a predictable name inside a shared folder, such as the temporary folder.

    Raises:
        UserError: the path is a link, belongs to another user, or is writable by anyone.
        OSError: the folder cannot be created.
    """
    path.mkdir(mode=0o700, exist_ok=True)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & stat.S_IWOTH:
        raise UserError(f"{path}: is not a private folder of this user, so its content is not trusted; remove it")


# Outputs of commands --------------------------------------------------------------------------------------------------


def nearest_existing(path: Path) -> Path:
    """Return the path itself if it exists, and otherwise its nearest existing parent."""
    return next(parent for parent in (path, *path.absolute().parents) if parent.exists())


def check_writable(path: Path, *, given: str, flag: str = "--output_dir") -> None:
    """Raise UserError if the folder `path` cannot be created or is not writable. `given` is the value of the flag."""
    existing = nearest_existing(path)
    if not existing.is_dir():
        raise UserError(f"{flag} {given}: {existing} is a file; give a folder")
    if not os.access(existing, os.W_OK):
        raise UserError(f"{flag} {given}: {existing} is not writable; give another folder")


def output_file(given: str, *, flag: str) -> Path:
    """Return the path of a file that a command writes when it finishes. Raise UserError if it is not writable."""
    path = user_path(given, flag=flag)
    if path.is_dir():
        raise UserError(f"{flag} {given}: is a folder; give a file")
    check_writable(path.parent, given=given, flag=flag)
    return path


def reject_links(*folders: Path) -> None:
    """Raise UserError if one of these subfolders of --output_dir is a link or not a folder.

    A folder from another person may contain links to any place. The folder --output_dir itself may be a link.
    """
    for folder in folders:
        if folder.is_symlink():
            raise UserError(
                f"{folder} is a link, so files written there would be outside of --output_dir; replace it with a"
                " folder, or move all of --output_dir to the link's target"
            )
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder} is not a folder, but a run writes into it; remove it, or restore the folder")


LONGEST_NAME = 240  # the maximum bytes of a name to which a prefix and a suffix are added


@dataclass(frozen=True)
class NewOutput:
    """An output folder that one process writes. It appears at `path` only when it is complete.

    Until then the files are in PARENT/.NAME.partial, which only this process may change. If this process is killed, the
    next process that writes the same output removes these files.

    Attributes:
        reject: a function that raises an error if the content of `path` must not be replaced.
    """

    path: Path
    lock: FolderLock
    reject: Callable[[Path], None]

    @property
    def partial(self) -> Path:
        """Return the folder in which the output is written."""
        return self.lock.owner.folder

    @contextmanager
    def written(self) -> Iterator[Path]:
        """Yield a temporary folder that becomes the output at the end of the block. Raise UserError if this fails."""
        try:
            with new_folder(self.path, guard=self.guard, parent=self.partial) as temporary:
                yield temporary
        except UserError:  # for example a missing file, because another process took over the output
            self.lock.owner.check()
            raise

    def guard(self) -> None:
        """Raise UserError if another process has taken over the output. Also call `reject`, which may raise."""
        self.lock.owner.check()
        self.reject(self.path)

    def release(self) -> None:
        """Release the partial folder and remove its remaining files."""
        with suppress(UserError):
            remove_leftovers(self.partial, guard=self.lock.owner.check)
        self.lock.release()


def take_output(
    path: Path,
    *,
    take_over: bool = False,
    resumes: bool = False,
    reject: Callable[[Path], None] | None = None,
    hint: str = "wait until it ends, give another folder, or take this one over with --take_over",
) -> NewOutput:
    """Make this process the only one that writes the output `path`.

    Args:
        resumes: as in `take_folder`.
        reject: as in `NewOutput`; by default only an empty folder is replaced.
        hint: what the user can do if another process is writing the output.

    Raises:
        FolderTaken: another process is writing the output, and `take_over` is False.
        UserError: the output is not writable.
    """
    folder = partial_folder(path)
    lock = take_folder(folder, resumes=resumes, take_over=take_over, hint=hint, removed_after=True)
    remove_leftovers(folder, guard=lock.owner.check)
    return NewOutput(path, lock, reject or partial(reject_existing, flag=str(path)))


def remove_abandoned_outputs(folder: Path) -> None:
    """Remove the partial outputs that killed processes have left in `folder`."""
    for item in folder.glob(".*.partial"):
        with suppress(UserError):  # another process is writing there
            take_output(folder / item.name.removeprefix(".").removesuffix(".partial")).release()


def partial_folder(path: Path) -> Path:
    """Return the folder .NAME.partial, in which `path` is written. A hash replaces a name that is too long."""
    name = path.name
    if len(os.fsencode(name)) > LONGEST_NAME:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()[:16]
    return path.with_name(f".{name}.partial")


@contextmanager
def new_output(path: Path, *, take_over: bool = False) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path` at the end of the block. See `take_output` for the errors."""
    output = take_output(path, take_over=take_over)
    try:
        with output.written() as temporary:
            yield temporary
    finally:
        output.release()


def reject_existing(path: Path, *, flag: str) -> None:
    """Raise UserError if `path` exists and is not an empty folder. `flag` is the flag with its value, as given."""
    if path.is_symlink() or (path.exists() and (not path.is_dir() or any(path.iterdir()))):
        raise UserError(f"{flag} exists; give a new folder")


def require_room(folder: Path, needed: int, *, output: Path) -> None:
    """Raise UserError if the file system of the existing `folder` has no space for the `needed` bytes of `output`."""
    if (free := shutil.disk_usage(folder).free) < needed:
        there = f"only {bytes_in_words(free)} are free in its folder's file system; free some space"
        raise UserError(f"--output {output}: needs {bytes_in_words(needed)}, but {there}")


def take_output_folder(given: str | None, *, parent: str, name: str, take_over: bool = False) -> NewOutput:
    """Make this process the owner of the --output_dir `given`, which must be new or empty. Without --output_dir, use
    the first free folder of PARENT/NAME, PARENT/NAME-2 and so on.

    Raises:
        UserError: the folder contains files, is not writable, or is being written by another process.
    """
    if given is not None:
        path = user_path(given)
        check_writable(path, given=given)
        path = path.resolve() if path.is_dir() else path  # a link is followed to its target
        if path.is_dir() and any(path.iterdir()):
            raise UserError(f"--output_dir {given} holds other files; give a new folder")
        reject_existing(path, flag=f"--output_dir {given}")
        if os.path.ismount(path):
            raise UserError(f"--output_dir {given} is a mount point, which cannot be replaced; give a folder in it")
        check_writable(path.parent, given=given)  # the output is first written in the parent folder
        return take_output(path, take_over=take_over)
    paths = numbered(Path(parent) / name)
    while True:
        path = next(one for one in paths if not os.path.lexists(one))
        check_writable(path, given=str(path))
        with suppress(FolderTaken):
            return take_output(path)
