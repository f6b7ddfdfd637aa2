"""What a child process does first."""

from __future__ import annotations

import ctypes
import os
import signal

_PARENT_DEATH_SIGNAL = 1  # Linux's prctl: PR_SET_PDEATHSIG


def end_with_parent(parent: int | None = None) -> None:
    """Have the kernel kill this process when its parent ends for any reason.

    Args:
        parent: the parent's process id; if it has ended already, this process ends now.
    """
    ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, int(signal.SIGKILL))
    if parent is not None and os.getppid() != parent:
        os._exit(1)


def leave_signals_to_parent() -> None:
    """Ignore what a terminal or a scheduler sends to a whole group of processes: the parent decides what it means."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
