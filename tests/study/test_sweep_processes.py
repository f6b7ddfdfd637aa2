"""How a sweep's commands are ordered, started, watched and stopped; nothing is trained here."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.base.ownership import OWNER_FILE
from megatron_tiedlora.cluster.running import StopSignals
from megatron_tiedlora.runtime.launch_env import visible_gpus
from megatron_tiedlora.study.plan import Step
from megatron_tiedlora.study.record import Failure
from megatron_tiedlora.study.starts import LaunchedChild, ScriptStart, deepspeed_starter, last_lines, with_port
from megatron_tiedlora.study.sweep import Outcome, lock_study, run_steps

WHY = Failure("why", Path("log"))


class World:
    """A plan whose runs take `ticks` looks each, with all that happens to them in `events`."""

    def __init__(self, *, ticks: int = 3, stop: Callable[[World], None] | None = None) -> None:
        self.events: list[str] = []
        self.ticks, self.stop = ticks, stop
        self.signals = StopSignals()

    def begin(self, name: Any) -> Any:
        assert not self.events or self.events[-1].endswith(" ends")  # one at a time
        self.events.append(f"begins {name}")
        return _Child(self, name)

    def run(self, *names: str, fails: tuple[str, ...] = (), nothing: tuple[str, ...] = ()) -> Outcome:
        items: list[Any] = [SimpleNamespace(name=name) for name in names]
        plan: Any = SimpleNamespace(
            steps=lambda: [Step((item,)) for item in items],
            num_items=len(items),
            start=lambda step, lock: None if step.name in nothing else step.name,
            failure=lambda item, step: WHY if item.name in fails else None,
            done=lambda item: (0.5, "half"),
            progress=self.progress,
        )
        return run_steps(plan, 0, self.begin, self.signals)

    def progress(self, step: Step) -> tuple[float, str]:
        return 0.5, "half"


class _Child:
    def __init__(self, world: World, name: str) -> None:
        self.world, self.name, self.left = world, name, world.ticks

    def ended(self) -> bool:
        self.left -= 1
        if self.world.stop is not None:
            self.world.stop(self.world)
        if self.left == 0:
            self.world.events.append(f"{self.name} ends")
        return self.left == 0

    def interrupt(self, number: int) -> None:
        self.world.events.append(f"{self.name} told {number}")

    def kill(self) -> None:
        self.world.events.append(f"{self.name} killed")
        self.left = 1


def test_one_after_another_in_the_order_given() -> None:
    world = World(ticks=2)
    assert world.run("a", "b", "c") == Outcome()
    assert world.events == ["begins a", "a ends", "begins b", "b ends", "begins c", "c ends"]


def test_a_failure_is_kept_and_what_follows_still_comes() -> None:
    world = World(ticks=1)
    assert world.run("a", "b", "s", fails=("a",), nothing=("b",)) == Outcome({"a": WHY})
    assert world.events == ["begins a", "a ends", "begins s", "s ends"]


def test_without_the_base_s_score_nothing_follows() -> None:
    world = World(ticks=2)
    outcome = world.run("score base", "b", fails=("score base",))
    assert outcome == Outcome({"score base": WHY}, given_up=True)
    assert world.events == ["begins score base", "score base ends"]


@pytest.mark.parametrize(
    ("received", "killed"),
    [([2], False), ([15, 15], False), ([2, 2], True), ([15, 2], True)],
)
@pytest.mark.parametrize("together", [False, True])
def test_signals_are_passed_on_once_and_a_second_interrupt_kills(
    received: list[int], killed: bool, together: bool
) -> None:
    waiting = list(received)

    def stop(world: World) -> None:
        while waiting:
            world.signals.received.append(waiting.pop(0))
            if not together:
                break

    world = World(ticks=6, stop=stop)
    assert world.run("a", "b", fails=("a",)) == Outcome(stopped_by=received[0])
    assert [event for event in world.events if "told" in event] == [f"a told {received[0]}"]
    assert ("a killed" in world.events) == killed and "begins b" not in world.events and world.events[-1] == "a ends"


@pytest.mark.parametrize("impatient", [False, True])
@pytest.mark.parametrize("signalled", [False, True])
def test_an_error_of_the_sweeps_own_leaves_nothing_running(impatient: bool, signalled: bool) -> None:
    """What runs is told, once, and waited for."""

    def stop(world: World) -> None:
        if signalled and not world.signals.received:
            world.signals.received.append(15)
        if impatient and "a told 15" in world.events and 2 not in world.signals.received:
            world.signals.received.append(2)

    def full_disk(step: Step) -> tuple[float, str]:
        raise OSError(28, "no space left on device")

    world = World(ticks=4, stop=stop)
    world.progress = full_disk  # type: ignore[method-assign]
    with pytest.raises(OSError, match="no space"):
        world.run("a", "b")
    assert [event for event in world.events if "told" in event] == ["a told 15"]
    assert ("a killed" in world.events) == impatient
    assert world.events[-1] == "a ends" and "begins b" not in world.events


def test_stop_signals_are_noted_and_given_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopSignals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.received == [15, 2]
    assert signal.getsignal(signal.SIGTERM) is before


# Places -------------------------------------------------------------------------------------------------------------


def test_gpus_are_those_that_the_user_left_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_gpus() == ("0", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, 5")
    assert visible_gpus() == ("3", "5")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-a,GPU-b")
    with pytest.raises(UserError, match="only GPU numbers are supported"):
        visible_gpus()


def test_a_port_for_each_start_unless_one_is_named() -> None:
    one, other = with_port(("--num_gpus", "2")), with_port(("--num_gpus", "2"))
    assert one[:3] == ("--num_gpus", "2", "--master_port") and int(one[3]) > 0 and one[3] != other[3]
    assert with_port(("--master_port", "5")) == ("--master_port", "5")
    assert with_port(("--master_port=5",)) == ("--master_port=5",)


# Processes ----------------------------------------------------------------------------------------------------------


def test_the_lock_is_held_by_what_was_started(tmp_path: Path) -> None:
    with lock_study(tmp_path) as lock, pytest.raises(UserError, match="another sweep"), lock_study(tmp_path):
        pass
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


LAUNCHER = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", "import time; print('rank', flush=True); time.sleep(RANK)"])
time.sleep(60)
"""


