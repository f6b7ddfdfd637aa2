"""How the starts of a sweep are ordered, started, watched and stopped, and what it may leave or meet: another in its
folder, a log that was cut off, a terminal that is gone. Nothing is trained here.
"""

from __future__ import annotations

import json
import os
import pty
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from support.launcher_jobs import write_program
from support.ranks import wait_for
from support.sweep_runs import LAUNCH, Given, a_job, planned, study_arguments, sweep_here
from support.task_files import refusal

from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.base.ownership import OWNER_FILE, take_folder
from megatron_tiedlora.cluster.launchers import plan_start
from megatron_tiedlora.config.settings import make_settings
from megatron_tiedlora.runtime.launch_env import visible_gpus
from megatron_tiedlora.runtime.run_folder import take_run_folder
from megatron_tiedlora.runtime.stopping import StopSignals
from megatron_tiedlora.study.plan import SweepPlan
from megatron_tiedlora.study.record import write_record
from megatron_tiedlora.study.sweep import Sweep, begin_job, last_lines, lock_study


class World:
    """A sweep whose starts take `ticks` looks each and do nothing, with all that happens to them in `events`."""

    def __init__(self, plan: SweepPlan, *, ticks: int = 3, stop: Callable[[World], None] = lambda world: None) -> None:
        self.events: list[str] = []
        self.ticks, self.stop = ticks, stop
        self.signals = StopSignals()
        plan.folder.path.mkdir()
        write_record(plan.folder, plan.command, plan.base)
        self.work = Sweep(plan, plan.folder.path, LAUNCH, self.begin, 0, self.signals)

    def begin(self, job: Any, log: Path, lock: int) -> Any:
        assert not self.events or self.events[-1].endswith(" ends")  # one at a time
        self.events.append(f"{log.stem} begins")
        return _Child(self, log.stem)


class _Child:
    """What `wait_for_end` asks of a launcher that was started."""

    def __init__(self, world: World, name: str) -> None:
        self.world, self.name, self.left, self.told = world, name, world.ticks, False
        self.process, self.returncode = self, 0

    def poll(self) -> int | None:
        if self.left:
            self.left -= 1
            self.world.stop(self.world)
            if not self.left:
                self.world.events.append(f"{self.name} ends")
        return None if self.left else 0

    def here(self) -> list[Any]:
        return []

    def stop(self, number: int) -> None:
        if not self.told:
            self.world.events.append(f"{self.name} told {number}")
        self.told = True

    def end(self, tell: Any) -> None:
        assert not self.here()

    def kill(self, *_: Any) -> None:
        if self.left:
            self.world.events.append(f"{self.name} killed")
        self.left = min(self.left, 1)


def write_launcher(folder: Path, text: str) -> tuple[Path, Path]:
    """A deepspeed that is this program, and the Python beside which it would be found."""
    return write_program(folder, "deepspeed", text), folder / "python"


def test_one_after_another_and_a_failure_is_kept(study: Given, tmp_path: Path) -> None:
    """Nothing leaves a result here. What was scored before needs none, and the groups come without the others."""
    plan = planned(study, tmp_path / "out", together=2, ranks="2")
    world = World(plan, ticks=2)
    scored = plan.folder.scores / "base"
    scored.mkdir(parents=True)
    (scored / "results.json").write_text('{"score": 1.0, "n": 2, "confidence_interval": [0.0, 2.0]}')
    world.work.run()
    assert world.events == [f"group {m}-r2-lr2e-1 {what}" for m in ("lora", "tl6") for what in ("begins", "ends")]
    assert list(world.work.failures) == [run.name for run in plan.grid.all_runs] and not world.work.given_up
    assert {reason for reason, _ in world.work.failures.values()} == {"it was not started"}


@pytest.mark.parametrize("shown", [True, False])
def test_without_the_base_s_score_nothing_follows(
    study: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, shown: bool
) -> None:
    """And progress that cannot be shown stops nothing."""
    world = World(planned(study, tmp_path / "out"), ticks=2)
    if not shown:
        monkeypatch.setattr(world.work._bar, "set_postfix_str", Mock(side_effect=OSError(28, "no space left")))
    world.work.run()
    assert list(world.work.failures) == ["score base"] and world.work.given_up
    assert world.events == ["score base begins", "score base ends"]
    assert world.work.end() == 1 and not (tmp_path / "out" / "table2.md").exists()
    line = f"error: 1 failed: score base; nothing else was started (logs in {tmp_path / 'out' / 'logs'})"
    assert capsys.readouterr().err.splitlines()[-1] == line


