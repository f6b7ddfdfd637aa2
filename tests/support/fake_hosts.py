"""Several hosts, for real, on one machine: each a set of namespaces with its own name, network, processes and daemons.

A host has its own net, uts, pid, ipc and mount namespace, and in it its own hosts file, /dev/shm, /run, /tmp, /etc/ssh
and sshd. Everything else of the file system is shared, as on a cluster with a network file system; `mount_private`
takes a path out of that. Hosts are joined by a bridge that lies in a namespace of its own. No namespace has a name and
no interface of the machine itself is touched: all of it is gone when the first processes of the namespaces are gone,
and these end when the test process ends, however it ends. So clusters do not see each other, and their addresses may
be the same.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from support.folders import ROOT
from support.host_needs import UNSHARE, host_environment, program_path, why_not

BOOT_LIMIT = 20.0  # seconds; a host is up in a tenth of one
NETWORK = "198.18.0"  # set aside for tests of networks (RFC 2544), so it is no address of the machine's own

# The first process of a host: $1 is its name, $2 the folder of its own files for /etc, the rest is kept of /tmp.
# It ends, and with it the host, when the test process does: then its input is closed.
FIRST_PROCESS = """
set -e
hostname "$1"; etc=$2; shift 2
mount -t tmpfs -o mode=755 tmpfs /run
mkdir /run/sshd /run/munge /run/keep
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
mount -t sysfs sysfs /sys
mount --bind "$etc/hosts" /etc/hosts
for part in ssh slurm; do if [ -d "/etc/$part" ]; then mount --bind "$etc/$part" "/etc/$part"; fi; done
if [ -d ~/.ssh ]; then mount -t tmpfs -o mode=700 tmpfs ~/.ssh; fi
for path; do mkdir "/run/keep/$((++count))"; mount --bind "$path" "/run/keep/$count"; done
mount -t tmpfs -o mode=1777 tmpfs /tmp
count=0
for path; do mkdir -p "$path"; mount --move "/run/keep/$((++count))" "$path"; done
echo up
while read -r _; do :; done
"""

SSHD_CONFIG = """
HostKey /etc/ssh/host_key
AuthorizedKeysFile /etc/ssh/authorized_keys
StrictModes no
PermitRootLogin yes
PasswordAuthentication no
UsePAM no
UseDNS no
MaxStartups 100
LoginGraceTime 30
"""

SSH_CONFIG = """
Host *
    IdentityFile /etc/ssh/user_key
    StrictHostKeyChecking no
    UserKnownHostsFile /dev/null
    LogLevel ERROR
    BatchMode yes
    ConnectTimeout 5
