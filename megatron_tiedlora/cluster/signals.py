"""Note the signals that tell a command to stop what it has started."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from types import FrameType
from typing import Any


class StopSignals:
    """Inside `with`, record SIGINT, SIGTERM and `more` in the order of their arrival, and do nothing else with them.

    SIGHUP (the terminal has closed) counts as SIGTERM, unless it is ignored, as under nohup.
    """

    def __init__(self, more: Sequence[int] = ()) -> None:
        self._numbers = (signal.SIGINT, signal.SIGTERM, *more)
        self.received: list[int] = []
        self._before: dict[int, Any] = {}
        self._terminals: list[int] = []

    def __enter__(self) -> StopSignals:
        ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        self._terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]
        for number in (*self._numbers, *(() if ignored else (signal.SIGHUP,))):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            self._leave_terminals()
        self.received.append(int(signal.SIGTERM) if number == signal.SIGHUP else number)

    def _leave_terminals(self) -> None:
        """Discard what is printed from now on: printing to a closed terminal would be an error."""
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for descriptor in self._terminals:
            os.dup2(nowhere, descriptor)
        os.close(nowhere)
