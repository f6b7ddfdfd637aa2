"""A folder for what a command writes: free, and in a place that can be written, before any work is done for it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from megatron_tiedlora.base.atomic import new_folder, remove_leftovers
from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.base.ownership import FolderLock, FolderTaken, take_folder
from megatron_tiedlora.base.paths import user_path


def check_place(path: Path, *, given: str) -> None:
    """Raise UserError, with the value `given` to --output_dir, where a folder `path` cannot be made or written."""
    place = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if not place.is_dir():
        raise UserError(f"--output_dir {given}: {place} is a file; give a folder")
    if not os.access(place, os.W_OK):
        raise UserError(f"--output_dir {given}: {place} cannot be written; give another folder")


def refuse_links(*folders: Path) -> None:
    """Raise UserError where a folder within --output_dir, into which is written, is a link or no folder.

    One that came from somebody else may hold links to anywhere. The folder that a user names may itself be one.
    """
    for folder in folders:
        if folder.is_symlink():
            raise UserError(
                f"{folder} is a link, so what is written there would lie outside of --output_dir; put a folder in its"
                " place, or move all of --output_dir to where the link leads"
            )
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder} is no folder, but a run writes files into it; remove it, or put the folder back")


_LONGEST_NAME = 240  # bytes


@dataclass(frozen=True)
class NewOutput:
    """A folder that one process makes, and that is at `path` whole or not at all.

    Until then it lies in PARENT/.NAME.partial, which the process owns: what a killed one has left there is removed by
    the next that makes the same output.
    """

    path: Path
    lock: FolderLock

    @property
    def partial(self) -> Path:
        """Where the output is made."""
        return self.lock.owner.folder

    @contextmanager
    def written(self) -> Iterator[Path]:
        """A temporary folder that becomes the output when the block ends well. Raises UserError where it cannot."""
        with new_folder(self.path, guard=self.guard, place=self.partial) as temporary:
            yield temporary

    def guard(self) -> None:
        """Raise UserError where another process has taken the output over, or where something is there."""
        self.lock.owner.check()
        refuse_existing(self.path, flag=str(self.path))

    def release(self) -> None:
        """Give the place back, and remove what was left of it."""
        with suppress(UserError):
            remove_leftovers(self.partial, guard=self.lock.owner.check)
        self.lock.release()


def take_output(path: Path, *, take_over: bool = False) -> NewOutput:
    """Become the one process that makes the output `path`.

    Raises:
        UserError: another process makes it, and `take_over` was not given; or it cannot be written.
    """
    partial = path.parent / _partial_name(path.name)
    hint = "wait for its end, give another folder, or take it over with --take_over"
    output = NewOutput(path, take_folder(partial, take_over=take_over, hint=hint, removed_after=True))
    remove_leftovers(partial, guard=output.lock.owner.check)
    return output


def _partial_name(name: str) -> str:
    """`.NAME.partial`, or a hash of the name in its place where that is too long for a file system."""
    if len(os.fsencode(name)) > _LONGEST_NAME:
        name = hashlib.sha256(os.fsencode(name)).hexdigest()[:16]
    return f".{name}.partial"


@contextmanager
def new_output(path: Path, *, take_over: bool = False) -> Iterator[Path]:
    """`take_output`, written and released: a temporary folder that is at `path` when the block ends well."""
    output = take_output(path, take_over=take_over)
    try:
        with output.written() as temporary:
            yield temporary
    finally:
        output.release()


def refuse_existing(path: Path, *, flag: str) -> None:
    """Raise UserError, with the flag and value that named it, where `path` holds anything."""
    if path.is_symlink() or (path.exists() and (not path.is_dir() or any(path.iterdir()))):
        raise UserError(f"{flag} exists; give a new folder")


def take_output_folder(given: str | None, *, parent: str, name: str, take_over: bool = False) -> NewOutput:
    """The folder `given` to --output_dir, which may be empty, or else the first free of PARENT/NAME, PARENT/NAME-2, ...

    Raises:
        UserError: it holds files, cannot be written, or another process makes it.
    """
    if given is not None:
        path = user_path(given)
        check_place(path, given=given)
        path = path.resolve() if path.is_dir() else path  # the folder of a link's own end
        if path.is_dir() and any(path.iterdir()):
            raise UserError(f"--output_dir {given} holds other files; give a new folder")
        refuse_existing(path, flag=f"--output_dir {given}")
        if os.path.ismount(path):
            raise UserError(f"--output_dir {given} is a mount point, which cannot be replaced; give a folder in it")
        check_place(path.parent, given=given)  # the output is made beside its place
        return take_output(path, take_over=take_over)
    path, number = Path(parent) / name, 2
    while True:
        if not os.path.lexists(path):
            check_place(path, given=str(path))
            with suppress(FolderTaken):
                return take_output(path)
        path, number = Path(parent) / f"{name}-{number}", number + 1
