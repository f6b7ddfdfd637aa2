"""Start the doctor's ranks by the job's own launcher, hear what they report, and judge the network by it.

rank.py runs in each rank. What it prints is found in the launcher's output, whatever the launcher puts before it.
"""

from __future__ import annotations

import base64
import json
import subprocess
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

from pydantic import ValidationError

from megatron_tiedlora.base.wording import enumerate_names
from megatron_tiedlora.cluster.doctor.compare import error, warning
from megatron_tiedlora.cluster.doctor.rank import RANK_MARK, SMALL_BYTES, group_members, hosts_of_ranks
from megatron_tiedlora.cluster.doctor.records import (
    Finding,
    GroupResult,
    HostReport,
    Order,
    ParallelConfig,
    RankEvent,
)
from megatron_tiedlora.cluster.launchers import Job, StartPlan, plan_start
from megatron_tiedlora.cluster.running import RunningJob, StopSignals

_PROGRAM = ("-m", "megatron_tiedlora.cluster.doctor.rank")
_START_SECONDS = 60.0  # for launchers, beside the time that the ranks have
_SLOW = 0.5  # of the median bandwidth of its kind
_MEASURED, _ERROR = '{"name": ', "error: "


@dataclass
class Trial:
    """What the ranks reported, and what else was printed; filled while they run.

    Attributes:
        status: the launcher's exit status; None if the time limit ended it.
        printed: all other lines.
    """

    events: dict[int, list[RankEvent]] = field(default_factory=dict)
    status: int | None = None
    printed: list[str] = field(default_factory=list)
    _pieces: dict[str, dict[str, str]] = field(default_factory=dict)

    def hear(self, line: str) -> None:
        """Take a line of the launcher's output."""
        _, mark, words = line.partition(RANK_MARK)
        name, _, rest = words.partition(" ")
        place, _, piece = rest.partition(" ")
        number, _, count = place.partition("/")
        if not mark or not count.isdigit():
            self.printed.append(line)
            return
        pieces = self._pieces.setdefault(name, {})
        pieces[number] = piece.strip()
        if len(pieces) == int(count):
            with suppress(ValueError, KeyError, zlib.error, ValidationError):  # another version's, or mixed lines
                packed = "".join(pieces[str(index)] for index in range(1, int(count) + 1))
                event = RankEvent.model_validate_json(zlib.decompress(base64.b64decode(packed)))
                self.events.setdefault(event.rank, []).append(event)

    def event(self, rank: int, name: str) -> RankEvent | None:
        """A rank's event of this name, if it has reported it."""
        return next((event for event in self.events.get(rank, ()) if event.event == name), None)

    def reached(self, ranks: Sequence[int], name: str) -> bool:
        """Whether all of the ranks have reported an event."""
        return all(self.event(rank, name) for rank in ranks)


def start_ranks(job: Job, order: Order, environment: Mapping[str, str], say: Callable[[str], None]) -> Trial:
    """Run the trial to its end, or until its time is over."""
    trial, has_met = Trial(), False
    for line in _lines(trial, job, (order.model_dump_json(),), environment, order.seconds):
        trial.hear(line)
        if not has_met and trial.reached(range(order.layout.num_ranks), "joined"):
            has_met = True
            say("all ranks have met")
    return trial


def measure_hosts(
    job: Job, environment: Mapping[str, str], *, model: str, seconds: float, limit: float
) -> tuple[dict[str, Any] | None, list[Finding]]:
    """The constants that all ranks together have measured, as rank 0 prints them; or why there are none.

    Args:
        model: the model whose widths are measured.
        seconds: about how long that takes.
        limit: seconds until all ranks are ended.
    """
    words = (str(limit + _START_SECONDS), "plan", "--measure=-", f"--model={model}", f"--measure_seconds={seconds}")
    trial, names = Trial(), [host.name for host in job.hosts]
    trial.printed = list(_lines(trial, job, words, environment, limit))
    for line in trial.printed:
        if trial.status == 0 and _MEASURED in line:
            return json.loads(line[line.index(_MEASURED) :]), []
    reasons = [line.partition(_ERROR)[2] for line in trial.printed if _ERROR in line]
    reason = next(iter(reasons), f"not finished in {limit:.0f} s" if trial.status is None else last_words(trial, names))
    message = f"the ranks on {enumerate_names(names)} did not finish measuring ({reason})"
    fix = "correct what the reason says; for want of time raise --timeout_seconds, or give a smaller --model"
    return None, [error("not_measured", names, message, fix)]


