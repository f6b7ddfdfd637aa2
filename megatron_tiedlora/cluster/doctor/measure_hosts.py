"""Measures the constants of a job's hosts: starts `tiedlora plan --measure` in each rank, as a job's ranks start."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from megatron_tiedlora.base.wording import enumerate_names
from megatron_tiedlora.cluster.doctor.compare import error
from megatron_tiedlora.cluster.doctor.measure import rank_commands
from megatron_tiedlora.cluster.doctor.records import Finding, HostReport, ParallelConfig
from megatron_tiedlora.cluster.remote import Done, HostCommands, RemoteCommand, Transport

_ERROR = "error: "


def measure_hosts(
    hosts: Sequence[HostReport],
    layout: ParallelConfig,
    transport: Transport,
    *,
    model: str,
    seconds: float,
    limit: float,
) -> tuple[dict[str, Any] | None, list[Finding]]:
    """The constants that all ranks together have measured, as rank 0 prints them; or why there are none.

    Args:
        model: the model whose widths are measured.
        seconds: about how long that takes.
        limit: seconds until all ranks are ended.
    """
    words = ("-m", "megatron_tiedlora", "plan", "--measure=-", f"--model={model}", f"--measure_seconds={seconds}")
    commands = rank_commands(hosts, layout, large_bytes=0, timeout=limit, limit=limit, words=words)
    printed: list[str] = []

    def hear(_command: RemoteCommand, line: str) -> None:
        if line.startswith('{"name": '):
            printed.append(line)

    done = HostCommands(transport, limit=limit, on_line=hear, at_once=len(hosts)).run(commands)
    failed = [one for one in done.values() if one.status != 0]
    if failed or not printed:
        reason = next(filter(None, map(explain_end, failed)), "nothing was printed")
        names = [one.host for one in failed] or [host.name for host in hosts]
        message = f"the ranks on {enumerate_names(names)} did not finish measuring ({reason})"
        fix = "correct what the reason says; for want of time raise --timeout_seconds, or give a smaller --model"
        return None, [error("not_measured", names, message, fix)]
    return json.loads(printed[0]), []


def explain_end(done: Done) -> str:
    """Why a host's ranks failed: the time, their first error, or the last words."""
    if done.status is None:
        return f"not finished in {done.seconds:.0f} s"
    lines = done.stderr.splitlines()
    return next((line.removeprefix(_ERROR) for line in lines if line.startswith(_ERROR)), done.last_words)
