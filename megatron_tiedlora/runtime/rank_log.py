"""Each rank's log file in the run folder. Rank 0 also prints to the screen, the others only what they must report."""

import os
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any, TextIO, cast

from megatron_tiedlora.base.atomic import Guard, make_way_for_log, new_file, unguarded
from megatron_tiedlora.base.messages import UserError, show

LOGS_FOLDER = "logs"


class _Tee:
    """A text stream that also writes whole lines to a log; of a progress bar, only the last state of its line.

    Everything else that a stream can do, such as `isatty`, is delegated to the screen.
    """

    def __init__(self, screen: TextIO, log: TextIO) -> None:
        self._screen, self._log, self._line = screen, log, ""

    def write(self, text: str) -> int:
        """Write to the screen, and write complete lines to the log."""
        *lines, self._line = (self._line + text).split("\n")
        self._line = self._line.rpartition("\r")[2] if len(self._line) > 1 << 16 else self._line
        with suppress(OSError, ValueError):  # a full disk must not end the run because of a log line
            self._log.writelines(f"{line.rstrip(chr(13)).rpartition(chr(13))[2]}\n" for line in lines)
        try:
            self._screen.write(text)
        except OSError:
            self._leave_screen()
        return len(text)

    def flush(self) -> None:
        """Flush the screen; the log is written line by line."""
        try:
            self._screen.flush()
        except OSError:
            self._leave_screen()

    def _leave_screen(self) -> None:
        """The screen is gone, for example its ssh connection: do not fail, and continue the log."""
        with suppress(OSError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._screen.fileno())
            os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._screen, name)


class RankLog:
    """Where a rank's output goes: the screen, until `opened` sends it to the rank's file."""

    def __init__(self) -> None:
        self._log: TextIO | None = None
        self._screen: TextIO | None = None  # the screen of a rank whose output goes only to its log

    @contextmanager
    def opened(self, folder: Path, rank: int, *, guard: Guard = unguarded) -> Iterator[None]:
        """Inside, append the output to RUN/logs/rank_N.log; rank 0's output also goes to the screen.

        An earlier start's lines are copied into a new file, so that an earlier process that still runs cannot add to
        this start's log. Output of C libraries appears only on rank 0's screen. If the file cannot be written (a run
        folder that only rank 0 sees may be read-only elsewhere), nothing changes.
        """
        file = folder / LOGS_FOLDER / f"rank_{rank}.log"
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            make_way_for_log(file)
            if file.is_file():
                with new_file(file, guard=guard) as copy:
                    shutil.copyfile(file, copy)
            log = file.open("a", encoding="utf-8", errors="replace", buffering=1)
            now = time.strftime("%Y-%m-%d %H:%M:%S")
            log.write(f"--- {now} rank {rank} on {socket.gethostname()}, process {os.getpid()}\n")
        except (OSError, UserError):
            yield
            return
        self._log = log
        with log, self._teed(log) if rank == 0 else self._moved(log):
            yield

    def say(self, text: str) -> None:
        """Show `text` on the screen and write it to the log."""
        with suppress(OSError):  # the screen may be gone
            show(*text.split("\n"), file=sys.stderr)
        if self._screen is not None:
            with suppress(OSError):
                show(*text.split("\n"), file=self._screen)

    def note(self, text: str) -> None:
        """Write `text` to the log only; without a log it is lost."""
        if self._log is not None:
            with suppress(OSError, ValueError):  # closed already
                self._log.write(f"{text}\n")

    @contextmanager
    def _teed(self, log: TextIO) -> Iterator[None]:
        out, err = (cast("TextIO", _Tee(screen, log)) for screen in (sys.stdout, sys.stderr))
        with redirect_stdout(out), redirect_stderr(err):
            yield

    @contextmanager
    def _moved(self, log: TextIO) -> Iterator[None]:
        sys.stdout.flush()
        sys.stderr.flush()
        kept = [os.dup(number) for number in (1, 2)]
        for number in (1, 2):
            os.dup2(log.fileno(), number)
        try:
            with os.fdopen(os.dup(kept[1]), "w", encoding="utf-8", errors="replace") as self._screen:
                yield
        finally:
            self._screen = None
            sys.stdout.flush()
            sys.stderr.flush()
            for number, saved in zip((1, 2), kept, strict=True):
                os.dup2(saved, number)
                os.close(saved)