@pytest.mark.parametrize(("received", "killed"), [([2], False), ([15, 15], False), ([2, 2], True), ([15, 2], True)])
@pytest.mark.parametrize("together", [False, True])
def test_signals_are_passed_on_once_and_a_second_interrupt_kills(
    study: Given, tmp_path: Path, received: list[int], killed: bool, together: bool
) -> None:
    waiting = list(received)

    def stop(world: World) -> None:
        while waiting:
            world.signals.received.append(waiting.pop(0))
            if not together:
                break

    world = World(planned(study, tmp_path / "out"), ticks=6, stop=stop)
    world.work.run()
    assert world.work.end() == 128 + received[0] and not world.work.failures
    assert [event for event in world.events if "told" in event] == [f"score base told {received[0]}"]
    assert ("score base killed" in world.events) == killed and world.events[-1] == "score base ends"


def test_an_error_of_the_sweeps_own_leaves_nothing_running(study: Given, tmp_path: Path) -> None:
    world = World(planned(study, tmp_path / "out"), ticks=4, stop=Mock(side_effect=MemoryError))
    with pytest.raises(MemoryError):
        world.work.run()
    assert world.events == ["score base begins", "score base killed"]


def test_stop_signals_are_noted_and_given_back() -> None:
    """But a hang-up under nohup, which is ignored."""
    before = signal.getsignal(signal.SIGTERM), signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as stop:
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
                os.kill(os.getpid(), number)
            assert stop.received == [15, 2]
        assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGHUP)) == (before[0], signal.SIG_IGN)
    finally:
        signal.signal(signal.SIGHUP, before[1])


# Places -------------------------------------------------------------------------------------------------------------


def test_gpus_are_those_that_the_user_left_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_gpus() == ("0", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, 5")
    assert visible_gpus() == ("3", "5")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b")
    assert "only GPU numbers are supported" in refusal(visible_gpus)


def test_a_port_for_each_start_unless_one_is_named(study: Given, tmp_path: Path) -> None:
    ports = []
    for number, flags in enumerate(({}, {}, {"launcher_args": "--master_port 5"})):
        world = World(planned(study, tmp_path / str(number), **flags))
        begin = world.work.begin
        world.work.begin = lambda job, log, lock, begin=begin: [ports.append(job.master_port), begin(job, log, lock)][1]
        world.work.run()
    assert ports[0] != ports[1] and min(ports[:2]) > 1000 and ports[2] == 5


# Processes ----------------------------------------------------------------------------------------------------------


def test_the_lock_is_held_by_what_was_started(tmp_path: Path) -> None:
    with lock_study(tmp_path) as lock:
        left = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=(lock.descriptor,))
    try:
        with pytest.raises(UserError, match="a run of a killed sweep"), lock_study(tmp_path):
            pass
    finally:
        left.communicate(b"\n")
    os.utime(tmp_path / OWNER_FILE, (time.time() - 25,) * 2)  # the process that took the folder lives
    with lock_study(tmp_path):
        pass


def test_what_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = '#!/bin/sh\necho "$@"\n[ -e /proc/$$/fd/$LOCK ] && echo holds the lock\n'
    launcher, python = write_launcher(tmp_path / "bin", text)
    log = tmp_path / "logs" / "a b.log"
    log.parent.mkdir()
    log.symlink_to(tmp_path / "elsewhere")  # is not followed
    words = []
    for port in (1, 2):
        with lock_study(tmp_path / "out") as lock:
            monkeypatch.setenv("LOCK", str(lock.descriptor))
            job = a_job(tmp_path, "--rank=2", "--adapters", "a=b", python=python, port=port)
            child = begin_job(job, log, lock.descriptor)
            assert child.process.wait(30) is not None
        words.append(shlex.join(plan_start(job, os.environ).words[1:]))
        assert f" --master_port {port} " in words[-1]
        assert words[-1].endswith(f" {LAUNCH}/train.py --rank=2 --adapters a=b")
    expected = [[f"$ {launcher} {line}", line, "holds the lock"] for line in words]
    assert log.read_text().splitlines() == [line for lines in expected for line in lines]
    assert last_lines(log) == [words[1], "holds the lock"]
    assert not log.is_symlink() and not (tmp_path / "elsewhere").exists()


