"""Files and folders that are there whole or not at all: written under a temporary name, synced, renamed."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from megatron_tiedlora.config.errors import UserError

TEMPORARY_PREFIX = ".writing-"


def sync_path(path: Path) -> None:
    """Flush a file's or a folder's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its name when the block ends well, replacing what was there.

    Killed at any point before, the folder at `path` is as it was; an error removes the temporary one.

    Raises:
        UserError: the disk is full or the place cannot be written, naming `path`.
    """
    temporary = path.parent / f"{TEMPORARY_PREFIX}{path.name}-{uuid.uuid4().hex[:8]}"
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for item in sorted(temporary.rglob("*")):
            sync_path(item)
        sync_path(temporary)
        if path.exists():
            # A folder cannot be renamed over a full one: step aside first. What a kill here leaves is found by its name.
            aside = path.parent / f"{TEMPORARY_PREFIX}old-{path.name}-{uuid.uuid4().hex[:8]}"
            os.rename(path, aside)
            os.rename(temporary, path)
            shutil.rmtree(aside, ignore_errors=True)
        else:
            os.rename(temporary, path)
        sync_path(path.parent)
    except (OSError, SafetensorError) as error:  # safetensors tells of a full disk by an error of its own
        shutil.rmtree(temporary, ignore_errors=True)
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be written ({reason}); nothing was changed") from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Replace a file's content at once. Raises UserError naming the file."""
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{path.name}-{uuid.uuid4().hex[:8]}")
    try:
        temporary.write_text(text, encoding="utf-8")
        sync_path(temporary)
        os.replace(temporary, path)
        sync_path(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written ({error.strerror or error}); nothing was changed") from error


def write_json(path: Path, content: Any) -> None:
    """Replace a JSON file at once. Raises UserError naming the file."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def remove_leftovers(folder: Path) -> None:
    """Remove what killed writers left in `folder`."""
    for item in folder.glob(f"{TEMPORARY_PREFIX}*"):
        if item.is_dir():
            shutil.rmtree(item, ignore_errors=True)
        else:
            item.unlink(missing_ok=True)
