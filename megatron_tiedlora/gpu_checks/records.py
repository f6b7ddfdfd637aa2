"""The findings of the checks: records with a status, a reason and a fix, written to a file as they come."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_tiedlora.base.errors import UserError, one_line
from megatron_tiedlora.base.wording import first_line

Status = Literal["pass", "warn", "fail", "skip", "info"]
Value = float | str | None
MEMORY_FIX = "end other processes on the GPU (nvidia-smi), or give a smaller --model"
_LONGEST = 300  # characters of an error
ERROR_FIX = "run this part alone with CUDA_LAUNCH_BLOCKING=1, and report the line with the versions of the part env"


@dataclass(frozen=True)
class Check:
    """One finding.

    Attributes:
        value: the measured value; None if there is none.
        expected: what the value was compared with, as text.
        seconds: since the previous finding.
        why: what the value means, or why there is none.
        fix: what to do if the check did not pass.
    """

    part: str
    name: str
    status: Status
    value: Value = None
    unit: str = ""
    expected: str = ""
    seconds: float = 0.0
    why: str = ""
    fix: str = ""


@dataclass(frozen=True)
class CheckOptions:
    """How to run the parts.

    Attributes:
        device: "cuda" or "cpu"; on a CPU only the logic of the parts is tested.
        model: the preset whose widths are used.
        seconds: time limit of a part.
        folder: for a part's output files.
    """

    device: str = "cuda"
    model: str = "llama2-7b"
    seconds: float = 60.0
    folder: str = "."

    @property
    def on_gpu(self) -> bool:
        """Whether the checks run on a GPU."""
        return self.device == "cuda"


class PartOver(Exception):
    """This process cannot continue the part."""


@dataclass
class Report:
    """The findings of one part.

    Attributes:
        file: gets each finding at once as a line of JSON, so that findings survive the process; None: no file.
        is_alive: raises if the device cannot compute any more; called after an error.
    """

    part: str
    file: Path | None = None
    is_alive: Callable[[], object] = lambda: None
    checks: list[Check] = field(default_factory=list)
    _last: float = field(default_factory=time.monotonic)

    def add(self, name: str, status: Status, value: Value = None, **more: Any) -> None:
        """Record one finding; `more` as in `Check`."""
        now = time.monotonic()
        check = Check(self.part, name, status, value, seconds=round(now - self._last, 2), **more)
        self._last = now
        self.checks.append(check)
        if self.file is not None:
            with self.file.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(asdict(check)) + "\n")

    def tell(self, name: str, value: Value, unit: str = "", *, why: str = "") -> None:
        """Record a value without an expectation."""
        self.add(name, "info", value, unit=unit, why=why)

    def skip(self, name: str, why: str) -> None:
        """Record a check that cannot be made here, and why."""
        self.add(name, "skip", why=one_line(why))

    def expect(
        self, name: str, good: bool, value: Value, *, expected: str, fix: str, otherwise: Status = "fail", **more: Any
    ) -> None:
        """Record a pass if `good`, else `otherwise` with a fix."""
        self.add(name, "pass" if good else otherwise, value, expected=expected, fix="" if good else fix, **more)

    def at_most(self, name: str, value: float, limit: float, *, unit: str = "", fix: str, **more: Any) -> None:
        """Record a pass if `value` is at most `limit`."""
        self.expect(name, value <= limit, value, expected=f"<= {limit:.3g}", unit=unit, fix=fix, **more)

    def at_least(self, name: str, value: float, limit: float, *, unit: str = "", fix: str, **more: Any) -> None:
        """Record a pass if `value` is at least `limit`."""
        self.expect(name, value >= limit, value, expected=f">= {limit:.3g}", unit=unit, fix=fix, **more)

    @contextmanager
    def attempt(self, name: str, *, fix: str = ERROR_FIX) -> Iterator[None]:
        """Record an error in the block as a failure of `name`, in one line; then the part continues.

        Raises:
            PartOver: the error has made the device unusable for this process.
        """
        try:
            yield
        except PartOver:
            raise
        except Exception as error:
            no_memory = type(error).__name__ == "OutOfMemoryError"
            self.add(name, "fail", why=error_line(error), fix=MEMORY_FIX if no_memory else fix)
            try:
                self.is_alive()
            except Exception as broken:
                raise PartOver(f"the device is lost to this process after {name}: {error_line(broken)}") from broken


def error_line(error: BaseException) -> str:
    """An error in one line: its type, unless it is a UserError, and the first line of its message."""
    said = first_line(error)[:_LONGEST]
    return one_line(said if isinstance(error, UserError) else f"{type(error).__name__}: {said}")


def read_checks(file: Path) -> list[Check]:
    """The findings in a part's file, without a line that was truncated when the part ended."""
    found = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
        try:
            found.append(Check(**json.loads(line)))
        except (ValueError, TypeError):
            continue
    return found
