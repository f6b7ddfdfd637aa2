"""Make a child process end with its parent, and limit the memory that a block of code may allocate."""

import ctypes
import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

_PARENT_DEATH_SIGNAL = 1  # Linux's prctl: PR_SET_PDEATHSIG


def end_with_parent(parent: int | None = None) -> None:
    """Ask the kernel to kill this process when its parent ends for any reason.

    Args:
        parent: the parent's process id. If the parent has already ended, this process exits with status 1.
    """
    ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, int(signal.SIGKILL))
    if parent is not None and os.getppid() != parent:
        os._exit(1)


@contextmanager
def limited(*, memory: int) -> Iterator[None]:
    """Let the `with` block allocate at most `memory` more bytes. A larger allocation raises MemoryError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = psutil.Process().memory_info().vms + memory
    lower = soft == resource.RLIM_INFINITY or most < soft
    if lower:
        resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    try:
        yield
    finally:
        if lower:
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
