"""The processes of one start, found and signalled on all hosts; hosts are played by a program called `ssh`."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from launcher_jobs import make_job, write_program

from megatron_tiedlora.cluster.job_hosts import JobHosts, describe
from megatron_tiedlora.cluster.job_processes import (
    RUN_ID,
    HostProcesses,
    JobProcess,
    find_processes,
    main,
    read_report,
    send_signal,
)
from megatron_tiedlora.config.hosts import Host
from megatron_tiedlora.config.launch_settings import parse_launch

pytestmark = pytest.mark.timeout(90)
RUN = secrets.token_hex(8)  # another run of these tests may be under way

# node1 and node2 are this host under other names, with a talkative shell; the others are in trouble.
SSH = """#!/bin/sh
until case "$1" in node*|down|slow|broken) true;; *) false;; esac; do shift; done
host=$1; shift
case "$host" in
    node*) echo "Welcome to $host {"; exec sh -c "$*";;
    down) echo "ssh: connect to host down port 22: No route to host" >&2; exit 255;;
    slow) exec sleep 60;;
    broken) echo "/usr/bin/python: No module named megatron_tiedlora" >&2; exit 1;;
esac
"""
COUNTS = """
import os, signal, sys, time
def note(number, frame):
    with open(sys.argv[1], "a") as file:
        file.write(f"{number}\\n")
signal.signal(signal.SIGTERM, note)
with open(sys.argv[1], "a") as file:
    file.write("up\\n")
