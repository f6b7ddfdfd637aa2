"""What the doctor concludes from what its ranks say, and how it reports it: pure functions over events."""

from __future__ import annotations

import os
from collections.abc import Sequence

import pytest
import torch

from megatron_tiedlora.cluster.doctor import measure
from megatron_tiedlora.cluster.doctor.examine import make_report
from megatron_tiedlora.cluster.doctor.measure import Trial, explain_trial, group_results, judge_groups
from megatron_tiedlora.cluster.doctor.measure_hosts import explain_end
from megatron_tiedlora.cluster.doctor.rank import SMALL_BYTES, TrialRank
from megatron_tiedlora.cluster.doctor.records import (
    DoctorReport,
    Finding,
    GroupResult,
    HostReport,
    ParallelConfig,
    RankEvent,
    TrialOrder,
)
from megatron_tiedlora.cluster.doctor.text import report_text
from megatron_tiedlora.cluster.remote import Done, Transport

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


def test_the_sum_that_ranks_expect() -> None:
    """What is wrong in one place of one rank's part must show."""
    ranks, device = [4, 6, 7], torch.device("cpu")
    order = TrialOrder(layout=LAYOUT, first_rank=0, slots=1, large_bytes=LARGE, timeout=1, seconds=1)
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
    monkeypatch.setattr("megatron_tiedlora.runtime.process_group.uses_gpu", lambda: True)
    met: list[tuple[torch.device, str | None]] = []

    def meet(device: torch.device, _: object) -> None:
        met.append((device, os.environ.get("TORCH_NCCL_RETHROW_CUDA_ERRORS")))
        raise ConnectionError("nobody is there")

    monkeypatch.setattr("megatron_tiedlora.runtime.process_group.meet", meet)
    on_gpus = LAYOUT.model_copy(update={"backend": "nccl"})
    order = TrialOrder(layout=on_gpus, first_rank=0, slots=4, large_bytes=LARGE, timeout=1, seconds=1)
    with pytest.raises(ConnectionError):
        TrialRank(order, 3).run()
    assert met == [(torch.device("cuda", 0), "0")]


def test_a_host_that_was_lost_explains_all_others() -> None:
    lost = trial({2: "joined", 3: "joined"}, failed={0: "closed by peer", 1: "closed by peer"}, unreachable=["nodeb"])
    assert explained(lost) == [("link_lost", ["nodeb"])]
    for until, words in (
        ("", "before its ranks started"),
        ("started", "before its ranks met"),
        ("joined", "all-reduced"),
    ):
        stopped = trial(dict.fromkeys((2, 3), until), unreachable=["nodeb"])
        assert words in explain_trial(HOSTS, LAYOUT, stopped, limit=60)[0].message


def test_ranks_that_do_not_start_meet_or_finish() -> None:
    ended = [Done("nodea", 1, "", "", 9.0), Done("nodeb", 1, "", "ImportError: libfoo", 9.0)]
    silent = trial({0: "started", 1: "started", 2: "", 3: ""}, ended=ended)
    assert explained(silent) == [("not_started", ["nodeb"])]
    assert "ImportError: libfoo" in explain_trial(HOSTS, LAYOUT, silent, limit=60)[0].message
    apart = trial(
        dict.fromkeys(range(4), "started"), failed={2: "timed out after 60000ms", 3: "timed out"}, ended=ended
    )
    assert explained(apart) == [("not_joined", ["nodea", "nodeb"])]
    assert "timed out after 60000ms" in explain_trial(HOSTS, LAYOUT, apart, limit=60)[0].message
    stuck = trial(dict.fromkeys(range(4), "joined"), ended=ended)
    assert explained(stuck) == [("allreduce_failed", ["nodea", "nodeb"])]
    assert "not finished in 60 s" in explain_trial(HOSTS, LAYOUT, stuck, limit=60)[0].message


def test_why_nothing_was_measured() -> None:
    """The time, a rank's own error in front of what others say later, or the last words."""
    assert explain_end(Done("nodea", None, "", "compiling the kernels ...\n", 160.2)) == "not finished in 160 s"
    assert explain_end(Done("nodea", 1, "", "bars\nerror: no such model\nConnection closed\n", 9.0)) == "no such model"
    assert explain_end(Done("nodea", 255, "", "Connection closed\n", 9.0)) == "Connection closed"


def test_a_node_that_slurm_misses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm ends the whole allocation with it, so that nothing starts on the other nodes either."""

    def nothing_starts(hosts: Sequence[str], *_: object, **__: object) -> dict[str, Done]:
        return {host: Done(host, 1, "", "", 0.1) for host in hosts}

    monkeypatch.setattr(measure, "run_on_hosts", nothing_starts)
    monkeypatch.setattr(measure, "_missed_by_slurm", lambda names: names[1:])
    assert measure._unreachable(["nodea", "nodeb"], Transport("srun"), []) == ["nodeb"]
    assert measure._unreachable(["nodea", "nodeb"], Transport("ssh"), []) == ["nodea", "nodeb"]


def report(findings: Sequence[Finding]) -> DoctorReport:
    results = group_results(HOSTS, LAYOUT, trial(), large_bytes=LARGE)
    return make_report("ssh", LAYOUT, HOSTS, results, None, findings, {"ask": 1.23456})


def test_the_verdict_counts_errors_and_puts_them_first() -> None:
    warning = Finding(level="warning", code="clock", hosts=["nodeb"], message="nodeb: late", fix="set it")
    error = Finding(level="error", code="host_down", hosts=["nodeb"], message="nodeb: gone", fix="look")
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
        "verdict", "num_errors", "num_warnings", "route", "layout", "hosts", "groups", "skipped", "findings", "seconds",
        "machine",
    }  # fmt: skip
    assert names["Finding"] == {"level", "code", "hosts", "message", "fix"}
    assert names["HostReport"] == {"name", "slots", "first_rank", "probe", "clock", "seconds"}
    assert names["GroupResult"] == {
        "kind", "ranks", "hosts", "num_bytes", "seconds", "bus_bytes_per_second", "latency_seconds", "correct",
    }  # fmt: skip
    assert names["ParallelConfig"] == {
        "num_ranks", "tensor_parallel", "pipeline_parallel", "data_parallel", "master_host", "master_port", "backend",
    }  # fmt: skip
