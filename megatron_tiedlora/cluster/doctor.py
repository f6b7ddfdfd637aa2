"""The doctor's trial: start ranks by the job's own launcher, hear what they report, compare and judge it.

rank.py runs in each rank. What it prints is found in the launcher's output, whatever the launcher puts before it.
"""

import os
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import Any, get_args

from megatron_tiedlora.base.messages import count_text, enumerate_names, user_path
from megatron_tiedlora.cluster.compare_hosts import compare_hosts
from megatron_tiedlora.cluster.doctor_rank import (
    NOT_SEEN,
    RANK_END,
    RANK_MARK,
    STAGES,
    DoctorReport,
    GroupKind,
    GroupResult,
    HostReport,
    Order,
    ParallelConfig,
    RankReport,
    answering,
    packed,
    unpacked,
)
from megatron_tiedlora.cluster.launchers import Job, StartPlan, plan_start
from megatron_tiedlora.cluster.start import POLL_SECONDS, RunningJob, check_programs, make_job
from megatron_tiedlora.config.job_settings import DoctorSettings, LaunchSettings
from megatron_tiedlora.parallel.groups import Grid
from megatron_tiedlora.runtime.launch_env import visible_gpus
from megatron_tiedlora.runtime.machine import Finding, error, warning
from megatron_tiedlora.runtime.stopping import StopSignals

_PROGRAM = ("-m", "megatron_tiedlora.cluster.doctor_rank")
_START_SECONDS = 60.0  # for launchers, beside the time that the ranks have
TEXT: Any = {"encoding": "utf-8", "errors": "replace", "newline": "\n"}  # of what a launcher prints
_SLOW = 0.5  # of the median bandwidth of its kind
_NOT_IN_THE_WAY = "output_not_writable"  # explains no failure of the ranks, and so is no reason to leave that out


