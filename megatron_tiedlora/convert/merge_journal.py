"""Which files of an unfinished merge are whole, so that the same command continues after it was killed.

The journal lies in the hidden folder in which the merge is written, and goes before that gets its name. It names a file
only when that is on the disk, with its size and the time of its last change. Files that were changed since then, and
all files of a merge of other inputs, are removed.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron_tiedlora.base.atomic import remove, write_json
from megatron_tiedlora.base.json_files import read_json_or_none
from megatron_tiedlora.base.version import __version__

JOURNAL = ".merge_journal.json"


class MergeJournal:
    """The journal of the merge that is written in `folder`. Opening it removes everything there but whole files."""

    def __init__(self, folder: Path, inputs: str) -> None:
        """`inputs` is the `fingerprint` of what is merged."""
        self._folder, self._inputs = folder, inputs
        found = read_json_or_none(folder / JOURNAL) or {}
        marks = found.get("whole") if found.get("inputs") == inputs else None
        self._marks = {
            name: mark
            for name, mark in (marks.items() if isinstance(marks, dict) else ())
            if mark is not None and mark == _mark(folder / name)
        }
        for item in folder.iterdir():
            if item.name not in self._marks:
                remove(item)
        self._write()

    def __contains__(self, name: str) -> bool:
        """Whether the file of this name is whole, so that it need not be written again."""
        return name in self._marks

    def add(self, name: str) -> None:
        """Note that a file is whole. It must be on the disk already, which may lose what was not flushed."""
        self._marks[name] = _mark(self._folder / name)
        self._write()

    def _write(self) -> None:
        write_json(self._folder / JOURNAL, {"inputs": self._inputs, "whole": self._marks})

    def close(self) -> None:
        """Remove the journal: all files are whole."""
        (self._folder / JOURNAL).unlink()


def fingerprint(record: Mapping[str, Any], files: Iterable[Path]) -> str:
    """Hash of what determines the bytes of a merge: a record of adapter, base and dtype, and the base's files."""
    found = [(file.name, _mark(Path(os.path.realpath(file)))) for file in files]
    text = json.dumps([__version__, record, found], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _mark(file: Path) -> list[int] | None:
    """Size and time of the last change of a regular file (not of what a link leads to). None if there is none.

    ctime changes with content, name and mode, and cannot be set as mtime can.
    """
    try:
        found = file.lstat()
    except (OSError, ValueError):
        return None
    return [found.st_size, found.st_ctime_ns] if stat.S_ISREG(found.st_mode) else None
