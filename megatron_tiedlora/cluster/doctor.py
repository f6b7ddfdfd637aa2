"""Check hosts for `tiedlora doctor`: start ranks with the launcher of a job, and collect and compare their reports.

`doctor_rank` runs in each rank. The lines that it prints are read from the launcher's output, where the launcher may
add a prefix.
"""

import ipaddress
import os
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from statistics import median
from typing import Any, get_args

from megatron_tiedlora.base import messages
from megatron_tiedlora.base.messages import aligned_lines, bytes_in_words, count_text, enumerate_names, printable
from megatron_tiedlora.cluster import doctor_rank
from megatron_tiedlora.cluster.doctor_rank import DoctorReport, GroupResult, HostReport, ParallelConfig, RankReport
from megatron_tiedlora.cluster.launchers import Job, StartPlan, plan_start
from megatron_tiedlora.cluster.start import POLL_SECONDS, RunningJob, check_programs, make_job
from megatron_tiedlora.config.job_settings import DoctorSettings, LaunchSettings
from megatron_tiedlora.parallel.groups import Grid
from megatron_tiedlora.runtime.launch_env import visible_gpus
from megatron_tiedlora.runtime.machine import Finding, MachineRecord, error, judge_machine, warning
from megatron_tiedlora.runtime.stopping import StopSignals

_PROGRAM = ("-m", "megatron_tiedlora.cluster.doctor_rank")
_START_SECONDS = 60.0  # for launchers, in addition to the ranks' time
TEXT: Any = {"encoding": "utf-8", "errors": "replace", "newline": "\n"}  # for a launcher's output
_SLOW = 0.5  # a group below this share of the median bandwidth of its kind is slow
_NOT_IN_THE_WAY = "output_not_writable"  # ranks do not fail because of this error, so their results still count
_PACKAGE = "megatron_tiedlora"
# Different versions of these packages are an error, as every rank computes with them. For others they are a warning.
_STRICT = ("python", "torch", "deepspeed", "transformers", _PACKAGE)
_COMPARED = (*_STRICT, "safetensors", "numpy", "bitsandbytes")
NO_GPU = "none"
_LEAST_SHM = 1 << 30  # for NCCL and data loaders
_FILES_PER_RANK, _FILES_BESIDE = 4, 256  # connections to every other rank in a few process groups, and other files
_LITTLE_SPACE = 1 << 30  # a checkpoint of a tied adapter is far smaller; logs and an exported model are not


def examine(settings: DoctorSettings, environment: Mapping[str, str], say: Callable[[str], None]) -> DoctorReport:
    """Check the hosts of a hostfile or a Slurm allocation, or else this machine, and return a report.

    Args:
        environment: the variables of this shell. They describe the allocation, and launchers export some to the hosts.
        say: a function that prints a line about the progress.

    Raises:
        UserError: the hostfile or a path is invalid, the parallel configuration does not fit the number of ranks, or
            the launcher is not installed.
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
        output_dir = os.path.abspath(messages.user_path(settings.output_dir, flag="--output_dir"))
    check_programs(job)
    begin = time.monotonic()
    say(f"starting {count_text(job.size, 'rank')} on {count_text(len(hosts), 'host')} by {job.launcher} ...")
    order = doctor_rank.Order(
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
    gpus = [answer.machine.gpus for _, answer in doctor_rank.answering(hosts)]
    layout = layout.model_copy(update={"backend": None if not gpus else "nccl" if all(gpus) else "gloo"})
    say(f"{len(doctor_rank.answering(hosts))} of {len(hosts)} hosts answered ({seconds:.1f} s)")

    findings = explain_silence(hosts, trial, route=job.route)
    findings += compare_hosts(hosts, max_skew=settings.max_clock_skew)
    if output_dir is not None:
        findings += explain_output(hosts, trial, output_dir)
    groups, skipped = group_results(hosts, trial), None
    if in_the_way := [one for one in findings if one.status == "error" and one.code != _NOT_IN_THE_WAY]:
        skipped = f"the all-reduce results do not count: correct {count_text(len(in_the_way), 'error')} first"
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
    """Return a job on the hosts to check, with the launcher that `tiedlora run` would use. Without a hostfile or a
    Slurm allocation, the job runs on this machine. It then has one rank per GPU, or tensor x pipeline ranks if there
    are no GPUs."""
    of_job = ("launcher", "hostfile", "launcher_args", "master_port")
    launch = LaunchSettings(**{name: getattr(settings, name) for name in of_job})
    # An interactive step of Slurm has only one node. Use all nodes of the allocation.
    outside = {name: value for name, value in environment.items() if "_STEP_" not in name or name.endswith("NUM_TASKS")}
    job = make_job(launch, outside)
    if job.route == "local":
        ranks = len(visible_gpus()) or settings.tensor_parallel * settings.pipeline_parallel
        job = make_job(launch.model_copy(update={"num_gpus": ranks}), outside)
    return job


@dataclass
class Trial:
    """The output of the ranks and the launcher, which is collected while the ranks run.

    Attributes:
        ranks: the latest report of each rank.
        status: the launcher's exit status; None if the time limit ended the launcher.
        printed: all lines that are not part of a report.
    """

    ranks: dict[int, RankReport] = field(default_factory=dict)
    status: int | None = None
    printed: list[str] = field(default_factory=list)
    _begun: dict[str, str] = field(default_factory=dict)

    def hear(self, line: str) -> None:
        """Parse a line of the launcher's output, and store a report once it is complete."""
        _, mark, words = line.partition(doctor_rank.RANK_MARK)
        rank, _, piece = words.strip().partition(" ")
        if not mark:
            self.printed.append(line)
            return
        text = self._begun.pop(rank, "") + piece
        if not text.endswith(doctor_rank.RANK_END):
            self._begun[rank] = text
            return
        with suppress(ValueError, zlib.error):  # a report of another version, or mixed lines of several ranks
            report = doctor_rank.unpacked(RankReport, text.removesuffix(doctor_rank.RANK_END))
            self.ranks[report.rank] = report

    def first(self, host: HostReport, field: str) -> Any:
        """Return a field of the report of a host's first rank; None without a report."""
        return getattr(self.ranks.get(host.first_rank), field, None)

    def reached(self, ranks: Iterable[int], stage: str) -> bool:
        """Return whether all of the ranks have reached a stage."""
        past = doctor_rank.STAGES[doctor_rank.STAGES.index(stage) :]
        return all(rank in self.ranks and self.ranks[rank].stage in past for rank in ranks)


