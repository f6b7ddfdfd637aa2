"""The one error type for a user's mistake, how values are shown in its message (short and on one line), and the screen.

Each module of the library logs under the name `megatron_tiedlora`, and a command shows these messages on stderr. A
program that uses the library as a package gets them by Python's `logging` alone, as it configures it.
"""

from __future__ import annotations

import logging
import reprlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

_LONGEST = 1200  # characters of a message


class UserError(ValueError):
    """A wrong input, described in one line that names the file, the value and the fix.

    Commands print the message without a traceback and exit with status 2. The message is always one line without
    control characters, even if a broken file supplied a part of it. The middle of a very long one is left out.

    Attributes:
        of_peer: whether another rank found it, and reports it.
    """

    of_peer: bool = False

    def __init__(self, message: object) -> None:
        super().__init__(one_line(str(message)))


def named(name: str, line: str) -> str:
    """A line about an adapter; it begins with its name, unless that is "", of the only one."""
    return f"{name}: {line}" if name else line


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Inside, a `UserError` says which adapter it is of; "" adds nothing."""
    try:
        yield
    except UserError as error:
        if not name:
            raise
        told = UserError(named(name, str(error)))
        told.of_peer = error.of_peer
        raise told from None


def one_line(text: str) -> str:
    """A text as one `printable` line. The middle of a very long one is left out."""
    return _cut(printable(_cut(text)))  # shortened first, so that `printable` never goes through gigabytes


def printable(text: str) -> str:
    """`text` as one line that is safe to print, since names and contents of files may be another user's. New lines and
    control characters are escaped. Letters of every script stay."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


def show(*lines: str, file: TextIO | None = None) -> None:
    """Print lines to `file` (default: standard output), each made `printable`."""
    print("\n".join(printable(line) for line in lines), file=file, flush=True)


def _cut(text: str) -> str:
    if len(text) <= _LONGEST:
        return text
    return f"{text[: _LONGEST * 2 // 3]} ... {text[-_LONGEST // 4 :]}"


class _Short(reprlib.Repr):
    """A `repr` of bounded length: aliases in a YAML file can make a value larger than the machine's memory."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 3, 100, 100

    def repr_int(self, value: int, level: int) -> str:
        # Python raises ValueError for integers of more than 4,300 digits.
        return repr(value) if value.bit_length() <= 128 else f"an integer of {value.bit_length()} bits"


def shown(value: object) -> str:
    """`repr(value)` for a message, shortened if it is long. It works for any value that a file can hold."""
    return _Short().repr(value)


def as_given(value: object) -> str:
    """Like `shown`, but a string is returned without quotes, as the user typed it."""
    return value if isinstance(value, str) else shown(value)


class _OnStderr(logging.Handler):
    """Shows messages as plain lines on what is sys.stderr at that time, since a rank's log replaces it."""

    def emit(self, record: logging.LogRecord) -> None:
        """Show one message; a screen that is gone changes nothing."""
        with suppress(OSError):
            show(*self.format(record).split("\n"), file=sys.stderr)


def show_messages() -> None:
    """Show the library's messages from level INFO on. Commands call this; a second call changes nothing."""
    logger = logging.getLogger("megatron_tiedlora")
    if not any(isinstance(handler, _OnStderr) for handler in logger.handlers):
        logger.addHandler(_OnStderr())
        logger.setLevel(logging.INFO)
        logger.propagate = False  # absl and DeepSpeed put handlers of their own on the root logger
