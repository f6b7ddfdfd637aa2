"""What every start of ranks shares: the server that they are forked from, their environment, ports and the time limit.

run_helpers.py runs scripts in such processes, as a launcher would, and forked_ranks.py functions that gloo joins.
"""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import os
import random
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from support.folders import TESTS

# Seconds that any start may take, which ends as a failure then. The longest takes 30 on two free cores.
TIME_LIMIT = 200.0
ENVIRONMENT = {
    "DS_ACCELERATOR": "cpu",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TORCHINDUCTOR_COMPILE_THREADS": "1",  # else importing it starts a pool of processes
    "TOKENIZERS_PARALLELISM": "false",
}
LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_ports = itertools.cycle(random.Random().sample(range(1000), 1000))
os.environ.setdefault("DS_ACCELERATOR", "cpu")  # for what this process itself imports


@functools.cache
def fork_server() -> Any:
    """A clean process with the imports done, from which ranks are forked."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["support.preloaded"])
    paths = os.pathsep.join([str(TESTS), *sys.path])
    own = {"PYTHONPATH": paths, "OWN_PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    with changed_environment({**ENVIRONMENT, **own}):
        from multiprocessing import forkserver

        forkserver.ensure_running()
    return context


def fork_server_pid() -> int | None:
    """The server's process; None before it is asked for."""
    from multiprocessing import forkserver

    return forkserver._forkserver._forkserver_pid  # nothing public names it


@contextmanager
def changed_environment(changes: dict[str, str]) -> Iterator[None]:
    """Inside, the environment has these changes, and nothing else of a launcher."""
    before = os.environ.copy()
    try:
        for name in LAUNCHER_VARIABLES:
            os.environ.pop(name, None)
        os.environ.update(changes)
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def redirect_output(out: Path, err: Path) -> None:
    """In a forked process: stdout and stderr go to files."""
    for number, path in ((1, out), (2, err)):
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, number)
        os.close(descriptor)


def free_port() -> int:
    """A TCP port that is free now, and that no other worker of this test run is given.

    It is below those that the system gives to outgoing connections, one of which may start before the port is used.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0")[2:])
    while True:
        port = 12000 + 1000 * (worker % 20) + next(_ports)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def wait_for(condition: Callable[[], bool], what: str, *, limit: float = TIME_LIMIT) -> None:
    """Wait until `condition()`; failing to come true in time fails the test."""
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline, f"waited {limit} s for {what}"
        time.sleep(0.05)
