"""The fuzzers' budget, the choices and the limits of one case, and what every case has to come to.

A case is a body that is called with a `Draw`. Its number and the part that it is of are its seed, so a case that fails
runs again, alone and with its traceback, by

    FUZZ_CASE='adapter/17' make test TESTS=tests/fuzz PYTEST_ARGS="-m 'slow or not slow' -k adapter"

The suite runs the first `SHARES` cases of each part, 545 in all. Eighty times as many run by hand, with a table of
what was refused and accepted:

    make test TESTS=tests/fuzz PYTEST_ARGS="-m slow -s"

Any text in FUZZ_SALT makes other cases of all, the same ones each time for the same text.
"""

from __future__ import annotations

import os
import random
import re
import resource
import signal
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import pytest

from megatron_tiedlora.base.messages import UserError

# Cases in the suite, by target and by part of it.
SHARES: Mapping[str, Mapping[str, int]] = {
    "native adapter": {"adapter": 80},
    "checkpoint, latest": {"checkpoint": 50, "latest": 20},
    "PEFT": {"peft": 50},
    "PEFT against peft": {"peft-merge": 15},
    "model folder": {"model": 25, "tokenizer": 15, "stored": 10},
    "model against transformers": {"logits": 25},
    "data": {"rows": 25, "texts": 10, "parquet": 10, "cache": 10},
    "YAML settings": {"yaml": 30},
    "DeepSpeed JSON": {"engine": 20},
    "command lines": {"flags": 30},
    "index of adapters": {"index": 75},
    "hosts, reports, logs": {"hostfile": 10, "slurm": 10, "reports": 10, "metrics": 10, "study": 5},
}
BY_HAND = 80  # times as many
SALT = os.environ.get("FUZZ_SALT", "")

CPU_SECONDS = 5.0  # of one case
WALL_SECONDS = 60.0  # of one case, which may wait for a busy machine
GROWTH = 1 << 30  # bytes that a process may grow by in one case
ADDRESSES = 3 << 30  # bytes of address space that a process may take beyond what it has
MAPPED = 10 << 30  # the same where large files are mapped
_SMALL = 1 << 20  # bytes of a file whose content is compared

_TIMERS, _ALARMS = (signal.ITIMER_PROF, signal.ITIMER_REAL), (signal.SIGPROF, signal.SIGALRM)
T = TypeVar("T")
Body = Callable[["Draw"], Any]


class Hang(BaseException):
    """A case does not end. No Exception, so that what is tested cannot catch it."""


class Draw(random.Random):
    """The choices of one case: the same ones each time for the same seed.

    Attributes:
        said: what was done, for the message of a failure.
        notes: of the case, for the table.
    """

    def __init__(self, seed: str) -> None:
        super().__init__(seed)
        self.said: list[str] = []
        self.notes: list[str] = []

    def chance(self, share: float = 0.5) -> bool:
        """True in this share of the cases."""
        return self.random() < share

    def raw(self, longest: int = 8) -> bytes:
        """Any bytes."""
        return self.randbytes(self.randint(0, longest))

    def text(self, longest: int = 5) -> str:
        """Any text, of letters and of what is none."""
        pools = ("abcXYZ_.-/", " \t\n\r\0\x1b\x7f\x85", "äß²٣日😀\u2028\ufeff\u202e", "{}[]()<>:;,'\"\\%$`#&*|~^=?!@+")
        return "".join(self.choice(self.choice(pools)) for _ in range(self.randint(0, longest)))

    def say(self, what: str) -> str:
        """Keep a word on what was chosen, and return it."""
        self.said.append(what)
        return what


@dataclass
class Tally:
    """What came of the cases of one target."""

    cases: int = 0
    refused: int = 0
    accepted: int = 0
    failed: int = 0
    seconds: float = 0.0  # of a core
    notes: Counter[str] = field(default_factory=Counter)


TALLIES: dict[str, Tally] = {target: Tally() for target in SHARES}


def cases(part: str) -> pytest.MarkDecorator:
    """A test of the part's cases, few in the suite and many behind the slow marker; its argument is `examples`."""
    few = SHARES[_target_of(part)][part]
    # "thread", because a wait inside of a library is ended by no signal.
    quick = pytest.param(few, marks=pytest.mark.timeout(240, method="thread"), id="few")
    by_hand = [pytest.mark.slow, pytest.mark.timeout(3600, method="thread")]
    return pytest.mark.parametrize("examples", [quick, pytest.param(few * BY_HAND, marks=by_hand, id="many")])


def _target_of(part: str) -> str:
    return next(target for target, parts in SHARES.items() if part in parts)