def test_last_lines_are_what_was_printed_and_not_the_bars(tmp_path: Path) -> None:
    log = tmp_path / "log"
    bars = "\x1b[A\ntraining:  0%|  | 0/6\rtraining: 50%|# | 3/6\x1b[A\n\n"
    log.write_text(f"$ first\nold\n$ second\none\n{bars}error: two\n")
    assert last_lines(log) == ["one", "error: two"] and last_lines(log, 1) == ["error: two"]
    assert last_lines(log, 2, bars=True) == ["training: 50%|# | 3/6", "error: two"]
    assert last_lines(tmp_path / "none") == []


# Errors of the sweep's own --------------------------------------------------------------------------------------------


def test_a_study_and_a_run_in_one_folder(study: Given, tmp_path: Path) -> None:
    """Whoever comes second is told who is there: a sweep beside a run that has just begun, and a run beside a sweep."""
    folder = tmp_path / "out"
    using = r"out: a launch on .* is using this folder"
    with take_folder(folder, hint="") as run_s, pytest.raises(UserError, match=using):
        sweep_here(study_arguments(*study, folder))
    assert not folder.exists() and run_s.owner.folder == folder
    with lock_study(folder), pytest.raises(UserError, match=r"out: a launch on .* is using this folder .* --take_over"):
        take_run_folder(make_settings({"output_dir": str(folder), "resume": "auto"}))
    folder.mkdir()
    (folder / "sweep.yaml").write_text("methods: [tl6]\n")
    settings = make_settings({"output_dir": str(folder), "resume": "auto"})
    assert "holds other files; give a new folder" in refusal(take_run_folder, settings)


def test_what_cannot_be_started_is_one_line(tmp_path: Path) -> None:
    _, python = write_launcher(tmp_path / "bin", "#!/nowhere/sh\n")
    job = a_job(tmp_path, python=python)
    with lock_study(tmp_path / "out") as lock:
        (tmp_path / "file").touch()
        for log, said in (
            (tmp_path / "logs" / "a.log", "deepspeed: cannot be started (No such file or directory)"),
            (tmp_path / "file" / "a.log", "file/a.log: cannot be written (File exists)"),
            (Path("/dev/full"), "/dev/full: cannot be written (No space left on device)"),
        ):
            assert said in refusal(begin_job, job, log, lock.descriptor)


def test_without_a_launcher_nothing_begins(study: Given, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    said = refusal(sweep_here, study_arguments(*study, tmp_path / "out"))
    assert "deepspeed: this program is not installed" in said
    assert not (tmp_path / "out").exists()


def test_a_sweep_that_cannot_go_on_says_so_in_its_status(study: Given, tmp_path: Path) -> None:
    begin = Mock(side_effect=UserError("the log: cannot be written"))
    assert "the log" in refusal(sweep_here, study_arguments(*study, tmp_path / "out"), begin)
    status = json.loads((tmp_path / "out" / "sweep_status.json").read_text())
    assert status == {"state": "failed", "reason": "the log: cannot be written", "failed": []}


def test_a_start_is_found_in_a_log_that_a_kill_cut_off(tmp_path: Path) -> None:
    (_, python), log = write_launcher(tmp_path, "#!/bin/sh\necho new\n"), tmp_path / "a.log"
    log.write_text("$ first\nerror: old\ntraining: 50%|# | 3/6")
    with lock_study(tmp_path / "out") as lock:
        begin_job(a_job(tmp_path, python=python), log, lock.descriptor).process.wait(30)
    assert last_lines(log) == ["new"]


# Terminals ------------------------------------------------------------------------------------------------------------

LISTENER = """
import sys, time
from pathlib import Path
from megatron_tiedlora.runtime.stopping import StopSignals
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
    wait_for(lambda: note.is_file() and note.read_text() == "listens", "the listener", limit=30)
    os.close(master)  # the kernel sends SIGHUP
    assert process.wait(30) == 0 and note.read_text() == "[15]"
