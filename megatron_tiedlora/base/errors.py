"""The one error type that stands for a user's mistake, and values in its words: never long, never more than a line."""

from __future__ import annotations

import reprlib
from typing import TextIO

_LONGEST = 1200  # characters of a message


class UserError(ValueError):
    """A wrong input, told in one line that names the file, the value and the fix.

    Commands print its message without a traceback and exit with status 2. Whatever a broken file put into the message,
    it is one line without control characters, and of a very long one the middle is left out.

    Attributes:
        of_peer: whether another rank met it, and tells of it.
    """

    of_peer: bool = False

    def __init__(self, message: object) -> None:
        super().__init__(one_line(str(message)))


def one_line(text: str) -> str:
    """A text as one `printable` line, of which the middle is left out where it is very long."""
    return _cut(printable(_cut(text)))  # cut before too: a message of gigabytes is not gone through


def printable(text: str) -> str:
    """`text` as one line that is safe to print: new lines and all that a terminal would act on are escaped, letters of
    every script stay. Names and texts of files may be another user's."""
    return text if text.isprintable() else "".join(map(_printable, text))


def _printable(character: str) -> str:
    return character if character.isprintable() else character.encode("unicode_escape").decode()


def show(*lines: str, file: TextIO | None = None) -> None:
    """Print lines, each one `printable`, on `file` (default: standard output)."""
    print("\n".join(map(printable, lines)), file=file, flush=True)


def _cut(text: str) -> str:
    if len(text) <= _LONGEST:
        return text
    return f"{text[: _LONGEST * 2 // 3]} ... {text[-_LONGEST // 4 :]}"


class _Short(reprlib.Repr):
    """`repr` with an end: aliases of a YAML file can make a value larger than the machine's memory."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 3, 100, 100

    def repr_int(self, value: int, level: int) -> str:
        # Python refuses to write out whole numbers of more than 4,300 digits.
        return repr(value) if value.bit_length() <= 128 else f"a whole number of {value.bit_length()} bits"


def shown(value: object) -> str:
    """`repr(value)` for a message, cut short where it is long; of any value that a file can hold."""
    return _Short().repr(value)


def as_given(value: object) -> str:
    """`shown`, but a text stands without quotes, as it was typed."""
    return value if isinstance(value, str) else shown(value)
