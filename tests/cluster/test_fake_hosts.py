"""The harness of fake hosts: separate in names, processes, network and files, and nothing is left behind.

That hosts die, links break and Slurm starts jobs when they are told to, the tests on them see.
"""

from __future__ import annotations

import itertools
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Set
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
from support.fake_hosts import FakeCluster, wait_until
from support.host_needs import needs, why_not

pytestmark = [pytest.mark.distributed, needs("hosts"), pytest.mark.timeout(60)]
NAMES = ("nodea", "nodeb")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeCluster]:
    with FakeCluster(tmp_path_factory.mktemp("cluster")) as cluster:
        if not why_not("ssh"):
            cluster.start_sshd()
        yield cluster


def namespaces(process: int) -> set[str]:
    """The namespaces of a process, as the machine numbers them; none where it is gone."""
    with suppress(OSError):
        return {os.readlink(f"/proc/{process}/ns/{kind}") for kind in ("net", "uts", "ipc", "pid", "mnt")}
    return set()


def started_by(process: int) -> set[psutil.Process]:
    """All that a process has started; what has lost its parent is not among it."""
    return set(psutil.Process(process).children(recursive=True))


@dataclass(frozen=True)
class Machine:
    """The machine without a cluster, to which it must return."""

    children: set[psutil.Process] = field(default_factory=lambda: started_by(os.getpid()))
    mounts: str = field(default_factory=lambda: Path("/proc/self/mounts").read_text())
    links: str = field(default_factory=lambda: subprocess.check_output(["ip", "-br", "addr"], text=True))

    def made_by(self, process: int) -> set[str]:
        """The namespaces that a test process has made, by the processes in them."""
        found = {space for child in started_by(process) - self.children for space in namespaces(child.pid)}
        return found - namespaces(process)

    def assert_as_before(self, made: Set[str] = frozenset()) -> None:
        """No process of ours runs that did not run before, none at all lives in a namespace of `made`."""

        def left() -> list[psutil.Process]:
            inside = [process for process in psutil.process_iter() if made & namespaces(process.pid)]
            return inside + list(started_by(os.getpid()) - self.children)

        wait_until(lambda: not left(), left, limit=5)
        assert (self.mounts, self.links) == (Machine().mounts, Machine().links)


def test_hosts_have_names_networks_and_processes_of_their_own(cluster: FakeCluster) -> None:
    for name, other in (NAMES, NAMES[::-1]):
        host = cluster.hosts[name]
        assert host.run(["hostname"]).strip() == name
        assert host.run(["hostname", "-I"]).split() == [host.address]
        assert host.reaches(other) and host.reaches(name) and not host.reaches("192.0.2.1")
        assert host.run(["bash", "-c", "ls /sys/class/net"]).split() == ["eth0", "lo"]
    running = cluster.hosts["nodea"].start(["sleep", "60"])
    assert [process.pid for process in cluster.hosts["nodea"].jobs()] == [running.pid]
    wait_until(lambda: cluster.jobs() == {"nodea": ["sleep 60"]}, cluster.jobs)
    assert "sleep" not in cluster.hosts["nodeb"].run(["ps", "ax"])
    running.signal(signal.SIGTERM)
    assert running.wait(5) == -signal.SIGTERM and cluster.jobs() == {}


def test_python_is_that_of_the_test_and_files_are_shared_but_for_tmp(cluster: FakeCluster, tmp_path: Path) -> None:
    code = "import megatron_tiedlora, sys; print(sys.executable, megatron_tiedlora.__file__)"
    import megatron_tiedlora

    found = cluster.hosts["nodeb"].run([sys.executable, "-c", code]).split()
    assert found == [sys.executable, megatron_tiedlora.__file__]
    (cluster.folder / "shared").write_text("seen")
    mine = Path(tempfile.gettempdir(), "fake-hosts-mine"), Path("/run/mine"), Path("/dev/shm/mine")
    for name in NAMES:
        host = cluster.hosts[name]
        assert host.run(["cat", cluster.folder / "shared"]) == "seen"
        host.run(["bash", "-c", f"set -o noclobber; for f in {' '.join(map(str, mine))}; do echo {name} > $f; done"])
    assert not any(path.exists() for path in mine)


