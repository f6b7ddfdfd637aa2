"""A status file that is seen late, and one that holds what a terminal would act on."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from megatron_tiedlora.cluster.verdict import StatusFile, judge
from megatron_tiedlora.runtime.run_folder import RunFolder

pytestmark = pytest.mark.timeout(30)


@pytest.mark.parametrize(("launcher_status", "status"), [(0, 0), (7, 7)])
def test_a_status_that_is_seen_late_counts_where_the_launcher_ended_well(
    tmp_path: Path, launcher_status: int, status: int
) -> None:
    folder = RunFolder(tmp_path)
    file = StatusFile(folder)
    late = threading.Timer(0.7, folder.write_status, args=["finished"], kwargs={"step": 4, "reason": "max_steps"})
    late.start()
    found = judge(file, launcher="srun", launcher_status=launcher_status, passed_on=0)
    late.join()
    assert found.status == status and ("finished at step 4" in found.line) is (status == 0)


@pytest.mark.parametrize("there", [True, False])
def test_the_wait_for_a_status_is_short_and_only_where_the_folder_is(tmp_path: Path, there: bool) -> None:
    file = StatusFile(RunFolder(tmp_path if there else tmp_path / "nowhere"))
    begun = time.monotonic()
    found = judge(file, launcher="srun", launcher_status=0, passed_on=0, late_seconds=0.5)
    assert found.status == 1 and found.line.endswith("; srun ended with status 0")
    assert (0.5 <= time.monotonic() - begun < 5) is there


def test_a_status_with_control_characters_is_one_line(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    file = StatusFile(folder)
    folder.write_status("failed", step=4, reason="\x1b[2J\n" + "x" * 5000)
    line = judge(file, launcher="srun", launcher_status=1, passed_on=0).line
    assert line.isprintable() and len(line) < 1500 and "\\x1b[2J" in line
