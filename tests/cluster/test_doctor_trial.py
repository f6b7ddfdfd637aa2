"""What the doctor concludes from what its ranks say, and how it reports it: pure functions over events."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support.launcher_jobs import make_job, write_program

from megatron_tiedlora.cluster.doctor import (
    Trial,
    examine,
    explain_trial,
    group_results,
    judge_groups,
    report_text,
    start_ranks,
)
from megatron_tiedlora.cluster.doctor_rank import (
    RANK_MARK,
    DoctorReport,
    GroupResult,
    HostAnswer,
    HostReport,
    Order,
    ParallelConfig,
    RankReport,
    TrialRank,
    packed,
)
from megatron_tiedlora.config.job_settings import DoctorSettings
from megatron_tiedlora.runtime.launch_env import Host
from megatron_tiedlora.runtime.machine import Finding, machine_record

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
Report = Callable[[Sequence[Finding]], DoctorReport]
GROUPS = (("tensor", (0, 1)), ("tensor", (2, 3)), ("data", (0, 2)), ("data", (1, 3)))


def report_of(rank: int, *, until: str = "done", **more: Any) -> RankReport:
    """What a rank has said when it has come to the stage `until`."""
    groups = [result(kind=kind, ranks=list(ranks)) for kind, ranks in GROUPS if rank == ranks[0] and until == "done"]
    return RankReport(rank=rank, stage=until, groups=groups, **more)


def result(**changes: Any) -> GroupResult:
    """A healthy group's figures but for `changes`."""
    healthy = {"kind": "data", "ranks": [0, 1], "hosts": [], "num_bytes": LARGE, "seconds": 0.1, "correct": True}
    return GroupResult(**{**healthy, "bus_bytes_per_second": 1e9, **changes})


def trial(until: dict[int, str] | None = None, *, failed: dict[int, str] | None = None, **kwargs: Any) -> Trial:
    """A trial whose ranks came to their end, but for those in `until` ('': it said nothing), and why some failed."""
    stages = {**dict.fromkeys(range(4), "done"), **(until or {})}
    reports = {
        rank: report_of(rank, until=stage, failed=(failed or {}).get(rank)) for rank, stage in stages.items() if stage
    }
    return Trial(reports, **kwargs)


def test_figures_of_each_group_are_in_the_order_of_its_kind_with_its_hosts() -> None:
    seen = trial()
    results = group_results(HOSTS, seen)
    assert [(group.kind, group.ranks, group.hosts) for group in results] == [
        ("tensor", [0, 1], ["nodea"]),
        ("tensor", [2, 3], ["nodeb"]),
        ("data", [0, 2], ["nodea", "nodeb"]),
        ("data", [1, 3], ["nodea", "nodeb"]),
    ]
    assert explain_trial(HOSTS, LAYOUT, seen, limit=60) == [] and judge_groups(results) == []
    assert len(group_results(HOSTS, trial({2: "joined", 0: "joined"}))) == 1  # the others were not measured


@pytest.mark.parametrize("wrong", [False, True])
def test_figures_are_of_the_slowest_rank_and_one_with_a_wrong_sum_spoils_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], wrong: bool
) -> None:
    """Bandwidth is that of a link; ranks 0, 1, 2 and 3 are one group, of which rank 2 is slow, or adds wrongly."""

    def others_too(values: torch.Tensor, **_: object) -> None:
        if len(values) == 2:
            values.copy_(values.maximum(torch.tensor([0.1, float(wrong)])))
        else:  # the sum of this pattern over the four ranks
            values.copy_(TrialRank(order, 0)._pattern([0, 1, 2, 3], torch.device("cpu"))[1])

    order = make_order(LAYOUT)
    monkeypatch.setattr("megatron_tiedlora.training.throughput.timed", lambda step, device: [step(), 1e-5][1])
    monkeypatch.setattr("torch.distributed.all_reduce", others_too)
    for rank in (0, 1):
        TrialRank(order, rank)._measure("data", [0, 1, 2, 3], None, torch.device("cpu"))
    seen = Trial()
    for line in capsys.readouterr().out.splitlines():
        seen.hear(line)
    (group,) = group_results(HOSTS, seen)
    assert group.seconds == pytest.approx(0.1)
    assert group.bus_bytes_per_second == pytest.approx(1.5 * LARGE / 0.1) and group.correct is not wrong