def test_a_private_mount_is_one_hosts_and_can_be_full(cluster: FakeCluster) -> None:
    a, b = (cluster.hosts[name] for name in NAMES)
    folder = cluster.folder / "private"
    folder.mkdir()
    (folder / "file").write_text("old")
    b.mount_private(folder, size="64k")
    fill = ["dd", "if=/dev/zero", f"of={folder / 'file'}", "bs=32k", "count=4"]
    assert "No space left on device" in b.run(fill, check=False)
    assert (folder / "file").read_text() == a.run(["cat", folder / "file"]) == "old"


def test_exit_statuses_outputs_and_hangs(cluster: FakeCluster) -> None:
    host = cluster.first
    done = host.start(["bash", "-c", 'echo "$WORD $PWD"; exit 7'], env={"WORD": "here"}, cwd=cluster.folder)
    assert done.wait(5) == 7 and done.output() == f"here {cluster.folder}\n"
    killed = host.start(["sleep", "60"])
    killed.signal(signal.SIGKILL)
    assert killed.wait(5) == -signal.SIGKILL
    with pytest.raises(AssertionError, match="a hang after"):
        host.start(["sleep", "60"]).wait(0.3)
    with pytest.raises(AssertionError, match="ended with 1"):
        host.run(["false"])
    assert cluster.jobs() == {}


def test_closing_leaves_nothing(tmp_path: Path) -> None:
    machine = Machine()
    with FakeCluster(tmp_path / "cluster") as cluster:
        if not why_not("ssh"):
            cluster.start_sshd()
        cluster.first.start(["sleep", "60"])
        made = machine.made_by(os.getpid())
        assert len(made) == 11  # five for each host, and the network of the switch
    machine.assert_as_before(made)
    cluster.close()


@pytest.mark.parametrize("broken", ["plug_in", "shared_below_tmp"])
def test_a_start_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    """The second host cannot be made."""
    machine, made, calls, works = Machine(), set(), itertools.count(1), getattr(FakeCluster, broken)

    def fail(*arguments: object) -> object:
        made.update(machine.made_by(os.getpid()))
        if next(calls) == 2:
            raise OSError("no more")
        return works(*arguments)

    monkeypatch.setattr(FakeCluster, broken, fail)
    with pytest.raises(OSError, match="no more"):
        FakeCluster(tmp_path / "cluster").__enter__()
    assert len(made) >= 6
    machine.assert_as_before(made)


def test_a_host_that_does_not_start_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    machine = Machine()
    missing = Path(tempfile.gettempdir(), "no", "such", "folder")
    impossible = FakeCluster(tmp_path / "cluster", shared=[missing])
    with pytest.raises(AssertionError, match=rf"nodea does not start: .*{re.escape(str(missing))}"):
        impossible.__enter__()
    machine.assert_as_before()


def test_a_test_process_that_is_killed_leaves_nothing(tmp_path: Path) -> None:
    machine = Machine()
    code = (
        "import sys, time, pathlib\nfrom support.fake_hosts import FakeCluster\n"
        "with FakeCluster(pathlib.Path(sys.argv[1])) as cluster:\n"
        "    cluster.first.start(['sleep', '60'])\n    print(list(cluster.jobs()), flush=True)\n    time.sleep(60)"
    )
    path = os.pathsep.join(sys.path)
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "cluster")],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": path},
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == b"['nodea']\n"
        made = machine.made_by(process.pid)
    finally:
        process.kill()
        process.wait(10)
    assert len(made) == 11
    machine.assert_as_before(made)


def test_two_clusters_do_not_see_each_other(cluster: FakeCluster, tmp_path: Path) -> None:
    with FakeCluster(tmp_path / "other", names=("nodea", "nodec")) as other:
        assert other.first.address == cluster.first.address
        other.first.start(["sleep", "60"])
        assert (list(cluster.jobs()), list(other.jobs())) == ([], ["nodea"])
        other.hosts["nodec"].kill()
        assert not other.first.reaches("198.18.0.2", limit=1) and cluster.first.reaches("198.18.0.2")
    assert cluster.first.reaches("nodeb")
