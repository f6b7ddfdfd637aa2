"""What a sweep may leave behind and must find: its lock, ranks without their launcher, a terminal that is gone."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from run_helpers import Base
from sweep_runs import study_arguments, write_study_base

from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.base.ownership import take_folder
from megatron_tiedlora.cluster.signals import StopSignals
from megatron_tiedlora.config.sweep_settings import parse_sweep
from megatron_tiedlora.runtime.run_folder import take_run_folder
from megatron_tiedlora.study.lock import lock_study, reject_left_behind
from megatron_tiedlora.study.processes import ScriptStart, deepspeed_starter
from megatron_tiedlora.study.record import last_lines
from megatron_tiedlora.study.sweep import sweep


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[Base, Path]:
    return write_study_base(tmp_path_factory.mktemp("study"))


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# Left behind ----------------------------------------------------------------------------------------------------------

LAUNCHER = """
import os, subprocess, sys
rank = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)", *sys.argv[2:]], start_new_session=True)
open(sys.argv[1], "w").write(str(rank.pid))
os.kill(os.getpid(), 9)
"""


@contextmanager
def rank_without_launcher(work: Path, *words: str, lock: int | None = None) -> Iterator[int]:
    """A rank that a launcher started as DeepSpeed's does, by Popen, and died; its pid."""
    pid = work / "pid"
    keep = () if lock is None else (lock,)
    command = [sys.executable, "-c", LAUNCHER, str(pid), *words]
    assert subprocess.run(command, cwd=work, pass_fds=keep, check=False).returncode == -signal.SIGKILL
    number = int(pid.read_text())
    try:
        until(lambda: psutil.Process(number).cmdline()[1:2] == ["-c"])  # exec is done
        yield number
    finally:
        os.kill(number, signal.SIGKILL)


def test_ranks_that_their_launcher_has_left_are_found(study: tuple[Base, Path], tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    target = folder / "runs" / "tl6-r2-lr1e-4"
    with lock_study(folder) as lock:
        left = rank_without_launcher(tmp_path, f"--output_dir={target}", lock=lock.descriptor)
        left.__enter__()
    with pytest.raises(UserError) as error:
        sweep(parse_sweep(study_arguments(*study, folder)), lambda: no_start)
    pid = (tmp_path / "pid").read_text()
    line = f"--output_dir {folder}: process {pid} of an earlier sweep is still writing {target}"
    assert str(error.value) == f"{line}; wait until it ends, or end it"
    assert list(folder.iterdir()) == []
    left.__exit__(None, None, None)
    until(lambda: not psutil.pid_exists(int(pid)) or psutil.Process(int(pid)).status() == psutil.STATUS_ZOMBIE)
    reject_left_behind(folder)


def no_start(_: Any) -> Any:
    raise AssertionError("nothing is to be started")


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (("--output_dir=out/scores/base",), True),  # as it was given, from its own folder
        (("--output_dir", "{folder}/runs/x"), True),
        (("--output_dir={folder}/groups/x",), True),
        (("ssh", "cd /x; python launch.py --output_dir={folder}/runs/x --rank=2"), True),
        (("--output_dir={folder}-2/runs/x",), False),
        (("--output_dir={folder}/runs-2/x",), False),
        (("--output_dir={folder}",), False),
        (("--adapter={folder}/runs/x/adapter", "--output_dir=elsewhere"), False),
    ],
)
@pytest.mark.parametrize("link", [False, True])
def test_which_processes_are_at_work_in_a_study(
    tmp_path: Path, words: tuple[str, ...], found: bool, link: bool
) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    (tmp_path / "link").symlink_to(folder)
    with rank_without_launcher(tmp_path, *(word.format(folder=folder) for word in words)) as pid:
        place = tmp_path / "link" if link else folder
        if found:
            with pytest.raises(UserError, match=f"process {pid} "):
                reject_left_behind(place)
        else:
            reject_left_behind(place)


# Errors of the sweep's own --------------------------------------------------------------------------------------------


def test_a_study_and_a_run_in_one_folder(study: tuple[Base, Path], tmp_path: Path) -> None:
    """Whoever comes second is told who is there: a sweep beside a run that has just begun, and a run beside a sweep."""
    folder = tmp_path / "out"
    with take_folder(folder, hint="") as run_s, pytest.raises(UserError, match=r"out: a start on .* is at work here"):
        sweep(parse_sweep(study_arguments(*study, folder)), lambda: no_start)
    assert not folder.exists() and run_s.owner.folder == folder
    with lock_study(folder), pytest.raises(UserError, match=r"out: a start on .* is at work here .* --take_over"):
        take_run_folder(str(folder), name="x", resume="auto")
    folder.mkdir()
    (folder / "sweep.yaml").write_text("methods: [tl6]\n")
    with pytest.raises(UserError, match="holds other files; give a new folder"):
        take_run_folder(str(folder), name="x", resume="auto")


def test_what_cannot_be_started_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = tmp_path / "bin" / "deepspeed"
    launcher.parent.mkdir()
    launcher.write_text("#!/nowhere/sh\n")
    launcher.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(launcher.with_name("python")))
    start = deepspeed_starter(tmp_path)
    with lock_study(tmp_path) as lock:
        with pytest.raises(UserError, match=r"deepspeed: cannot be started \(No such file or directory\)"):
            start(ScriptStart("train", {}, (), tmp_path / "logs" / "a.log", lock.descriptor))
        with pytest.raises(UserError, match=r"file/a.log: cannot be written \(File exists\)"):
            (tmp_path / "file").touch()
            start(ScriptStart("train", {}, (), tmp_path / "file" / "a.log", lock.descriptor))
        with pytest.raises(UserError, match=r"/dev/full: cannot be written \(No space left on device\)"):
            start(ScriptStart("train", {}, (), Path("/dev/full"), lock.descriptor))


def test_a_sweep_that_cannot_go_on_says_so_in_its_status(study: tuple[Base, Path], tmp_path: Path) -> None:
    def start(_: Any) -> Any:
        raise UserError("the log: cannot be written")

    with pytest.raises(UserError, match="the log"):
        sweep(parse_sweep(study_arguments(*study, tmp_path / "out")), lambda: start)
    status = json.loads((tmp_path / "out" / "sweep_status.json").read_text())
    assert status == {"state": "failed", "reason": "the log: cannot be written", "failed": []}


def test_a_start_is_found_in_a_log_that_a_kill_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launcher, log = tmp_path / "deepspeed", tmp_path / "a.log"
    launcher.write_text("#!/bin/sh\necho new\n")
    launcher.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(launcher.with_name("python")))
    log.write_text("$ first\nerror: old\ntraining: 50%|# | 3/6")
    with lock_study(tmp_path) as lock:
        child = deepspeed_starter(tmp_path)(ScriptStart("train", {}, (), log, lock.descriptor))
        until(child.ended)
    assert last_lines(log) == ["new"]


# Terminals ------------------------------------------------------------------------------------------------------------

LISTENER = """
import sys, time
from pathlib import Path
from megatron_tiedlora.cluster.signals import StopSignals
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
