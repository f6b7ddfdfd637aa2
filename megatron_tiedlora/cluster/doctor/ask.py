"""Asks every host at once what it has (probe.py runs there), its clock, and whether a folder is shared (shared.py)."""

from __future__ import annotations

import os
import re
import secrets
import sys
import time
from collections.abc import Sequence

from pydantic import ValidationError

from megatron_tiedlora.cluster.doctor.compare import error, warning
from megatron_tiedlora.cluster.doctor.probe import CLOCK_MARK, CLOCK_QUESTION, PROBE_MARK
from megatron_tiedlora.cluster.doctor.records import Clock, Finding, HostReport, HubRepo, Probe, Question
from megatron_tiedlora.cluster.doctor.shared import FILE_PREFIX, NOT_SEEN, SEEN, SHARED_MARK, WRITTEN
from megatron_tiedlora.cluster.doctor.wording import enumerate_names
from megatron_tiedlora.cluster.remote import Done, HostCommands, RemoteCommand, Way, run_on_hosts

_CLOCK_QUESTIONS = 3
_SHARED_SECONDS = 5.0  # network file systems may keep what a folder holds for some seconds
_SHARED_LIMIT = 30.0


def module_command(name: str, *arguments: str) -> list[str]:
    """A module of the doctor under this interpreter's path; `-P`: found as a job finds it, not by the folder."""
    return [sys.executable, "-P", "-m", f"megatron_tiedlora.cluster.doctor.{name}", *arguments]


# What a host has -----------------------------------------------------------------------------------------------------


class _Answers:
    """What the hosts say while they are asked. A host's lines come in one thread, so its entries have one writer."""

    def __init__(self) -> None:
        self.probes: dict[str, Probe] = {}
        self.garbled: set[str] = set()
        self.clocks: dict[str, list[Clock]] = {}
        self._asked: dict[str, float] = {}

    def hear(self, command: RemoteCommand, line: str) -> None:
        """A line: the probe, or the clock; ask for the clock until it has been told often enough."""
        now, host = time.time(), command.host
        if line.startswith(PROBE_MARK):
            try:
                self.probes[host] = Probe.model_validate_json(line.removeprefix(PROBE_MARK))
            except ValidationError:
                self.garbled.add(host)
                command.close_input()
                return
        elif line.startswith(CLOCK_MARK):
            begin = self._asked[host]
            told = float(line.removeprefix(CLOCK_MARK))
            self.clocks.setdefault(host, []).append(Clock(skew=told - (begin + now) / 2, margin=(now - begin) / 2))
        else:
            return  # of a login shell
        if len(self.clocks.get(host, ())) == _CLOCK_QUESTIONS:
            command.close_input()
        else:
            self._asked[host] = time.time()
            command.send(CLOCK_QUESTION)


def ask_hosts(
    hosts: Sequence[HostReport],
    way: Way,
    *,
    paths: dict[str, str],
    hub: dict[str, HubRepo],
    output_dir: str | None,
    master_port: int,
    limit: float,
) -> tuple[list[HostReport], list[Finding]]:
    """Probe all hosts; returns them with their answers, and an error for each that gives none."""
    answers, first = _Answers(), hosts[0].name
    commands = {}
    for host in hosts:
        question = Question(
            host=host.name,
            peer=next((other.name for other in hosts if other.name != host.name), None),
            first_host=first,
            master_port=master_port if host.name == first else None,
            paths=paths,
            hub=hub,
            output_dir=output_dir,
            seconds=limit,
        )
        commands[host.name] = module_command("probe", question.model_dump_json())
    done = HostCommands(way, limit=limit, on_line=answers.hear).run(commands)
    asked = [
        host.model_copy(
            update={
                "probe": answers.probes.get(host.name),
                "clock": min(answers.clocks.get(host.name, ()), key=lambda clock: clock.margin, default=None),
                "seconds": round(done[host.name].seconds, 3),
            }
        )
        for host in hosts
    ]
    findings = []
    for host in asked:
        if host.name in answers.garbled:
            message = f"{host.name}: its megatron_tiedlora answers in a form that is not known here: another version"
            findings.append(error("version", [host.name], message, "install the same version on every host"))
        elif host.probe is None:
            findings.append(explain_silence(done[host.name], way, limit=limit))
    return asked, findings


