"""What the doctor concludes from what its ranks say, and how it reports it: pure functions over events."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from launcher_jobs import make_job, write_program

from megatron_tiedlora.cluster.doctor.examine import examine, make_report
from megatron_tiedlora.cluster.doctor.rank import RANK_MARK, SMALL_BYTES, TrialRank
from megatron_tiedlora.cluster.doctor.records import (
    DoctorReport,
    Finding,
    GroupResult,
    HostReport,
    Order,
    ParallelConfig,
    Probe,
    RankEvent,
)
from megatron_tiedlora.cluster.doctor.text import report_text
from megatron_tiedlora.cluster.doctor.trial import (
    Trial,
    explain_trial,
    group_results,
    heard_hosts,
    judge_groups,
    measure_hosts,
)
from megatron_tiedlora.cluster.launchers import Job
from megatron_tiedlora.config.doctor_settings import DoctorSettings
from megatron_tiedlora.config.hosts import Host

LARGE = 64_000_000
LAYOUT = ParallelConfig(
    num_ranks=4,
    tensor_parallel=2,
    pipeline_parallel=1,
    data_parallel=2,
    master_host="nodea",
    master_port=29500,
    backend="gloo",
)
HOSTS = [HostReport(name="nodea", slots=2, first_rank=0), HostReport(name="nodeb", slots=2, first_rank=2)]
GROUPS = (("tensor", (0, 1)), ("tensor", (2, 3)), ("data", (0, 2)), ("data", (1, 3)))


def events_of(rank: int, *, until: str = "done", seconds: float = 0.1) -> list[RankEvent]:
    """What a rank says up to and with its event `until`."""
    measured = [
        RankEvent(
            rank=rank,
            event="measured",
            kind=kind,
            ranks=list(ranks),
            num_bytes=num_bytes,
            seconds=seconds if num_bytes == LARGE else 1e-4,
        )
        for kind, ranks in GROUPS
        if rank in ranks
        for num_bytes in (SMALL_BYTES, LARGE)
    ]
    started, joined, done = (RankEvent(rank=rank, event=event) for event in ("started", "joined", "done"))
    events = [started, joined, *measured, done]
    names = [event.event for event in events]
    return [] if until == "" else events[: names.index(until) + 1]


def trial(until: dict[int, str] | None = None, *, failed: dict[int, str] | None = None, **kwargs: object) -> Trial:
    """A trial whose ranks came to their end, but for those in `until` and those that said how they failed."""
    until = until or {}
    events = {rank: events_of(rank, until=until.get(rank, "done")) for rank in range(4)}
    for rank, reason in (failed or {}).items():
        events[rank].append(RankEvent(rank=rank, event="failed", reason=reason))
    return Trial(events=events, **kwargs)  # type: ignore[arg-type]


def explained(seen: Trial) -> list[tuple[str, list[str]]]:
    return [(finding.code, finding.hosts) for finding in explain_trial(HOSTS, LAYOUT, seen, limit=60)]


def test_figures_of_each_group() -> None:
    seen = trial()
    seen.events[3] = events_of(3, seconds=0.4)
    results = group_results(HOSTS, LAYOUT, seen, large_bytes=LARGE)
    assert [(group.kind, group.ranks, group.hosts) for group in results] == [
        ("tensor", [0, 1], ["nodea"]),
        ("tensor", [2, 3], ["nodeb"]),
        ("data", [0, 2], ["nodea", "nodeb"]),
        ("data", [1, 3], ["nodea", "nodeb"]),
    ]
    assert [group.seconds for group in results] == [0.1, 0.4, 0.1, 0.4]  # of the slowest rank
    assert results[0].bus_bytes_per_second == pytest.approx(2 * (1 / 2) * LARGE / 0.1)
    assert all(group.correct and group.latency_seconds == 1e-4 for group in results)
    assert explained(seen) == [] and judge_groups(results) == []


def test_bandwidth_is_of_a_link_and_one_rank_with_a_wrong_sum_spoils_it() -> None:
    layout = LAYOUT.model_copy(update={"tensor_parallel": 1, "data_parallel": 4})
    everyone = {"kind": "data", "ranks": [0, 1, 2, 3], "event": "measured"}
    events = {
        rank: [
            RankEvent(rank=rank, num_bytes=SMALL_BYTES, seconds=1e-4, **everyone),
            RankEvent(rank=rank, num_bytes=LARGE, seconds=0.1, correct=rank != 3, **everyone),
        ]
        for rank in range(4)
    }
    (group,) = group_results(HOSTS, layout, Trial(events=events), large_bytes=LARGE)
    assert group.bus_bytes_per_second == pytest.approx(1.5 * LARGE / 0.1) and not group.correct


def test_a_group_that_was_not_measured_has_no_figures() -> None:
    assert len(group_results(HOSTS, LAYOUT, trial({3: "joined"}), large_bytes=LARGE)) == 2


def result(
    kind: str = "data", hosts: Sequence[str] = ("nodea",), speed: float = 1e9, correct: bool = True
) -> GroupResult:
    return GroupResult(
        kind=kind,
        ranks=[0, 1],
        hosts=list(hosts),
        num_bytes=LARGE,
        seconds=0.1,
        bus_bytes_per_second=speed,
        latency_seconds=1e-4,
        correct=correct,
    )


def test_a_slow_group_and_a_wrong_sum_are_named_by_their_hosts() -> None:
    slow = [result(), result(), result(hosts=["nodeb", "nodec"], speed=3e8), result(kind="tensor", speed=1e8)]
    assert [(finding.code, finding.level, finding.hosts) for finding in judge_groups(slow)] == [
        ("slow_group", "warning", ["nodeb", "nodec"])
    ]
    wrong = [result(), result(hosts=["nodec"], correct=False)]
    assert [(finding.code, finding.level, finding.hosts) for finding in judge_groups(wrong)] == [
        ("wrong_sum", "error", ["nodec"])
    ]


def make_order(layout: ParallelConfig) -> Order:
    limits = {"large_bytes": LARGE, "timeout": 1, "seconds": 1}
    return Order(layout=layout, peers={}, first_host="nodea", paths={}, output_dir=None, **limits)


def test_the_sum_that_ranks_expect() -> None:
    """What is wrong in one place of one rank's part must show."""
    ranks, device = [4, 6, 7], torch.device("cpu")
    order = make_order(LAYOUT)
    parts = [TrialRank(order, rank)._pattern(4096, ranks, device) for rank in ranks]
    total = torch.stack([part for part, _ in parts]).sum(0)
    assert all(torch.equal(total, whole) for _, whole in parts) and total.numel() == 1024
    assert len({tuple(part[:9].tolist()) for part, _ in parts}) == 3