@pytest.mark.parametrize("kill", [False, True])
def test_the_ends_of_ranks_are_waited_for(tmp_path: Path, kill: bool) -> None:
    out = tmp_path / "out"
    with out.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER.replace("RANK", "60" if kill else "1.5")],
            stdout=stream,
            start_new_session=True,
        )
    child = LaunchedChild(process, "train.py")
    deadline = time.monotonic() + 30
    while not out.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert not child.ended()
    (child.kill if kill else lambda: child.interrupt(signal.SIGTERM))()
    process.wait(10)
    assert kill or not child.ended()  # the launcher is gone, its rank is not
    while not child.ended():
        assert time.monotonic() < deadline
        time.sleep(0.05)


HARD_OF_HEARING = """
import signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
print("starting", flush=True)
time.sleep(1)
hear_again = lambda: (signal.signal(signal.SIGINT, signal.default_int_handler), time.sleep(0.5))  # seen as a fork first
subprocess.Popen([sys.executable, "train.py"], preexec_fn=hear_again)
"""
RANK = "import time\nprint('rank', flush=True)\ntime.sleep(120)\n"


def test_a_rank_that_starts_after_its_launcher_was_told_is_told_too(tmp_path: Path) -> None:
    """The launcher is told in the middle of its start, loses the signal and ends; its rank knows of nothing."""
    (tmp_path / "train.py").write_text(RANK)
    out = tmp_path / "out"
    with out.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, "-c", HARD_OF_HEARING],
            stdout=stream,
            stderr=subprocess.DEVNULL,
            cwd=tmp_path,
            start_new_session=True,
        )
    child = LaunchedChild(process, "train.py")
    deadline = time.monotonic() + 30
    while "starting" not in out.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    child.interrupt(signal.SIGINT)
    try:
        while not child.ended():
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        child.kill()
    assert process.poll() == 0


def test_what_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "bin" / "python"
    fake.parent.mkdir()
    monkeypatch.setattr(sys, "executable", str(fake))
    with pytest.raises(UserError, match="deepspeed: no such launcher"):
        deepspeed_starter(tmp_path)
    launcher = fake.with_name("deepspeed")
    launcher.write_text('#!/bin/sh\necho "$@"\n[ -e /proc/$$/fd/$LOCK ] && echo holds the lock\n')
    launcher.chmod(0o755)
    settings = {"rank": 2, "layers": (1, 4), "packing": False, "adapter": None}
    log = tmp_path / "logs" / "a b.log"
    log.parent.mkdir()
    log.symlink_to(tmp_path / "elsewhere")  # is not followed
    for port in ("1", "2"):
        with lock_study(tmp_path) as lock:
            monkeypatch.setenv("LOCK", str(lock.descriptor))
            command = ScriptStart("train", settings, ("--master_port", port), log, lock.descriptor)
            child = deepspeed_starter(Path("/scripts"))(command)
            deadline = time.monotonic() + 30
            while not child.ended():
                assert time.monotonic() < deadline
                time.sleep(0.02)
    flags = "/scripts/train.py --rank=2 --layers=1,4 --packing=false"
    assert log.read_text().splitlines() == [
        f"$ {launcher} --master_port 1 {flags}",
        f"--master_port 1 {flags}",
        "holds the lock",
        f"$ {launcher} --master_port 2 {flags}",
        f"--master_port 2 {flags}",
        "holds the lock",
    ]
    assert last_lines(log) == [f"--master_port 2 {flags}", "holds the lock"]
    assert not log.is_symlink() and not (tmp_path / "elsewhere").exists()


def test_last_lines_are_what_was_printed_and_not_the_bars(tmp_path: Path) -> None:
    log = tmp_path / "log"
    bars = "\x1b[A\ntraining:  0%|  | 0/6\rtraining: 50%|# | 3/6\x1b[A\n\n"
    log.write_text(f"$ first\nold\n$ second\none\n{bars}error: two\n")
    assert last_lines(log) == ["one", "error: two"] and last_lines(log, 1) == ["error: two"]
    assert last_lines(tmp_path / "none") == []
