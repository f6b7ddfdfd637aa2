"""The processes of one start on this host: found by the run id in their environment, and signalled.

`python -m megatron_tiedlora.cluster.leftovers --run_id ID --script FILE [--signal N ...]` is run on each host and
answers in one line of JSON. It imports little, so that it is quick, and looks at the user's own processes only.
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
class Found:
    """A process of the start.

    Attributes:
        kind: `rank` runs the script; `agent` is torchrun's, which starts its ranks anew when they end badly; all else
            is `launcher`, helpers of ranks included.
        told: whether it has just been signalled.
        created: when it was started, since its number may be another's later.
    """

    pid: int
    kind: Kind
    name: str
    told: bool = False
    created: float = 0.0


@dataclass(frozen=True)
class Report:
    """What was found on a host, which may be known by other names too, and its first address."""

    host: str
    processes: tuple[Found, ...]
    address: str = ""


def find(run_id: str, *, script: str) -> Report:
    """The processes of start `run_id` on this host, without this one and those above it.

    Args:
        script: what the ranks run, as it stands in their command line.
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
            found.append(Found(pid, kind, process.name(), created=process.create_time()))
    return Report(socket.gethostname(), tuple(found))


def _kind(process: psutil.Process, script: str) -> Kind:
    try:
        words = process.cmdline()
    except psutil.Error:
        return "launcher"
    if started_program(words) == script:
        return "rank"
    return "agent" if is_torchrun(words) else "launcher"


def tell(report: Report, number: int, *, everything: bool = False, but: Sequence[int] = ()) -> Report:
    """Signal the ranks (torchrun's agents where there are any, which pass it on), or all there is, parents first.

    Args:
        but: processes that have been told before.

    Returns:
        The report, with those that were signalled marked.
    """
    by_kind: dict[Kind, list[Found]] = {"launcher": [], "agent": [], "rank": []}
    for found in report.processes:
        by_kind[found.kind].append(found)
    chosen = (
        [*by_kind["launcher"], *by_kind["agent"], *by_kind["rank"]]
        if everything
        else (by_kind["agent"] or by_kind["rank"])
    )
    told = set()
    for found in chosen:
        with suppress(psutil.Error):
            process = psutil.Process(found.pid)
            if found.pid not in but and process.create_time() == found.created:
                process.send_signal(number)
                told.add(found.pid)
    return replace(report, processes=tuple(replace(found, told=found.pid in told) for found in report.processes))


def read_report(text: str) -> Report | None:
    """The report in what a host has printed, below whatever its shell says at a login; None if there is none."""
    for line in reversed(text.splitlines()):
        with suppress(ValueError, TypeError, KeyError, AttributeError):
            content = json.loads(line)
            processes = tuple(Found(**found) for found in content["processes"])
            return Report(str(content["host"]), processes, str(content["address"]))
    return None


def first_address() -> str:
    """The first address of this host, as `hostname -I` gives it, which DeepSpeed's launchers go by; '' if none."""
    for name, addresses in psutil.net_if_addrs().items():
        for address in addresses:
            if address.family == socket.AF_INET and not address.address.startswith("127.") and _is_up(name):
                return address.address
    return ""


def _is_up(interface: str) -> bool:
    return interface in psutil.net_if_stats() and psutil.net_if_stats()[interface].isup


def main(argv: Sequence[str]) -> int:
    """Find, signal, answer."""
    parser = argparse.ArgumentParser(prog="leftovers", description=__doc__)
    parser.add_argument("--run_id", required=True)
    parser.add_argument("--script", required=True)
    parser.add_argument("--signal", type=int)
    parser.add_argument("--to", choices=("ranks", "all"), default="ranks")
    parser.add_argument("--but", type=int, nargs="*", default=[])
    options = parser.parse_args(argv)
    report = find(options.run_id, script=options.script)
    if options.signal is not None:
        report = tell(report, options.signal, everything=options.to == "all", but=options.but)
    print(json.dumps({**asdict(report), "address": first_address()}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
