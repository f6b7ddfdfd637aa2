"""A real Slurm on fake hosts: munged and slurmd on each, slurmctld on the first."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from support.fake_hosts import FakeCluster, wait_until
from support.host_needs import program_path

SLURM_CONF = """
ClusterName=fake
SlurmctldHost={first}
SlurmUser=root
AuthType=auth/munge
AuthInfo=cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir=/run/slurmd-%n
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmctldDebug=info
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SwitchType=switch/none
MpiDefault=none
SlurmdParameters=config_overrides
PropagateResourceLimits=NONE
ReturnToService=2
SlurmdTimeout=45
KillWait={kill_wait}
MessageTimeout=5
SchedulerParameters=sched_interval=1,batch_sched_delay=0
JobRequeue=0
NodeName={names} CPUs={cpus} State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


class SlurmCluster:
    """Slurm on all hosts of a cluster, ready when every node is idle: `with SlurmCluster(cluster)`.

    Args:
        kill_wait: seconds between SIGTERM and SIGKILL when a job is cancelled or its time is over.
        cpus: of each node.
    """

    def __init__(self, cluster: FakeCluster, *, kill_wait: int = 30, cpus: int = 2) -> None:
        self.cluster, self.folder = cluster, cluster.folder / "slurm"
        self._values = {"kill_wait": kill_wait, "cpus": cpus}

    def __enter__(self) -> SlurmCluster:
        (self.folder / "state").mkdir(parents=True)
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        names = ",".join(self.cluster.hosts)
        text = SLURM_CONF.format(first=self.cluster.first.name, folder=self.folder, names=names, **self._values)
        for name, host in self.cluster.hosts.items():
            etc = host.folder / "etc" / "slurm"
            (etc / "slurm.conf").write_text(text)
            (etc / "cgroup.conf").write_text("CgroupPlugin=disabled\n")
            self.start_node(name)
        self.cluster.first.run([_program("slurmctld")])
        wait_until(self.is_idle, self.logs)
        self.cluster.first.keep_running()
        return self

    def __exit__(self, *_: object) -> None:
        """The daemons end with their hosts."""

    def start_node(self, name: str) -> None:
        """Start munged and slurmd on a host; also after it has been booted again."""
        host, log = self.cluster.hosts[name], self.folder / f"munged-{name}.log"
        files = ["--pid-file=/run/munge/munged.pid", "--seed-file=/run/munge/seed", f"--log-file={log}"]
        host.run([_program("munged"), "--force", f"--key-file={self.folder / 'munge.key'}", *files])
        host.run([_program("slurmd"), "-N", name])
        wait_until(host.outside(Path("/run/slurmd.pid")).exists, self.logs)
        host.keep_running()

    def is_idle(self) -> bool:
        """Whether every node waits for work."""
        states = self.cluster.first.run(["sinfo", "-h", "-N", "-o", "%t"], check=False).split()
        return states == ["idle"] * len(self.cluster.hosts)

    def field(self, job: str, name: str) -> str:
        """What `scontrol` says of a job: its JobState (PENDING, RUNNING, COMPLETED, FAILED, CANCELLED, TIMEOUT ...).

        Or its ExitCode, that of its script and, after a colon, the signal that ended it; or its Restarts.
        """
        shown = self.cluster.first.run(["scontrol", "show", "job", "-o", job])
        return dict(word.split("=", 1) for word in shown.split() if "=" in word)[name]

    def submit(self, words: Sequence[str | Path], *, cwd: Path, env: Mapping[str, str] | None = None) -> str:
        """Submit a batch job by the words of sbatch; returns the job's number."""
        return self.cluster.first.run(["sbatch", "--parsable", *words], cwd=cwd, env=env).strip()

    def logs(self) -> str:
        """The end of every daemon's log."""
        return "\n".join(f"--- {log.name}\n{log.read_text()[-2000:]}" for log in sorted(self.folder.glob("*.log")))


def _program(name: str) -> str:
    path = program_path(name)
    assert path is not None, f"{name} is not installed"
    return path
