"""Reads small text files; every failure is a one-line UserError. It imports little, since host probes load it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from megatron_tiedlora.base.errors import UserError

Value = TypeVar("Value")
LARGEST_TEXT = 2**24  # bytes; the weight index of the largest models has a tenth of that


def read_small_text(file: Path, *, kind: str = "text", largest: int = LARGEST_TEXT) -> str:
    """The text of an existing file that should be `kind`. Raises UserError naming the file if it is unreadable, not
    UTF-8, or too large."""
    try:
        with file.open("rb") as stream:
            raw = stream.read(largest + 1)
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error})") from None
    if len(raw) > largest:
        raise UserError(f"{file}: is larger than {largest:,} bytes, which is too large for {kind}")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        where = f"byte {raw[error.start]:#04x} at byte {error.start + 1}"
        raise UserError(f"{file}: not valid {kind} (not UTF-8: {where})") from None


def seen_late(read: Callable[[], Value | None], folder: Path, *, seconds: float) -> Value | None:
    """What `read` finds in `folder`, awaited for at most `seconds`: NFS caches for a while that a file was missing."""
    limit = time.monotonic() + seconds
    while (found := read()) is None and time.monotonic() < limit and folder.is_dir():
        time.sleep(seconds / 10)
        with suppress(OSError):
            os.listdir(folder)  # makes NFS look again
    return found
