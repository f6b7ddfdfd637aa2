"""Input and messages of users: the one error type for a mistake, paths, how messages show values (short, on one line)
and word sizes, times, counts, names and tables, the screen, and what is installed.

Each module of the library logs under the name `megatron_tiedlora`, and a command shows these messages on stderr. A
program that uses the library as a package gets them by Python's `logging` alone, as it configures it.
"""

import csv
import difflib
import io
import logging
import os
import platform
import reprlib
import shlex
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from itertools import zip_longest
from pathlib import Path
from typing import Any, TextIO, TypeVar

_LONGEST = 1200  # characters of a message
_LONGEST_FILE_NAME, _LONGEST_PATH = 255, 4000  # bytes that Linux takes


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
    """Inside, a `UserError` begins with `name`, of an adapter or a file; "" adds nothing."""
    try:
        yield
    except UserError as error:
        if not name:
            raise
        told = UserError(named(name, str(error)))
        told.of_peer = error.of_peer
        raise told from None


@contextmanager
def os_errors(said: str, *, fix: str = "") -> Iterator[None]:
    """Inside, an `OSError` becomes a `UserError`: what is `said`, the system's reason in brackets, and `fix`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{said} ({error.strerror or error}){fix}") from None


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


def user_path(given: str | Path, *, flag: str = "") -> Path:
    """The path that `given` names, with ~ and ~USER expanded; nothing else is looked up. `flag` is for the message.

    Raises:
        UserError: it cannot name a file on any system.
    """
    said = f"{flag} {shown(str(given))}".lstrip()
    try:
        path = Path(given).expanduser()
        raw = os.fsencode(path)
    except (RuntimeError, UnicodeEncodeError) as error:
        raise UserError(f"{said}: is not a path ({error})") from None
    if b"\0" in raw or len(raw) > _LONGEST_PATH or any(len(part) > _LONGEST_FILE_NAME for part in raw.split(b"/")):
        raise UserError(f"{said}: is not a path (too long, or with characters that a file name cannot have)")
    return path


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


Number = TypeVar("Number", int, float)

_SCALES = {"P": 1e15, "T": 1e12, "G": 1e9, "M": 1e6, "k": 1e3}
_LONGEST_NAME, _MOST_NAMES = 200, 8
_LIKENESS = 0.6  # of a name that is suggested; below it most suggestions mislead


def bytes_in_words(size: float) -> str:
    """A number of bytes with a decimal unit, of GB at most: `1.50 GB`, `640 B`."""
    return amount_text(size, "B", prefixes="GMk")


def amount_text(value: float, unit: str, *, prefixes: str = "PTGMk") -> str:
    """A number with the largest of these decimal prefixes that leaves at least 1: `1.50 TFLOP`, `640 B`."""
    for prefix in prefixes:
        if value >= _SCALES[prefix]:
            return f"{value / _SCALES[prefix]:,.2f} {prefix}{unit}"
    return f"{value:,.0f} {unit}"


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type if the message is empty."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def nearest_name(name: str, known: Iterable[str]) -> str:
    """' (did you mean X?)' with the known name nearest to `name`, or '' if none is near."""
    if len(name) > _LONGEST_NAME:
        return ""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=_LIKENESS)
    return f" (did you mean {matches[0]}?)" if matches else ""


def enumerate_names(names: Sequence[str]) -> str:
    """`a, b and c`; a long list is cut to its first names and the number of the others."""
    if len(names) > _MOST_NAMES:
        return f"{', '.join(names[:_MOST_NAMES])} and {len(names) - _MOST_NAMES} more"
    return " and ".join(filter(None, (", ".join(names[:-1]), *names[-1:])))


def time_text(seconds: float) -> str:
    """Seconds with the unit that fits: `85 us`, `3.2 ms`, `1.5 s`."""
    for factor, unit in ((1e6, "us"), (1e3, "ms")):
        if seconds * factor < 1000:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds:.3g} s"


def count_text(number: int, noun: str) -> str:
    """`1 host`, `2 hosts`, `1,024 micro-batches`."""
    return f"{number:,} {noun}{'' if number == 1 else 'es' if noun.endswith('ch') else 's'}"


def range_text(values: Collection[Number], words: Callable[[Number], str] = "{:,}".format) -> str:
    """`7`, `1 to 7`: the least and the most, or one of them if both are worded alike."""
    return " to ".join(dict.fromkeys(map(words, (min(values), max(values)))))


# Tables ---------------------------------------------------------------------------------------------------------------


def aligned_lines(rows: Sequence[Sequence[str]], *, align: str = "<>", indent: str = "") -> list[str]:
    """One line for each row. Columns are as wide as their longest cell and two spaces apart.

    Args:
        rows: the header, if there is one, is the first. The last cells of a row may be missing. Spaces around a header
            make its column wider.
        align: `<` for each column that is aligned to the left and `>` for the right; the last one is for all that
            follow, so that by default only the first column, of labels, is to the left.
        indent: what each line begins with.
    """
    widths = [max(map(len, column)) for column in zip_longest(*rows, fillvalue="")]
    sides = align.ljust(len(widths), align[-1])
    lines = []
    for row in rows:
        cells = (f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=False))
        lines.append(f"{indent}{'  '.join(cells)}".rstrip())
    return lines


def markdown_lines(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table in Markdown."""
    return ["| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *rows)]


def csv_text(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows as CSV below the names of the columns; what a row does not have is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


# What is installed ----------------------------------------------------------------------------------------------------
#
# The extras are what a command needs that loading, merging and exporting do not. Nothing is imported to find out.

__version__ = "0.2.0"  # pyproject.toml reads it from here
PACKAGE_FOLDER = Path(__file__).parents[1]  # of megatron_tiedlora
# By extra: the modules that it brings, which pyproject.toml lists under their names as packages.
EXTRAS: Mapping[str, tuple[str, ...]] = {
    "train": ("deepspeed", "datasets", "pyarrow", "accelerate", "tensorboard", "matplotlib"),
    "eval": ("deepspeed", "datasets", "pyarrow", "rouge_score", "sacrebleu"),
    "check": ("deepspeed", "pytest"),
    "peft": ("peft",),
    "quantised": ("bitsandbytes",),
    "demo": ("gguf", "accelerate", "reasoning_gym", "peft", "tokenizers"),
    "mpi": ("mpi4py",),
}
# A run does without these: they are asked for where they are used, by --report_to and for figures.
_WHERE_USED = ("accelerate", "tensorboard", "matplotlib")


def installed_versions(*libraries: str) -> dict[str, str]:
    """Versions of this package, of Python and of those `libraries` that are installed."""
    found = {"megatron_tiedlora": __version__, "python": platform.python_version()}
    for library in libraries:
        if number := _installed(library):  # the library of a metric that was not requested may be missing
            found[library] = number
    return found


@cache
def _installed(library: str) -> str | None:
    """The version of an installed library; looking it up parses the library's whole metadata file."""
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def missing_modules(*names: str) -> list[str]:
    """The modules of these extras that are not installed; nothing is imported."""
    modules = dict.fromkeys(module for name in names for module in EXTRAS[name])
    return [module for module in modules if find_spec(module) is None]


def require_extra(*names: str, only: Collection[str] | None = None) -> None:
    """Raise UserError if a module of these extras that every run needs, or one of `only`, is not installed."""
    absent = missing_modules(*names)
    missing = [name for name in absent if (name not in _WHERE_USED if only is None else name in only)]
    if missing:
        raise UserError(f"this needs {enumerate_names(missing)}; {install_hint(*names)}")


def missing_module(error: ModuleNotFoundError) -> UserError | None:
    """The error for a user who lacks an extra; None if the module belongs to none."""
    module = (error.name or "").partition(".")[0]
    names = [name for name, modules in EXTRAS.items() if module in modules]
    return UserError(f"this needs {module}; {install_hint(*names[:1])}") if names else None


def install_hint(*names: str) -> str:
    """The command that installs these extras, for a message.

    pip adds what they bring to the package that is installed. One that is not, but runs from a clone, is named by its
    folder, because a package of the same name in an index would be somebody else's.
    """
    what = "megatron_tiedlora" if _installed("megatron_tiedlora") else str(PACKAGE_FOLDER.parent)
    extras = ",".join(names)
    return f"install it with: pip install {shlex.quote(f'{what}[{extras}]')}"