def start_ranks(
    job: Job, order: doctor_rank.Order, environment: Mapping[str, str], say: Callable[[str], None]
) -> Trial:
    """Run the ranks until they end or the time limit is reached, and return their reports. stderr is read last."""
    trial, has_met, end = Trial(), False, time.monotonic() + 2 * order.timeout + _START_SECONDS
    with tempfile.TemporaryDirectory(prefix="megatron_tiedlora-") as folder, StopSignals() as signals:
        job = replace(job, program=_PROGRAM, arguments=(doctor_rank.packed(order),), private=Path(folder))
        # A single rank on this machine needs no launcher, as in a plain job.
        alone = StartPlan(tuple(job.command), {**environment, "PYTHONSAFEPATH": "1"})
        plan = alone if job.route == "local" and job.size == 1 else plan_start(job, environment)
        output, errors = job.private / "output", job.private / "errors"
        with output.open("wb") as stdout, errors.open("wb") as stderr, output.open(**TEXT) as reader:
            running, text, is_over = RunningJob(job, plan, stdout=stdout, stderr=stderr), "", False
            try:
                while not is_over:  # also after the launcher's end, as its children may print
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
    """Return the first line of output about one of the hosts in `names`, or else the last line of output."""
    lines = [line.strip() for line in trial.printed if line.strip()]
    about = (line for name in names for line in lines if f"{name}:" in line or f" {name} " in line)
    return next(about, lines[-1] if lines else f"the launcher ended with status {trial.status}")


# Results -------------------------------------------------------------------------------------------------------------


def explain_silence(hosts: Sequence[HostReport], trial: Trial, *, route: str) -> list[Finding]:
    """Return an error for each host without a report. The error quotes the launcher's line about the host."""
    findings = []
    for host in hosts:
        if host.answer is None:
            said = last_words(trial, [host.name])
            check = {"ssh": f"`ssh {host.name} true` must work without a question", "srun": "see `sinfo -R`"}
            fix = f"{check.get(route, 'see what it printed')}; Python and this package must be at the same path there"
            findings.append(error("no_answer", [host.name], f"{host.name}: no rank has reported ({said})", fix))
    return findings


