"""Parts in processes of their own: one that hangs, crashes or breaks its device costs its own findings alone."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from gpu_checks.records import ERROR_FIX, Check, CheckOptions, read_checks

_POLL_SECONDS, _LAST_SECONDS = 0.2, 10.0
_LAST_WORDS = 2000  # characters of a part's output that may stand in a finding
_PARENT_DEATH_SIGNAL = 1  # Linux's prctl: PR_SET_PDEATHSIG
HANG_FIX = (
    "run this part alone with a larger --minutes; where it hangs again, look at its output in the report's folder"
)
STUCK_FIX = (
    "the driver holds this process, which cannot be killed: look at `dmesg` for lines with Xid; the GPU needs a reset,"
    " or the host a restart"
)


def run_part(part: str, options: CheckOptions, *, command: Sequence[str], hear: Callable[[Check], None]) -> list[Check]:
    """Run a part to its end or its time limit; returns its findings, the last of them a failure where it had no end.

    Args:
        options: its folder gets the part's findings and output.
        command: starts the part; the file for its findings is added.
        hear: called with each finding as it comes.
    """
    folder = Path(options.folder)
    file, log = folder / f"{part}.jsonl", folder / f"{part}.log"
    file.unlink(missing_ok=True)
    told: list[Check] = []

    def read_on() -> None:
        for check in read_checks(file)[len(told) :]:
            told.append(check)
            hear(check)

    started = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, str(file)],
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            while process.poll() is None and time.monotonic() - started < options.seconds:
                time.sleep(_POLL_SECONDS)
                read_on()
            hangs = process.poll() is None
        finally:
            is_gone = _end_session(process)
    read_on()
    seconds = round(time.monotonic() - started, 1)
    if hangs:
        fix = HANG_FIX if is_gone else STUCK_FIX
        expected, why = f"<= {options.seconds:.0f}", f"its last line: {_last_line(log)}"
        told.append(Check(part, "time limit", "fail", seconds, "s", expected, seconds, why, fix))
    elif process.returncode or not told:
        why = f"{_status_words(process.returncode)}; its last line: {_last_line(log)}"
        told.append(Check(part, "the part's process", "fail", seconds=seconds, why=why, fix=ERROR_FIX))
    else:
        return told
    hear(told[-1])
    return told


def python_command(script: Path, *arguments: str) -> list[str]:
    """This Python with a script."""
    return [sys.executable, str(script), *arguments]


def end_with_parent() -> None:
    """Let this process be killed when its parent dies, however that comes about: a GPU must not stay held."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, int(signal.SIGKILL))


def _end_session(process: subprocess.Popen[bytes]) -> bool:
    """End the process and all that it has started, politely at first where it still runs; whether it is gone."""
    if process.poll() is None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(_LAST_SECONDS)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):  # not while it is inside a driver that does not come back
        process.wait(_LAST_SECONDS)
    return process.poll() is not None


def _status_words(status: int | None) -> str:
    if not status:
        return "ended without a finding"
    if status < 0:
        return f"ended by {signal.Signals(-status).name}"
    return f"ended with status {status}"


def _last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace")[-_LAST_WORDS:].splitlines() if line.strip()]
    return lines[-1] if lines else "nothing"
