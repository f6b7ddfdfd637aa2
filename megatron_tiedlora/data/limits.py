"""A limit of memory for what a stranger's file makes libraries do.

It is the kernel's, so that it also holds inside of a library's own code. It is for the time before ranks meet: memory
is counted for the whole process, and another thread that asked for much meanwhile would be rejected too.
"""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager

import psutil


@contextmanager
def limited(*, memory: int) -> Iterator[None]:
    """Let the block ask for at most `memory` further bytes. Raises MemoryError where it asks for more."""
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
