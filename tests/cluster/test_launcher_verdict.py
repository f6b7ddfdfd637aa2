"""A status file that is seen late, one that holds what a terminal would act on, and what is said of ranks elsewhere."""

from __future__ import annotations

import shlex
import subprocess
import threading
import time
from pathlib import Path

import pytest
from support.launcher_jobs import make_job

from megatron_tiedlora.base.ownership import START_ID, FolderLock, take_folder
from megatron_tiedlora.cluster import start as start_module
from megatron_tiedlora.cluster.start import StatusFile, _say_what_may_be_left, judge
from megatron_tiedlora.runtime.run_folder import RunFolder

pytestmark = pytest.mark.timeout(30)


def taken(folder: Path, monkeypatch: pytest.MonkeyPatch, start: str, **more: bool) -> FolderLock:
    """The folder as the ranks of a start take it."""
    monkeypatch.setenv(START_ID, start)
    return take_folder(folder, hint="", **more)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("launcher_status", [0, 2])
def test_what_another_start_does_in_the_folder_is_not_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: bool, launcher_status: int
) -> None:
    """Whether it was there before this start looked, or came at the same time."""
    file = None if first else StatusFile(RunFolder(tmp_path), "ours")
    with taken(tmp_path, monkeypatch, "theirs"):
        file = file or StatusFile(RunFolder(tmp_path), "ours")
        assert not (file.is_new() or file.has_begun() or file.is_awaited()) and file.is_of_another
        RunFolder(tmp_path).write_status("finished", step=4, reason="max_steps")
    assert not (file.is_new() or file.has_begun() or file.is_awaited())  # also after its end
    monkeypatch.setattr(start_module, "LATE_SECONDS", 0.1)
    found = judge(file, launcher="srun", launcher_status=launcher_status, passed_on=0)
    assert found.status != 0 and found.line.startswith(f"{tmp_path} belongs to another launch; srun ended")


def test_a_folder_that_this_start_takes_over_is_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with taken(tmp_path, monkeypatch, "theirs"):
        file = StatusFile(RunFolder(tmp_path), "ours")
        with taken(tmp_path, monkeypatch, "ours", take_over=True):
            assert file.has_begun() and file.is_awaited() and not file.is_new()
            RunFolder(tmp_path).write_status("finished", step=4, reason="max_steps")
        assert file.is_new() and judge(file, launcher="srun", launcher_status=0, passed_on=0).status == 0


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
def test_the_wait_for_a_status_is_short_and_only_where_the_folder_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    monkeypatch.setattr(start_module, "LATE_SECONDS", 0.5)
    file = StatusFile(RunFolder(tmp_path if there else tmp_path / "nowhere"))
    begun = time.monotonic()
    found = judge(file, launcher="srun", launcher_status=0, passed_on=0)
    assert found.status == 1 and found.line.endswith("; srun ended with status 0")
    assert (0.5 <= time.monotonic() - begun < 5) is there


def test_a_status_with_control_characters_is_one_line(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    file = StatusFile(folder)
    folder.write_status("failed", step=4, reason="\x1b[2J\n" + "x" * 5000)
    line = judge(file, launcher="srun", launcher_status=1, passed_on=0).line
    assert line.isprintable() and len(line) < 1500 and "\\x1b[2J" in line


def test_what_ends_ranks_elsewhere_ends_those_of_this_folder_only(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "a+b (1)%h.d"
    _say_what_may_be_left(make_job(tmp_path), RunFolder(folder))
    first, second = capfd.readouterr().err.splitlines()
    assert second == "tiedlora run: ranks that hang end with the same command and pkill -KILL -f"
    words = shlex.split(first.partition(" end with: ")[2])
    assert words[:-1] == ["pdsh", "-R", "ssh", "-w", "node1,node2"]
    pkill, f, pattern = shlex.split(words[-1].replace("%%", "\0").replace("\0", "%"))
    assert (pkill, f) == ("pkill", "-f") and "%%h" in words[-1]
    for line, is_found in ((folder, True), (f"{folder} --x=1", True), (f"{folder}-2", False), (f"{folder}/2", False)):
        text = f"python train.py --output_dir={line}\n"
        found = subprocess.run(["grep", "-E", "--", pattern], input=text, capture_output=True, text=True)
        assert (found.returncode == 0) is is_found, line
