"""Decide how a job ended, by its run folder's status file; a launcher's exit status alone is not reliable."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_tiedlora.base.errors import one_line
from megatron_tiedlora.base.json_files import read_json_or_none
from megatron_tiedlora.base.ownership import OWNER_FILE, Token, owner_in_words, read_token
from megatron_tiedlora.runtime.run_folder import RunFolder

Stamp = tuple[int, int, int]
LATE_SECONDS = 3.0  # until a status that was written on another host is visible here
_SILENT_SECONDS = 25.0  # an owner that has not renewed its token for so long is dead; it does so every 10 seconds


@dataclass(frozen=True)
class Verdict:
    """The exit status of tiedlora run and the line that explains it.

    Attributes:
        state: of the run, as its status file says; '' if there is none of this start.
    """

    status: int
    line: str
    state: str = ""


class StatusFile:
    """run_status.json of this start; ranks remove an earlier one when they take the folder.

    Args:
        start: the START_ID of its ranks. What is written while the folder has another owner is not theirs.
    """

    def __init__(self, folder: RunFolder, start: str = "") -> None:
        self.folder, self._start = folder, start
        self._before, self.is_of_another = stamp(folder.status), False
        self._renewed: tuple[Stamp | None, float] = (None, 0.0)  # the owner's token, and when it was seen to change
        self._token()

    def _token(self) -> Token | None:
        """The owner's token if it is of this start."""
        token = read_token(self.folder.path / OWNER_FILE)
        if token is not None:  # of two owners the last one counts: this start takes a folder over, or loses it
            self.is_of_another = token.job != self._start
        return None if self.is_of_another else token

    def is_new(self) -> bool:
        """Whether this start has written the file."""
        self._token()
        return not self.is_of_another and stamp(self.folder.status) not in (None, self._before)

    def has_begun(self) -> bool:
        """Whether a rank of this start has taken the folder: the settings, the hosts and the model were right."""
        return self.is_new() or self._token() is not None

    def is_awaited(self) -> bool:
        """Whether a rank may still write it: it owns the folder, and is not known to be dead and not silent."""
        seen, now = stamp(self.folder.path / OWNER_FILE), time.monotonic()
        if seen != self._renewed[0]:
            self._renewed = seen, now
        is_owned = self._token() is not None and owner_in_words(self.folder.path) is not None
        return is_owned and now - self._renewed[1] < _SILENT_SECONDS

    def read(self) -> Mapping[str, Any] | None:
        """The file's content if this start has written it; None otherwise."""
        return read_json_or_none(self.folder.status) if self.is_new() else None

    def read_late(self, seconds: float) -> Mapping[str, Any] | None:
        """As `read`, but wait for a late file: NFS caches for a while that a file was missing."""
        limit = time.monotonic() + seconds
        while (content := self.read()) is None and time.monotonic() < limit and self.folder.path.is_dir():
            time.sleep(seconds / 10)
            with suppress(OSError):
                os.listdir(self.folder.path)  # makes NFS look again
        return content


def stamp(file: Path) -> Stamp | None:
    """What changes when a file is written or replaced; None if it is not there."""
    try:
        stat = file.stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_mtime_ns, stat.st_size


def judge(
    file: StatusFile, *, launcher: str, launcher_status: int, passed_on: int, late_seconds: float = LATE_SECONDS
) -> Verdict:
    """Status 0 if the run finished or was stopped by the signal that was passed on; else the launcher's status, or 1.

    Args:
        launcher_status: the launcher's exit status; -N if signal N killed it.
        passed_on: the signal that this command received, 0 for none.
        late_seconds: how long a status that is missing is waited for.
    """
    path = file.folder.path
    ended = f"{launcher} ended with {_in_words(launcher_status)}"
    failed = launcher_status if launcher_status > 0 else 128 - launcher_status if launcher_status else 1
    content = file.read() if launcher_status else file.read_late(late_seconds)
    if content is None:
        if not path.is_dir():
            why = f"{path} is not visible on this host: it was rejected, as the ranks say above, or is elsewhere"
        elif file.is_of_another:
            why = f"{path} belongs to another start"
        else:
            why = f"{path} does not say how this start ended"
        return Verdict(failed, f"{why}; {ended}")
    state, step, reason = content.get("state"), content.get("step"), content.get("reason")
    line = one_line(f"{path}: {state} at step {step} ({reason})")
    if state == "finished" or (state == "stopped" and passed_on):
        return Verdict(0, line, str(state))
    return Verdict(failed, f"{line}; {ended}", str(state))


def _in_words(status: int) -> str:
    if status >= 0:
        return f"status {status}"
    try:
        return signal.Signals(-status).name
    except ValueError:
        return f"signal {-status}"