def explain_output(hosts: Sequence[HostReport], trial: Trial, output_dir: str) -> list[Finding]:
    """Return a finding if hosts cannot write to the output folder or cannot see the file that rank 0 wrote there."""
    seen = {host.name: trial.first(host, "output") for host in hosts}
    blind = [name for name, wrong in seen.items() if wrong == doctor_rank.NOT_SEEN]
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
    """Return the results of all process groups that finished their all-reduce, sorted by kind, with their hosts."""
    found = [group for _, report in sorted(trial.ranks.items()) for group in report.groups]
    found.sort(key=lambda group: get_args(doctor_rank.GroupKind).index(group.kind))
    places = {host.first_rank + index: host.name for host in hosts for index in range(host.slots)}
    where = (list(dict.fromkeys(places[rank] for rank in group.ranks)) for group in found)
    return [group.model_copy(update={"hosts": names}) for group, names in zip(found, where, strict=True)]


def explain_trial(hosts: Sequence[HostReport], layout: ParallelConfig, trial: Trial, *, limit: float) -> list[Finding]:
    """Return a list with an error that explains why ranks did not finish; [] if all ranks finished."""
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
    """Return findings about wrong sums, and about process groups that are much slower than others of their kind."""
    findings = []
    for result in results:
        speeds = [other.bus_bytes_per_second for other in results if other.kind == result.kind]
        name = f"the {result.kind} parallel group of ranks {', '.join(map(str, result.ranks))}"
        where = enumerate_names(result.hosts)
        if not result.correct:
            fix = "leave out one host at a time to find the faulty host; then test that host's memory and network card"
            findings.append(error("wrong_sum", result.hosts, f"{name} ({where}) computes wrong sums", fix))
        share = result.bus_bytes_per_second / median(speeds)
        if len(speeds) > 2 and share < _SLOW:
            message = f"{name} ({where}) has {share:.0%} of the other groups' bandwidth"
            findings.append(warning("slow_group", result.hosts, message, "compare the hosts' links and cards"))
    return findings


# Comparing hosts ------------------------------------------------------------------------------------------------------
#
# A value is wrong if it differs from the value of most hosts. If two values are equally frequent, the value of the
# first host counts. So the finding names the host that differs, and not all remaining hosts.


def compare_hosts(hosts: Sequence[HostReport], *, max_skew: float) -> Iterator[Finding]:
    """Yield all findings about the hosts that answered. A clock is reported if it certainly differs by more than
    `max_skew` seconds."""
    yield from compare_machines(hosts)
    for host, answer in doctor_rank.answering(hosts):
        yield from _look_at(host, answer, hosts)
    for host in hosts:
        if host.clock is not None and abs(host.clock.skew) - host.clock.margin > max_skew:
            direction = "ahead of" if host.clock.skew > 0 else "behind"
            value = f"{host.name}: its clock is {abs(host.clock.skew):.1f} s {direction} this machine's"
            fix = "set the clock with chrony or systemd-timesyncd; until then, times in logs and of files are wrong"
            yield warning("clock", [host.name], value, fix)


def odd_hosts(
    hosts: Sequence[HostReport], value_of: Callable[[MachineRecord], str]
) -> Iterator[tuple[str, list[str], str, list[str]]]:
    """Yield (value, its hosts, most frequent value, its hosts) for each value that is not the most frequent. If several
    values are equally frequent, the first value counts as the most frequent."""
    names: dict[str, list[str]] = {}
    for host, answer in doctor_rank.answering(hosts):
        names.setdefault(value_of(answer.machine), []).append(host.name)
    usual = max(names, key=lambda value: len(names[value]), default="")
    return ((value, where, usual, names[usual]) for value, where in names.items() if value != usual)


def compare_machines(hosts: Sequence[HostReport]) -> Iterator[Finding]:
    """Yield findings about differences between hosts: versions of Python, packages and CUDA, the code of this package,
    and GPU models. Two names for the same machine are also a finding, because a job would use the machine twice."""

    def differs(
        kind: Callable[..., Finding],
        code: str,
        title: str,
        value_of: Callable[[MachineRecord], str],
        fix: str,
        among: Sequence[HostReport] = hosts,
    ) -> Iterator[Finding]:
        for value, where, usual, others in odd_hosts(among, value_of):
            here, there = enumerate_names(where), enumerate_names(others)
            yield kind(code, where, f"{title} is {value} on {here}", fix, f"{usual} on {there}")

    for name in _COMPARED:
        kind, fix = error if name in _STRICT else warning, f"install the same {name} on every host"
        yield from differs(kind, "version", name, lambda machine, name=name: machine.versions.get(name, "none"), fix)  # type: ignore[misc]
    other = [where for _, where, *_ in odd_hosts(hosts, lambda machine: machine.versions.get(_PACKAGE, "none"))]
    same = [host for host in hosts if not any(host.name in where for where in other)]
    code, fix = f"the code of {_PACKAGE} (hash of its files)", "update its checkout or installation there"
    yield from differs(error, "source", code, lambda machine: machine.source_hash, fix, same)
    on_gpus = [host for host, answer in doctor_rank.answering(hosts) if answer.machine.gpus]
    fix = "install the same build of torch on every host"
    yield from differs(error, "cuda_version", "torch's CUDA", lambda machine: str(machine.cuda), fix, on_gpus)
    yield from differs(error, "nccl_version", "NCCL", lambda machine: str(machine.nccl), fix, on_gpus)
    kind = error if len(on_gpus) < len(doctor_rank.answering(hosts)) else warning
    fix = "use only hosts of one kind; on a host where torch sees no GPU, check nvidia-smi and CUDA_VISIBLE_DEVICES"
    yield from differs(kind, "gpus_differ", "the kind of GPU", kind_of_gpus, fix)
    machines: dict[str, list[str]] = {}
    for host, answer in doctor_rank.answering(hosts):
        machines.setdefault(answer.machine.id, []).append(host.name)
    for twice in (names for names in machines.values() if len(names) > 1):
        fix = "keep only one line for this host in the hostfile, with all its slots"
        yield error("same_machine", twice, f"{enumerate_names(twice)} are one machine", fix)