"""


# Commands inside hosts, seen from outside --------------------------------------------------------------------------


class Started:
    """A command that was started inside a host; its output goes to the file `out`."""

    def __init__(self, host: str, command: list[str], process: subprocess.Popen[bytes], out: Path) -> None:
        self.host, self.command, self.out, self._process = host, command, out, process

    def poll(self) -> int | None:
        """The exit status, minus the signal that killed it; None while it runs."""
        return self._process.poll()

    def wait(self, limit: float = 60.0) -> int:
        """The exit status; a command that runs longer than `limit` seconds is killed and fails the test."""
        try:
            return self._process.wait(limit)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(
                f"a hang after {limit:.0f} s: {self.host}: {self.command}\n{self.output()[-4000:]}"
            ) from None

    @property
    def pid(self) -> int:
        """The command's process, as the machine numbers it."""
        return psutil.Process(self._process.pid).children()[0].pid

    def signal(self, number: int) -> None:
        """Send a signal to the command itself."""
        os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL to the command itself, if it still runs."""
        if self.poll() is None:
            with suppress(ProcessLookupError, psutil.NoSuchProcess):
                self.signal(signal.SIGKILL)
            self._process.wait(10)

    def output(self) -> str:
        """What it has printed so far, errors included."""
        return self.out.read_text(errors="replace")


def wait_until(
    condition: Callable[[], object], what: str | Callable[[], object], *, limit: float = BOOT_LIMIT, pause: float = 0.05
) -> float:
    """Wait until `condition()`; returns the seconds. Failing to come true in time fails the test."""
    started = time.monotonic()
    while not condition():
        if time.monotonic() - started > limit:
            raise AssertionError(f"waited {limit:.0f} s for {what if isinstance(what, str) else what()}")
        time.sleep(pause)
    return time.monotonic() - started


# Hosts -----------------------------------------------------------------------------------------------------------


class FakeHost:
    """One host of a cluster."""

    def __init__(self, cluster: FakeCluster, name: str, number: int) -> None:
        self.cluster, self.name, self.number = cluster, name, number
        self.address = f"{NETWORK}.{number}"
        self.folder = cluster.folder / name
        self._boots = self._starts = 0
        self._holder: subprocess.Popen[bytes] | None = None
        self._first = 0  # the first process of the namespaces, as the machine numbers it
        self._own: set[psutil.Process] = set()

    # Life

    def boot(self) -> None:
        """Make the namespaces and plug the host in; also after `kill`."""
        self._boots += 1
        kept = self.cluster.shared_below_tmp()
        self._holder = subprocess.Popen(
            [*UNSHARE, "bash", "-c", FIRST_PROCESS, "bash", self.name, str(self.folder / "etc"), *map(str, kept)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=host_environment(),
            start_new_session=True,
        )
        assert self._holder.stdout is not None
        said = self._holder.stdout.readline()  # an end of file where it fails
        if said != b"up\n":
            raise AssertionError(f"{self.name} does not start: {(said + self._holder.stdout.read()).decode()}")
        first = psutil.Process(self._holder.pid).children()[0].pid
        self.cluster.plug_in(self.port, first)
        self._first = first
        _ip(self._first, f"link set lo up\naddr add {self.address}/24 dev eth0\nlink set eth0 up\n")
        self.keep_running()

    def kill(self) -> None:
        """The whole host dies at once, as if its power were cut: SIGKILL to the first process of its namespaces.

        Its link goes first. The kernel would else close the connections of the dead and answer for the host until it
        gets to the end of the namespaces, seconds later on a busy machine, which a host without power does not.
        """
        if self._holder is not None:
            with suppress(ProcessLookupError):
                if self._first:
                    with suppress(AssertionError):  # whoever held the other end may be gone
                        self.cut_link()
                    os.kill(self._first, signal.SIGKILL)
                else:  # it never came up
                    self._holder.kill()
            self._holder.wait(BOOT_LIMIT)
            for stream in (self._holder.stdin, self._holder.stdout):
                assert stream is not None
                stream.close()
            self._holder, self._first = None, 0

    @property
    def is_up(self) -> bool:
        """Whether the host lives."""
        return self._holder is not None

    def start_sshd(self) -> None:
        """Start sshd and wait until it answers."""
        program = program_path("sshd")
        assert program is not None
        self.run([program, "-E", str(self.folder / "sshd.log")])
        wait_until(lambda: self.reaches(self.name, 22), f"sshd of {self.name}")
        self.keep_running()

    # Commands

    def start(
        self,
        command: Sequence[str | Path],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        out: Path | None = None,
    ) -> Started:
        """Start a command inside the host.

        Args:
            env: beyond `host_environment`.
            cwd: the host's folder where nothing is named; a path as the host sees it.
            out: the file for what it prints; one in the host's folder where nothing is named.
        """
        assert self._first, f"{self.name} is down"
        self._starts += 1
        out = out or self.folder / f"{self._starts}.{Path(command[0]).name}.out"
        words = [str(word) for word in command]
        enter = ["nsenter", "-t", str(self._first), "-n", "-u", "-i", "-p", "-m", "env", "-C", str(cwd or self.folder)]
        with out.open("wb") as stream:
            process = subprocess.Popen(
                [*enter, *words],
                env={**host_environment(), **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        started = Started(self.name, words, process, out)
        self.cluster.started.append(started)
        wait_until(lambda: started.poll() is not None or psutil.Process(process.pid).children(), "a start", pause=0.002)
        return started

    def run(
        self,
        command: Sequence[str | Path],
        *,
        limit: float = 30.0,
        check: bool = True,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> str:
        """Run a command inside the host and return what it prints; with `check` it must end with status 0."""
        started = self.start(command, env=env, cwd=cwd)
        status = started.wait(limit)
        assert not check or status == 0, f"{self.name}: {started.command} ended with {status}\n{started.output()}"
        return started.output()

    def reaches(self, other: str, port: int | None = None, *, limit: float = 2.0) -> bool:
        """Whether `other` answers within `limit` seconds: at that TCP port, or at all, if only by refusing."""
        knock = f"exec 3<>/dev/tcp/{other}/{port or 9}"
        answer = self.run(["timeout", str(limit), "bash", "-c", f"{knock} && echo open"], check=False)
        return "open" in answer or (port is None and "refused" in answer)

    # Processes

    def processes(self) -> list[psutil.Process]:
        """Every process inside the host but the first one, which is the host."""
        if not self._first:
            return []
        here = os.readlink(f"/proc/{self._first}/ns/pid")
        found = []
        for process in psutil.process_iter():
            with suppress(OSError, psutil.NoSuchProcess):
                inside = os.readlink(f"/proc/{process.pid}/ns/pid") == here
                if inside and process.pid != self._first and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def keep_running(self) -> None:
        """What runs now is the host's own: its daemons."""
        self._own = set(self.processes())

    def jobs(self) -> list[psutil.Process]:
        """Every process that is not one of the host's own daemons, sessions of sshd included."""
        return [process for process in self.processes() if process not in self._own]

    # Network and files

    @property
    def port(self) -> str:
        """The host's port of the switch; a new one at each boot, as the kernel takes its time to end the old one."""
        return f"port{self.number}-{self._boots}"

    def cut_link(self) -> None:
        """Pull the cable: nothing comes or goes, and nobody is told."""
        self.cluster.switch_ip(f"link set {self.port} down\n")

    def restore_link(self) -> None:
        """Plug it in again."""
        self.cluster.switch_ip(f"link set {self.port} up\n")

    def outside(self, path: Path) -> Path:
        """Where a path of this host is found from outside, with its own file systems."""
        return Path(f"/proc/{self._first}/root{path}")

    def mount_private(self, path: Path, *, size: str = "64m") -> None:
        """Lay an empty file system of its own over `path`, which only this host sees; `size` as tmpfs reads it."""
        self.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", path])