def _lines(
    trial: Trial, job: Job, arguments: tuple[str, ...], environment: Mapping[str, str], seconds: float
) -> Iterator[str]:
    """Start a job and yield what it prints, first its output and at its end its errors. Nothing of it is left here."""
    job, limit = replace(job, program=_PROGRAM, arguments=arguments), threading.Event()
    with tempfile.TemporaryFile() as errors, StopSignals() as signals:
        # One rank of this machine needs no launcher; a plain job starts so, too.
        alone = StartPlan(tuple(job.command), {**environment, "PYTHONSAFEPATH": "1"})
        plan = alone if job.route == "local" and job.size == 1 else plan_start(job, environment)
        running = RunningJob(job, plan, stdout=subprocess.PIPE, stderr=errors.fileno())

        def watch() -> None:
            end = time.monotonic() + seconds + _START_SECONDS
            while not over.wait(0.2):  # also after the launcher's end: what it has started may hold the output
                running.here()  # so that it is known then
                if time.monotonic() > end or signals.received:
                    limit.set()
                    running.kill()

        over = threading.Event()
        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            assert running.process.stdout is not None
            for line in running.process.stdout:
                yield line.decode(errors="replace").rstrip("\n")
            status = running.process.wait()
            trial.status = None if limit.is_set() else status
        finally:
            over.set()
            watcher.join()
            running.kill()
            running.process.wait()
        if signals.received:
            raise KeyboardInterrupt
        errors.seek(0)
        yield from errors.read().decode(errors="replace").splitlines()


def last_words(trial: Trial, names: Sequence[str]) -> str:
    """What the launcher printed of the first of `names` that it mentions, or else its last line."""
    lines = [line.strip() for line in trial.printed if line.strip()]
    about = (line for name in names for line in lines if f"{name}:" in line or f" {name} " in line)
    return next(about, lines[-1] if lines else f"the launcher ended with status {trial.status}")


# Results -------------------------------------------------------------------------------------------------------------


def heard_hosts(hosts: Sequence[HostReport], trial: Trial) -> list[HostReport]:
    """The hosts with what their first ranks have reported."""
    probes = {host.name: trial.event(host.first_rank, "probe") for host in hosts}
    clocks = {host.name: trial.event(host.first_rank, "clock") for host in hosts}
    return [
        host.model_copy(
            update={
                "probe": None if (probe := probes[host.name]) is None else probe.probe,
                "clock": None if (clock := clocks[host.name]) is None else clock.clock,
            }
        )
        for host in hosts
    ]


def explain_silence(hosts: Sequence[HostReport], trial: Trial, *, route: str) -> list[Finding]:
    """An error for each host that has reported nothing, with what the launcher says of it."""
    findings = []
    for host in hosts:
        if host.probe is None:
            said = last_words(trial, [host.name])
            check = {"ssh": f"`ssh {host.name} true` must work without a question", "srun": "see `sinfo -R`"}
            fix = f"{check.get(route, 'see what it printed')}; Python and this package must be at the same path there"
            findings.append(error("no_answer", [host.name], f"{host.name}: no rank has reported ({said})", fix))
    return findings


