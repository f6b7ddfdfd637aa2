"""The doctor's trial: start ranks by the job's own launcher, hear what they report, compare and judge it.

rank.py runs in each rank. What it prints is found in the launcher's output, whatever the launcher puts before it.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import Any, get_args

from megatron_tiedlora.base.errors import count_text, enumerate_names, user_path
from megatron_tiedlora.base.text_files import read_json_object
from megatron_tiedlora.cluster.doctor.compare import compare_hosts
from megatron_tiedlora.cluster.doctor.rank import RANK_MARK, absolute_path, job_files
from megatron_tiedlora.cluster.doctor.records import (
    DoctorReport,
    GroupKind,
    GroupResult,
    HostReport,
    Order,
    ParallelConfig,
    Said,
    Stage,
    answering,
    hosts_of_ranks,
    packed,
    unpacked,
)
from megatron_tiedlora.cluster.launchers import Job, StartPlan, plan_start
from megatron_tiedlora.cluster.running import POLL_SECONDS, RunningJob, StopSignals
from megatron_tiedlora.cluster.start import check_programs, make_job
from megatron_tiedlora.config.doctor_settings import DoctorSettings
from megatron_tiedlora.config.launch_settings import LaunchSettings
from megatron_tiedlora.model.hf_config import format_in_use, stored_format
from megatron_tiedlora.parallel.groups import Grid
from megatron_tiedlora.runtime.launch_env import visible_gpus
from megatron_tiedlora.runtime.machine import Finding, error, warning

_PROGRAM = ("-m", "megatron_tiedlora.cluster.doctor.rank")
_START_SECONDS = 60.0  # for launchers, beside the time that the ranks have
_SLOW = 0.5  # of the median bandwidth of its kind
_MEASURED, _ERROR = '{"name": ', "error: "
# These errors explain no failure of the ranks, and so are no reason to leave that out.
_NOT_IN_THE_WAY = frozenset({"path_missing", "path_unreadable", "path_differs", "output_not_writable"})

Say = Callable[[str], None]


def examine(settings: DoctorSettings, environment: Mapping[str, str], say: Say) -> DoctorReport:
    """Examine the hosts that the settings or the allocation name.

    Args:
        environment: variables of this shell: they describe the allocation, and launchers send some to the hosts.
        say: called with a line of progress at each step.

    Raises:
        UserError: a hostfile that names no host, a layout that does not divide the ranks, a storage format that a run
            would reject, an invalid path, or a launcher that is not installed.
    """
    with tempfile.TemporaryDirectory(prefix="megatron_tiedlora-") as private:
        return _examine(settings, environment, say, find_job(settings, environment, Path(private)))


def _examine(settings: DoctorSettings, environment: Mapping[str, str], say: Say, job: Job) -> DoctorReport:
    hosts = place_ranks(job)
    grid = Grid(0, job.size, settings.tensor_parallel, settings.pipeline_parallel)
    layout = ParallelConfig(
        num_ranks=job.size,
        tensor_parallel=grid.tp_size,
        pipeline_parallel=grid.pp_size,
        data_parallel=grid.dp_size,
        master_host="127.0.0.1" if len(hosts) == 1 else hosts[0].name,
        master_port=job.master_port,
    )
    base_format = _base_format(settings)
    paths, hub = job_files(settings.paths())
    output_dir = None if settings.output_dir is None else absolute_path(settings.output_dir, flag="output_dir")
    check_programs(job)
    seconds: dict[str, float] = {}

    begin = time.monotonic()
    say(f"starting {count_text(job.size, 'rank')} on {count_text(len(hosts), 'host')} by {job.launcher} ...")
    order = Order(
        layout=layout,
        peers={one.first_rank: next((two.name for two in hosts if two is not one), None) for one in hosts},
        first_host=hosts[0].name,
        paths=paths,
        hub=hub,
        output_dir=output_dir,
        large_bytes=max(4, round(settings.allreduce_mb * 1e6) // 4 * 4),
        timeout=settings.timeout_seconds,
        seconds=2 * settings.timeout_seconds,
    )
    trial = start_ranks(job, order, environment, say)
    seconds["ranks"] = time.monotonic() - begin
    hosts = heard_hosts(hosts, trial)
    gpus = [answer.machine.gpus for _, answer in answering(hosts)]
    layout = layout.model_copy(update={"backend": None if not gpus else "nccl" if all(gpus) else "gloo"})
    say(f"{len(answering(hosts))} of {len(hosts)} hosts answered ({seconds['ranks']:.1f} s)")

    findings = explain_silence(hosts, trial, route=job.route)
    wanted = {"base_format": base_format, "products": settings.products}
    findings += compare_hosts(hosts, layout, max_skew=settings.max_clock_skew, **wanted)
    if output_dir is not None:
        findings += explain_shared(hosts, trial, output_dir)
    groups, skipped = group_results(hosts, trial), None
    if in_the_way := [one for one in findings if one.status == "error" and one.code not in _NOT_IN_THE_WAY]:
        skipped = f"the ranks' trial does not count: correct {count_text(len(in_the_way), 'error')} first"
    else:
        findings += [*explain_trial(hosts, layout, trial, limit=order.seconds), *judge_groups(groups)]
        skipped = "no all-reduce: a single rank has no communication to test" if layout.num_ranks == 1 else None
    machine = None
    if settings.measure is not None and not any(finding.status == "error" for finding in findings):
        begin = time.monotonic()
        model = str(settings.model) if "model" in hub else paths["model"]
        say(f"measuring with {count_text(layout.num_ranks, 'rank')}, for about {settings.measure_seconds:g} s ...")
        limit = 2 * settings.timeout_seconds + 4 * settings.measure_seconds
        machine, more = measure_hosts(job, environment, model=model, seconds=settings.measure_seconds, limit=limit)
        findings += more
        seconds["measure"] = time.monotonic() - begin
    return DoctorReport.of(
        findings,
        route=job.route,
        launcher=job.launcher,
        layout=layout,
        hosts=hosts,
        groups=groups,
        skipped=skipped,
        seconds={phase: round(value, 3) for phase, value in seconds.items()},
        machine=machine,
    )


def _base_format(settings: DoctorSettings) -> str | None:
    """The storage format of the base in the job: --base, or that of the folder if this machine can read it."""
    config = None if settings.model is None else user_path(settings.model, flag="--model") / "config.json"
    if config is None or not os.path.isfile(config):  # so too for a name that no file can have
        return settings.base
    stored = stored_format(read_json_object(config, kind="a Hugging Face model folder"), source=str(config))
    return format_in_use(stored, settings.base, settings.products, source=str(settings.model))


def find_job(settings: DoctorSettings, environment: Mapping[str, str], private: Path) -> Job:
    """A job on the hosts to examine, by the launcher that `tiedlora run` would use: those of the hostfile, else all of
    the allocation, else this machine, with a rank for each GPU, or without GPUs one for each part of the model."""
    of_job = ("launcher", "hostfile", "ssh_port", "launcher_args", "master_port")
    launch = LaunchSettings(**{name: getattr(settings, name) for name in of_job})
    # An interactive step of Slurm has one node: use the whole allocation.
    outside = {name: value for name, value in environment.items() if "_STEP_" not in name or name.endswith("NUM_TASKS")}
    if settings.hostfile is None and "SLURM_JOB_ID" not in environment:
        ranks = len(visible_gpus()) or settings.tensor_parallel * settings.pipeline_parallel
        launch = launch.model_copy(update={"num_gpus": ranks})
    return replace(make_job(launch, outside), private=private)


def place_ranks(job: Job) -> list[HostReport]:
    """The hosts with the number of each one's first rank. torchrun sorts the hosts' names as text."""
    hosts = sorted(job.hosts, key=lambda host: host.name) if job.launcher == "torchrun" else job.hosts
    firsts = accumulate((host.slots for host in hosts), initial=0)
    return [HostReport(name=one.name, slots=one.slots, first_rank=at) for one, at in zip(hosts, firsts, strict=False)]


# The ranks --------------------------------------------------------------------------------------------------------


@dataclass
class Trial:
    """What the ranks said, and what else was printed; filled while they run.

    Attributes:
        said: the messages of each rank.
        status: the launcher's exit status; None if the time limit ended it.
        printed: all other lines.
    """

    said: dict[int, list[Said]] = field(default_factory=dict)
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
            with suppress(ValueError, KeyError, zlib.error):  # another version's, or mixed lines
                said = unpacked(Said, "".join(pieces[str(index)] for index in range(1, int(count) + 1)))
                self.said.setdefault(said.rank, []).append(said)

    def news(self, rank: int, field: str) -> list[Any]:
        """The values that a rank has given to a field of `Said`."""
        values = (getattr(said, field) for said in self.said.get(rank, ()))
        return [value for value in values if value is not None]

    def reached(self, ranks: Iterable[int], stage: Stage) -> bool:
        """Whether all of the ranks have come to a stage."""
        return all(stage in self.news(rank, "stage") for rank in ranks)


def start_ranks(job: Job, order: Order, environment: Mapping[str, str], say: Say) -> Trial:
    """Run the trial to its end, or until its time is over."""
    trial, has_met = Trial(), False
    for line in _lines(trial, job, (packed(order),), environment, order.seconds):
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
    job, end = replace(job, program=_PROGRAM, arguments=arguments), time.monotonic() + seconds + _START_SECONDS
    # One rank of this machine needs no launcher; a plain job starts so, too.
    alone = StartPlan(tuple(job.command), {**environment, "PYTHONSAFEPATH": "1"})
    plan = alone if job.route == "local" and job.size == 1 else plan_start(job, environment)
    files = job.private / "output", job.private / "errors"
    with files[0].open("wb") as output, files[1].open("wb") as errors, StopSignals() as signals:
        running, text, is_over = RunningJob(job, plan, stdout=output, stderr=errors), "", False
        try:
            with files[0].open(encoding="utf-8", errors="replace", newline="\n") as reader:
                while not is_over:  # also after the launcher's end: what it has started may still print
                    time.sleep(POLL_SECONDS)
                    is_over = not running.here() or time.monotonic() > end or bool(signals.received)
                    *lines, text = (text + reader.read()).split("\n")
                    yield from lines
            trial.status = None if running.here() else running.process.wait()
        finally:
            running.kill()
            running.process.wait()
    if signals.received:
        raise KeyboardInterrupt
    yield from [*([text] if text else []), *files[1].read_text("utf-8", "replace").splitlines()]


def last_words(trial: Trial, names: Sequence[str]) -> str:
    """What the launcher printed of the first of `names` that it mentions, or else its last line."""
    lines = [line.strip() for line in trial.printed if line.strip()]
    about = (line for name in names for line in lines if f"{name}:" in line or f" {name} " in line)
    return next(about, lines[-1] if lines else f"the launcher ended with status {trial.status}")


# Results -------------------------------------------------------------------------------------------------------------


def heard_hosts(hosts: Sequence[HostReport], trial: Trial) -> list[HostReport]:
    """The hosts with what their first ranks have said."""

    def first(host: HostReport, name: str) -> Any:
        return next(iter(trial.news(host.first_rank, name)), None)

    fields = ("answer", "clock")
    return [host.model_copy(update={name: first(host, name) for name in fields}) for host in hosts]


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


def explain_shared(hosts: Sequence[HostReport], trial: Trial, output_dir: str) -> list[Finding]:
    """What the first ranks of the hosts say about the file in the output folder."""
    seen = {host.name: said[0] for host in hosts if (said := trial.news(host.first_rank, "shared"))}
    first, flag = hosts[0].name, f"--output_dir {output_dir}"
    if seen.get(first):
        message = f"{first}: {flag}: no file can be written there ({seen[first]})"
        return [error("output_not_writable", [first], message, "choose another folder, or make it writable")]
    blind = [name for name, wrong in seen.items() if wrong]
    if not blind:
        return []
    message = f"{flag} is not shared: {enumerate_names(blind)} cannot read what {first} writes there"
    fix = f"use a folder that all hosts share; otherwise keep {first} as first host: only it can resume"
    return [warning("output_not_shared", blind, message, fix)]


def group_results(hosts: Sequence[HostReport], trial: Trial) -> list[GroupResult]:
    """Results of every group whose ranks have all measured, by kind, with the hosts of each."""
    found = [group for rank in sorted(trial.said) for group in trial.news(rank, "group")]
    found.sort(key=lambda group: get_args(GroupKind).index(group.kind))
    return [group.model_copy(update={"hosts": hosts_of_ranks(hosts, group.ranks)}) for group in found]


def explain_trial(hosts: Sequence[HostReport], layout: ParallelConfig, trial: Trial, *, limit: float) -> list[Finding]:
    """Why ranks did not finish; empty if all did."""
    ranks_of = {host.name: range(host.first_rank, host.first_rank + host.slots) for host in hosts}
    failed = [reason for rank in trial.said for reason in trial.news(rank, "failed")]
    reason = failed[0] if failed else f"not finished in {limit:.0f} s" if trial.status is None else ""
    network = (
        f"open the hosts' firewalls to each other, for port {layout.master_port} of {layout.master_host} and for the"
        " ports that ranks choose; or name the network in NCCL_SOCKET_IFNAME and GLOO_SOCKET_IFNAME"
    )
    slow = "check the hosts' network, or raise --timeout_seconds if it is slow"
    stages: tuple[tuple[Stage, str, str, str], ...] = (
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