# A cluster ---------------------------------------------------------------------------------------------------------


class FakeCluster:
    """Hosts that are joined by a bridge: `with FakeCluster(folder) as cluster`.

    Args:
        folder: for keys, configuration, and what commands print; all hosts see it.
        names: of the hosts.
        shared: further paths below /tmp that all hosts see, as they see this Python; the rest is each host's own.
    """

    def __init__(self, folder: Path, names: Sequence[str] = ("nodea", "nodeb"), *, shared: Sequence[Path] = ()) -> None:
        self.folder = folder.resolve()
        self.started: list[Started] = []
        self.hosts = {name: FakeHost(self, name, number) for number, name in enumerate(names, start=1)}
        python = [sys.prefix, sys.base_prefix, *host_environment()["PYTHONPATH"].split(":")]
        self._shared = [self.folder, *shared, ROOT, *map(Path, python)]
        self._switch: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> FakeCluster:
        try:
            self._write_files()
            self._start_switch()
            for host in self.hosts.values():
                host.boot()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End everything, however far the start got; may be called twice."""
        for host in self.hosts.values():
            host.kill()
        for started in self.started:
            started.wait(BOOT_LIMIT)  # their commands died with the host
        if self._switch is not None:
            self._switch.kill()
            self._switch.wait(BOOT_LIMIT)
            self._switch = None

    @property
    def first(self) -> FakeHost:
        """The host that jobs are started from."""
        return next(iter(self.hosts.values()))

    def start_sshd(self) -> None:
        """Start sshd on every host."""
        for host in self.hosts.values():
            host.start_sshd()

    def hostfile(self, slots: int = 1) -> Path:
        """A hostfile of all hosts, as DeepSpeed reads it; OpenMPI reads it, too."""
        path = self.folder / f"hostfile{slots}"
        path.write_text("".join(f"{name} slots={slots}\n" for name in self.hosts))
        return path

    def jobs(self) -> dict[str, list[str]]:
        """The command lines, by host, of what is not a host's own daemon; hosts without any are left out."""
        found: dict[str, list[str]] = {}
        for name, host in self.hosts.items():
            for process in host.jobs():
                with suppress(psutil.NoSuchProcess):
                    found.setdefault(name, []).append(" ".join(process.cmdline()) or process.name())
        return found

    def shared_below_tmp(self) -> list[Path]:
        """Paths that the hosts share and that a /tmp of their own would hide; none of them lies in another."""
        paths = {path.absolute() for path in self._shared} | {path.resolve() for path in self._shared}
        below = sorted(path for path in paths if path.is_relative_to("/tmp") and path != Path("/tmp"))
        return [path for path in below if not any(path != other and path.is_relative_to(other) for other in below)]

    def switch_ip(self, lines: str) -> None:
        """Run lines of `ip` where the bridge is."""
        assert self._switch is not None
        _ip(self._switch.pid, lines)

    def plug_in(self, port: str, first_process: int) -> None:
        """Join a host's namespace to the bridge; its end is called eth0."""
        self.switch_ip(
            f"link add name {port} type veth peer name eth0 netns {first_process}\nlink set {port} master bridge up\n"
        )

    def _start_switch(self) -> None:
        # `cat` ends when its input is closed, which the end of the test process does.
        self._switch = subprocess.Popen(
            ["unshare", "--net", "cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True
        )
        here, switch = os.readlink("/proc/self/ns/net"), f"/proc/{self._switch.pid}/ns/net"
        wait_until(lambda: os.readlink(switch) != here, "the switch")
        self.switch_ip("link add bridge type bridge\nlink set bridge up\n")

    def _write_files(self) -> None:
        keys = self.folder / "keys"
        keys.mkdir(parents=True)
        names = "".join(f"{host.address} {name}\n" for name, host in self.hosts.items())
        if not why_not("ssh"):
            for key in ("host_key", "user_key"):
                subprocess.run(
                    ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", keys / key], check=True, timeout=30
                )
        for host in self.hosts.values():
            etc = host.folder / "etc"
            (etc / "slurm").mkdir(parents=True)
            shutil.copytree(keys, etc / "ssh")
            (etc / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
            (etc / "ssh" / "sshd_config").write_text(SSHD_CONFIG)
            (etc / "ssh" / "ssh_config").write_text(SSH_CONFIG)
            if (keys / "user_key.pub").exists():
                shutil.copy(keys / "user_key.pub", etc / "ssh" / "authorized_keys")


def _ip(process: int, lines: str) -> None:
    command = ["nsenter", "-t", str(process), "-n", "ip", "-batch", "-"]
    done = subprocess.run(command, input=lines, text=True, capture_output=True, timeout=BOOT_LIMIT)
    assert done.returncode == 0, f"ip: {done.stdout}{done.stderr}\n{lines}"
