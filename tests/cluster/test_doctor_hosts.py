"""launch/doctor.py on fake hosts over real ssh: a healthy pair, and each fault by the name of its host."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.cluster_routes import MPI_ENVIRONMENT
from support.fake_hosts import FakeCluster, FakeHost, Started, wait_until
from support.folders import ROOT
from support.host_needs import needs
from support.slurm_cluster import SlurmCluster

pytestmark = [
    pytest.mark.distributed,
    needs("pdsh"),
    pytest.mark.timeout(260),
    pytest.mark.cpu_seconds(40, reason="a job under deepspeed on two hosts, whose processes import it themselves"),
]
DOCTOR = ROOT / "launch" / "doctor.py"
PORT = 29517
RANKS_MODULE = "megatron_tiedlora.cluster.doctor"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeCluster]:
    with FakeCluster(tmp_path_factory.mktemp("cluster")) as cluster:
        cluster.start_sshd()
        yield cluster


class Examined:
    """A doctor that was started on the first host, and its report."""

    def __init__(self, cluster: FakeCluster, *, before: Sequence[str] = (), **settings: Any) -> None:
        self._report = cluster.folder / "report.json"
        self._report.unlink(missing_ok=True)
        given = {"master_port": PORT, "json": self._report, "allreduce_mb": 1, "timeout_seconds": 30, **settings}
        flags = [f"--{name}={value}" for name, value in given.items()]
        self.started: Started = cluster.first.start([*before, sys.executable, DOCTOR, *flags], env=MPI_ENVIRONMENT)

    def wait(self, limit: float = 150.0) -> tuple[int, dict[str, Any]]:
        """(exit status, report)."""
        status = self.started.wait(limit)
        assert self._report.exists(), self.started.output()
        return status, json.loads(self._report.read_text())

    def wait_for(self, line: str) -> None:
        """Wait until the doctor has come so far."""
        wait_until(
            lambda: line in self.started.output() or self.started.poll() is not None, self.started.output, limit=120
        )
        assert line in self.started.output(), self.started.output()


def found(report: dict[str, Any], level: str = "error") -> list[tuple[str, list[str]]]:
    """(code, hosts) of the findings of a level."""
    return [(finding["code"], finding["hosts"]) for finding in report["findings"] if finding["status"] == level]


def doctors_on(host: FakeHost) -> list[str]:
    """Command lines of the doctor's processes on a host."""
    lines = []
    for process in host.jobs():
        with suppress(psutil.NoSuchProcess):
            lines.append(" ".join(process.cmdline()))
    return [line for line in lines if RANKS_MODULE in line]


def assert_nothing_left(cluster: FakeCluster, *, limit: float = 10.0) -> None:
    """Neither processes, after `limit` seconds, nor the file that shows whether a folder is shared."""
    wait_until(lambda: not cluster.jobs(), cluster.jobs, limit=limit)
    assert not list(cluster.folder.rglob(".doctor-*"))


BOTH = ["nodea", "nodeb"]
LAYOUTS = (
    pytest.param(1, {"pipeline_parallel": 2}, [("pipeline", [0, 1], BOTH)], id="1x2"),
    pytest.param(
        2,
        {"tensor_parallel": 2},
        [("tensor", [0, 1], ["nodea"]), ("tensor", [2, 3], ["nodeb"]), ("data", [0, 2], BOTH), ("data", [1, 3], BOTH)],
        id="2x2",
        marks=[pytest.mark.slow, pytest.mark.timeout(400)],
    ),
)


@pytest.mark.parametrize(("slots", "layout", "groups"), LAYOUTS)
def test_a_healthy_pair_is_ready(
    cluster: FakeCluster,
    slots: int,
    layout: dict[str, int],
    groups: list[tuple[str, list[int], list[str]]],
) -> None:
    runs = cluster.folder / "new" / "runs"
    # Both hosts import torch at once, which takes half a minute where other tests run beside them.
    patient: dict[str, Any] = {"timeout_seconds": 80, **layout}
    doctor = Examined(cluster, hostfile=cluster.hostfile(slots), output_dir=runs, **patient)
    status, report = doctor.wait(200.0 if slots == 1 else 300.0)
    text = doctor.started.output()
    assert (status, report["verdict"], report["findings"]) == (0, "ready", []), text
    assert f"verdict: ready, 2 hosts, {2 * slots} ranks" in text
    for host, row in zip(cluster.hosts.values(), report["hosts"], strict=True):
        answer = row["answer"]
        assert (row["name"], answer["machine"]["host"]) == (host.name, host.name)
        assert any(host.address in addresses for addresses in answer["machine"]["interfaces"].values())
        assert abs(row["clock"]["skew"]) <= row["clock"]["margin"] + 0.01  # one machine has one clock
    assert [(group["kind"], group["ranks"], group["hosts"]) for group in report["groups"]] == groups
    for group in report["groups"]:
        assert group["correct"] and group["bus_bytes_per_second"] == pytest.approx(1e6 / group["seconds"])
    assert not runs.parent.exists()
    assert_nothing_left(cluster)


@pytest.mark.slow
@needs("openmpi")
@pytest.mark.parametrize(("launcher", "own"), [("deepspeed", {"launcher_args": "--launcher=openmpi"}), ("mpirun", {})])
def test_by_the_launcher_that_the_job_will_have(cluster: FakeCluster, launcher: str, own: dict[str, str]) -> None:
    doctor = Examined(cluster, hostfile=cluster.hostfile(), launcher=launcher, timeout_seconds=80, **own)
    status, report = doctor.wait(200.0)
    assert (status, report["launcher"], report["findings"]) == (0, launcher, []), doctor.started.output()
    assert [row["answer"]["machine"]["host"] for row in report["hosts"]] == BOTH
    assert [group["hosts"] for group in report["groups"]] == [BOTH]
    assert_nothing_left(cluster)


