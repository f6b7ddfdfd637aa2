"""Start the ranks of the wanted layout on all hosts for a short trial, and judge the network by what they report.

host_ranks.py runs on each host, rank.py in each rank.
"""

from __future__ import annotations

import re
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

from megatron_tiedlora.base.wording import enumerate_names
from megatron_tiedlora.cluster.doctor.ask import module_command
from megatron_tiedlora.cluster.doctor.compare import error, warning
from megatron_tiedlora.cluster.doctor.rank import RANK_MARK, SMALL_BYTES
from megatron_tiedlora.cluster.doctor.rank_groups import group_members, hosts_of_ranks
from megatron_tiedlora.cluster.doctor.records import (
    Finding,
    GroupResult,
    HostReport,
    ParallelConfig,
    RankEvent,
    TrialOrder,
)
from megatron_tiedlora.cluster.remote import Done, HostCommands, RemoteCommand, Transport, run_on_hosts

_LAST_WORDS_SECONDS = 4.0  # after the first host has failed: for the others to report how far they were
_AGAIN_SECONDS = 12.0  # after a failure: to see which hosts can still be reached
_SLOW = 0.5  # of the median bandwidth of its kind


@dataclass
class Trial:
    """What the ranks reported, and how each host's command ended; filled while they run."""

    events: dict[int, list[RankEvent]] = field(default_factory=dict)
    ended: list[Done] = field(default_factory=list)
    unreachable: list[str] = field(default_factory=list)

    def last(self, rank: int) -> str:
        """The last event of a rank; '' before it has started."""
        events = self.events.get(rank)
        return events[-1].event if events else ""

    def reached(self, rank: int, event: str) -> bool:
        """Whether a rank has reported `event`."""
        return any(seen.event == event for seen in self.events.get(rank, ()))


def rank_commands(
    hosts: Sequence[HostReport],
    layout: ParallelConfig,
    *,
    large_bytes: int,
    timeout: float,
    limit: float,
    words: tuple[str, ...] = (),
) -> dict[str, list[str]]:
    """The command that starts each host's ranks; see `TrialOrder` for its values."""
    commands = {}
    for host in hosts:
        order = TrialOrder(
            layout=layout,
            first_rank=host.first_rank,
            slots=host.slots,
            large_bytes=large_bytes,
            timeout=timeout,
            seconds=limit,
            words=words,
        )
        commands[host.name] = module_command("host_ranks", order.model_dump_json())
    return commands


def start_ranks(
    hosts: Sequence[HostReport],
    layout: ParallelConfig,
    transport: Transport,
    *,
    large_bytes: int,
    timeout: float,
    say: Callable[[str], None],
) -> tuple[Trial, float]:
    """Run the trial to its end, or little longer than its time limit; returns the trial and that limit in seconds.

    The first host that fails ends the trial for all. Then every host is tried again, to tell a lost host from one that
    only waited for it.

    Args:
        timeout: seconds that a rank waits for others; the limit of the whole trial is twice as long.
        say: called with a line when all ranks have met.
    """
    limit, trial, lock = 2 * timeout, Trial(), threading.Lock()
    commands = rank_commands(hosts, layout, large_bytes=large_bytes, timeout=timeout, limit=limit)
    timers: list[threading.Timer] = []

    def hear(_command: RemoteCommand, line: str) -> None:
        if line.startswith(RANK_MARK):
            event = RankEvent.model_validate_json(line.removeprefix(RANK_MARK))
            with lock:
                trial.events.setdefault(event.rank, []).append(event)
                if event.event == "joined" and all(trial.reached(rank, "joined") for rank in range(layout.num_ranks)):
                    say("all ranks have met")

    def see(done: Done) -> None:
        with lock:
            trial.ended.append(done)
            if done.status != 0 and not timers:
                timers.append(threading.Timer(_LAST_WORDS_SECONDS, running.end_all))
                timers[0].start()

    running = HostCommands(transport, limit=limit, on_line=hear, on_done=see, at_once=len(hosts))
    try:
        running.run(commands)
    finally:
        for timer in timers:
            timer.cancel()
    if transport.route != "local" and any(done.status != 0 for done in trial.ended):
        trial.unreachable = _unreachable([host.name for host in hosts], transport, trial.ended)
    return trial, limit


