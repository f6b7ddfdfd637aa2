"""Check whether hosts share a folder: one writes a token to a file there, the others read it, and it is removed.

python -m megatron_tiedlora.cluster.doctor.shared write FILE TOKEN SECONDS    until its standard input ends
python -m megatron_tiedlora.cluster.doctor.shared read FILE TOKEN SECONDS
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


def write(path: str, token: str) -> None:
    """Write the file, report it, and remove it when the standard input ends or a signal tells this process to end."""
    for number in (signal.SIGALRM, signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, _leave)
    try:
        file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
    except OSError as error:
        _say(error.strerror or str(error))
        return
    try:
        try:
            with open(file, "w") as writer:
                writer.write(token)
        except OSError as error:  # a full disk may accept the name but no content
            _say(error.strerror or str(error))
            return
        _say(WRITTEN)
        sys.stdin.read()
    finally:
        with suppress(FileNotFoundError):
            os.unlink(path)


def read(path: str, token: str, seconds: float) -> None:
    """Report whether the token can be read there within `seconds`; a network file system may show it late."""
    limit = time.monotonic() + seconds
    while not _holds(path, token) and time.monotonic() < limit:
        with suppress(OSError):
            os.listdir(os.path.dirname(path))  # asks the server again
        time.sleep(_LOOK_SECONDS)
    _say(SEEN if _holds(path, token) else NOT_SEEN)


def _holds(path: str, token: str) -> bool:
    with suppress(OSError), open(path, "rb") as file:
        return file.read(len(token) + 1) == token.encode()
    return False


def _say(word: str) -> None:
    print(f"{SHARED_MARK}{word}", flush=True)


def _leave(_number: int, _frame: object) -> NoReturn:
    sys.exit(1)


def main() -> None:
    """Run the command that the command line names."""
    what, path, token, seconds = *sys.argv[1:4], float(sys.argv[4])
    if what == "write":
        signal.alarm(math.ceil(seconds))
        write(path, token)
    else:
        read(path, token, seconds)


if __name__ == "__main__":
    main()