@contextmanager
def other_metadata(host: FakeHost, package: str, version: str) -> Iterator[None]:
    """A host where a package says that it is another version."""
    files = distribution(package).files
    assert files is not None
    place = next(Path(str(file.locate())) for file in files if file.name == "METADATA").resolve()
    mine = host.folder / "METADATA"
    lines = place.read_text().splitlines()
    mine.write_text("\n".join(f"Version: {version}" if line.startswith("Version: ") else line for line in lines))
    host.run(["mount", "--bind", mine, place])
    try:
        yield
    finally:
        host.run(["umount", place])


@contextmanager
def private(host: FakeHost, *folders: Path) -> Iterator[None]:
    """A host that has an empty file system of its own in the place of folders that the others share."""
    for folder in folders:
        host.mount_private(folder, size="2g")  # what is below one GiB is warned of
    try:
        yield
    finally:
        for folder in folders:
            host.run(["umount", folder])


def test_a_version_and_a_folder_that_is_not_shared_are_each_named(cluster: FakeCluster) -> None:
    second, runs = cluster.hosts["nodeb"], cluster.folder / "runs"
    runs.mkdir()
    with private(second, runs), other_metadata(second, "deepspeed", "0.19.7"):
        status, report = Examined(cluster, hostfile=cluster.hostfile(), output_dir=runs).wait()
    messages = {finding["code"]: (finding["value"], finding["expected"]) for finding in report["findings"]}
    assert (status, report["verdict"]) == (1, "not ready")
    assert found(report) == [("version", ["nodeb"])]
    assert messages["version"] == ("deepspeed is 0.19.7 on nodeb", f"{distribution('deepspeed').version} on nodea")
    assert found(report, "warning") == [("output_not_shared", ["nodeb"])]
    assert "1 error" in report["skipped"]
    assert_nothing_left(cluster)


@pytest.mark.parametrize(
    ("moment", "code"),
    [("starting 2 ranks", "no_answer"), pytest.param("all ranks have met", "allreduce_failed", marks=pytest.mark.slow)],
    ids=["connect", "reduce"],
)
def test_a_link_that_is_cut_is_named(cluster: FakeCluster, moment: str, code: str) -> None:
    first, second = cluster.hosts.values()
    doctor = Examined(cluster, hostfile=cluster.hostfile(), allreduce_mb=200, timeout_seconds=45)
    doctor.wait_for(moment)
    second.cut_link()
    try:
        status, report = doctor.wait(limit=150)
        wait_until(lambda: not doctors_on(first), lambda: doctors_on(first), limit=5)
        # The far side hears nothing of all this: its ranks end by their own limits.
        wait_until(lambda: not doctors_on(second), lambda: doctors_on(second), limit=95)
    finally:
        second.restore_link()
    (finding,) = report["findings"]
    assert (status, finding["code"]) == (1, code) and "nodeb" in finding["hosts"], doctor.started.output()
    # A login that was under way when the link was cut is given up by sshd after its LoginGraceTime.
    assert_nothing_left(cluster, limit=60)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_doctor_that_is_stopped_ends_its_launcher_and_ranks_end_by_their_limit(
    cluster: FakeCluster, number: int
) -> None:
    doctor = Examined(cluster, hostfile=cluster.hostfile(), allreduce_mb=200, timeout_seconds=30)
    doctor.wait_for("all ranks have met")
    for process in cluster.hosts["nodeb"].jobs():
        if f"{RANKS_MODULE}_rank" in " ".join(process.cmdline()[:4]):
            process.suspend()  # so no rank comes to an end by itself
    doctor.started.signal(number)
    assert doctor.started.wait(20) != 0
    wait_until(lambda: not any("pdsh" in line for lines in cluster.jobs().values() for line in lines), cluster.jobs)
    for process in cluster.hosts["nodeb"].jobs():
        process.resume()
    assert_nothing_left(cluster, limit=100)


def test_a_host_that_is_down_is_named(tmp_path: Path) -> None:
    with FakeCluster(tmp_path) as cluster:
        cluster.start_sshd()
        cluster.hosts["nodeb"].kill()
        doctor = Examined(cluster, hostfile=cluster.hostfile())
        status, report = doctor.wait(limit=150)
        assert (status, found(report)) == (1, [("no_answer", ["nodeb"])])
        assert "verdict: not ready: 1 error" in doctor.started.output()
        assert report["hosts"][1]["answer"] is None and report["groups"] == []
        assert_nothing_left(cluster)


@pytest.mark.slow
@needs("slurm")
def test_an_allocation_needs_no_ssh(tmp_path: Path) -> None:
    with FakeCluster(tmp_path) as cluster, SlurmCluster(cluster):
        allocate = ["salloc", "--quiet", "--nodes=2", "--ntasks-per-node=2"]
        doctor = Examined(cluster, before=allocate, output_dir=tmp_path / "runs", tensor_parallel=2)
        status, report = doctor.wait()
        assert (status, report["route"], report["findings"]) == (0, "srun", []), doctor.started.output()
        assert [(row["name"], row["slots"]) for row in report["hosts"]] == [("nodea", 2), ("nodeb", 2)]
        assert {group["kind"]: group["hosts"] for group in report["groups"]} == {"tensor": ["nodeb"], "data": BOTH}
        assert_nothing_left(cluster)