def count_gpus(machine: MachineRecord) -> str:
    """Return the number of GPUs of each kind as text."""
    counts = Counter(gpu.name for gpu in machine.gpus)
    return ", ".join(f"{number} x {name}" for name, number in sorted(counts.items())) or NO_GPU


def kind_of_gpus(machine: MachineRecord) -> str:
    """Return the names of the GPU models of a machine as text."""
    return " and ".join(sorted({gpu.name for gpu in machine.gpus})) or NO_GPU


def _look_at(host: HostReport, answer: doctor_rank.HostAnswer, hosts: Sequence[HostReport]) -> Iterator[Finding]:
    """Yield findings about a single host, including problems that depend on its number of ranks."""
    machine, name, ranks = answer.machine, host.name, count_text(host.slots, "rank")
    num_ranks, here = sum(one.slots for one in hosts), [host.name]
    for finding in judge_machine(machine):
        yield finding.model_copy(update={"hosts": here, "value": f"{name}: {finding.value}"})
    if machine.gpus and host.slots > len(machine.gpus):
        value = f"{name}: {ranks} for {count_text(len(machine.gpus), 'GPU')}"
        yield error("too_few_gpus", here, value, f"write slots={len(machine.gpus)} for it")
    if not machine.gpus and host.slots > machine.num_cores:
        value = f"{name}: {ranks} on {count_text(machine.num_cores, 'core')}"
        yield warning("cores", here, value, f"write slots={machine.num_cores} or less for it")
    if host.slots > 1 and machine.shm_bytes < _LEAST_SHM:
        fix = "ranks of one host share memory there; start a container with --shm-size=1g or --ipc=host"
        yield warning("shm", here, f"{name}: /dev/shm has {bytes_in_words(machine.shm_bytes)} free", fix)
    wanted = _FILES_PER_RANK * num_ranks + _FILES_BESIDE
    if machine.nofile is not None and machine.nofile < wanted:
        value, expected = f"{name}: a process may open {machine.nofile} files", f"{num_ranks} ranks need {wanted}"
        yield warning("nofile", here, value, f"ulimit -n {wanted}, or nofile in /etc/security/limits.conf", expected)
    if machine.infiniband and machine.memlock is not None:
        value = f"{name}: a process may lock only {bytes_in_words(machine.memlock)} of memory"
        expected = f"InfiniBand ({', '.join(machine.infiniband)}) locks its buffers"
        yield warning("memlock", here, value, "ulimit -l unlimited, or memlock in /etc/security/limits.conf", expected)
    if answer.output_free_bytes is not None and answer.output_free_bytes < _LITTLE_SPACE:
        value = f"{name}: {bytes_in_words(answer.output_free_bytes)} free where --output_dir is"
        yield warning("disk", here, value, "free some space: a save that does not fit ends the run")
    # gloo listens on the address of the host's own name. NCCL looks for an interface itself.
    is_named = len(hosts) == 1 or machine.variables.get("GLOO_SOCKET_IFNAME")
    # An address such as 127.0.1.1, which Debian gives to hosts, is only valid on its own host.
    if not is_named and all(ipaddress.ip_address(address).is_loopback for address in machine.name_addresses):
        addresses = ", ".join(machine.name_addresses)
        found = f"resolves to {addresses}, which other hosts cannot reach" if addresses else "does not resolve there"
        fix = f"give {machine.host} its real address in its /etc/hosts, or set GLOO_SOCKET_IFNAME"
        kind = warning if machine.gpus else error
        yield kind("loopback_name", here, f"{name}: its own name, {machine.host}, {found}", fix)


