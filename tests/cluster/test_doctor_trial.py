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

from megatron_tiedlora.cluster.doctor.compare import report_text
from megatron_tiedlora.cluster.doctor.rank import RANK_MARK, TrialRank
from megatron_tiedlora.cluster.doctor.records import (
    DoctorReport,
    GroupResult,
    HostAnswer,
    HostReport,
    Order,
    ParallelConfig,
    PathContent,
    Said,
)
from megatron_tiedlora.cluster.doctor.trial import (
    Trial,
    examine,
    explain_trial,
    group_results,
    heard_hosts,
    judge_groups,
    measure_hosts,
)
from megatron_tiedlora.config.doctor_settings import DoctorSettings
from megatron_tiedlora.config.hosts import Host
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
GROUPS = (("tensor", (0, 1)), ("tensor", (2, 3)), ("data", (0, 2)), ("data", (1, 3)))


def news_of(rank: int, *, until: str = "done") -> list[Said]:
    """What a rank says up to and with the stage `until`."""
    groups = [Said(rank=rank, group=result(kind, ranks)) for kind, ranks in GROUPS if rank == ranks[0]]
    started, joined, done = (Said(rank=rank, stage=stage) for stage in ("started", "joined", "done"))
    news = [started, joined, *groups, done]
    stages = [said.stage for said in news]
    return [] if until == "" else news[: stages.index(until) + 1]


def result(
    kind: str = "data",
    ranks: Sequence[int] = (0, 1),
    hosts: Sequence[str] = (),
    speed: float = 1e9,
    correct: bool = True,
) -> GroupResult:
    return GroupResult(
        kind=kind,
        ranks=list(ranks),
        hosts=list(hosts),
        num_bytes=LARGE,
        seconds=0.1,
        bus_bytes_per_second=speed,
        latency_seconds=1e-4,
        correct=correct,
    )


def trial(until: dict[int, str] | None = None, *, failed: dict[int, str] | None = None, **kwargs: object) -> Trial:
    """A trial whose ranks came to their end, but for those in `until` and those that said how they failed."""
    until = until or {}
    said = {rank: news_of(rank, until=until.get(rank, "done")) for rank in range(4)}
    for rank, reason in (failed or {}).items():
        said[rank].append(Said(rank=rank, failed=reason))
    return Trial(said, **kwargs)  # type: ignore[arg-type]


def explained(seen: Trial) -> list[tuple[str, list[str]]]:
    return [(finding.code, finding.hosts) for finding in explain_trial(HOSTS, LAYOUT, seen, limit=60)]


def test_figures_of_each_group_are_in_the_order_of_its_kind_with_its_hosts() -> None:
    seen = trial()
    results = group_results(HOSTS, seen)
    assert [(group.kind, group.ranks, group.hosts) for group in results] == [
        ("tensor", [0, 1], ["nodea"]),
        ("tensor", [2, 3], ["nodeb"]),
        ("data", [0, 2], ["nodea", "nodeb"]),
        ("data", [1, 3], ["nodea", "nodeb"]),
    ]
    assert explained(seen) == [] and judge_groups(results) == []
    assert len(group_results(HOSTS, trial({2: "joined", 0: "joined"}))) == 1  # the others were not measured


@pytest.mark.parametrize("wrong", [False, True])
def test_figures_are_of_the_slowest_rank_and_one_with_a_wrong_sum_spoils_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], wrong: bool
) -> None:
    """Bandwidth is that of a link; ranks 0, 1, 2 and 3 are one group, of which rank 2 is slow, or adds wrongly."""

    def others_too(values: torch.Tensor, **_: object) -> None:
        values.copy_(values.maximum(torch.tensor([2e-4, 0.1, float(wrong)])))

    monkeypatch.setattr(TrialRank, "_reduce", lambda *_, turns, **__: (True, 1e-5))
    monkeypatch.setattr(TrialRank, "_agreed_turns", lambda *_: 1)
    monkeypatch.setattr("torch.distributed.all_reduce", others_too)
    for rank in (0, 1):
        TrialRank(make_order(LAYOUT), rank)._measure("data", [0, 1, 2, 3], None, torch.device("cpu"))
    seen = Trial()
    for line in capsys.readouterr().out.splitlines():
        seen.hear(line)
    (group,) = group_results(HOSTS, seen)
    assert group.seconds == pytest.approx(0.1) and group.latency_seconds == pytest.approx(2e-4)
    assert group.bus_bytes_per_second == pytest.approx(1.5 * LARGE / 0.1) and group.correct is not wrong


