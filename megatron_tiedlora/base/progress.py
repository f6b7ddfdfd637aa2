"""Show progress as bars on a terminal, and as plain lines in a pipe or a file, such as Slurm's log.

All progress bars of the library are created here, so that no log contains carriage returns or cursor codes.
"""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 30.0
_LINE = "{l_bar} {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"  # tqdm's default without its bar


class _Lines(tqdm):
    """A progress bar that writes at most one line of text per `SECONDS_BETWEEN_LINES`, and one line when it is closed.

    With `leave=False` the last line is written only if an earlier line was written.
    """

    monitor_interval = 0  # no monitor thread of tqdm, because nothing is redrawn

    def __init__(self, **options: Any) -> None:
        self._line_at, self._line_n = 0.0, -1.0  # of the last line: seconds since the start, and count
        # With `gui`, tqdm calls `display` for all output. Without smoothing, the rate is the mean since the start.
        super().__init__(**{"gui": True, "miniters": 1, "smoothing": 0, **options})
        self.bar_format = options.get("bar_format", _LINE if self.total else None)  # tqdm has its own without a total

    def display(self, *_: Any, **__: Any) -> None:
        """Write a line if enough time has passed. tqdm calls this after every change."""
        if self._elapsed() - self._line_at >= SECONDS_BETWEEN_LINES:
            self._write_line()

    def clear(self, *_: Any, **__: Any) -> None:
        """Do nothing. Other output can be written below the last line without clearing it."""

    def close(self) -> None:
        """Close the progress bar and write its last line."""
        has_begun = not self.disable and self._elapsed() >= (self.delay or 0)
        super().close()
        if has_begun and (self.leave or self._line_at) and self.n != self._line_n:
            self._write_line()

    def _elapsed(self) -> float:
        return float(self.format_dict["elapsed"])

    def _write_line(self) -> None:
        self._line_at, self._line_n = self._elapsed(), self.n
        self.fp.write(f"{str(self).strip()}\n")
        self.fp.flush()


def progress_bar(
    what: str,
    unit: str,
    items: Iterable[Any] | None = None,
    *,
    total: float | None = None,
    shows: bool = True,
    **options: Any,
) -> Any:
    """Return a progress bar on stderr: tqdm's own bar on a terminal, and otherwise lines of text. The bar iterates over
    `items` or counts calls of `update`.

    Args:
        what: the text before the bar, which describes the task.
        unit: the name of the unit that is counted; "B" for bytes, which are shown as kB, MB and so on.
        total: the number of units, by default the length of `items`; None if it is unknown.
        shows: whether the bar is shown; False on all ranks but the first.
        options: more arguments for `tqdm`. With `leave=True` the bar stays on the terminal after it is closed.
    """
    kind: type[Any] = tqdm if sys.stderr.isatty() else _Lines
    own = {"leave": False, "unit": unit, "unit_scale": unit == "B", "disable": not shows}
    return kind(iterable=items, desc=what, total=total, **{**own, **options})