def explain_silence(done: Done, way: Way, *, limit: float) -> Finding:
    """Why a host gave no answer, by how the command there ended, and what to do."""
    host, said = done.host, done.last_words
    if done.status is None:
        return error(
            "no_answer", [host], f"{host}: no answer in {limit:.0f} s", "see whether a file system hangs there"
        )
    if way.route == "ssh" and done.status == 255:
        return _explain_ssh(host, said, way.ssh_port)
    if way.route == "srun" and re.search(r"not available|down|node fail|communication", said, re.IGNORECASE):
        return error("host_down", [host], f"{host}: srun cannot start there ({said})", "see `sinfo -R`")
    if re.search(r"\bcd: ", said):
        fix = "start from a folder that every host has, as the launchers go there too"
        return error("no_folder", [host], f"{host}: no folder {way.folder}", fix)
    if done.status in (126, 127):
        fix = "install the same environment at the same path there, or share its file system"
        return error("no_python", [host], f"{host}: {sys.executable} does not run there ({said})", fix)
    if match := re.search(r"No module named '?([\w.]+)", said):
        fix = f"install it there for {sys.executable}, or set PYTHONPATH to a checkout that the host sees"
        return error("no_package", [host], f"{host}: its Python has no module {match[1]}", fix)
    words = f" ({said})" if said else ""
    return error("no_answer", [host], f"{host}: the probe ended with status {done.status}{words}", "see what it says")


def _explain_ssh(host: str, said: str, port: int | None) -> Finding:
    """What ssh's last words mean."""
    ssh = f"ssh {f'-p {port} ' if port else ''}{host}"
    reason = f" ({said})" if said else ""
    if "Host key verification failed" in said:
        return error("ssh_refused", [host], f"{host}: its ssh key is not known{reason}", f"run `{ssh}` by hand once")
    if "Permission denied" in said:
        fix = f"ssh-copy-id {host}: `{ssh}` must ask for no password"
        return error("ssh_refused", [host], f"{host}: ssh does not let us in{reason}", fix)
    if "resolve hostname" in said:
        fix = "correct it in the hostfile, or add it to /etc/hosts"
        return error("host_unknown", [host], f"{host}: no host of that name is known{reason}", fix)
    if "refused" in said:
        fix = "start sshd there, or give its port with --ssh_port"
        return error("no_sshd", [host], f"{host}: nothing answers at ssh's port{reason}", fix)
    fix = f"see whether it runs and `{ssh}` works, or take it out of the hostfile"
    return error("host_down", [host], f"{host}: cannot be reached{reason}", fix)


# Whether a folder is shared ------------------------------------------------------------------------------------------


def try_shared(hosts: Sequence[HostReport], way: Way) -> list[Finding]:
    """What the first host writes into a file where output will be must be read there by all others."""
    first, others = hosts[0], [host.name for host in hosts[1:]]
    if first.probe is None or first.probe.output is None:
        return []
    output = first.probe.output
    path, token = os.path.join(output.existing, f"{FILE_PREFIX}{secrets.token_hex(8)}"), secrets.token_hex(8)
    said: dict[str, str] = {}

    def hear_reader(command: RemoteCommand, line: str) -> None:
        if line.startswith(SHARED_MARK):
            said[command.host] = line.removeprefix(SHARED_MARK)

    def hear_writer(command: RemoteCommand, line: str) -> None:
        hear_reader(command, line)
        if said.get(command.host) == WRITTEN and others:
            reading = module_command("shared", "read", path, token, str(_SHARED_SECONDS))
            run_on_hosts(others, reading, limit=_SHARED_LIMIT, way=way, on_line=hear_reader)
        command.close_input()

    writing = module_command("shared", "write", path, token, str(2 * _SHARED_LIMIT))
    run_on_hosts([first.name], writing, limit=2 * _SHARED_LIMIT, way=way, on_line=hear_writer)
    return explain_shared(first.name, others, said, path=output.path, folder=output.existing)


def explain_shared(first: str, others: Sequence[str], said: dict[str, str], *, path: str, folder: str) -> list[Finding]:
    """What the hosts said about the file in words of the report."""
    flag = f"--output_dir {path}"
    if said.get(first) != WRITTEN:
        reason = said.get(first, "no answer")
        message = f"{first}: {flag}: no file can be written in {folder} ({reason})"
        return [error("output_not_writable", [first], message, "choose another one, or have it made writable")]
    blind = [host for host in others if said.get(host) == NOT_SEEN]
    silent = [host for host in others if said.get(host) not in (SEEN, NOT_SEEN)]
    findings = []
    if blind:
        message = f"{flag} is not shared: {enumerate_names(blind)} cannot read what {first} writes in {folder}"
        fix = f"a folder that all hosts share; otherwise keep {first} as first host, as only it can resume"
        findings.append(warning("output_not_shared", blind, message, fix))
    if silent:
        message = f"{flag}: {enumerate_names(silent)} did not say whether what {first} writes is read there"
        findings.append(error("no_answer", silent, message, "see whether its file system hangs there"))
    return findings
