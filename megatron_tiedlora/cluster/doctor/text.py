"""The report as text: a row for each host and each kind of group, the findings with their fixes, and the verdict."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median

from megatron_tiedlora.base.errors import printable
from megatron_tiedlora.base.wording import aligned_lines, bytes_in_words, count_text, enumerate_names, time_text
from megatron_tiedlora.cluster.doctor.compare import NO_GPU, answering, interface_in_use, usual_value
from megatron_tiedlora.cluster.doctor.records import (
    DoctorReport,
    Finding,
    GroupResult,
    HostReport,
    ParallelConfig,
    Probe,
)

ODD_MARK = "*"


def report_text(report: DoctorReport) -> str:
    """The whole report, to print."""
    parts = [[_headline(report)], host_table(report.hosts)]
    if report.groups:
        parts.append(group_table(report.groups))
    if report.skipped is not None:
        parts.append([report.skipped])
    if report.findings:
        parts.append([line for finding in report.findings for line in finding_lines(finding)])
    return "\n\n".join("\n".join(map(printable, lines)) for lines in [*parts, [verdict_line(report)]])


def verdict_line(report: DoctorReport) -> str:
    """The conclusion in one line."""
    warnings = count_text(report.num_warnings, "warning") if report.num_warnings else ""
    if report.verdict == "ready":
        hosts, ranks = count_text(len(report.hosts), "host"), count_text(report.layout.num_ranks, "rank")
        return f"verdict: ready, {hosts}, {ranks}{f' ({warnings})' if warnings else ''}"
    return f"verdict: not ready: {count_text(report.num_errors, 'error')}{f', {warnings}' if warnings else ''}"


def finding_lines(finding: Finding) -> list[str]:
    """The problem, and below it what to do."""
    return [f"{finding.level}: {finding.message}", f"  fix: {finding.fix}"]


def _headline(report: DoctorReport) -> str:
    hosts = count_text(len(report.hosts), "host")
    return f"{hosts} (by {report.launcher}), {_layout_text(report.layout)}"


def _layout_text(layout: ParallelConfig) -> str:
    parts = f"tensor {layout.tensor_parallel} x pipeline {layout.pipeline_parallel} x data {layout.data_parallel}"
    meeting = f"meeting at {layout.master_host}:{layout.master_port}"
    backend = f"{layout.backend}, " if layout.backend else ""
    return f"{count_text(layout.num_ranks, 'rank')} = {parts}, {backend}{meeting}"


# Hosts ---------------------------------------------------------------------------------------------------------------

_SAME: tuple[tuple[str, Callable[[Probe], str]], ...] = (  # values that should be the same on all hosts
    ("python", lambda probe: probe.versions.get("python", "-")),
    ("torch", lambda probe: "broken" if probe.torch_error else probe.versions.get("torch", "-")),
    ("deepspeed", lambda probe: probe.versions.get("deepspeed", "-")),
    ("transformers", lambda probe: probe.versions.get("transformers", "-")),
    ("tiedlora", lambda probe: f"{probe.versions.get('megatron_tiedlora', '-')} {probe.source_hash[:6]}"),
    ("GPUs", lambda probe: _gpus_text(probe)),
    ("cores", lambda probe: str(probe.num_cores)),
)


def host_table(hosts: Sequence[HostReport]) -> list[str]:
    """A row for each host; a value that differs from that of most hosts is marked."""
    on_gpus = any(probe.gpus for _, probe in answering(hosts))
    free = ["memory free", *(["GPU memory free"] if on_gpus else [])]
    header = ["host", "ranks", *(title for title, _ in _SAME), *free, "clock", "interface"]
    usual = {title: usual_value([value(probe) for _, probe in answering(hosts)] or [""]) for title, value in _SAME}
    rows, odd = [header], False
    for host in hosts:
        row = [host.name, str(host.slots)]
        if host.probe is None:
            rows.append([*row, "no answer"])
            continue
        for title, value in _SAME:
            differs = value(host.probe) != usual[title]
            odd = odd or differs
            row.append(value(host.probe) + (ODD_MARK if differs else ""))
        memory = f"{bytes_in_words(host.probe.free_memory_bytes)} of {bytes_in_words(host.probe.memory_bytes)}"
        row += [memory, *([_gpu_memory_text(host.probe)] if on_gpus else [])]
        rows.append([*row, _clock_text(host), _interface_text(host.probe)])
    return [*aligned_lines(rows, align="<"), *([f"{ODD_MARK} differs from most hosts"] if odd else [])]


def _gpus_text(probe: Probe) -> str:
    if not probe.gpus:
        return NO_GPU
    kinds = {gpu.name: sum(other.name == gpu.name for other in probe.gpus) for gpu in probe.gpus}
    return ", ".join(f"{number} x {name}" for name, number in kinds.items())


def _gpu_memory_text(probe: Probe) -> str:
    """The memory of the GPU with the least free memory: a job can use no more than that on each."""
    if not probe.gpus:
        return "-"
    least = min(probe.gpus, key=lambda gpu: gpu.free_bytes)
    return f"{bytes_in_words(least.free_bytes)} of {bytes_in_words(least.total_bytes)}"


def _clock_text(host: HostReport) -> str:
    if host.clock is None:
        return "-"
    sign = "-" if host.clock.skew < 0 else "+"
    return f"{sign}{time_text(abs(host.clock.skew))} +-{time_text(host.clock.margin)}"


def _interface_text(probe: Probe) -> str:
    if probe.peer_address is None:
        return "-"
    return f"{interface_in_use(probe.interfaces, probe.peer_address) or '?'} {probe.peer_address}"


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