def test_a_slow_group_and_a_wrong_sum_are_named_by_their_hosts() -> None:
    slow = [result(), result(), result(hosts=["nodeb", "nodec"], bus_bytes_per_second=3e8)]
    slow.append(result(kind="tensor", bus_bytes_per_second=1e8))
    assert [(finding.code, finding.status, finding.hosts) for finding in judge_groups(slow)] == [
        ("slow_group", "warning", ["nodeb", "nodec"])
    ]
    wrong = [result(), result(hosts=["nodec"], correct=False)]
    assert [(finding.code, finding.status, finding.hosts) for finding in judge_groups(wrong)] == [
        ("wrong_sum", "error", ["nodec"])
    ]


def make_order(layout: ParallelConfig) -> Order:
    return Order(layout=layout, first_ranks=[], output_dir=None, large_bytes=LARGE, timeout=1)


def test_the_sum_that_ranks_expect() -> None:
    """What is wrong in one place of one rank's part must show."""
    ranks, device = [4, 6, 7], torch.device("cpu")
    order = make_order(LAYOUT).model_copy(update={"large_bytes": 4096})
    parts = [TrialRank(order, rank)._pattern(ranks, device) for rank in ranks]
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
    printed, both = ["nodea: bars", "nodeb: ImportError: libfoo", "the end"], ["nodea", "nodeb"]
    silent = trial({0: "started", 1: "started", 2: "", 3: ""}, printed=printed, status=1)
    apart = trial(dict.fromkeys(range(4), "started"), failed={2: "timed out after 60000ms", 3: "timed out"}, status=1)
    lost = trial({2: "joined", 3: "joined"}, printed=["nodeb: Timeout, server nodeb not responding."], status=255)
    for seen, code, hosts, words in (
        (silent, "not_started", ["nodeb"], "ImportError: libfoo"),
        (apart, "not_joined", both, "timed out after 60000ms"),
        (trial(dict.fromkeys(range(4), "joined")), "allreduce_failed", both, "not finished in 60 s"),
        (lost, "allreduce_failed", ["nodeb"], "server nodeb not responding"),
    ):
        (finding,) = explain_trial(HOSTS, LAYOUT, seen, limit=60)
        assert (finding.code, finding.hosts) == (code, hosts) and words in finding.message


def answer() -> HostAnswer:
    """With as many interfaces as make its record longer than a line."""
    interfaces = {f"eth{number}": [os.urandom(8).hex()] for number in range(300)}
    return HostAnswer(machine=machine_record().model_copy(update={"interfaces": interfaces}), output_free_bytes=None)