time.sleep(60)
"""

Spawn = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def spawn(tmp_path: Path) -> Iterator[Spawn]:
    """Starts processes, and ends them after the test."""
    started: list[subprocess.Popen[bytes]] = []

    def run(*words: str, run_id: str | None = RUN) -> subprocess.Popen[bytes]:
        environment = {**os.environ, **({RUN_ID: run_id} if run_id is not None else {})}
        process = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, start_new_session=True)
        started.append(process)
        return process

    yield run
    send_signal(find_processes(RUN, script=""), signal.SIGKILL, everything=True)
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture
def script(tmp_path: Path) -> str:
    """What the ranks of these tests run."""
    file = tmp_path / "train.py"
    file.write_text(COUNTS)
    return str(file)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def kinds(report: HostProcesses) -> dict[int, str]:
    return {found.pid: found.kind for found in report.processes}


def test_ranks_agents_and_launchers_of_one_start_are_told_apart(spawn: Spawn, script: str, tmp_path: Path) -> None:
    mark = str(tmp_path / "mark")
    rank = spawn(sys.executable, "-u", script, mark)
    torchrun = write_program(tmp_path, "torchrun", f"#!{sys.executable}\nimport time; time.sleep(60)\n")
    agent = spawn(str(torchrun), script)
    launcher = spawn(sys.executable, "-c", "import time; time.sleep(60)", script)
    for other in (None, RUN[:-1], f"{RUN}4"):
        spawn(sys.executable, script, mark, run_id=other)
    expected = {rank.pid: "rank", agent.pid: "agent", launcher.pid: "launcher"}
    wait_for(lambda: expected.items() <= kinds(find_processes(RUN, script=script)).items())
    report = find_processes(RUN, script=script)
    assert report.host == socket.gethostname() and len(report.processes) == 3
    assert main(["--run_id", "none", "--script", script]) == 0


def test_the_fork_of_a_rank_is_no_rank(spawn: Spawn, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text("import os, time\nos.fork()\ntime.sleep(60)\n")
    rank = spawn(sys.executable, str(script))
    wait_for(lambda: len(find_processes(RUN, script=str(script)).processes) == 2)
    found = find_processes(RUN, script=str(script))
    assert [pid for pid, kind in kinds(found).items() if kind == "rank"] == [rank.pid]
    send_signal(found, signal.SIGKILL, everything=True)
    rank.wait(10)


def test_whom_a_signal_is_for(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []

    class Process:
        def __init__(self, pid: int) -> None:
            self.pid = pid

        def create_time(self) -> float:
            return 5.0 if self.pid == 9 else 0.0

        def send_signal(self, _number: int) -> None:
            sent.append(self.pid)

    monkeypatch.setattr(psutil, "Process", Process)
    ranks, launcher, agent = (
        (JobProcess(1, "rank", "r"), JobProcess(2, "rank", "r")),
        JobProcess(3, "launcher", "l"),
        JobProcess(4, "agent", "a"),
    )
    report = HostProcesses("here", (*ranks, launcher))
    reused = HostProcesses("here", (JobProcess(9, "rank", "another by now"),))
    assert not send_signal(reused, 15).processes[0].signalled and not sent
    told = send_signal(report, 15)
    assert sent == [1, 2] and [found.signalled for found in told.processes] == [True, True, False]
    sent.clear()
    send_signal(report, 15, skip=[1])
    assert sent == [2]
    sent.clear()
    send_signal(HostProcesses("here", (*ranks, launcher, agent)), 15)  # it passes it on and restarts no rank
    assert sent == [4]
    sent.clear()
    send_signal(HostProcesses("here", (*ranks, launcher, agent)), 9, everything=True)
    assert sent == [3, 4, 1, 2]


def test_an_answer_is_found_below_what_a_shell_says() -> None:
    process = '{"pid": 3, "kind": "rank", "name": "python", "signalled": true}'
    line = f'{{"host": "n", "address": "10.0.0.2", "processes": [{process}]}}'
    expected = HostProcesses("n", (JobProcess(3, "rank", "python", signalled=True),), "10.0.0.2")
    assert read_report(f"Welcome!\n{{}}\n[1]\n{line}\nbye\n") == expected
    for text in ("", "Welcome!\n", "{}", '{"processes": 3}', '["host"]', "[" * 100_000):
        assert read_report(text) is None


@pytest.fixture
def ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_program(tmp_path / "bin", "ssh", SSH)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")


@pytest.mark.usefixtures("ssh")
def test_a_host_under_several_names_is_told_once(spawn: Spawn, script: str, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    rank = spawn(sys.executable, "-u", script, str(mark))
    wait_for(mark.exists)
    hosts = JobHosts(make_job(tmp_path / "job", run_id=RUN, script=script), dict(os.environ), limit=30)
    checked = hosts.check()
    assert not checked.unreached and checked.addresses.keys() == {"node1", "node2"}
    assert [found.pid for _, found in hosts.ask().found] == [rank.pid]
    hosts.ask(signal.SIGTERM)
    answers = hosts.ask(signal.SIGTERM)
    wait_for(lambda: mark.read_text() == "up\n15\n")
    name = psutil.Process(rank.pid).name()
    assert answers.working and describe(answers) == [f"{socket.gethostname()}: {rank.pid} (rank, {name})"]
    hosts.ask(signal.SIGKILL, everything=True)
    rank.wait(10)
    assert not hosts.ask().found


@pytest.mark.usefixtures("ssh")
def test_a_rank_on_another_host_is_told_once(tmp_path: Path) -> None:
    process = '{"pid": 7, "kind": "rank", "name": "python", "signalled": true}'
    answer = f'{{"host": "far", "address": "", "processes": [{process}]}}'
    calls = tmp_path / "calls"
    write_program(tmp_path / "bin", "ssh", f"#!/bin/sh\necho \"$*\" >> {calls}\necho '{answer}'\n")
    hosts = JobHosts(make_job(tmp_path / "job", run_id=RUN, hosts=(Host("far", 1),)), dict(os.environ), limit=30)
    for everything in (False, False, True):
        assert [found.pid for _, found in hosts.ask(signal.SIGTERM, everything=everything).found] == [7]
    told, again, ended = (line.partition(" --signal ")[2] for line in calls.read_text().splitlines())
    assert (told, again, ended) == ("15 --to ranks", "15 --to ranks --skip 7", "15 --to all")


@pytest.mark.usefixtures("ssh")
def test_a_host_that_does_not_answer_is_named_with_the_reason(tmp_path: Path) -> None:
    names = ("node1", "down", "slow", "broken")
    job = make_job(tmp_path / "job", run_id=RUN, hosts=tuple(Host(name, 1) for name in names))
    begun = time.monotonic()
    hosts = JobHosts(job, dict(os.environ), limit=8)
    answers = hosts.check()
    assert answers.unreached == {
        "down": "ssh: connect to host down port 22: No route to host",
        "slow": "no answer within 8 s",
        "broken": "/usr/bin/python: No module named megatron_tiedlora",
    }
    assert time.monotonic() - begun < 20
    assert answers.addresses.keys() == {"node1"}


def test_a_start_on_hosts_that_cannot_be_reached_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ssh: None
) -> None:
    from megatron_tiedlora.base.errors import UserError
    from megatron_tiedlora.cluster.start import launch

    write_program(tmp_path / "bin", "mpirun", "#!/bin/sh\ntouch started\n")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hosts").write_text("node1 slots=1\ndown slots=1\n")
    flags = ["--launcher=mpirun", "--hostfile=hosts", "--host_seconds=20"]
    with pytest.raises(UserError, match=r"1 of 2 hosts cannot be used \(down: ssh: connect to host down"):
        launch(parse_launch(flags), scripts=tmp_path)
    assert not (tmp_path / "started").exists() and not (tmp_path / "runs").exists()