def _unreachable(names: Sequence[str], transport: Transport, ended: Sequence[Done]) -> list[str]:
    """The hosts on which no command can be started any more."""
    lost = [done.host for done in ended if transport.route == "ssh" and done.status == 255]
    others = [name for name in names if name not in lost]
    again = run_on_hosts(others, ["true"], limit=_AGAIN_SECONDS, transport=transport)
    lost += [name for name in others if again[name].status != 0]
    if transport.route == "srun" and len(lost) == len(names):  # Slurm ends the whole allocation when a node is lost
        lost = _missed_by_slurm(names) or lost
    return [name for name in names if name in lost]


def _missed_by_slurm(names: Sequence[str]) -> list[str]:
    """The nodes that Slurm reports as down, or marks with `*` as not responding; empty if it gives no answer."""
    command = ["sinfo", "--noheader", "--Node", f"--nodes={','.join(names)}", "--format=%N %T"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_AGAIN_SECONDS)
    except (OSError, subprocess.TimeoutExpired):
        return []
    states = dict(line.split(maxsplit=1) for line in done.stdout.splitlines() if " " in line.strip())
    return [name for name in names if re.search(r"\*|down|fail", states.get(name, ""), re.IGNORECASE)]


# Results -------------------------------------------------------------------------------------------------------------


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
    """Why ranks did not finish; empty if all did. If a host was lost, only that is reported."""
    ranks_of = {host.name: range(host.first_rank, host.first_rank + host.slots) for host in hosts}
    if trial.unreachable:
        return [_explain_lost(name, ranks_of[name], trial) for name in trial.unreachable]
    if all(trial.last(rank) == "done" for rank in range(layout.num_ranks)):
        return []
    words = {done.host: done.last_words for done in trial.ended}
    late = [name for name, ranks in ranks_of.items() if not all(trial.reached(rank, "started") for rank in ranks)]
    if late:
        said = f" ({words[late[0]]})" if words.get(late[0]) else ""
        message = f"ranks did not start on {enumerate_names(late)}{said}"
        return [error("not_started", late, message, "run `python -c 'import torch'` there and see how long it takes")]
    failed = [event for events in trial.events.values() for event in events if event.event == "failed"]
    reason = failed[0].reason if failed else f"not finished in {limit:.0f} s"
    apart = [name for name, ranks in ranks_of.items() if not all(trial.reached(rank, "joined") for rank in ranks)]
    if apart:
        message = f"the ranks on {enumerate_names(apart)} could not meet at {layout.master_host} ({reason})"
        fix = (
            f"open the hosts' firewalls to each other, for port {layout.master_port} of {layout.master_host} and for"
            " the ports that ranks choose; or name the network in NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME"
        )
        return [error("not_joined", apart, message, fix)]
    stuck = [name for name, ranks in ranks_of.items() if not all(trial.reached(rank, "done") for rank in ranks)]
    message = f"the ranks on {enumerate_names(stuck)} did not finish their all-reduces ({reason})"
    return [
        error("allreduce_failed", stuck, message, "check the hosts' network, or raise --timeout_seconds if it is slow")
    ]


def _explain_lost(name: str, ranks: Sequence[int], trial: Trial) -> Finding:
    stages = (("started", "before its ranks started"), ("joined", "before its ranks met the others"))
    not_reached = (text for event, text in stages if not all(trial.reached(rank, event) for rank in ranks))
    stage = next(not_reached, "while its ranks all-reduced")
    return error(
        "link_lost",
        [name],
        f"{name}: answered at first, but was lost {stage}",
        "check whether it still runs, and its cable, switch or interface",
    )


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
