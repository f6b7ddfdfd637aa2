"""Progress bars, as ever on a terminal, and in a pipe or a file plain lines, not many, without cursor codes; and text
tables."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tqdm import tqdm

import megatron_tiedlora
from megatron_tiedlora.base import progress
from megatron_tiedlora.base.messages import aligned_lines
from megatron_tiedlora.base.progress import SECONDS_BETWEEN_LINES, progress_bar

Clock = Callable[[float], None]
Captured = pytest.CaptureFixture[str]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Lets time pass for bars that are made later."""
    now = [1000.0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])

    def wait(seconds: float) -> None:
        now[0] += seconds

    return wait


def test_a_log_has_a_line_every_so_often_and_one_at_the_end(capsys: Captured, passes: Clock) -> None:
    with progress_bar("training", "step", total=100, initial=10, leave=True) as bar:
        for step in range(11, 101):
            passes(4.0)
            bar.set_postfix_str(f"loss {step}", refresh=False)
            bar.update(1)
            if step == 12:
                bar.write("step 12: validation loss 2.5")
                with progress_bar("validation", "batch", total=3) as inner:
                    inner.update(3)
    shown, log = capsys.readouterr()
    assert shown == "step 12: validation loss 2.5\n"
    lines = log.splitlines()
    assert log == "".join(f"{line}\n" for line in lines) and "\x1b" not in log
    assert lines[0] == "training:  18%| 18/100 [00:32<05:28,  4.00s/step, loss 18]"
    assert lines[-1] == "training: 100%| 100/100 [06:00<00:00,  4.00s/step, loss 100]"
    assert all(line.startswith("training:") for line in lines)
    assert len(lines) == 1 + 90 * 4 // 32 and SECONDS_BETWEEN_LINES == 30


@pytest.mark.parametrize(("seconds", "lines"), [(1.0, 0), (20.0, 2)])
def test_a_bar_that_a_terminal_removes_ends_silently_if_it_was_short(
    capsys: Captured, passes: Clock, seconds: float, lines: int
) -> None:
    for _ in progress_bar("index", "adapter", range(4)):
        passes(seconds)
    log = capsys.readouterr().err
    assert log.count("\n") == log.count("index:") == lines and "\r" not in log


def test_bytes_and_a_total_that_nobody_knows(capsys: Captured, passes: Clock) -> None:
    with progress_bar("merge", "B", total=4_000_000) as bar:
        passes(31)
        bar.update(3_100_000)
    assert capsys.readouterr().err.splitlines() == ["merge:  78%| 3.10M/4.00M [00:31<00:09, 100kB/s]"]
    with progress_bar("tokenising a.jsonl", " rows", leave=True, delay=2) as bar:
        passes(31)
        bar.update(62)
    assert capsys.readouterr().err.splitlines() == ["tokenising a.jsonl: 62 rows [00:31,  2.00 rows/s]"]


def test_a_delayed_bar_and_those_of_other_ranks_are_silent(capsys: Captured, passes: Clock) -> None:
    with progress_bar("tokenising a.jsonl", " rows", total=5, leave=True, delay=2) as bar:
        passes(1)
        bar.update(5)
    with progress_bar("training", "step", total=5, leave=True, shows=False) as bar:
        passes(100)
        bar.update(5)
    assert list(progress_bar("index", "adapter", iter("ab"), shows=False)) == ["a", "b"]
    assert capsys.readouterr().err == ""


def test_a_terminal_has_the_bars_of_tqdm(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    with progress_bar("training", "step", total=2, leave=True) as bar:
        assert type(bar) is tqdm
        bar.update(2)
    assert re.search(r"\rtraining: 100%\|#+\| 2/2 \[.*\n$", screen.getvalue())


def test_no_module_makes_a_bar_by_itself() -> None:
    package = Path(megatron_tiedlora.__file__).parent
    texts = {file.relative_to(package).as_posix(): file.read_text() for file in package.rglob("*.py")}
    made = {name for name, text in texts.items() if "tqdm" in text.replace("use_tqdm=", "")}  # an argument of vLLM
    assert made == {Path(progress.__file__).relative_to(package).as_posix()}


# Tables -------------------------------------------------------------------------------------------------------------


def test_columns_of_a_table_are_two_spaces_apart() -> None:
    """Labels to the left and numbers to the right, and no line ends with spaces. A row may lack its last cells, or have
    one more than the header."""
    rows = [["stage", "bytes"], ["0", "12.50 GB"], ["1-3", ""]]
    assert aligned_lines(rows) == ["stage     bytes", "0      12.50 GB", "1-3"]
    assert aligned_lines(rows, indent="  ") == ["  stage     bytes", "  0      12.50 GB", "  1-3"]
    uneven = [("host", "ranks"), ("alpha", "8", "note"), ("b",)]
    assert aligned_lines(uneven, align="<") == ["host   ranks", "alpha  8      note", "b"]
    assert aligned_lines([("", "  most"), ("one", "1")]) == ["       most", "one       1"]  # a wider header


def test_a_side_for_each_column() -> None:
    """The last one is for the columns that follow, too."""
    rows = [("a", "bb", "c", "d"), ("aaa", "b", "ccc", "ddd")]
    assert aligned_lines(rows, align="<") == ["a    bb  c    d", "aaa  b   ccc  ddd"]
    assert aligned_lines(rows, align="<<>") == ["a    bb    c    d", "aaa  b   ccc  ddd"]