def test_a_slow_group_and_a_wrong_sum_are_named_by_their_hosts() -> None:
    slow = [result(), result(), result(hosts=["nodeb", "nodec"], speed=3e8), result(kind="tensor", speed=1e8)]
    assert [(finding.code, finding.status, finding.hosts) for finding in judge_groups(slow)] == [
        ("slow_group", "warning", ["nodeb", "nodec"])
    ]
    wrong = [result(), result(hosts=["nodec"], correct=False)]
    assert [(finding.code, finding.status, finding.hosts) for finding in judge_groups(wrong)] == [
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


def answer() -> HostAnswer:
    """With as much about files as makes its record longer than a line."""
    files = {f"{number:05}": os.urandom(6).hex() for number in range(900)}
    paths = {"model": PathContent(path="/model", kind="folder", files=files)}
    return HostAnswer(machine=machine_record(), master_addresses=[], peer_address=None, paths=paths, output=None)


def test_what_ranks_say_is_found_in_what_launchers_print(capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever stands before it or between its lines; lines that are not whole are not believed."""
    asked = answer()
    for rank in (0, 2):
        TrialRank(make_order(LAYOUT), rank).say(answer=asked)
    lines = capsys.readouterr().out.splitlines()
    half = len(lines) // 2
    assert half > 2 and all(len(line) < 2100 for line in lines)
    mixed = [line for pair in zip(lines[:half], lines[half:], strict=True) for line in pair]
    seen = Trial()
    for line in ["Welcome!", *(f"nodea: {line}" for line in mixed), f"{RANK_MARK}1.0 1/1 nonsense", "", "bye"]:
        seen.hear(line)
    assert [each.answer for said in seen.said.values() for each in said] == [asked, asked]
    assert [host.answer for host in heard_hosts(HOSTS, seen)] == [asked, asked]
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
    monkeypatch.setattr("megatron_tiedlora.cluster.doctor.trial.start_ranks", lambda *_: seen)
    monkeypatch.setattr("megatron_tiedlora.cluster.doctor.trial.compare_hosts", lambda *_, **__: [])
    return examine(DoctorSettings(), {}, lambda line: None)


def test_a_single_rank_that_fails_after_its_probe_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    told, fails = Said(rank=0, answer=answer()), Said(rank=0, failed="CUDA error: out of memory")
    bad = examined(monkeypatch, Trial({0: [told, *news_of(0, until="started"), fails]}, status=1))
    assert bad.verdict == "not ready" and "CUDA error: out of memory" in bad.findings[0].message
    good = examined(monkeypatch, Trial({0: [told, *news_of(0)]}, status=0))
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
    more = {"groups": group_results(HOSTS, trial()), "skipped": None, "seconds": {"ranks": 1.235}}
    return DoctorReport.of(findings, route="ssh", launcher="deepspeed", layout=LAYOUT, hosts=HOSTS, **more)


def test_the_verdict_counts_errors_and_puts_them_first() -> None:
    warning = Finding(status="warning", code="clock", hosts=["nodeb"], value="nodeb: late", fix="set it")
    error = Finding(status="error", code="no_answer", hosts=["nodeb"], value="nodeb: gone", fix="look")
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
    assert names["Finding"] == {"status", "value", "expected", "fix", "code", "hosts"}
    assert names["HostReport"] == {"name", "slots", "first_rank", "answer", "clock"}
    assert names["GroupResult"] == {
        "kind", "ranks", "hosts", "num_bytes", "seconds", "bus_bytes_per_second", "latency_seconds", "correct",
    }  # fmt: skip
    assert names["ParallelConfig"] == {
        "num_ranks", "tensor_parallel", "pipeline_parallel", "data_parallel", "master_host", "master_port", "backend",
    }  # fmt: skip
