"""Limits of memory and of a processor's time, for what a stranger's file makes libraries do.

The limits are the kernel's, so that they also hold inside of a library's own code. They are for the time before ranks
meet: memory is counted for the whole process, and another thread that asked for much meanwhile would be refused too.
"""

from __future__ import annotations

import resource
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType

import psutil

_LOOK_AGAIN = 0.1  # seconds of a processor


@contextmanager
def limited(*, memory: int, seconds: float | None = None) -> Iterator[None]:
    """Let the block ask for at most `memory` further bytes, and take `seconds` of this thread's processor time.

    The time is looked at between two steps of Python and in long loops of `re` and of whole numbers: one call of
    another built-in function ends first, however long it takes with the memory that it has. Only the main thread can be
    limited in time.

    Raises:
        MemoryError: it asked for more memory.
        TimeoutError: it took longer.
    """
    with ExitStack() as stack:
        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        most = psutil.Process().memory_info().vms + memory
        if soft == resource.RLIM_INFINITY or most < soft:
            stack.callback(resource.setrlimit, resource.RLIMIT_AS, (soft, hard))
            resource.setrlimit(resource.RLIMIT_AS, (most, hard))
        if seconds is not None and threading.current_thread() is threading.main_thread():
            stack.enter_context(_timed(seconds))
        yield


@contextmanager
def _timed(seconds: float) -> Iterator[None]:
    end, armed = time.thread_time() + seconds, True

    def look(_number: int, _frame: FrameType | None) -> None:
        if armed and time.thread_time() >= end:  # the timer also counts other threads
            raise TimeoutError

    # The timer of processor time: that of real time is used by others (pytest-timeout), and may end an honest template
    # on a busy machine. It fires again and again, as a library may swallow an exception.
    before = signal.signal(signal.SIGPROF, look)
    left, interval = signal.setitimer(signal.ITIMER_PROF, seconds, _LOOK_AGAIN)
    try:
        try:
            yield
        finally:
            armed = False
    finally:
        signal.setitimer(signal.ITIMER_PROF, left, interval)
        signal.signal(signal.SIGPROF, before)
