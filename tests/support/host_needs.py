"""What tests on fake hosts need of this machine, and the environment of a login on such a host."""

from __future__ import annotations

import functools
import os
import pwd
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from support.folders import ROOT
from support.ranks import ENVIRONMENT

SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
UNSHARE = ("unshare", "--net", "--uts", "--ipc", "--pid", "--fork", "--mount", "--mount-proc", "--kill-child")


@functools.cache
def why_not(part: str) -> str:
    """Why tests of `part` ("hosts", "ssh", "pdsh", "openmpi", "slurm") cannot run here; empty where they can."""
    if os.getuid() != 0 or sys.platform != "linux":
        return "needs root on Linux, for namespaces"
    programs = {
        "hosts": ("ip", "unshare", "nsenter", "mount", "hostname", "bash"),
        "ssh": ("ssh", "sshd", "ssh-keygen"),
        "pdsh": ("pdsh",),
        "openmpi": ("mpirun",),
        "slurm": ("slurmctld", "slurmd", "sbatch", "srun", "scancel", "munged"),
    }[part]
    missing = [program for program in programs if program_path(program) is None]
    if missing:
        return f"needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed"
    if part == "hosts" and _status([*UNSHARE, "mount", "-t", "tmpfs", "tmpfs", "/run"]) != 0:
        return "needs the right to make namespaces, which this container does not give"
    if part == "openmpi" and _status([sys.executable, "-c", "from mpi4py import MPI"]) != 0:
        return "needs mpi4py and the MPI library that it loads"
    needs = {"ssh": ("hosts",), "pdsh": ("ssh",), "openmpi": ("ssh",), "slurm": ("hosts",)}.get(part, ())
    return next(filter(None, map(why_not, needs)), "")


def needs(*parts: str) -> pytest.MarkDecorator:
    """A mark that skips a test where one of `parts` cannot be had."""
    reason = next(filter(None, map(why_not, parts)), "")
    return pytest.mark.skipif(bool(reason), reason=reason or "it is there")


def program_path(program: str) -> str | None:
    """Where a program is, also one that only root has on its path."""
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:{SYSTEM_PATH}")


def _status(command: Sequence[str]) -> int:
    try:
        return subprocess.run(command, capture_output=True, timeout=60).returncode
    except (OSError, subprocess.TimeoutExpired):
        return -1


def host_environment() -> dict[str, str]:
    """The environment of a login on a fake host: nothing of the test's own but what Python needs."""
    paths = dict.fromkeys([str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(":"))])
    kept = {name: os.environ[name] for name in ("TORCH_EXTENSIONS_DIR",) if name in os.environ}
    return {
        "PATH": f"{Path(sys.executable).parent}:{SYSTEM_PATH}",
        "HOME": pwd.getpwuid(os.getuid()).pw_dir,
        "USER": "root",
        "LOGNAME": "root",
        "SHELL": "/bin/bash",
        "LANG": "C.UTF-8",
        "PYTHONPATH": ":".join(paths),
        **ENVIRONMENT,
        **kept,
    }
