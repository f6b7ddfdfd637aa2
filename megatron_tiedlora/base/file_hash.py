"""The hash of a file's content."""

from __future__ import annotations

import hashlib
from pathlib import Path

from megatron_tiedlora.base.errors import UserError


def file_sha256(file: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal. Raises UserError if it cannot be read."""
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error})") from None