def examine(settings: DoctorSettings, environment: Mapping[str, str], say: Callable[[str], None]) -> DoctorReport:
    """Examine the hosts that the settings or the allocation name.

    Args:
        environment: variables of this shell: they describe the allocation, and launchers send some to the hosts.
        say: called with a line of progress at each step.

    Raises:
        UserError: a hostfile that names no host, a layout that does not divide the ranks, an invalid path, a launcher
            that is not installed.
    """
    job = find_job(settings, environment)
    firsts = accumulate((host.slots for host in job.hosts), initial=0)
    hosts = [HostReport(name=host.name, slots=host.slots, first_rank=next(firsts)) for host in job.hosts]
    grid = Grid(0, job.size, settings.tensor_parallel, settings.pipeline_parallel)
    layout = ParallelConfig(
        num_ranks=job.size,
        tensor_parallel=grid.tp_size,
        pipeline_parallel=grid.pp_size,
        data_parallel=grid.dp_size,
        master_host="127.0.0.1" if len(hosts) == 1 else hosts[0].name,
        master_port=job.master_port,
    )
    output_dir = None
    if settings.output_dir is not None:
        output_dir = os.path.abspath(user_path(settings.output_dir, flag="--output_dir"))
    check_programs(job)
    begin = time.monotonic()
    say(f"starting {count_text(job.size, 'rank')} on {count_text(len(hosts), 'host')} by {job.launcher} ...")
    order = Order(
        layout=layout,
        first_ranks=[host.first_rank for host in hosts],
        output_dir=output_dir,
        large_bytes=max(4, round(settings.allreduce_mb * 1e6) // 4 * 4),
        timeout=settings.timeout_seconds,
    )
    trial = start_ranks(job, order, environment, say)
    seconds = time.monotonic() - begin
    fields = ("answer", "clock")
    hosts = [one.model_copy(update={name: trial.first(one, name) for name in fields}) for one in hosts]
    gpus = [answer.machine.gpus for _, answer in answering(hosts)]
    layout = layout.model_copy(update={"backend": None if not gpus else "nccl" if all(gpus) else "gloo"})
    say(f"{len(answering(hosts))} of {len(hosts)} hosts answered ({seconds:.1f} s)")

    findings = explain_silence(hosts, trial, route=job.route)
    findings += compare_hosts(hosts, max_skew=settings.max_clock_skew)
    if output_dir is not None:
        findings += explain_output(hosts, trial, output_dir)
    groups, skipped = group_results(hosts, trial), None
    if in_the_way := [one for one in findings if one.status == "error" and one.code != _NOT_IN_THE_WAY]:
        skipped = f"the ranks' trial does not count: correct {count_text(len(in_the_way), 'error')} first"
    else:
        findings += [*explain_trial(hosts, layout, trial, limit=2 * order.timeout), *judge_groups(groups)]
        skipped = "no all-reduce: a single rank has no communication to test" if layout.num_ranks == 1 else None
    errors, warnings = ([one for one in findings if one.status == status] for status in ("error", "warning"))
    return DoctorReport(
        verdict="not ready" if errors else "ready",
        num_errors=len(errors),
        num_warnings=len(warnings),
        findings=[*errors, *warnings],
        route=job.route,
        launcher=job.launcher,
        layout=layout,
        hosts=hosts,
        groups=groups,
        skipped=skipped,
        seconds={"ranks": round(seconds, 3)},
    )


def find_job(settings: DoctorSettings, environment: Mapping[str, str]) -> Job:
    """A job on the hosts to examine, by the launcher that `tiedlora run` would use: those of the hostfile, else all of
    the allocation, else this machine, with a rank for each GPU, or without GPUs one for each part of the model."""
    of_job = ("launcher", "hostfile", "launcher_args", "master_port")
    launch = LaunchSettings(**{name: getattr(settings, name) for name in of_job})
    # An interactive step of Slurm has one node: use the whole allocation.
    outside = {name: value for name, value in environment.items() if "_STEP_" not in name or name.endswith("NUM_TASKS")}
    job = make_job(launch, outside)
    if job.route == "local":
        ranks = len(visible_gpus()) or settings.tensor_parallel * settings.pipeline_parallel
        job = make_job(launch.model_copy(update={"num_gpus": ranks}), outside)
    return job


@dataclass
class Trial:
    """What the ranks said, and what else was printed; filled while they run.

    Attributes:
        ranks: the last report of each rank.
        status: the launcher's exit status; None if the time limit ended it.
        printed: all other lines.
    """

    ranks: dict[int, RankReport] = field(default_factory=dict)
    status: int | None = None
    printed: list[str] = field(default_factory=list)
    _begun: dict[str, str] = field(default_factory=dict)

    def hear(self, line: str) -> None:
        """Take a line of the launcher's output."""
        _, mark, words = line.partition(RANK_MARK)
        rank, _, piece = words.strip().partition(" ")
        if not mark:
            self.printed.append(line)
            return
        text = self._begun.pop(rank, "") + piece
        if not text.endswith(RANK_END):
            self._begun[rank] = text
            return
        with suppress(ValueError, zlib.error):  # another version's, or mixed lines
            report = unpacked(RankReport, text.removesuffix(RANK_END))
            self.ranks[report.rank] = report

    def first(self, host: HostReport, field: str) -> Any:
        """A field of the report of a host's first rank; None if that has reported nothing."""
        return getattr(self.ranks.get(host.first_rank), field, None)

    def reached(self, ranks: Iterable[int], stage: str) -> bool:
        """Whether all of the ranks have come to a stage."""
        past = STAGES[STAGES.index(stage) :]
        return all(rank in self.ranks and self.ranks[rank].stage in past for rank in ranks)


def start_ranks(job: Job, order: Order, environment: Mapping[str, str], say: Callable[[str], None]) -> Trial:
    """Run the trial to its end, or until its time is over; of what it prints the errors are heard last."""
    trial, has_met, end = Trial(), False, time.monotonic() + 2 * order.timeout + _START_SECONDS
    with tempfile.TemporaryDirectory(prefix="megatron_tiedlora-") as folder, StopSignals() as signals:
        job = replace(job, program=_PROGRAM, arguments=(packed(order),), private=Path(folder))
        # One rank of this machine needs no launcher; a plain job starts so, too.
        alone = StartPlan(tuple(job.command), {**environment, "PYTHONSAFEPATH": "1"})
        plan = alone if job.route == "local" and job.size == 1 else plan_start(job, environment)
        output, errors = job.private / "output", job.private / "errors"
        with output.open("wb") as stdout, errors.open("wb") as stderr, output.open(**TEXT) as reader:
            running, text, is_over = RunningJob(job, plan, stdout=stdout, stderr=stderr), "", False
            try:
                while not is_over:  # also after the launcher's end: what it has started may still print
                    time.sleep(POLL_SECONDS)
                    is_late = time.monotonic() > end or bool(signals.received)
                    trial.status = None if is_late else running.process.poll()
                    is_over = is_late or (trial.status is not None and not running.here())
                    *lines, text = (text + reader.read()).split("\n")
                    for line in lines:
                        trial.hear(line)
                    if not has_met and trial.reached(range(order.layout.num_ranks), "joined"):
                        has_met = True
                        say("all ranks have met")
            finally:
                running.kill()
                running.process.wait()
        if signals.received:
            raise KeyboardInterrupt
        for line in [*([text] if text else []), *errors.read_text("utf-8", "replace").splitlines()]:
            trial.hear(line)
    return trial


def last_words(trial: Trial, names: Sequence[str]) -> str:
    """What the launcher printed of the first of `names` that it mentions, or else its last line."""
    lines = [line.strip() for line in trial.printed if line.strip()]
    about = (line for name in names for line in lines if f"{name}:" in line or f" {name} " in line)
    return next(about, lines[-1] if lines else f"the launcher ended with status {trial.status}")


# Results -------------------------------------------------------------------------------------------------------------


def explain_silence(hosts: Sequence[HostReport], trial: Trial, *, route: str) -> list[Finding]:
    """An error for each host that has reported nothing, with what the launcher says of it."""
    findings = []
    for host in hosts:
        if host.answer is None:
            said = last_words(trial, [host.name])
            check = {"ssh": f"`ssh {host.name} true` must work without a question", "srun": "see `sinfo -R`"}
            fix = f"{check.get(route, 'see what it printed')}; Python and this package must be at the same path there"
            findings.append(error("no_answer", [host.name], f"{host.name}: no rank has reported ({said})", fix))
    return findings


def explain_output(hosts: Sequence[HostReport], trial: Trial, output_dir: str) -> list[Finding]:
    """What the first ranks of the hosts say about the output folder, and about the file that the first one wrote."""
    seen = {host.name: trial.first(host, "output") for host in hosts}
    blind = [name for name, wrong in seen.items() if wrong == NOT_SEEN]
    closed = [name for name, wrong in seen.items() if wrong and name not in blind]
    flag, first = f"--output_dir {output_dir}", hosts[0].name
    if closed:
        message = f"{flag}: no file can be written there ({seen[closed[0]]}) on {enumerate_names(closed)}"
        return [error("output_not_writable", closed, message, "choose another folder, or make it writable")]
    if not blind:
        return []
    message = f"{flag} is not shared: {enumerate_names(blind)} cannot read what {first} writes there"
    fix = f"use a folder that all hosts share; otherwise keep {first} as first host: only it can resume"
    return [warning("output_not_shared", blind, message, fix)]


def group_results(hosts: Sequence[HostReport], trial: Trial) -> list[GroupResult]:
    """Results of every group whose ranks have all measured, by kind, with the hosts of each."""
    found = [group for _, report in sorted(trial.ranks.items()) for group in report.groups]
    found.sort(key=lambda group: get_args(GroupKind).index(group.kind))
    places = {host.first_rank + index: host.name for host in hosts for index in range(host.slots)}
    where = (list(dict.fromkeys(places[rank] for rank in group.ranks)) for group in found)
    return [group.model_copy(update={"hosts": names}) for group, names in zip(found, where, strict=True)]


def explain_trial(hosts: Sequence[HostReport], layout: ParallelConfig, trial: Trial, *, limit: float) -> list[Finding]:
    """Why ranks did not finish; empty if all did."""
    ranks_of = {host.name: range(host.first_rank, host.first_rank + host.slots) for host in hosts}
    failed = [report.failed for report in trial.ranks.values() if report.failed is not None]
    reason = failed[0] if failed else f"not finished in {limit:.0f} s" if trial.status is None else ""
    network = (
        f"open the hosts' firewalls to each other, for port {layout.master_port} of {layout.master_host} and for the"
        " ports that ranks choose; or name the network in NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME"
    )
    slow = "check the hosts' network, or raise --timeout_seconds if it is slow"
    stages = (
        ("started", "not_started", "did not start", "run `python -c 'import torch'` there, see how long it takes"),
        ("joined", "not_joined", f"could not meet at {layout.master_host}", network),
        ("done", "allreduce_failed", "did not finish their all-reduces", slow),
    )
    for stage, code, what, fix in stages:
        late = [name for name, ranks in ranks_of.items() if not trial.reached(ranks, stage)]
        if late:
            why = reason or last_words(trial, late)
            return [error(code, late, f"the ranks on {enumerate_names(late)} {what} ({why})", fix)]
    return []


def judge_groups(results: Sequence[GroupResult]) -> list[Finding]:
    """Wrong sums, and groups that are much slower than the others of their kind."""
    findings = []
    for result in results:
        speeds = [other.bus_bytes_per_second for other in results if other.kind == result.kind]
        name = f"the {result.kind} parallel group of ranks {', '.join(map(str, result.ranks))}"
        where = enumerate_names(result.hosts)
        if not result.correct:
            fix = "leave out one of its hosts at a time to find the cause; then test its memory and network card"
            findings.append(error("wrong_sum", result.hosts, f"{name} ({where}) computes wrong sums", fix))
        share = result.bus_bytes_per_second / median(speeds)
        if len(speeds) > 2 and share < _SLOW:
            message = f"{name} ({where}) has {share:.0%} of the bandwidth of the others"
            findings.append(warning("slow_group", result.hosts, message, "compare the hosts' links and cards"))
    return findings
