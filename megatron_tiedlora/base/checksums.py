"""Checksums of files in the JSON beside them, which also has its own, so that damage and mix-ups are found before use.

They are not signatures: anyone who can change the files can change them too. Files that PEFT wrote have none.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron_tiedlora.base.errors import UserError, shown

FILES_FIELD = "sha256"  # {file name: SHA-256 of its bytes}
UNSEALED_NOTE = "its files have no checksums (PEFT wrote them), so that damage to them is not found"
SEAL_FIELD = "config_sha256"  # SHA-256 of the JSON's content without this field


def file_sha256(file: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal. Raises UserError if it cannot be read."""
    try:
        with file.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror or error})") from None


def sealed(content: Mapping[str, Any], *, files: Iterable[Path] = ()) -> dict[str, Any]:
    """Return `content`, a JSON object, with the checksums of `files` and its own."""
    whole = {**content, FILES_FIELD: {file.name: file_sha256(file) for file in files}}
    return {**whole, SEAL_FIELD: _seal(whole)}


def check_seal(file: Path, content: Mapping[str, Any]) -> dict[str, str]:
    """The checksums of files in a JSON object read from `file`; empty if PEFT wrote it, without any.

    Raises:
        UserError: the content has changed since it was written.
    """
    if FILES_FIELD not in content and SEAL_FIELD not in content:
        return {}
    sums = content.get(FILES_FIELD)
    if not isinstance(sums, dict) or not all(isinstance(value, str) for value in sums.values()):
        raise UserError(f"{file}: {FILES_FIELD} = {shown(sums)} is not a table of files and checksums; copy it again")
    if content.get(SEAL_FIELD) != _seal(content):
        raise UserError(f"{file}: does not match its own checksum: it was damaged or edited; copy it again")
    return sums


def check_file(file: Path, sums: Mapping[str, str], *, found: str | None = None) -> None:
    """Raise UserError if a file does not match the checksum for its name in `sums`, if there is one.

    Args:
        found: the file's checksum if it is known; otherwise the file is read.
    """
    wanted = sums.get(file.name)
    if wanted is not None and (file_sha256(file) if found is None else found) != wanted:
        raise UserError(f"{file}: does not match its checksum: it was damaged, or is another folder's; copy it again")


def _seal(content: Mapping[str, Any]) -> str:
    # Independent of spaces and order, so that a reformatted file still matches.
    rest = {name: value for name, value in content.items() if name != SEAL_FIELD}
    text = json.dumps(rest, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
