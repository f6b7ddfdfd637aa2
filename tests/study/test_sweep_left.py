"""What a sweep may leave behind or meet: another in its folder, a log that was cut off, a terminal that is gone."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from run_helpers import Base
from sweep_runs import LAUNCH, a_job, study_arguments, write_study_base

from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.base.ownership import take_folder
from megatron_tiedlora.cluster.start import StopSignals
from megatron_tiedlora.config.sweep_settings import parse_sweep
from megatron_tiedlora.runtime.run_folder import take_run_folder
from megatron_tiedlora.study.sweep import begin_job, last_lines, lock_study, sweep


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[Base, Path]:
    return write_study_base(tmp_path_factory.mktemp("study"))


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def no_start(*_: Any) -> Any:
    raise AssertionError("nothing is to be started")


# Errors of the sweep's own --------------------------------------------------------------------------------------------


def test_a_study_and_a_run_in_one_folder(study: tuple[Base, Path], tmp_path: Path) -> None:
    """Whoever comes second is told who is there: a sweep beside a run that has just begun, and a run beside a sweep."""
    folder = tmp_path / "out"
    with take_folder(folder, hint="") as run_s, pytest.raises(UserError, match=r"out: a start on .* is at work here"):
        sweep(parse_sweep(study_arguments(*study, folder)), scripts=LAUNCH, begin=no_start)
    assert not folder.exists() and run_s.owner.folder == folder
    with lock_study(folder), pytest.raises(UserError, match=r"out: a start on .* is at work here .* --take_over"):
        take_run_folder(str(folder), name="x", resume="auto")
    folder.mkdir()
    (folder / "sweep.yaml").write_text("methods: [tl6]\n")
    with pytest.raises(UserError, match="holds other files; give a new folder"):
        take_run_folder(str(folder), name="x", resume="auto")


def test_what_cannot_be_started_is_one_line(tmp_path: Path) -> None:
    python = tmp_path / "bin" / "python"
    launcher = python.with_name("deepspeed")
    launcher.parent.mkdir()
    launcher.write_text("#!/nowhere/sh\n")
    launcher.chmod(0o755)
    job = a_job(tmp_path, python=python)
    with lock_study(tmp_path / "out") as lock:
        with pytest.raises(UserError, match=r"deepspeed: cannot be started \(No such file or directory\)"):
            begin_job(job, tmp_path / "logs" / "a.log", lock.descriptor)
        with pytest.raises(UserError, match=r"file/a.log: cannot be written \(File exists\)"):
            (tmp_path / "file").touch()
            begin_job(job, tmp_path / "file" / "a.log", lock.descriptor)
        with pytest.raises(UserError, match=r"/dev/full: cannot be written \(No space left on device\)"):
            begin_job(job, Path("/dev/full"), lock.descriptor)


def test_without_a_launcher_nothing_begins(
    study: tuple[Base, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(UserError, match="deepspeed: no such launcher"):
        sweep(parse_sweep(study_arguments(*study, tmp_path / "out")), scripts=LAUNCH, begin=no_start)
    assert not (tmp_path / "out").exists()


def test_a_sweep_that_cannot_go_on_says_so_in_its_status(study: tuple[Base, Path], tmp_path: Path) -> None:
    def begin(*_: Any) -> Any:
        raise UserError("the log: cannot be written")

    with pytest.raises(UserError, match="the log"):
        sweep(parse_sweep(study_arguments(*study, tmp_path / "out")), scripts=LAUNCH, begin=begin)
    status = json.loads((tmp_path / "out" / "sweep_status.json").read_text())
    assert status == {"state": "failed", "reason": "the log: cannot be written", "failed": []}


def test_a_start_is_found_in_a_log_that_a_kill_cut_off(tmp_path: Path) -> None:
    launcher, log = tmp_path / "deepspeed", tmp_path / "a.log"
    launcher.write_text("#!/bin/sh\necho new\n")
    launcher.chmod(0o755)
    log.write_text("$ first\nerror: old\ntraining: 50%|# | 3/6")
    with lock_study(tmp_path / "out") as lock:
        child = begin_job(a_job(tmp_path, python=launcher.with_name("python")), log, lock.descriptor)
        until(lambda: child.process.poll() is not None)
    assert last_lines(log) == ["new"]


# Terminals ------------------------------------------------------------------------------------------------------------

LISTENER = """
import sys, time
from pathlib import Path
from megatron_tiedlora.cluster.start import StopSignals
with StopSignals() as stop:
    Path(sys.argv[1]).write_text("listens")
    deadline = time.monotonic() + 30
    while not stop.received and time.monotonic() < deadline:
        time.sleep(0.05)
    print("to nobody", flush=True)
    print("to nobody", file=sys.stderr, flush=True)
    Path(sys.argv[1]).write_text(str(stop.received))
"""


def test_a_terminal_that_hangs_up_stops_and_what_is_printed_then_is_no_error(tmp_path: Path) -> None:
    note = tmp_path / "note"
    master, slave = pty.openpty()
    # Whatever this suite runs under: nohup would hand down a SIGHUP that is ignored.
    lead = "import fcntl, signal, termios; signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
    lead += "fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
    process = subprocess.Popen(
        [sys.executable, "-c", lead + LISTENER, str(note)], stdin=slave, stdout=slave, stderr=slave,
        start_new_session=True,
    )  # fmt: skip
    os.close(slave)
    until(lambda: note.is_file() and note.read_text() == "listens")
    os.close(master)  # the kernel sends SIGHUP
    assert process.wait(30) == 0 and note.read_text() == "[15]"


def test_under_nohup_a_hang_up_is_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.received == []
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
