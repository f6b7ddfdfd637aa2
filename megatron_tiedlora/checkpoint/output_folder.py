"""A folder for what a command writes: free, and in a place that can be written, before any work is done for it."""

from __future__ import annotations

import os
from pathlib import Path

from megatron_tiedlora.config.errors import UserError
from megatron_tiedlora.config.paths import user_path


def check_place(path: Path, *, given: str) -> None:
    """Raise UserError, with the value `given` to --output_dir, where a folder `path` cannot be made or written."""
    place = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if not place.is_dir():
        raise UserError(f"--output_dir {given}: {place} is a file; give a folder")
    if not os.access(place, os.W_OK):
        raise UserError(f"--output_dir {given}: {place} cannot be written; give another folder")


def refuse_links(*folders: Path) -> None:
    """Raise UserError where a folder within --output_dir, into which is written, is a link.

    One that came from somebody else may hold links to anywhere. The folder that a user names may itself be one.
    """
    for folder in folders:
        if folder.is_symlink():
            raise UserError(
                f"{folder} is a link, so what is written there would lie outside of --output_dir; put a folder in its"
                " place, or move all of --output_dir to where the link leads"
            )


def choose_output_folder(given: str | None, *, parent: str, name: str) -> Path:
    """The folder `given` to --output_dir, which may be empty, or else the first free of PARENT/NAME, PARENT/NAME-2, ...

    Raises:
        UserError: it holds files, or cannot be written.
    """
    if given is None:
        path, number = Path(parent) / name, 2
        while path.exists():
            path, number = Path(parent) / f"{name}-{number}", number + 1
        check_place(path, given=str(path))
        return path
    path = user_path(given)
    check_place(path, given=given)
    if path.is_dir() and any(path.iterdir()):
        raise UserError(f"--output_dir {given} holds other files; give a new folder")
    return path
