"""Commands that run inside fake hosts, seen from outside."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil

BOOT_LIMIT = 20.0  # seconds; a host is up in a tenth of one


class Started:
    """A command that was started inside a host; its output goes to the file `out`."""

    def __init__(self, host: str, command: list[str], process: subprocess.Popen[bytes], out: Path) -> None:
        self.host, self.command, self.out, self._process = host, command, out, process

    def poll(self) -> int | None:
        """The exit status, minus the signal that killed it; None while it runs."""
        return self._process.poll()

    def wait(self, limit: float = 60.0) -> int:
        """The exit status; a command that runs longer than `limit` seconds is killed and fails the test."""
        try:
            return self._process.wait(limit)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(
                f"a hang after {limit:.0f} s: {self.host}: {self.command}\n{self.output()[-4000:]}"
            ) from None

    @property
    def pid(self) -> int:
        """The command's process, as the machine numbers it."""
        return psutil.Process(self._process.pid).children()[0].pid

    def signal(self, number: int) -> None:
        """Send a signal to the command itself."""
        os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL to the command itself, if it still runs."""
        if self.poll() is None:
            with suppress(ProcessLookupError, psutil.NoSuchProcess):
                self.signal(signal.SIGKILL)
            self._process.wait(10)

    def output(self) -> str:
        """What it has printed so far, errors included."""
        return self.out.read_text(errors="replace")


def wait_until(
    condition: Callable[[], object], what: str | Callable[[], object], *, limit: float = BOOT_LIMIT, pause: float = 0.05
) -> float:
    """Wait until `condition()`; returns the seconds. Failing to come true in time fails the test."""
    started = time.monotonic()
    while not condition():
        if time.monotonic() - started > limit:
            raise AssertionError(f"waited {limit:.0f} s for {what if isinstance(what, str) else what()}")
        time.sleep(pause)
    return time.monotonic() - started
