"""Define `UserError`, format values, sizes, times, names and tables as text, and print messages.

Each module of the library logs under the name `megatron_tiedlora`. A command shows these messages on stderr. In a
program that imports the library, the program's own `logging` configuration decides what is shown.
"""

import csv
import difflib
import io
import logging
import os
import reprlib
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import zip_longest
from pathlib import Path
from typing import Any, TextIO, TypeVar

_LONGEST = 1200  # characters of a message
_LONGEST_FILE_NAME, _LONGEST_PATH = 255, 4000  # limits in bytes on Linux


class UserError(ValueError):
    """An error in the user's input. Its message is one line with the file, the value and the fix.

    Commands print the message without a traceback and exit with status 2. The message is always one line without
    control characters, even if it quotes a broken file. The middle of a very long message is replaced by "...".

    Attributes:
        of_peer: whether another rank found the error and will report it.
    """

    of_peer: bool = False

    def __init__(self, message: object) -> None:
        super().__init__(one_line(str(message)))


def named(name: str, line: str) -> str:
    """Return the message `line` after the name of its adapter or file. An empty name adds nothing."""
    return f"{name}: {line}" if name else line


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Add the name of an adapter or a file to the message of a `UserError` in the block. An empty name adds nothing."""
    try:
        yield
    except UserError as error:
        error.args = (one_line(named(name, str(error))),)
        raise


@contextmanager
def os_errors(said: str, *, fix: str = "", kinds: tuple[type[Exception], ...] = (OSError,)) -> Iterator[None]:
    """Convert an error of `kinds` in the block into a `UserError` with the text `said`, its reason, and `fix`."""
    try:
        yield
    except kinds as error:
        raise UserError(f"{said} ({getattr(error, 'strerror', None) or error}){fix}") from None


@contextmanager
def library_errors(said: str, *, fix: str = "") -> Iterator[None]:
    """Convert any error of a library that reads a broken file into a `UserError`, as `os_errors` does. Ctrl-C,
    SystemExit and the signal that stops a run are not converted."""
    try:
        yield
    except UserError:
        raise
    except BaseException as error:  # a corrupt file raises anything from KeyError to a Rust panic
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise UserError(f"{said} ({first_line(error)}){fix}") from error


def one_line(text: str) -> str:
    """Return a text as one `printable` line. The middle of a very long text is replaced by "..."."""
    return _cut(printable(_cut(text)))  # shortened first, so that `printable` never reads gigabytes


def printable(text: str) -> str:
    """Return `text` as one line that is safe to print, even if it comes from another user's file. Line breaks and
    control characters are escaped. Letters of all scripts are unchanged."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


def show(*lines: str, file: TextIO | None = None) -> None:
    """Print `printable` copies of the lines to `file` (default: standard output)."""
    print("\n".join(printable(line) for line in lines), file=file, flush=True)


def _cut(text: str) -> str:
    if len(text) <= _LONGEST:
        return text
    return f"{text[: _LONGEST * 2 // 3]} ... {text[-_LONGEST // 4 :]}"


class _Short(reprlib.Repr):
    """A `repr` of limited length. Aliases in a YAML file can make a value larger than the machine's memory."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 3, 100, 100

    def repr_int(self, value: int, level: int) -> str:
        # Python raises ValueError for integers of more than 4,300 digits.
        return repr(value) if value.bit_length() <= 128 else f"an integer of {value.bit_length()} bits"


def shown(value: object) -> str:
    """Return `repr(value)` for a message, shortened if it is long. The value can be any value read from a file."""
    return _Short().repr(value)


def as_given(value: object) -> str:
    """Return a string unchanged, as the user typed it, and any other value as `shown`."""
    return value if isinstance(value, str) else shown(value)


def user_path(given: str | Path, *, flag: str = "") -> Path:
    """Return the path `given` with ~ and ~USER expanded. The path need not exist.

    Raises:
        UserError: the text cannot be a path on any system; the message contains `flag`.
    """
    said = f"{flag} {shown(str(given))}".lstrip()
    try:
        path = Path(given).expanduser()
        raw = os.fsencode(path)
    except (RuntimeError, UnicodeEncodeError) as error:
        raise UserError(f"{said}: is not a path ({error}); give another path") from None
    if b"\0" in raw or len(raw) > _LONGEST_PATH or any(len(part) > _LONGEST_FILE_NAME for part in raw.split(b"/")):
        raise UserError(f"{said}: is not a path (it is too long or has invalid characters); give another path")
    return path


class _OnStderr(logging.Handler):
    """A log handler that writes plain lines to the current `sys.stderr`, which may be replaced while a rank runs."""

    def emit(self, record: logging.LogRecord) -> None:
        """Show one log message, and ignore the error if the terminal is closed."""
        with suppress(OSError):
            show(*self.format(record).split("\n"), file=sys.stderr)


def show_messages() -> None:
    """Show the library's log messages of level INFO and above on stderr. A second call has no effect."""
    logger = logging.getLogger("megatron_tiedlora")
    if not any(isinstance(handler, _OnStderr) for handler in logger.handlers):
        logger.addHandler(_OnStderr())
        logger.setLevel(logging.INFO)
        logger.propagate = False  # absl and DeepSpeed put handlers of their own on the root logger


