"""The one error type for a user's mistake, and how values are shown in its message: short and on one line."""

from __future__ import annotations

import reprlib
from collections.abc import Iterator
from contextlib import contextmanager
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
    return text if text.isprintable() else "".join(map(_printable, text))


def _printable(character: str) -> str:
    return character if character.isprintable() else character.encode("unicode_escape").decode()


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
