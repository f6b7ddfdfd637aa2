"""Find the processes of one start on this host by the run id in their environment, and signal them.

`python -m megatron_tiedlora.cluster.job_processes --run_id ID --script FILE [--signal N ...]` runs on each host and
prints one line of JSON. It imports little, so that it is quick, and looks at the user's own processes only.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Literal

import psutil

from megatron_tiedlora.config.hosts import is_torchrun, started_program

RUN_ID = "MEGATRON_TIEDLORA_RUN_ID"

Kind = Literal["rank", "agent", "launcher"]


@dataclass(frozen=True)
class JobProcess:
    """A process of the start.

    Attributes:
        kind: `rank` runs the script; `agent` is torchrun's agent, which restarts its ranks when they fail; everything
            else is `launcher`, including helper processes of ranks.
        signalled: whether this call has signalled it.
        created: its start time, because the pid may be reused later.
    """

    pid: int
    kind: Kind
    name: str
    signalled: bool = False
    created: float = 0.0


@dataclass(frozen=True)
class HostProcesses:
    """The processes of the start on one host, the host's own name and its first address."""

    host: str
    processes: tuple[JobProcess, ...]
    address: str = ""


def find_processes(run_id: str, *, script: str) -> HostProcesses:
    """The processes of start `run_id` on this host, except this process and its parents.

    Args:
        script: the script that the ranks run, as written in their command line.
    """
    above = {os.getpid()}
    with suppress(psutil.Error):
        above |= {process.pid for process in psutil.Process().parents()}
    mine: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        with suppress(psutil.Error, OSError):
            if process.pid in above or process.uids().real != os.getuid():
                continue
            if process.environ().get(RUN_ID) == run_id and process.status() != psutil.STATUS_ZOMBIE:
                mine[process.pid] = process
    kinds = {pid: _kind(process, script) for pid, process in mine.items()}
    found = []
    for pid, process in mine.items():
        kind = kinds[pid]
        with suppress(psutil.Error):
            if kind == "rank" and kinds.get(process.ppid()) == "rank":  # a fork of a rank, to read data or to compile
                kind = "launcher"
            found.append(JobProcess(pid, kind, process.name(), created=process.create_time()))
    return HostProcesses(socket.gethostname(), tuple(found))


def _kind(process: psutil.Process, script: str) -> Kind:
    try:
        words = process.cmdline()
    except psutil.Error:
        return "launcher"
    if started_program(words) == script:
        return "rank"
    return "agent" if is_torchrun(words) else "launcher"


def send_signal(
    report: HostProcesses, number: int, *, everything: bool = False, skip: Sequence[int] = ()
) -> HostProcesses:
    """Signal the ranks (or torchrun's agents if there are any: they pass it on), or every process, parents first.

    Args:
        skip: pids that have had the signal already.

    Returns:
        The report, in which the processes that were signalled are marked.
    """
    by_kind: dict[Kind, list[JobProcess]] = {"launcher": [], "agent": [], "rank": []}
    for found in report.processes:
        by_kind[found.kind].append(found)
    chosen = (
        [*by_kind["launcher"], *by_kind["agent"], *by_kind["rank"]]
        if everything
        else (by_kind["agent"] or by_kind["rank"])
    )
    done = set()
    for found in chosen:
        with suppress(psutil.Error):
            process = psutil.Process(found.pid)
            if found.pid not in skip and process.create_time() == found.created:
                process.send_signal(number)
                done.add(found.pid)
    return replace(report, processes=tuple(replace(found, signalled=found.pid in done) for found in report.processes))


def read_report(text: str) -> HostProcesses | None:
    """The report in a host's output, which may begin with what its login shell prints; None if there is no report."""
    for line in reversed(text.splitlines()):
        with suppress(ValueError, TypeError, KeyError, AttributeError, RecursionError):
            content = json.loads(line)
            processes = tuple(JobProcess(**found) for found in content["processes"])
            return HostProcesses(str(content["host"]), processes, str(content["address"]))
    return None


def first_address() -> str:
    """The first address that `hostname -I` prints here, which DeepSpeed's launchers use; '' if there is none."""
    for name, addresses in psutil.net_if_addrs().items():
        for address in addresses:
            if address.family == socket.AF_INET and not address.address.startswith("127.") and _is_up(name):
                return address.address
    return ""


def _is_up(interface: str) -> bool:
    return interface in psutil.net_if_stats() and psutil.net_if_stats()[interface].isup


def main(argv: Sequence[str]) -> int:
    """Find the processes, signal them and print the report."""
    parser = argparse.ArgumentParser(prog="job_processes", description=__doc__)
    parser.add_argument("--run_id", required=True)
    parser.add_argument("--script", required=True)
    parser.add_argument("--signal", type=int)
    parser.add_argument("--to", choices=("ranks", "all"), default="ranks")
    parser.add_argument("--skip", type=int, nargs="*", default=[])
    options = parser.parse_args(argv)
    report = find_processes(options.run_id, script=options.script)
    if options.signal is not None:
        report = send_signal(report, options.signal, everything=options.to == "all", skip=options.skip)
    print(json.dumps({**asdict(report), "address": first_address()}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