Number = TypeVar("Number", int, float)

_SCALES = {"P": 1e15, "T": 1e12, "G": 1e9, "M": 1e6, "k": 1e3}
_LONGEST_NAME, _MOST_NAMES = 200, 8
_LIKENESS = 0.6  # minimum similarity of a suggested name; most suggestions below it are wrong


def bytes_in_words(size: float) -> str:
    """Return a number of bytes with a decimal unit, at most GB: `1.50 GB`, `640 B`."""
    return amount_text(size, "B", prefixes="GMk")


def amount_text(value: float, unit: str, *, prefixes: str = "PTGMk") -> str:
    """Return a value as text with the largest decimal prefix for which it is at least 1: `1.50 TFLOP`, `640 B`."""
    for prefix in prefixes:
        if value >= _SCALES[prefix]:
            return f"{value / _SCALES[prefix]:,.2f} {prefix}{unit}"
    return f"{value:,.0f} {unit}"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of the error's type if the message is empty."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def nearest_name(name: str, known: Iterable[str]) -> str:
    """Return ' (did you mean X?)' with the known name most similar to `name`, or '' if none is similar."""
    if len(name) > _LONGEST_NAME:
        return ""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=_LIKENESS)
    return f" (did you mean {matches[0]}?)" if matches else ""


def enumerate_names(names: Sequence[str]) -> str:
    """Return names as `a, b and c`. A long list is shortened to its first names and the number of remaining names."""
    if len(names) > _MOST_NAMES:
        return f"{', '.join(names[:_MOST_NAMES])} and {len(names) - _MOST_NAMES} more"
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))


def time_text(seconds: float) -> str:
    """Return a time in seconds as text with a suitable unit: `85 us`, `3.2 ms`, `1.5 s`."""
    for factor, unit in ((1e6, "us"), (1e3, "ms")):
        if seconds * factor < 1000:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds:.3g} s"


def count_text(number: int, noun: str) -> str:
    """Return a number with its noun: `1 host`, `2 hosts`, `1,024 micro-batches`."""
    return f"{number:,} {noun}{'' if number == 1 else 'es' if noun.endswith('ch') else 's'}"


def range_text(values: Collection[Number], words: Callable[[Number], str] = "{:,}".format) -> str:
    """Return the smallest and the largest value as text, such as `1 to 7`, or `7` if their texts are the same."""
    return " to ".join(dict.fromkeys(map(words, (min(values), max(values)))))


# Tables ---------------------------------------------------------------------------------------------------------------


def aligned_lines(rows: Sequence[Sequence[str]], *, align: str = "<>", indent: str = "") -> list[str]:
    """Return one line of text per row. Each column is as wide as its longest cell, with two spaces between columns.

    Args:
        rows: the cells of each row. A header, if any, is the first row. The last cells of a row may be missing. Spaces
            around a header make its column wider.
        align: one character per column: `<` for left-aligned and `>` for right-aligned. The last character applies to
            all further columns. By default only the first column is left-aligned.
        indent: the text before each line.
    """
    widths = [max(map(len, column)) for column in zip_longest(*rows, fillvalue="")]
    sides = align.ljust(len(widths), align[-1])
    lines = []
    for row in rows:
        cells = (f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=False))
        lines.append(f"{indent}{'  '.join(cells)}".rstrip())
    return lines


def csv_text(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """Return rows as CSV with a header of column names. Values that are missing in a row are empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
