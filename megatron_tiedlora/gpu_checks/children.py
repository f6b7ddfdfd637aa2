"""Run each part in its own process: a part that hangs, crashes or breaks its device only loses its own findings."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from megatron_tiedlora.gpu_checks.records import ERROR_FIX, Check, CheckOptions, read_checks

_POLL_SECONDS = 0.2
_LAST_WORDS = 2000  # characters at the end of a part's output that are searched for its last line
HANG_FIX = "run this part alone with a larger --minutes; if it hangs again, see its output in the report's folder"
STUCK_FIX = (
    "this process hangs in the driver and cannot be killed: look for lines with Xid in `dmesg`; reset the GPU or"
    " restart the host"
)


def run_part(
    part: str,
    options: CheckOptions,
    *,
    command: Sequence[str],
    hear: Callable[[Check], None],
    end_seconds: float = 10.0,
) -> list[Check]:
    """Run a part to its end or its time limit; returns its findings, with a failure at the end if it did not finish.

    Args:
        options: their folder gets the part's findings and output.
        command: starts the part; the file for its findings is appended.
        hear: called with each finding as it comes.
        end_seconds: how long a process may take to end after SIGTERM, and again after SIGKILL.
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
            is_gone = _end_session(process, end_seconds)
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


def _end_session(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """End the process and all that it has started, first with SIGTERM; returns whether it has ended."""
    if process.poll() is None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):  # a process that hangs in the driver does not end
        process.wait(seconds)
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
