"""User input and messages: `UserError`, paths, values as short text on one line, sizes, times, counts, names and tables
as text, the screen, and installed packages.

Each module of the library logs under the name `megatron_tiedlora`. A command shows these messages on stderr. In a
program that imports the library, the program's own `logging` configuration decides what is shown.
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
    """An error in the user's input. Its message is one line with the file, the value and the fix.

    Commands print the message without a traceback and exit with status 2. The message is always one line without
    control characters, even if it quotes a broken file. The middle of a very long message is left out.

    Attributes:
        of_peer: whether another rank found the error and reports it.
    """

    of_peer: bool = False

    def __init__(self, message: object) -> None:
        super().__init__(one_line(str(message)))


def named(name: str, line: str) -> str:
    """Return a line about an adapter that begins with its name. The name "" of a single adapter adds nothing."""
    return f"{name}: {line}" if name else line


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Put `name`, of an adapter or a file, before the message of a `UserError` in the block; "" adds nothing."""
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
    """Turn an `OSError` in the block into a `UserError` with `said`, the system's reason in brackets, and `fix`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{said} ({error.strerror or error}){fix}") from None


def one_line(text: str) -> str:
    """Return a text as one `printable` line. The middle of a very long text is left out."""
    return _cut(printable(_cut(text)))  # shortened first, so that `printable` never reads gigabytes


def printable(text: str) -> str:
    """Return `text` as one line that is safe to print: another user may have written names and contents of files. New
    lines and control characters are escaped. Letters of every script are unchanged."""
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
    """A `repr` of bounded length. Aliases in a YAML file can make a value larger than the machine's memory."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother = 3, 100, 100

    def repr_int(self, value: int, level: int) -> str:
        # Python raises ValueError for integers of more than 4,300 digits.
        return repr(value) if value.bit_length() <= 128 else f"an integer of {value.bit_length()} bits"


def shown(value: object) -> str:
    """Return `repr(value)` for a message, shortened if it is long. Any value that a file can hold is accepted."""
    return _Short().repr(value)


def as_given(value: object) -> str:
    """Return the value like `shown`, but a string without quotes, as the user typed it."""
    return value if isinstance(value, str) else shown(value)


def user_path(given: str | Path, *, flag: str = "") -> Path:
    """Return the path `given` with ~ and ~USER expanded. The file need not exist. The message contains `flag`.

    Raises:
        UserError: the text cannot be a path on any system.
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
    """A log handler that writes plain lines to the current sys.stderr, which a rank's log may replace."""

    def emit(self, record: logging.LogRecord) -> None:
        """Show one message. Ignore a closed terminal."""
        with suppress(OSError):
            show(*self.format(record).split("\n"), file=sys.stderr)


def show_messages() -> None:
    """Show the library's log messages of level INFO and above. Commands call this. A second call changes nothing."""
    logger = logging.getLogger("megatron_tiedlora")
    if not any(isinstance(handler, _OnStderr) for handler in logger.handlers):
        logger.addHandler(_OnStderr())
        logger.setLevel(logging.INFO)
        logger.propagate = False  # absl and DeepSpeed put handlers of their own on the root logger


Number = TypeVar("Number", int, float)

_SCALES = {"P": 1e15, "T": 1e12, "G": 1e9, "M": 1e6, "k": 1e3}
_LONGEST_NAME, _MOST_NAMES = 200, 8
_LIKENESS = 0.6  # least similarity of a suggested name; below it most suggestions are wrong


def bytes_in_words(size: float) -> str:
    """Return a number of bytes with a decimal unit, at most GB: `1.50 GB`, `640 B`."""
    return amount_text(size, "B", prefixes="GMk")


def amount_text(value: float, unit: str, *, prefixes: str = "PTGMk") -> str:
    """Return a number with the largest decimal prefix for which it is at least 1: `1.50 TFLOP`, `640 B`."""
    for prefix in prefixes:
        if value >= _SCALES[prefix]:
            return f"{value / _SCALES[prefix]:,.2f} {prefix}{unit}"
    return f"{value:,.0f} {unit}"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or its type if the message is empty."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def nearest_name(name: str, known: Iterable[str]) -> str:
    """Return ' (did you mean X?)' with the known name most similar to `name`, or '' if none is similar."""
    if len(name) > _LONGEST_NAME:
        return ""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=_LIKENESS)
    return f" (did you mean {matches[0]}?)" if matches else ""