def explain_shared(hosts: Sequence[HostReport], trial: Trial, output_dir: str) -> list[Finding]:
    """What the first ranks of the hosts say about the file in the output folder."""
    seen = {host.name: event for host in hosts if (event := trial.event(host.first_rank, "shared")) is not None}
    first, flag = hosts[0].name, f"--output_dir {output_dir}"
    if first in seen and seen[first].reason:
        message = f"{first}: {flag}: no file can be written there ({seen[first].reason})"
        return [error("output_not_writable", [first], message, "choose another folder, or make it writable")]
    blind = [name for name, event in seen.items() if event.reason]
    if not blind:
        return []
    message = f"{flag} is not shared: {enumerate_names(blind)} cannot read what {first} writes there"
    fix = f"use a folder that all hosts share; otherwise keep {first} as first host: only it can resume"
    return [warning("output_not_shared", blind, message, fix)]


def group_results(
    hosts: Sequence[HostReport], layout: ParallelConfig, trial: Trial, *, large_bytes: int
) -> list[GroupResult]:
    """Results of every group whose ranks have all measured both sizes; the slowest rank's time counts."""
    results = []
    for kind, groups in group_members(layout).items():
        for ranks in groups:
            seen = [event for rank in ranks for event in trial.events.get(rank, ()) if event.kind == kind]
            small = [event for event in seen if event.num_bytes == SMALL_BYTES]
            large = [event for event in seen if event.num_bytes == large_bytes]
            if len(small) < len(ranks) or len(large) < len(ranks):
                continue
            seconds, size = max(event.seconds for event in large), len(ranks)
            results.append(
                GroupResult(
                    kind=kind,
                    ranks=ranks,
                    hosts=hosts_of_ranks(hosts, ranks),
                    num_bytes=large_bytes,
                    seconds=seconds,
                    bus_bytes_per_second=2 * (size - 1) / size * large_bytes / seconds,
                    latency_seconds=max(event.seconds for event in small),
                    correct=all(event.correct for event in seen),
                )
            )
    return results


def explain_trial(hosts: Sequence[HostReport], layout: ParallelConfig, trial: Trial, *, limit: float) -> list[Finding]:
    """Why ranks did not finish; empty if all did."""
    ranks_of = {host.name: range(host.first_rank, host.first_rank + host.slots) for host in hosts}
    failed = [event for events in trial.events.values() for event in events if event.event == "failed"]
    reason = failed[0].reason if failed else f"not finished in {limit:.0f} s" if trial.status is None else ""
    network = (
        f"open the hosts' firewalls to each other, for port {layout.master_port} of {layout.master_host} and for the"
        " ports that ranks choose; or name the network in NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME"
    )
    slow = "check the hosts' network, or raise --timeout_seconds if it is slow"
    for event, code, what, fix in (
        ("started", "not_started", "did not start", "run `python -c 'import torch'` there, see how long it takes"),
        ("joined", "not_joined", f"could not meet at {layout.master_host}", network),
        ("done", "allreduce_failed", "did not finish their all-reduces", slow),
    ):
        late = [name for name, ranks in ranks_of.items() if not trial.reached(ranks, event)]
        if late:
            why = reason or last_words(trial, late)
            return [error(code, late, f"the ranks on {enumerate_names(late)} {what} ({why})", fix)]
    return []


def judge_groups(results: Sequence[GroupResult]) -> list[Finding]:
    """Wrong sums, and groups that are much slower than the others of their kind."""
    findings = []
    speeds: Mapping[str, list[float]] = {
        kind: [other.bus_bytes_per_second for other in results if other.kind == kind]
        for kind in ("tensor", "pipeline", "data")
    }
    for result in results:
        name = f"the {result.kind} parallel group of ranks {', '.join(map(str, result.ranks))}"
        where = enumerate_names(result.hosts)
        if not result.correct:
            fix = "leave out one of its hosts at a time to find the cause; then test its memory and network card"
            findings.append(error("wrong_sum", result.hosts, f"{name} ({where}) computes wrong sums", fix))
        usual = median(speeds[result.kind])
        if len(speeds[result.kind]) > 2 and result.bus_bytes_per_second < _SLOW * usual:
            share = result.bus_bytes_per_second / usual
            message = f"{name} ({where}) has {share:.0%} of the bandwidth of the others"
            findings.append(warning("slow_group", result.hosts, message, "compare the hosts' links and cards"))
    return findings
