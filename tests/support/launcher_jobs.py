"""Jobs for tests of launch/run.py: descriptions of one, programs that play a launcher, and what a rank was given."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from megatron_tiedlora.cluster.launchers import Job, StartPlan
from megatron_tiedlora.runtime.launch_env import Host

# Writes what it was given beside itself: a rank of the tests that only look at words and variables.
DUMP = """
import json, os, sys
from pathlib import Path
rank = os.environ.get("RANK", os.environ.get("OMPI_COMM_WORLD_RANK", "0"))
given = {"argv": sys.argv[1:], "environment": dict(os.environ), "folder": os.getcwd()}
Path(__file__).with_name(f"given-{rank}.json").write_text(json.dumps(given))
"""


# As the real one: the words after the host are joined, and the host's shell makes of them what it does.
SSH = """#!/bin/sh
until [ "$1" = node1 ] || [ "$1" = node2 ] || [ "$1" = localhost ]; do shift; done
shift
exec env -i HOME="$HOME" SHELL=/bin/sh PATH=/usr/bin:/bin sh -c "$*"
"""
# What pdsh does with the words of its command, for where it is not installed.
PDSH = f"""#!{sys.executable}
import re, subprocess, sys
words = sys.argv[1:]
hosts = words[words.index("-w") + 1].split(",")
command = words[words.index("-w") + 2 :]
for number, host in enumerate(hosts):
    values = {{"%h": host, "%n": str(number), "%u": "user", "%%": "%"}}
    text = " ".join(re.sub("%[hnu%]", lambda found: values[found[0]], word) for word in command)
    done = subprocess.run(["ssh", host, text])
    if done.returncode:
        sys.exit(done.returncode)
"""


def make_job(place: Path, **changes: Any) -> Job:
    """A job of two hosts whose script writes down what it is given."""
    (place / "private").mkdir(parents=True, exist_ok=True)
    script = place / "dump.py"
    script.write_text(DUMP)
    values: dict[str, Any] = {
        "launcher": "deepspeed",
        "route": "ssh",
        "hosts": (Host("node1", 1), Host("node2", 1)),
        "program": (str(script),),
        "arguments": ("--max_steps", "3"),
        "python": sys.executable,
        "folder": place,
        "private": place / "private",
        "master_addr": "10.0.0.1",
        "master_port": 29400,
        **changes,
    }
    return Job(**values)


def write_program(folder: Path, name: str, text: str) -> Path:
    """A program for PATH."""
    folder.mkdir(exist_ok=True)
    file = folder / name
    file.write_text(text)
    file.chmod(0o755)
    return file


def hosts_here(folder: Path) -> dict[str, str]:
    """An environment in which node1 and node2 are this machine, and `folder` is the home."""
    write_program(folder / "programs", "ssh", SSH)
    if shutil.which("pdsh") is None:
        write_program(folder / "programs", "pdsh", PDSH)
    path = f"{folder / 'programs'}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "DS_ACCELERATOR": "cpu", "HOME": str(folder)}


def start(plan: StartPlan, folder: Path, *, limit: float = 120.0) -> str:
    """Write a plan's files and run its command; returns what that prints."""
    for path, text in plan.files.items():
        path.write_text(text)
    done = subprocess.run(
        plan.words,
        cwd=folder,
        env=dict(plan.environment),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=limit,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def given(job: Job, rank: int) -> dict[str, Any]:
    """What a rank was given."""
    content: dict[str, Any] = json.loads(Path(job.program[-1]).with_name(f"given-{rank}.json").read_text())
    return content
