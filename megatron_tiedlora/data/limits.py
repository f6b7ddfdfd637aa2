"""A memory limit for libraries that read an untrusted file.

The kernel enforces it, so it also holds inside a library's own code. Use it only before the process group is set up:
it counts the memory of the whole process, so allocations of other threads could fail too.
"""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager

import psutil


@contextmanager
def limited(*, memory: int) -> Iterator[None]:
    """Let the block allocate at most `memory` further bytes. Raises MemoryError if it allocates more."""
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