def enumerate_names(names: Sequence[str]) -> str:
    """Return names as `a, b and c`. A long list is shortened to its first names and the number of the others."""
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
    """Return the smallest and the largest value as `1 to 7`, or as `7` if both have the same text."""
    return " to ".join(dict.fromkeys(map(words, (min(values), max(values)))))


# Tables ---------------------------------------------------------------------------------------------------------------


def aligned_lines(rows: Sequence[Sequence[str]], *, align: str = "<>", indent: str = "") -> list[str]:
    """Return one line of text per row. Each column is as wide as its longest cell, with two spaces between columns.

    Args:
        rows: a header, if any, is the first row. The last cells of a row may be missing. Spaces around a header make
            its column wider.
        align: `<` for a left-aligned column and `>` for a right-aligned one. The last character is for all further
            columns. By default only the first column is left-aligned.
        indent: the text before each line.
    """
    widths = [max(map(len, column)) for column in zip_longest(*rows, fillvalue="")]
    sides = align.ljust(len(widths), align[-1])
    lines = []
    for row in rows:
        cells = (f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=False))
        lines.append(f"{indent}{'  '.join(cells)}".rstrip())
    return lines


def markdown_lines(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a table in Markdown."""
    return ["| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *rows)]


def csv_text(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """Return rows as CSV with a header of column names. A value that a row does not have is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


# What is installed ----------------------------------------------------------------------------------------------------
#
# An extra holds packages that only some commands need; loading, merging and exporting need none. Checks import nothing.

__version__ = "0.2.0"  # pyproject.toml reads it from here
PACKAGE_FOLDER = Path(__file__).parents[1]  # of megatron_tiedlora
# The modules of each extra. pyproject.toml lists the names of their packages.
EXTRAS: Mapping[str, tuple[str, ...]] = {
    "train": ("deepspeed", "datasets", "pyarrow", "accelerate", "tensorboard", "matplotlib"),
    "eval": ("deepspeed", "datasets", "pyarrow", "rouge_score", "sacrebleu"),
    "check": ("deepspeed", "pytest"),
    "peft": ("peft",),
    "quantised": ("bitsandbytes",),
    "demo": ("gguf", "accelerate", "reasoning_gym", "peft", "tokenizers"),
    "mpi": ("mpi4py",),
}
# A run does not need these. They are checked where they are used: by --report_to and for figures.
_WHERE_USED = ("accelerate", "tensorboard", "matplotlib")


def installed_versions(*libraries: str) -> dict[str, str]:
    """Return the versions of this package, of Python and of the installed ones of `libraries`."""
    found = {"megatron_tiedlora": __version__, "python": platform.python_version()}
    for library in libraries:
        if number := _installed(library):  # the library of a metric that was not requested may be missing
            found[library] = number
    return found


@cache
def _installed(library: str) -> str | None:
    """Return the version of an installed library, or None. This parses the library's whole metadata file."""
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def missing_modules(*names: str) -> list[str]:
    """Return the modules of these extras that are not installed. Nothing is imported."""
    modules = dict.fromkeys(module for name in names for module in EXTRAS[name])
    return [module for module in modules if find_spec(module) is None]


def require_extra(*names: str, only: Collection[str] | None = None) -> None:
    """Raise UserError if a module of `only`, or by default one that every run needs, is not installed."""
    absent = missing_modules(*names)
    missing = [name for name in absent if (name not in _WHERE_USED if only is None else name in only)]
    if missing:
        raise UserError(f"this needs {enumerate_names(missing)}; {install_hint(*names)}")


def missing_module(error: ModuleNotFoundError) -> UserError | None:
    """Return the error for a missing module that belongs to an extra; None if it belongs to none."""
    module = (error.name or "").partition(".")[0]
    names = [name for name, modules in EXTRAS.items() if module in modules]
    return UserError(f"this needs {module}; {install_hint(*names[:1])}") if names else None


def install_hint(*names: str) -> str:
    """Return the command that installs these extras, for a message.

    pip adds the extras' packages to the installed package. A clone that is not installed is named by its folder,
    because an index may have an unrelated package of the same name.
    """
    what = "megatron_tiedlora" if _installed("megatron_tiedlora") else str(PACKAGE_FOLDER.parent)
    extras = ",".join(names)
    return f"install it with: pip install {shlex.quote(f'{what}[{extras}]')}"
