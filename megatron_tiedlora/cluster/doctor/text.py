"""The report as text: a row for each host and each kind of group, the findings with their fixes, and the verdict."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from statistics import median

from megatron_tiedlora.base.errors import printable
from megatron_tiedlora.base.wording import aligned_lines, bytes_in_words, count_text, enumerate_names, time_text
from megatron_tiedlora.cluster.doctor.compare import NO_GPU, interface_in_use, usual_value
from megatron_tiedlora.cluster.doctor.records import (
    DoctorReport,
    GroupResult,
    HostAnswer,
    HostReport,
    answering,
)
from megatron_tiedlora.runtime.machine import Gpu, MachineRecord

ODD_MARK = "*"


def report_text(report: DoctorReport) -> str:
    """The whole report, to print."""
    parts = [[_headline(report)], host_table(report.hosts)]
    if report.groups:
        parts.append(group_table(report.groups))
    if report.skipped is not None:
        parts.append([report.skipped])
    if report.findings:
        pairs = ((f"{one.status}: {one.message}", f"  fix: {one.fix}") for one in report.findings)
        parts.append([line for pair in pairs for line in pair])
    warnings = count_text(report.num_warnings, "warning") if report.num_warnings else ""
    if report.verdict == "ready":
        hosts, ranks = count_text(len(report.hosts), "host"), count_text(report.layout.num_ranks, "rank")
        verdict = f"ready, {hosts}, {ranks}{f' ({warnings})' if warnings else ''}"
    else:
        verdict = f"not ready: {count_text(report.num_errors, 'error')}{f', {warnings}' if warnings else ''}"
    return "\n\n".join("\n".join(map(printable, lines)) for lines in [*parts, [f"verdict: {verdict}"]])


def _headline(report: DoctorReport) -> str:
    layout = report.layout
    parts = f"tensor {layout.tensor_parallel} x pipeline {layout.pipeline_parallel} x data {layout.data_parallel}"
    ranks = f"{count_text(layout.num_ranks, 'rank')} = {parts}"
    meeting = f"{f'{layout.backend}, ' if layout.backend else ''}meeting at {layout.master_host}:{layout.master_port}"
    return f"{count_text(len(report.hosts), 'host')} (by {report.launcher}), {ranks}, {meeting}"


# Hosts ---------------------------------------------------------------------------------------------------------------

_SAME: tuple[tuple[str, Callable[[MachineRecord], str]], ...] = (  # values that should be the same on all hosts
    ("python", lambda machine: machine.versions.get("python", "-")),
    ("torch", lambda machine: "broken" if machine.torch_error else machine.versions.get("torch", "-")),
    ("deepspeed", lambda machine: machine.versions.get("deepspeed", "-")),
    ("transformers", lambda machine: machine.versions.get("transformers", "-")),
    ("tiedlora", lambda machine: f"{machine.versions.get('megatron_tiedlora', '-')} {machine.source_hash[:6]}"),
    ("GPUs", lambda machine: _gpus_text(machine.gpus)),
    ("cores", lambda machine: str(machine.num_cores)),
)


def host_table(hosts: Sequence[HostReport]) -> list[str]:
    """A row for each host; a value that differs from that of most hosts is marked."""
    machines = [answer.machine for _, answer in answering(hosts)]
    on_gpus = any(machine.gpus for machine in machines)
    free = ["memory free", *(["GPU memory free"] if on_gpus else [])]
    header = ["host", "ranks", *(title for title, _ in _SAME), *free, "clock", "interface"]
    usual = {title: usual_value([value(machine) for machine in machines] or [""]) for title, value in _SAME}
    rows, odd = [header], False
    for host in hosts:
        row = [host.name, str(host.slots)]
        if host.answer is None:
            rows.append([*row, "no answer"])
            continue
        machine = host.answer.machine
        for title, value in _SAME:
            differs = value(machine) != usual[title]
            odd = odd or differs
            row.append(value(machine) + (ODD_MARK if differs else ""))
        memory = f"{bytes_in_words(machine.free_memory_bytes)} of {bytes_in_words(machine.memory_bytes)}"
        row += [memory, *([_gpu_memory_text(machine.gpus)] if on_gpus else [])]
        rows.append([*row, _clock_text(host), _interface_text(host.answer)])
    return [*aligned_lines(rows, align="<"), *([f"{ODD_MARK} differs from most hosts"] if odd else [])]


def _gpus_text(gpus: Sequence[Gpu]) -> str:
    kinds = Counter(gpu.name for gpu in gpus)
    return ", ".join(f"{number} x {name}" for name, number in kinds.items()) or NO_GPU


def _gpu_memory_text(gpus: Sequence[Gpu]) -> str:
    """The memory of the GPU with the least free memory: a job can use no more than that on each."""
    if not gpus:
        return "-"
    least = min(gpus, key=lambda gpu: gpu.free_bytes)
    return f"{bytes_in_words(least.free_bytes)} of {bytes_in_words(least.total_bytes)}"


def _clock_text(host: HostReport) -> str:
    if host.clock is None:
        return "-"
    sign = "-" if host.clock.skew < 0 else "+"
    return f"{sign}{time_text(abs(host.clock.skew))} +-{time_text(host.clock.margin)}"


def _interface_text(answer: HostAnswer) -> str:
    return "-" if answer.peer_address is None else f"{interface_in_use(answer) or '?'} {answer.peer_address}"


# Groups --------------------------------------------------------------------------------------------------------------


def group_table(groups: Sequence[GroupResult]) -> list[str]:
    """A row for each kind of group, with its slowest group and that group's hosts."""
    rows = [["all-reduce", "groups x ranks", "latency", "bytes", "time", "bus bandwidth", "median", "slowest group"]]
    for kind in dict.fromkeys(group.kind for group in groups):
        of_kind = [group for group in groups if group.kind == kind]
        slowest = min(of_kind, key=lambda group: group.bus_bytes_per_second)
        usual = median(group.bus_bytes_per_second for group in of_kind)
        ranks = ", ".join(map(str, slowest.ranks[:8])) + (" ..." if len(slowest.ranks) > 8 else "")
        rows.append(
            [
                kind,
                f"{len(of_kind)} x {len(slowest.ranks)}",
                time_text(max(group.latency_seconds for group in of_kind)),
                f"{slowest.num_bytes / 1e6:.3g} MB",
                time_text(slowest.seconds),
                f"{slowest.bus_bytes_per_second / 1e9:.3g} GB/s",
                f"{usual / 1e9:.3g} GB/s",
                f"ranks {ranks} on {enumerate_names(slowest.hosts)}",
            ]
        )
    return aligned_lines(rows, align="<")
