"""Whether hosts see the same folder: one writes a small file there, the others look for it, and it is removed.

python -m megatron_tiedlora.cluster.doctor.shared write FILE SECONDS    until its standard input ends
python -m megatron_tiedlora.cluster.doctor.shared read FILE SECONDS
"""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from contextlib import suppress
from typing import NoReturn

SHARED_MARK = "doctor-shared "
WRITTEN, SEEN, NOT_SEEN = "written", "seen", "not seen"
FILE_PREFIX = ".doctor-"
_LOOK_SECONDS = 0.2


def write(path: str) -> None:
    """Make the file, say so, and remove it when nobody listens any more or this process is told to end."""
    for number in (signal.SIGALRM, signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, _leave)
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except OSError as error:
        _say(error.strerror or str(error))
        return
    try:
        _say(WRITTEN)
        sys.stdin.read()
    finally:
        with suppress(FileNotFoundError):
            os.unlink(path)


def read(path: str, seconds: float) -> None:
    """Say whether the file comes to be seen; a network file system may show it late."""
    limit = time.monotonic() + seconds
    while not os.path.exists(path) and time.monotonic() < limit:
        with suppress(OSError):
            os.listdir(os.path.dirname(path))  # asks the server anew
        time.sleep(_LOOK_SECONDS)
    _say(SEEN if os.path.exists(path) else NOT_SEEN)


def _say(word: str) -> None:
    print(f"{SHARED_MARK}{word}", flush=True)


def _leave(_number: int, _frame: object) -> NoReturn:
    sys.exit(1)


def main() -> None:
    """Do what the command line says."""
    what, path, seconds = sys.argv[1], sys.argv[2], float(sys.argv[3])
    if what == "write":
        signal.alarm(math.ceil(seconds))
        write(path)
    else:
        read(path, seconds)


if __name__ == "__main__":
    main()
