"""Checksums of files, kept in the JSON beside them, which holds one of itself: damage and mix-ups are found before use.

They are no signatures: whoever can change the files can change them too. Files of versions that wrote none are read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron_tiedlora.base.errors import UserError, shown

FILES_FIELD = "sha256"  # {file name: SHA-256 of its bytes}
SEAL_FIELD = "config_sha256"  # of the JSON's content without this field


def file_sha256(file: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal. Raises UserError where it cannot be read."""
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error})") from None


def sealed(content: Mapping[str, Any], *, files: Iterable[Path] = ()) -> dict[str, Any]:
    """`content`, a JSON object, with the checksums of `files` and of itself."""
    whole = {**content, FILES_FIELD: {file.name: file_sha256(file) for file in files}}
    return {**whole, SEAL_FIELD: _seal(whole)}


def check_seal(file: Path, content: Mapping[str, Any]) -> dict[str, str]:
    """The checksums of files that a JSON object read from `file` holds; none where it is of a version without.

    Raises:
        UserError: the content is not the one that was written.
    """
    if FILES_FIELD not in content and SEAL_FIELD not in content:
        return {}
    sums = content.get(FILES_FIELD)
    if not isinstance(sums, dict) or not all(isinstance(value, str) for value in sums.values()):
        raise UserError(f"{file}: {FILES_FIELD} = {shown(sums)} is no table of files and checksums")
    if content.get(SEAL_FIELD) != _seal(content):
        raise UserError(f"{file}: does not fit its own checksum: it was damaged or edited; copy it again")
    return sums


def check_file(file: Path, sums: Mapping[str, str], *, found: str | None = None) -> None:
    """Raise UserError where a file is another one than the checksum for its name in `sums` (if there is one) says.

    Args:
        found: its checksum, where that is known; else it is read.
    """
    wanted = sums.get(file.name)
    if wanted is not None and (file_sha256(file) if found is None else found) != wanted:
        raise UserError(f"{file}: does not fit its checksum: it was damaged, or is another folder's; copy it again")


def _seal(content: Mapping[str, Any]) -> str:
    # Free of spaces and order, so that a file that was written out anew still fits.
    rest = {name: value for name, value in content.items() if name != SEAL_FIELD}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
