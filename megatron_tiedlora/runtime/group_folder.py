"""The folder of a run of several adapters: a run folder of each, and what is said of all of them together."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_tiedlora.base.atomic import write_text
from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.base.paths import PathIn
from megatron_tiedlora.runtime.run_folder import RunFolder, State


@dataclass(frozen=True)
class GroupFolder(RunFolder):
    """The paths of a run of several adapters; RUN/NAME is the run folder of the adapter NAME.

    Attributes:
        running: the folders of the adapters that have not ended, each with its last step. They end as the run does.
    """

    running: Callable[[], Iterable[tuple[RunFolder, int]]] = field(default=tuple, compare=False)

    settings = PathIn("adapters.yaml")  # every setting as resolved, of all and of each
    table = PathIn("table.csv")  # one row per adapter

    def write_status(self, state: State, *, step: int, reason: str) -> None:
        """Write run_status.json, and that of each adapter that has not ended."""
        super().write_status(state, step=step, reason=reason)
        for folder, own_step in self.running():
            if not folder.is_of_main and folder.status.exists():
                continue  # only rank 0 knows which ones it has finished by now
            with suppress(UserError):  # another start may have one of them by now
                folder.write_status(state, step=own_step, reason=reason)

    def with_running(self, running: Callable[[], Iterable[tuple[RunFolder, int]]]) -> GroupFolder:
        """The folder with `running`."""
        return replace(self, running=running)

    def write_table(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Replace table.csv. Raises UserError if it cannot be written."""
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(self.table, text.getvalue(), guard=self.guard)
