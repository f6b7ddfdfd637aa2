"""Find, signal and end the processes of a job on all of its hosts at once."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import dataclass, field

from megatron_tiedlora.cluster.job_processes import HostProcesses, JobProcess, find_processes, read_report, send_signal
from megatron_tiedlora.cluster.remote import Done, HostCommands
from megatron_tiedlora.cluster.routes import Job

MODULE = "megatron_tiedlora.cluster.job_processes"


@dataclass(frozen=True)
class Answers:
    """What the hosts answered.

    Attributes:
        reports: by the hosts' own names.
        unreached: why a host gave no answer, by its name in the hostfile or allocation.
        addresses: each host's first address, by the same names.
    """

    reports: Mapping[str, HostProcesses]
    unreached: Mapping[str, str] = field(default_factory=dict)
    addresses: Mapping[str, str] = field(default_factory=dict)

    @property
    def found(self) -> list[tuple[str, JobProcess]]:
        """Every process with its host."""
        return [(host, found) for host, report in self.reports.items() for found in report.processes]

    @property
    def working(self) -> frozenset[str]:
        """Hosts where a rank runs, or an agent that may start some."""
        return frozenset(host for host, found in self.found if found.kind != "launcher")


class JobHosts:
    """The hosts of a job, and this host, where its launcher runs."""

    def __init__(self, job: Job, environment: Mapping[str, str], *, limit: float) -> None:
        """Args: limit: seconds that a host has to answer."""
        here = socket.gethostname()
        own = {"localhost", here, here.split(".")[0], environment.get("SLURMD_NODENAME", here)}
        self._job, self._limit = job, limit
        self._others = () if job.route == "local" else tuple(h.name for h in job.hosts if h.name not in own)
        named = {name: environment[name] for name in ("PYTHONPATH",) if name in environment}
        self._transport = job.transport(named if job.route == "ssh" else {})
        self._signalled: dict[str, set[int]] = {}  # by the name that is used to reach a host
        self._here, self._aliases = here, set[str]()  # names in a hostfile that turned out to be this host's

    def check(self) -> Answers:
        """Whether every host of the job, which may include this one, can be reached as the launcher will reach it."""
        names = [] if self._job.route == "local" else [host.name for host in self._job.hosts]
        return self._answers(self._run(dict.fromkeys(names, self._command())), {})

    def ask(self, number: int = 0, *, everything: bool = False) -> Answers:
        """Which processes of the job run on which host.

        Args:
            number: a signal to send to them, 0 for none.
            everything: send it to all processes, and not only to the ranks (or torchrun's agents) not signalled yet.
        """
        here = find_processes(self._job.run_id, script=self._job.script)
        if number:
            done = () if everything else [*self._signalled.get("", ())]
            here = send_signal(here, number, everything=everything, skip=done)
        others = [name for name in self._others if name not in self._aliases]
        commands = {name: self._command(number, everything=everything, name=name) for name in others}
        return self._answers(self._run(commands), {"": here})

    def _command(self, number: int = 0, *, everything: bool = False, name: str = "") -> list[str]:
        words = [self._job.python, "-P", "-m", MODULE, "--run_id", self._job.run_id, "--script", self._job.script]
        if number:
            words += ["--signal", str(int(number)), "--to", "all" if everything else "ranks"]
            if not everything and (done := self._signalled.get(name)):
                words += ["--skip", *map(str, sorted(done))]
        return words

    def _run(self, commands: Mapping[str, list[str]]) -> Mapping[str, Done]:
        return HostCommands(self._transport, limit=self._limit).run(commands) if commands else {}

    def _answers(self, answered: Mapping[str, Done], reports: Mapping[str, HostProcesses]) -> Answers:
        by_name, unreached = dict(reports), {}
        for name, done in answered.items():
            report = read_report(done.stdout) if done.status == 0 else None
            if report is None:
                unreached[name] = self._why(done)
            else:
                by_name[name] = report
                self._aliases |= {name} if report.host == self._here else set()
        for name, report in by_name.items():
            self._signalled.setdefault(name, set()).update(found.pid for found in report.processes if found.signalled)
        addresses = {name: report.address for name, report in by_name.items()}
        return Answers({report.host: report for report in by_name.values()}, unreached, addresses)

    def _why(self, done: Done) -> str:
        if done.status is None:
            return f"no answer within {self._limit:g} s"
        return done.last_words or f"status {done.status}"


def describe(answers: Answers) -> list[str]:
    """One line for each host that has processes of the job."""
    lines = []
    for host, report in answers.reports.items():
        processes = ", ".join(f"{found.pid} ({found.kind}, {found.name})" for found in report.processes)
        if processes:
            lines.append(f"{host}: {processes}")
    return lines