# As text --------------------------------------------------------------------------------------------------------------


ODD_MARK = "*"


def report_text(report: DoctorReport) -> str:
    """Return the complete report as text."""
    layout, num_hosts = report.layout, count_text(len(report.hosts), "host")
    sizes = f"tensor {layout.tensor_parallel} x pipeline {layout.pipeline_parallel} x data {layout.data_parallel}"
    ranks = f"{count_text(layout.num_ranks, 'rank')} = {sizes}"
    meeting = f"{f'{layout.backend}, ' if layout.backend else ''}meeting at {layout.master_host}:{layout.master_port}"
    findings = [line for one in report.findings for line in (f"{one.status}: {one.message}", f"  fix: {one.fix}")]
    warnings = count_text(report.num_warnings, "warning") if report.num_warnings else ""
    if report.verdict == "ready":
        verdict = f"ready, {num_hosts}, {count_text(layout.num_ranks, 'rank')}{f' ({warnings})' if warnings else ''}"
    else:
        verdict = f"not ready: {count_text(report.num_errors, 'error')}{f', {warnings}' if warnings else ''}"
    tables = (host_table(report.hosts), group_table(report.groups))
    parts = ([f"{num_hosts} (by {report.launcher}), {ranks}, {meeting}"], *tables, [report.skipped or ""], findings)
    return "\n\n".join("\n".join(map(printable, lines)) for lines in (*parts, [f"verdict: {verdict}"]) if any(lines))


_SAME: tuple[tuple[str, Callable[[MachineRecord], str]], ...] = (  # values that should be equal on all hosts
    ("python", lambda machine: machine.versions.get("python", "-")),
    ("torch", lambda machine: "broken" if machine.torch_error else machine.versions.get("torch", "-")),
    ("deepspeed", lambda machine: machine.versions.get("deepspeed", "-")),
    ("transformers", lambda machine: machine.versions.get("transformers", "-")),
    ("tiedlora", lambda machine: f"{machine.versions.get('megatron_tiedlora', '-')} {machine.source_hash[:6]}"),
    ("GPUs", count_gpus),
    ("cores", lambda machine: str(machine.num_cores)),
)


def host_table(hosts: Sequence[HostReport]) -> list[str]:
    """Return a table with one row per host. A value that differs from the value of most hosts is marked."""
    odd = {title: {name for _, where, *_ in odd_hosts(hosts, value) for name in where} for title, value in _SAME}
    rows = [["host", "ranks", *odd, "memory free", "clock"]]
    for host in hosts:
        row = [host.name, str(host.slots)]
        if host.answer is None:
            rows.append([*row, "no answer"])
            continue
        machine, clock = host.answer.machine, "-"
        row += [value(machine) + (ODD_MARK if host.name in odd[title] else "") for title, value in _SAME]
        row.append(f"{bytes_in_words(machine.free_memory_bytes)} of {bytes_in_words(machine.memory_bytes)}")
        if host.clock is not None:
            sign = "-" if host.clock.skew < 0 else "+"
            clock = f"{sign}{messages.time_text(abs(host.clock.skew))} +-{messages.time_text(host.clock.margin)}"
        rows.append([*row, clock])
    return [*aligned_lines(rows, align="<"), *([f"{ODD_MARK} differs from most hosts"] if any(odd.values()) else [])]


def group_table(groups: Sequence[GroupResult]) -> list[str]:
    """Return a table with one row per kind of process group. The row shows the slowest group and its hosts."""
    rows = [["all-reduce", "groups x ranks", "bytes", "time", "bus bandwidth", "slowest group"]]
    for kind in dict.fromkeys(group.kind for group in groups):
        of_kind = [group for group in groups if group.kind == kind]
        slowest = min(of_kind, key=lambda group: group.bus_bytes_per_second)
        ranks = ", ".join(map(str, slowest.ranks[:8])) + (" ..." if len(slowest.ranks) > 8 else "")
        rows.append(
            [
                kind,
                f"{len(of_kind)} x {len(slowest.ranks)}",
                f"{slowest.num_bytes / 1e6:.3g} MB",
                messages.time_text(slowest.seconds),
                f"{slowest.bus_bytes_per_second / 1e9:.3g} GB/s",
                f"ranks {ranks} on {enumerate_names(slowest.hosts)}",
            ]
        )
    return aligned_lines(rows, align="<") if groups else []
