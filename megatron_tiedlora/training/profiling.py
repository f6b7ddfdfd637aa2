"""--profile FIRST:LAST: torch's profiler over some steps of this start of a run, one trace per rank.

A trace is in Chrome's format, for https://ui.perfetto.dev. It is written when LAST is done, or when the run ends before
that. Recording makes the steps slower, so their speed in metrics.jsonl is not that of others.
"""

from __future__ import annotations

import gzip
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from megatron_tiedlora.base.atomic import new_file
from megatron_tiedlora.base.errors import UserError, show
from megatron_tiedlora.base.wording import first_line
from megatron_tiedlora.config.settings import profiled_steps
from megatron_tiedlora.runtime.run_folder import RunFolder


def steps_over(profile: str | None, step: int) -> str:
    """Which steps of a --profile a run that continues after `step` does not record, in a line; '' if there are none."""
    steps = profiled_steps(profile)
    if not steps or steps[0] > step:
        return ""
    last = min(steps[-1], step)
    which = f"step {last} is" if steps[0] == last else f"steps {steps[0]} to {last} are"
    return f"--profile {profile}: the run continues after step {step}, so {which} not recorded"


class StepProfiler:
    """Records the steps of a --profile on one rank, and writes RUN/profile/rank_N.json.gz."""

    def __init__(self, profile: str | None, folder: RunFolder, *, rank: int) -> None:
        self._steps = profiled_steps(profile)
        self._folder, self._rank = folder, rank
        self._recording: Any = None

    @contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Record what happens inside, if step `number` is one of those to record."""
        if number not in self._steps:
            yield
            return
        if self._recording is None:
            kinds = [torch.profiler.ProfilerActivity.CPU]
            if torch.cuda.is_available():
                kinds.append(torch.profiler.ProfilerActivity.CUDA)
            self._recording = torch.profiler.profile(activities=kinds)
            self._recording.start()
        with torch.profiler.record_function(f"step {number}"):
            yield
        if number == self._steps[-1]:
            self.finish(last_step=number)

    def finish(self, *, last_step: int) -> None:
        """Write what was recorded, if anything was; rank 0 says if the run ended after `last_step`, before the first
        step to record. A trace that cannot be written is no reason to end a run: a run folder that only rank 0 sees may
        be read-only elsewhere."""
        if self._steps and last_step < self._steps[0] and self._rank == 0:
            first = self._steps[0]
            show(f"note: --profile: the run ended after step {last_step}, before step {first}", file=sys.stderr)
        if self._recording is None:
            return
        recording, self._recording = self._recording, None
        target = self._folder.profile / f"rank_{self._rank}.json.gz"
        try:
            recording.stop()
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory() as scratch, new_file(target, guard=self._folder.guard) as unfinished:
                plain = Path(scratch, "trace.json")
                recording.export_chrome_trace(str(plain))
                with plain.open("rb") as trace, gzip.open(unfinished, "wb") as compressed:
                    shutil.copyfileobj(trace, compressed)
        except (OSError, UserError, RuntimeError) as error:
            show(f"note: --profile: {target} cannot be written ({first_line(error)})", file=sys.stderr)