def explore(part: str, examples: int, body: Body, *, addresses: int = ADDRESSES) -> None:
    """Call `body` on the first `examples` cases of `part`; then fail with those that did, by what they failed with.

    What `body` returns counts as refused where it is a UserError, and as accepted otherwise.
    """
    tally, failures = TALLIES[_target_of(part)], dict[str, list[str]]()
    only, alone = os.environ.get("FUZZ_CASE", "").rpartition("/")[::2]
    numbers = range(examples) if not only else [int(alone)] if only == part else []
    started = time.process_time()
    with _address_space(addresses):
        for number in numbers:
            draw = Draw(f"{SALT}{part}/{number}")
            tally.cases += 1
            try:
                value = _limited(f"{part}/{number}", lambda: body(draw))  # noqa: B023
            except (KeyboardInterrupt, pytest.exit.Exception):
                raise
            except BaseException as error:  # a library written in Rust panics with one that is no Exception
                if only:
                    print(draw.said)
                    raise
                tally.failed += 1
                message = (str(error).splitlines() or [""])[0]
                case = f"{part}/{number}: {message[:300]}; {'; '.join(draw.said)[:400]}"
                failures.setdefault(_kind(error), []).append(case)
            else:
                tally.refused += isinstance(value, UserError)
                tally.accepted += not isinstance(value, UserError)
            tally.notes.update(draw.notes)
    tally.seconds += time.process_time() - started
    if failures:
        lines = [""]
        for kind, found in sorted(failures.items(), key=lambda item: -len(item[1])):
            lines += [f"{len(found)} x {kind}", *(f"    {case}" for case in found[:3])]  # the first cases of each kind
        pytest.fail("\n".join(lines), pytrace=False)


def _kind(error: BaseException) -> str:
    """The kind of the error and the place in the code."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "site-packages" not in frame.filename] or frames
    places = " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(ours[-3:]))
    return f"{type(error).__name__} at {places}"


# The limits of a case ---------------------------------------------------------------------------------------------


def _limited(name: str, case: Callable[[], Any]) -> Any:
    """What `case` returns, where it keeps to the limits."""
    thread = threading.current_thread()
    outside, thread.name = thread.name, f"case {name}"  # pytest-timeout shows it
    before, started = _forget_peak(), time.process_time()
    previous = [signal.signal(number, _hang) for number in _ALARMS]
    signal.setitimer(signal.ITIMER_PROF, 2 * CPU_SECONDS)
    signal.setitimer(signal.ITIMER_REAL, WALL_SECONDS)
    try:
        value = case()
    finally:
        for timer, number, handler in zip(_TIMERS, _ALARMS, previous, strict=True):
            signal.setitimer(timer, 0)
            signal.signal(number, handler)
        thread.name = outside
    seconds, grown = time.process_time() - started, _status_bytes("VmHWM") - before
    assert seconds < CPU_SECONDS, f"took {seconds:.1f} s of a processor"
    assert grown < GROWTH, f"grew by {grown:,} bytes"
    return value


def _hang(number: int, _: object) -> None:
    raise Hang("does not end" if number == signal.SIGPROF else f"waited for {WALL_SECONDS:.0f} s")


def _status_bytes(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0


def _forget_peak() -> int:
    """The memory that this process has now; its peak counts from here."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _status_bytes("VmRSS")


@contextmanager
def _address_space(more: int) -> Iterator[None]:
    """Let this process take no more than this beyond the address space that it has."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_status_bytes("VmSize") + more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextmanager
def bounded(seconds: float = 2.0) -> Iterator[None]:
    """The block takes at most `seconds` of a processor, and grows by less than 1 GB: beyond that is a MemoryError."""
    started = time.process_time()
    with _address_space(GROWTH):
        yield
    assert time.process_time() - started < seconds


# What a case comes to ---------------------------------------------------------------------------------------------


def tree(folder: Path) -> dict[str, tuple[int, int, int, bytes | str]]:
    """Every path under `folder` with its mode, time of change and size, and its content or where it leads."""
    found: dict[str, tuple[int, int, int, bytes | str]] = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        content: bytes | str = ""
        if path.is_symlink():
            content = os.readlink(path)
        elif path.is_file() and status.st_size < _SMALL:
            content = path.read_bytes()
        found[str(path.relative_to(folder))] = (status.st_mode, status.st_mtime_ns, status.st_size, content)
    return found


def outcome(load: Callable[[], Any], *, unchanged: Path, names: tuple[str, ...]) -> Any:
    """What `load` returns, or the UserError that it raises, which is then one line with one of `names` in it."""
    before = tree(unchanged)
    try:
        value = load()
    except UserError as error:
        value = error
        line = str(error)
        assert line.isprintable() and 10 < len(line) < 1500, line
        assert any(name in line for name in names), line
    assert tree(unchanged) == before, "loading changed a file"
    return value


def refused(area: Path, load: Callable[[], Any], *names: str, said: str = "") -> None:
    """Fail unless `load` is refused in one line with one of `names` and with `said`, and changes nothing in `area`."""
    found = outcome(load, unchanged=area, names=names)
    assert isinstance(found, UserError) and said in str(found), found


def printable(*texts: str) -> None:
    """Fail where a text holds what a terminal would take for a command, or what is no text."""
    for text in texts:
        assert text.isprintable(), f"not printable: {text!a}"
