"""Folders and names in them: those of one user, and a command's output folder, which is checked to be free and writable
before any work is done."""

import hashlib
import itertools
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

from megatron_tiedlora.base.files import new_folder, remove_leftovers
from megatron_tiedlora.base.messages import UserError, bytes_in_words, user_path
from megatron_tiedlora.base.ownership import FolderLock, FolderTaken, take_folder

_LONGEST_PART = 80  # bytes of a name that becomes a part of a longer one


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


# Outputs of commands --------------------------------------------------------------------------------------------------


def nearest_existing(path: Path) -> Path:
    """The path itself, or the nearest of its parents that exists."""
    return next(parent for parent in (path, *path.absolute().parents) if parent.exists())


def check_writable(path: Path, *, given: str, flag: str = "--output_dir") -> None:
    """Raise UserError if the folder `path` cannot be created or written. `given` is the value of the flag."""
    existing = nearest_existing(path)
    if not existing.is_dir():
        raise UserError(f"{flag} {given}: {existing} is a file; give a folder")
    if not os.access(existing, os.W_OK):
        raise UserError(f"{flag} {given}: {existing} is not writable; give another folder")


def output_file(given: str, *, flag: str) -> Path:
    """The path of a file that a command writes at its end. Raises UserError if it could not be written."""
    path = user_path(given, flag=flag)
    if path.is_dir():
        raise UserError(f"{flag} {given}: is a folder; give a file")
    check_writable(path.parent, given=given, flag=flag)
    return path


def output_files(given: Mapping[str, str | None]) -> dict[str, Path]:
    """The paths of the files, by flag, that a command writes at its end; a flag that was left out has none.

    Raises:
        UserError: one could not be written, or two are the same file.
    """
    found = {flag: output_file(value, flag=flag) for flag, value in given.items() if value is not None}
    for (one, path), (other, same) in combinations(found.items(), 2):
        if path.resolve() == same.resolve():
            raise UserError(f"{one} and {other} both write {given[one]}; give two files")
    return found


def reject_links(*folders: Path) -> None:
    """Raise UserError if a subfolder of --output_dir that is written to is a link, or not a folder.

    A folder that came from somebody else may hold links to anywhere. The folder that a user names may be a link.
    """
    for folder in folders:
        if folder.is_symlink():
            raise UserError(
                f"{folder} is a link, so files written there would lie outside of --output_dir; replace it with a"
                " folder, or move all of --output_dir to the link's target"
            )
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder} is not a folder, but a run writes into it; remove it, or restore the folder")


LONGEST_NAME = 240  # bytes, so that what is put around a name still fits


@dataclass(frozen=True)
class NewOutput:
    """An output folder that one process writes. It appears at `path` complete or not at all.

    Until then it lies in PARENT/.NAME.partial, which the process owns. The next process that writes the same output
    removes what a killed one left there.

    Attributes:
        reject: raises an error if what is at `path` must not be replaced.
    """

    path: Path
    lock: FolderLock
    reject: Callable[[Path], None]

    @property
    def partial(self) -> Path:
        """The folder in which the output is written."""
        return self.lock.owner.folder

    @contextmanager
    def written(self) -> Iterator[Path]:
        """Yield a temporary folder that becomes the output when the block ends. Raises UserError if it cannot."""
        try:
            with new_folder(self.path, guard=self.guard, parent=self.partial) as temporary:
                yield temporary
        except UserError:  # such as a file that is gone, because another process took over the output
            self.lock.owner.check()
            raise

    def guard(self) -> None:
        """Raise UserError if another process has taken over the output, or what `reject` does."""
        self.lock.owner.check()
        self.reject(self.path)

    def release(self) -> None:
        """Give up the partial folder, and remove what is left in it."""
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
    """Become the one process that writes the output `path`.

    Args:
        resumes: see `take_folder`.
        reject: see `NewOutput`; default: nothing is replaced.
        hint: what a user can do if another process is writing it.

    Raises:
        FolderTaken: another process is writing it, and `take_over` is False.
        UserError: it is not writable.
    """
    folder = partial_folder(path)
    lock = take_folder(folder, resumes=resumes, take_over=take_over, hint=hint, removed_after=True)
    remove_leftovers(folder, guard=lock.owner.check)
    return NewOutput(path, lock, reject or partial(reject_existing, flag=str(path)))


def remove_abandoned_outputs(folder: Path) -> None:
    """Remove what killed processes have left of any output in `folder`."""
    for item in folder.glob(".*.partial"):
        with suppress(UserError):  # a process is at work there
            take_output(folder / item.name.removeprefix(".").removesuffix(".partial")).release()


def partial_folder(path: Path) -> Path:
    """The folder in which `path` is written: .NAME.partial, or a hash if the name is too long for a file system."""
    name = path.name
    if len(os.fsencode(name)) > LONGEST_NAME:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()[:16]
    return path.with_name(f".{name}.partial")


@contextmanager
def new_output(path: Path, *, take_over: bool = False) -> Iterator[Path]:
    """`take_output`, `written` and `release` in one: yield a temporary folder that becomes `path`."""
    output = take_output(path, take_over=take_over)
    try:
        with output.written() as temporary:
            yield temporary
    finally:
        output.release()


def reject_existing(path: Path, *, flag: str) -> None:
    """Raise UserError if `path` is anything but an empty folder. `flag` is the flag with its value, as given."""
    if path.is_symlink() or (path.exists() and (not path.is_dir() or any(path.iterdir()))):
        raise UserError(f"{flag} exists; give a new folder")


def require_room(folder: Path, needed: int, *, output: Path) -> None:
    """Raise UserError if the file system of the existing `folder` has no room for the `needed` bytes of `output`."""
    if (free := shutil.disk_usage(folder).free) < needed:
        there = f"only {bytes_in_words(free)} are free in its folder's file system"
        raise UserError(f"--output {output}: needs {bytes_in_words(needed)}, but {there}")


def take_output_folder(given: str | None, *, parent: str, name: str, take_over: bool = False) -> NewOutput:
    """Take the folder `given` to --output_dir, new or empty; without one, the first free of PARENT/NAME, NAME-2, ...

    Raises:
        UserError: it holds files, is not writable, or another process is writing it.
    """
    if given is not None:
        path = user_path(given)
        check_writable(path, given=given)
        path = path.resolve() if path.is_dir() else path  # the target of a link
        if path.is_dir() and any(path.iterdir()):
            raise UserError(f"--output_dir {given} holds other files; give a new folder")
        reject_existing(path, flag=f"--output_dir {given}")
        if os.path.ismount(path):
            raise UserError(f"--output_dir {given} is a mount point, which cannot be replaced; give a folder in it")
        check_writable(path.parent, given=given)  # the output is written beside it first
        return take_output(path, take_over=take_over)
    paths = numbered(Path(parent) / name)
    while True:
        path = next(one for one in paths if not os.path.lexists(one))
        check_writable(path, given=str(path))
        with suppress(FolderTaken):
            return take_output(path)