def test_what_ranks_say_is_found_in_what_launchers_print(capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever stands before it or between its lines; lines that are not whole are not believed."""
    asked = answer()
    for rank in (0, 2):
        speaker = TrialRank(make_order(LAYOUT), rank)
        speaker.say(answer=asked)
        speaker.say(stage="started")
    lines = capsys.readouterr().out.splitlines()
    half = len(lines) // 2
    assert half > 2 and all(len(line) < 2100 for line in lines)
    mixed = [line for pair in zip(lines[:half], lines[half:], strict=True) for line in pair]
    seen = Trial()
    broken = [f"{RANK_MARK}1 nonsense.", f"{RANK_MARK}3 begun"]
    for line in ["Welcome!", *(f"nodea: {line}" for line in mixed), *broken, "", "bye"]:
        seen.hear(line)
    assert {rank: report.answer for rank, report in seen.ranks.items()} == {0: asked, 2: asked}  # and not forgotten
    assert seen.reached([0, 2], "started") and not seen.reached([0, 2], "joined")
    assert not seen.reached([0, 1], "started")
    assert [seen.first(host, "answer") for host in HOSTS] == [asked, asked]
    assert seen.printed == ["Welcome!", "", "bye"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("echo compiling; sleep 30", "not finished in 2 s"),
        ("echo compiling; sleep 30 &", "not finished in 2 s"),  # what is left holds the output
        ("echo bars; echo Connection closed >&2; exit 1", "Connection closed"),
        ("exit 7", "the launcher ended with status 7"),
        ("exit 0", "the launcher ended with status 0"),
    ],
)
def test_why_nothing_was_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, reason: str) -> None:
    """The time, or the last words."""
    write_program(tmp_path / "bin", "mpirun", f"#!/bin/sh\n{text}\n")
    monkeypatch.setattr("megatron_tiedlora.cluster.doctor._START_SECONDS", 1.0)
    job = make_job(tmp_path / "job", launcher="mpirun", route="local", hosts=(Host("nodea", 2),))
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    begin = time.monotonic()
    seen = start_ranks(job, make_order(LAYOUT), dict(os.environ), lambda line: None)
    assert time.monotonic() - begin < 15
    (finding,) = explain_trial(HOSTS[:1], LAYOUT, seen, limit=2)
    assert finding.code == "not_started" and f"({reason})" in finding.message


def test_ranks_have_an_alarm() -> None:
    """Of their own, where a host is cut off from the doctor and no time limit of an exchange ends the rank."""
    order = make_order(LAYOUT).model_copy(update={"timeout": 0.5})
    hanging = (
        "import sys, time; from megatron_tiedlora.cluster import doctor_rank as rank;"
        " rank.TrialRank.run = lambda self: time.sleep(60); sys.exit(rank.main())"
    )
    done = subprocess.run([sys.executable, "-c", hanging, packed(order)], capture_output=True, timeout=60)
    assert done.returncode == -signal.SIGALRM, done.stderr


def examined(monkeypatch: pytest.MonkeyPatch, seen: Trial, settings: DoctorSettings, **answers: Any) -> DoctorReport:
    """What the doctor says when its ranks are `seen`, hosts are alike, and functions of its module give `answers`."""
    for name, value in {"start_ranks": seen, "compare_hosts": [], **answers}.items():
        monkeypatch.setattr(f"megatron_tiedlora.cluster.doctor.{name}", lambda *_, value=value, **__: value)
    return examine(settings, {}, lambda line: None)


def test_a_single_rank_that_fails_after_its_probe_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    told = answer()
    failed = report_of(0, until="started", answer=told, failed="CUDA error: out of memory")
    bad = examined(monkeypatch, Trial({0: failed}, status=1), DoctorSettings())
    assert bad.verdict == "not ready" and "CUDA error: out of memory" in bad.findings[0].message
    healthy = Trial({0: RankReport(rank=0, stage="done", answer=told)}, status=0)
    good = examined(monkeypatch, healthy, DoctorSettings())
    assert good.verdict == "ready" and good.skipped == "no all-reduce: a single rank has no communication to test"


def test_an_order_for_many_hosts_is_one_argument() -> None:
    """Of at most 128 KiB under Linux."""
    order = make_order(LAYOUT).model_copy(update={"first_ranks": list(range(0, 80000, 8))})
    assert len(order.model_dump_json()) < 2**16


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Report:
    """What the doctor makes of two healthy hosts with these findings."""
    job = make_job(tmp_path, hosts=(Host("nodea", 2), Host("nodeb", 2)))

    def of_two(findings: Sequence[Finding]) -> DoctorReport:
        answers = {"find_job": job, "check_programs": None, "explain_silence": [], "compare_hosts": list(findings)}
        return examined(monkeypatch, trial(), DoctorSettings(tensor_parallel=2), **answers)

    return of_two


def test_the_verdict_counts_errors_and_puts_them_first(report: Report) -> None:
    warning = Finding(status="warning", code="clock", hosts=["nodeb"], value="nodeb: late", fix="set it")
    error = Finding(status="error", code="no_answer", hosts=["nodeb"], value="nodeb: gone", fix="look")
    assert report_text(report([])).endswith("\n\nverdict: ready, 2 hosts, 4 ranks")
    assert report_text(report([warning])).endswith("\n\nverdict: ready, 2 hosts, 4 ranks (1 warning)")
    text = report_text(report([warning, error]))
    assert text.endswith(
        "error: nodeb: gone\n  fix: look\nwarning: nodeb: late\n  fix: set it\n\nverdict: not ready: 1 error, 1 warning"
    )


def test_the_json_report_reads_back_and_keeps_its_names(report: Report) -> None:
    written = report([])
    assert DoctorReport.model_validate_json(written.model_dump_json()) == written
    names = {name: set(shape["properties"]) for name, shape in DoctorReport.model_json_schema()["$defs"].items()} | {
        "DoctorReport": set(DoctorReport.model_fields)
    }
    assert names["DoctorReport"] == {
        "verdict", "num_errors", "num_warnings", "route", "launcher", "layout", "hosts", "groups", "skipped",
        "findings", "seconds",
    }  # fmt: skip
    assert names["Finding"] == {"status", "value", "expected", "fix", "code", "hosts"}
    assert names["HostReport"] == {"name", "slots", "first_rank", "answer", "clock"}
    assert names["GroupResult"] == {
        "kind", "ranks", "hosts", "num_bytes", "seconds", "bus_bytes_per_second", "correct",
    }  # fmt: skip
    assert names["ParallelConfig"] == {
        "num_ranks", "tensor_parallel", "pipeline_parallel", "data_parallel", "master_host", "master_port", "backend",
    }  # fmt: skip
