"""Progress bars: redrawn in place on a terminal, and plain lines now and then in a pipe or file, such as Slurm's log.

All bars of the package are made here, so that no log contains carriage returns or cursor codes.
"""

import sys
from collections.abc import Iterable, Sized
from typing import Any

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 30.0
_LINE = "{l_bar} {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"  # tqdm's default without its bar


class _Lines(tqdm):
    """A bar that writes its state as a line, at most one in `SECONDS_BETWEEN_LINES`, and one at its end.

    A bar that a terminal removes at its end (`leave=False`) has a last line only if it has had another one.
    """

    monitor_interval = 0  # no thread, as nothing is redrawn

    def __init__(self, **options: Any) -> None:
        self._line_at, self._line_n = 0.0, -1.0  # seconds since the start, and the count
        line = _LINE if options["total"] else None  # tqdm words a count without a total by itself
        # With `gui`, tqdm leaves all that is shown to `display`. Unsmoothed, the rate is the mean since the start.
        super().__init__(**{"bar_format": line, "gui": True, "miniters": 1, "smoothing": 0, **options})

    def display(self, *_: Any, **__: Any) -> None:
        """Write a line if one is due. tqdm calls this whenever something has changed."""
        if self._elapsed() - self._line_at >= SECONDS_BETWEEN_LINES:
            self._write_line()

    def clear(self, *_: Any, **__: Any) -> None:
        """Do nothing: other lines are written below this one."""

    def close(self) -> None:
        """Write the last line."""
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
    """A bar on stderr: tqdm's own on a terminal, else lines. It iterates over `items`, or counts by `update`.

    Args:
        what: what is being done, in front of the bar.
        unit: what is counted; "B" for bytes, which are shown as kB, MB and so on.
        total: how many there are; the length of `items` by default. None if nobody knows.
        shows: False on ranks other than the first.
        options: further arguments of `tqdm`. With `leave=True` the bar stays on a terminal after its end.
    """
    if isinstance(items, Sized):
        total = len(items)
    kind: type[Any] = tqdm if sys.stderr.isatty() else _Lines
    own = {"leave": False, "unit": unit, "unit_scale": unit == "B", "disable": not shows}
    return kind(iterable=items, desc=what, total=total, **{**own, **options})
