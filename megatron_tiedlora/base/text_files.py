"""Small text files, with every way to fail told in one line. Imports little, since hosts are asked by what does."""

from __future__ import annotations

from pathlib import Path

from megatron_tiedlora.base.errors import UserError

LARGEST_TEXT = 2**24  # bytes; the index of the largest models has a tenth of that


def read_small_text(file: Path, *, kind: str = "text", largest: int = LARGEST_TEXT) -> str:
    """The text of a file that is there and should be `kind`. Raises UserError naming it: unreadable, not UTF-8, or of
    absurd size."""
    try:
        with file.open("rb") as stream:
            raw = stream.read(largest + 1)
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error})") from None
    if len(raw) > largest:
        raise UserError(f"{file}: is larger than {largest:,} bytes, which no such file is")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        where = f"byte {raw[error.start]:#04x} at byte {error.start + 1}"
        raise UserError(f"{file}: not valid {kind} (not UTF-8: {where})") from None
