"""What becomes of `deepspeed` over pdsh when launch/run.py is killed: it ends, and has no time to end other jobs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from folders import SUPPORT
from launcher_jobs import make_job, write_program

from megatron_tiedlora.cluster.routes import plan_start
from megatron_tiedlora.cluster.watch import start_all

pytestmark = pytest.mark.timeout(60)

# `deepspeed`, as its child pdsh, and as that one's an ssh in a session of its own, as pdsh starts it. It notes a
# SIGTERM, on which the real one would run pkill on all hosts.
DEEPSPEED = """#!/bin/sh
trap 'touch "$PLACE/told"' TERM
sh -c 'setsid sleep 50 & echo $! > "$PLACE/ssh"; wait' &
while [ ! -s "$PLACE/ssh" ]; do sleep 0.1; done
echo "$$ $! $(cat "$PLACE/ssh")" > "$PLACE/new"
mv "$PLACE/new" "$PLACE/pids"
wait
sleep 5
"""
WATCHER = """
import os, sys, time
from pathlib import Path
from launcher_jobs import make_job
from megatron_tiedlora.cluster.routes import plan_start
from megatron_tiedlora.cluster.watch import start_all
job = make_job(Path(os.environ["PLACE"]), python=sys.argv[1])
start_all(plan_start(job, os.environ), job.folder)
time.sleep(50)
"""


@pytest.fixture
def watcher(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that has started `deepspeed` as launch/run.py does."""
    write_program(tmp_path / "bin", "deepspeed", DEEPSPEED)
    search = os.pathsep.join([str(SUPPORT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PLACE": str(tmp_path), "PYTHONPATH": search}
    process = subprocess.Popen([sys.executable, "-c", WATCHER, str(tmp_path / "bin" / "python")], env=environment)
    yield process
    process.kill()
    process.wait()
    for pid in (tmp_path / "pids").read_text().split():
        if psutil.pid_exists(int(pid)):
            psutil.Process(int(pid)).kill()


def test_deepspeed_and_pdsh_die_with_their_watcher_unasked(watcher: subprocess.Popen[bytes], tmp_path: Path) -> None:
    deadline = time.monotonic() + 40
    while not (tmp_path / "pids").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    started = [psutil.Process(int(pid)) for pid in (tmp_path / "pids").read_text().split()]
    watcher.kill()
    gone, _ = psutil.wait_procs(started, timeout=10)
    assert len(gone) == 3 and not (tmp_path / "told").exists()


@pytest.mark.parametrize(("end", "status"), [("exit 3", 3), ("exit 0", 0), ("kill -KILL $$", 128 + signal.SIGKILL)])
def test_the_exit_status_of_deepspeed_is_seen(tmp_path: Path, end: str, status: int) -> None:
    write_program(tmp_path / "bin", "deepspeed", f'#!/bin/sh\necho "$*" > {tmp_path}/words\n{end}\n')
    job = make_job(tmp_path / "job", python=str(tmp_path / "bin" / "python"))
    (launcher,) = start_all(plan_start(job, dict(os.environ)), job.folder)
    assert launcher.name == "deepspeed" and launcher.process.wait(20) == status
    assert (tmp_path / "words").read_text().startswith(f"--hostfile {job.hostfile} ")