def test_a_rank_on_a_gpu_prepares_cuda_and_takes_the_one_that_it_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    """With LOCAL_RANK 3 and one visible GPU, as `srun --gpus-per-task=1` gives it."""
    for name in ("TORCH_NCCL_RETHROW_CUDA_ERRORS", "TORCH_NCCL_ASYNC_ERROR_HANDLING", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    monkeypatch.setattr("megatron_tiedlora.runtime.process_group.uses_gpu", lambda: True)
    met: list[tuple[torch.device, str | None]] = []

    def meet(device: torch.device, _: object) -> None:
        met.append((device, os.environ.get("TORCH_NCCL_RETHROW_CUDA_ERRORS")))
        raise ConnectionError("nobody is there")

    monkeypatch.setattr("megatron_tiedlora.runtime.process_group.meet", meet)
    on_gpus = LAYOUT.model_copy(update={"backend": "nccl"})
    order = make_order(on_gpus)
    with pytest.raises(ConnectionError):
        TrialRank(order, 3).run()
    assert met == [(torch.device("cuda", 0), "0")]


def test_ranks_that_do_not_start_meet_or_finish() -> None:
    printed = ["nodea: bars", "nodeb: ImportError: libfoo", "the end"]
    silent = trial({0: "started", 1: "started", 2: "", 3: ""}, printed=printed, status=1)
    assert explained(silent) == [("not_started", ["nodeb"])]
    assert "ImportError: libfoo" in explain_trial(HOSTS, LAYOUT, silent, limit=60)[0].message
    apart = trial(dict.fromkeys(range(4), "started"), failed={2: "timed out after 60000ms", 3: "timed out"}, status=1)
    assert explained(apart) == [("not_joined", ["nodea", "nodeb"])]
    assert "timed out after 60000ms" in explain_trial(HOSTS, LAYOUT, apart, limit=60)[0].message
    stuck = trial(dict.fromkeys(range(4), "joined"))
    assert explained(stuck) == [("allreduce_failed", ["nodea", "nodeb"])]
    assert "not finished in 60 s" in explain_trial(HOSTS, LAYOUT, stuck, limit=60)[0].message
    lost = trial({2: "joined", 3: "joined"}, printed=["nodeb: Timeout, server nodeb not responding."], status=255)
    assert explained(lost) == [("allreduce_failed", ["nodeb"])]
    assert "server nodeb not responding" in explain_trial(HOSTS, LAYOUT, lost, limit=60)[0].message


def probe() -> Probe:
    """With as much about files as makes its record longer than a line."""
    files = {f"{number:05}": os.urandom(6).hex() for number in range(900)}
    paths = {"/model": {"path": "/model", "kind": "folder", "files": files}}
    annotations = {name: str(field.annotation) for name, field in Probe.model_fields.items()}
    values = {name: [] if text.startswith("list") else {} for name, text in annotations.items()}
    plain = dict.fromkeys(("hostname", "machine", "executable", "source_hash"), "a")
    plain |= dict.fromkeys(("torch_error", "cuda", "nccl", "nofile", "memlock", "peer_address", "output"))
    numbers = dict.fromkeys(("num_cores", "memory_bytes", "free_memory_bytes", "shm_bytes"), 1)
    return Probe(**{**values, **plain, **numbers, "paths": paths})  # type: ignore[arg-type]


def test_what_ranks_say_is_found_in_what_launchers_print(capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever stands before it or between its lines; lines that are not whole are not believed."""
    asked = probe()
    for rank in (0, 2):
        TrialRank(make_order(LAYOUT), rank).say("probe", probe=asked)
    lines = capsys.readouterr().out.splitlines()
    half = len(lines) // 2
    assert half > 2 and all(len(line) < 2100 for line in lines)
    mixed = [line for pair in zip(lines[:half], lines[half:], strict=True) for line in pair]
    seen = Trial()
    for line in ["Welcome!", *(f"nodea: {line}" for line in mixed), f"{RANK_MARK}1.0 1/1 nonsense", "", "bye"]:
        seen.hear(line)
    assert [event.probe for events in seen.events.values() for event in events] == [asked, asked]
    assert [host.probe for host in heard_hosts(HOSTS, seen)] == [asked, asked]
    assert seen.printed == ["Welcome!", "", "bye"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("echo compiling; sleep 30", "not finished in 0 s"),
        ("echo compiling; sleep 30 &", "not finished in 0 s"),  # what is left holds the output
        ("echo bars; echo 'error: no such model' >&2; echo Connection closed >&2; exit 1", "no such model"),
        ("echo Connection closed >&2; exit 1", "Connection closed"),
        ("exit 7", "the launcher ended with status 7"),
        ("exit 0", "the launcher ended with status 0"),
    ],
)
def test_why_nothing_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, reason: str
) -> None:
    """The time, a rank's own error in front of what others say later, or the last words."""
    write_program(tmp_path / "bin", "mpirun", f"#!/bin/sh\n{text}\n")
    monkeypatch.setattr("megatron_tiedlora.cluster.doctor.trial._START_SECONDS", 3.0)
    job = make_job(tmp_path / "job", launcher="mpirun", route="local", hosts=(Host("nodea", 2),))
    environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    monkeypatch.setenv("PATH", environment["PATH"])
    found, (finding,) = measure_hosts(job, environment, model="m", seconds=1.0, limit=0.0)
    assert found is None and finding.code == "not_measured" and f"({reason})" in finding.message


def test_measuring_ranks_have_an_alarm() -> None:
    """Of their own, where a host is cut off from the doctor."""
    module = [sys.executable, "-m", "megatron_tiedlora.cluster.doctor.rank"]
    done = subprocess.run([*module, "60", "plan", "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.startswith("usage: tiedlora plan"), done.stderr
    done = subprocess.run([*module, "1", "plan", "--measure=-", "--model=demo"], capture_output=True, timeout=60)
    assert done.returncode == -signal.SIGALRM


def examined(monkeypatch: pytest.MonkeyPatch, seen: Trial) -> DoctorReport:
    """What the doctor says of a single rank on this machine."""
    monkeypatch.setattr("megatron_tiedlora.cluster.doctor.examine.start_ranks", lambda *_: seen)
    monkeypatch.setattr("megatron_tiedlora.cluster.doctor.examine.compare_hosts", lambda *_, **__: [])
    return examine(DoctorSettings(), {}, lambda line: None)


def test_a_single_rank_that_fails_after_its_probe_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    told = RankEvent(rank=0, event="probe", probe=probe())
    fails = RankEvent(rank=0, event="failed", reason="CUDA error: out of memory")
    bad = examined(monkeypatch, Trial({0: [told, *events_of(0, until="started"), fails]}, status=1))
    assert bad.verdict == "not ready" and "CUDA error: out of memory" in bad.findings[0].message
    good = examined(monkeypatch, Trial({0: [told, *events_of(0)]}, status=0))
    assert good.verdict == "ready" and good.skipped == "no all-reduce: a single rank has no communication to test"


def test_an_order_for_many_hosts_is_one_argument() -> None:
    """Of at most 128 KiB under Linux."""
    order = make_order(LAYOUT).model_copy(
        update={"paths": {str(n): "/data/" * 40 for n in range(9)}, "peers": dict.fromkeys(range(0, 8000, 8), "a" * 30)}
    )
    assert len(order.model_dump_json()) < 2**16


def test_what_was_measured_is_read_from_the_line_of_rank_0(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_program(tmp_path / "bin", "mpirun", """#!/bin/sh\necho 'nodea: {"name": "this", "of": 2}'\n""")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    job = make_job(tmp_path / "job", launcher="mpirun", route="local", hosts=(Host("nodea", 2),))
    assert measure_hosts(job, os.environ, model="m", seconds=1.0, limit=60.0) == ({"name": "this", "of": 2}, [])


def report(findings: Sequence[Finding]) -> DoctorReport:
    results = group_results(HOSTS, LAYOUT, trial(), large_bytes=LARGE)
    job = Job("pdsh", "ssh", (Host("nodea", 2),), ("x.py",), (), "python", Path(), Path(), "", 29500)
    return make_report(job, LAYOUT, HOSTS, results, None, findings, {"ranks": 1.23456})


def test_the_verdict_counts_errors_and_puts_them_first() -> None:
    warning = Finding(level="warning", code="clock", hosts=["nodeb"], message="nodeb: late", fix="set it")
    error = Finding(level="error", code="no_answer", hosts=["nodeb"], message="nodeb: gone", fix="look")
    assert report_text(report([])).endswith("\n\nverdict: ready, 2 hosts, 4 ranks")
    assert report_text(report([warning])).endswith("\n\nverdict: ready, 2 hosts, 4 ranks (1 warning)")
    text = report_text(report([warning, error]))
    assert text.endswith(
        "error: nodeb: gone\n  fix: look\nwarning: nodeb: late\n  fix: set it\n\nverdict: not ready: 1 error, 1 warning"
    )


def test_the_json_report_reads_back_and_keeps_its_names() -> None:
    written = report([])
    assert DoctorReport.model_validate_json(written.model_dump_json()) == written
    names = {name: set(shape["properties"]) for name, shape in DoctorReport.model_json_schema()["$defs"].items()} | {
        "DoctorReport": set(DoctorReport.model_fields)
    }
    assert names["DoctorReport"] == {
        "verdict", "num_errors", "num_warnings", "route", "launcher", "layout", "hosts", "groups", "skipped",
        "findings", "seconds", "machine",
    }  # fmt: skip
    assert names["Finding"] == {"level", "code", "hosts", "message", "fix"}
    assert names["HostReport"] == {"name", "slots", "first_rank", "probe", "clock"}
    assert names["GroupResult"] == {
        "kind", "ranks", "hosts", "num_bytes", "seconds", "bus_bytes_per_second", "latency_seconds", "correct",
    }  # fmt: skip
    assert names["ParallelConfig"] == {
        "num_ranks", "tensor_parallel", "pipeline_parallel", "data_parallel", "master_host", "master_port", "backend",
    }  # fmt: skip
