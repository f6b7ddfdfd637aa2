"""Ask all hosts at once what they have (probe.py), what time it is, and whether they share a folder (shared.py)."""

from __future__ import annotations

import os
import re
import secrets
import sys
import time
from collections.abc import Sequence

from pydantic import ValidationError

from megatron_tiedlora.base.wording import enumerate_names
from megatron_tiedlora.cluster.doctor.compare import error, warning
from megatron_tiedlora.cluster.doctor.probe import CLOCK_MARK, CLOCK_QUESTION, PROBE_MARK
from megatron_tiedlora.cluster.doctor.records import Clock, Finding, HostReport, HubRepo, Probe, Question
from megatron_tiedlora.cluster.doctor.shared import FILE_PREFIX, NOT_SEEN, SEEN, SHARED_MARK, WRITTEN
from megatron_tiedlora.cluster.remote import Done, HostCommands, RemoteCommand, Transport, run_on_hosts

_CLOCK_QUESTIONS = 3
_SHARED_SECONDS = 5.0  # network file systems may cache a folder's content for some seconds
_SHARED_LIMIT = 30.0


def module_command(name: str, *arguments: str) -> list[str]:
    """The command that runs a module of the doctor with this interpreter; `-P` ignores the current folder, as a job."""
    return [sys.executable, "-P", "-m", f"megatron_tiedlora.cluster.doctor.{name}", *arguments]


# What a host has -----------------------------------------------------------------------------------------------------


class _Answers:
    """Collects the hosts' answers. One thread reads a host's lines, so its entries have one writer."""

    def __init__(self) -> None:
        self.probes: dict[str, Probe] = {}
        self.garbled: set[str] = set()
        self.clocks: dict[str, list[Clock]] = {}
        self._asked: dict[str, float] = {}

    def hear(self, command: RemoteCommand, line: str) -> None:
        """Take a line with the probe's record or the clock, and ask for the clock until there are enough answers."""
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
            theirs = float(line.removeprefix(CLOCK_MARK))
            self.clocks.setdefault(host, []).append(Clock(skew=theirs - (begin + now) / 2, margin=(now - begin) / 2))
        else:
            return  # a login shell has printed it
        if len(self.clocks.get(host, ())) == _CLOCK_QUESTIONS:
            command.close_input()
        else:
            self._asked[host] = time.time()
            command.send(CLOCK_QUESTION)


def ask_hosts(
    hosts: Sequence[HostReport],
    transport: Transport,
    *,
    paths: dict[str, str],
    hub: dict[str, HubRepo],
    output_dir: str | None,
    master_port: int,
    limit: float,
) -> tuple[list[HostReport], list[Finding]]:
    """Probe all hosts; returns them with their answers, and an error for each host that gives none."""
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
    done = HostCommands(transport, limit=limit, on_line=answers.hear).run(commands)
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
            message = f"{host.name}: the answer of its megatron_tiedlora cannot be read; it is another version"
            findings.append(error("version", [host.name], message, "install the same version on every host"))
        elif host.probe is None:
            findings.append(explain_silence(done[host.name], transport, limit=limit))
    return asked, findings


def explain_silence(done: Done, transport: Transport, *, limit: float) -> Finding:
    """Explain from the end of its command why a host gave no answer, and what to do."""
    host, said = done.host, done.last_words
    if done.status is None:
        return error(
            "no_answer", [host], f"{host}: no answer in {limit:.0f} s", "check whether a file system hangs there"
        )
    if transport.route == "ssh" and done.status == 255:
        return _explain_ssh(host, said, transport.ssh_port)
    if transport.route == "srun" and re.search(r"not available|down|node fail|communication", said, re.IGNORECASE):
        return error("host_down", [host], f"{host}: srun cannot start there ({said})", "see `sinfo -R`")
    if re.search(r"\bcd: ", said):
        fix = "start from a folder that every host has; the launchers change to it too"
        return error("no_folder", [host], f"{host}: no folder {transport.folder}", fix)
    if done.status in (126, 127):
        fix = "install the same environment at the same path there, or share its file system"
        return error("no_python", [host], f"{host}: {sys.executable} cannot be run there ({said})", fix)
    if match := re.search(r"No module named '?([\w.]+)", said):
        fix = f"install it there for {sys.executable}, or set PYTHONPATH to a checkout that the host sees"
        return error("no_package", [host], f"{host}: its Python has no module {match[1]}", fix)
    words = f" ({said})" if said else ""
    message = f"{host}: the probe ended with status {done.status}{words}"
    return error("no_answer", [host], message, "correct what its message says")


def _explain_ssh(host: str, said: str, port: int | None) -> Finding:
    """Explain ssh's last line."""
    ssh = f"ssh {f'-p {port} ' if port else ''}{host}"
    reason = f" ({said})" if said else ""
    if "Host key verification failed" in said:
        return error("ssh_refused", [host], f"{host}: its ssh host key is unknown{reason}", f"run `{ssh}` by hand once")
    if "Permission denied" in said:
        fix = f"ssh-copy-id {host}: `{ssh}` must not ask for a password"
        return error("ssh_refused", [host], f"{host}: ssh rejects the login{reason}", fix)
    if "resolve hostname" in said:
        fix = "correct it in the hostfile, or add it to /etc/hosts"
        return error("host_unknown", [host], f"{host}: this host name cannot be resolved{reason}", fix)
    if "refused" in said:
        fix = "start sshd there, or give its port with --ssh_port"
        return error("no_sshd", [host], f"{host}: nothing answers at ssh's port{reason}", fix)
    fix = f"check that it runs and that `{ssh}` works, or remove it from the hostfile"
    return error("host_down", [host], f"{host}: cannot be reached{reason}", fix)


# Whether a folder is shared ------------------------------------------------------------------------------------------


def try_shared(hosts: Sequence[HostReport], transport: Transport) -> list[Finding]:
    """Check that all other hosts can read a file that the first host writes where the output will be."""
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
            run_on_hosts(others, reading, limit=_SHARED_LIMIT, transport=transport, on_line=hear_reader)
        command.close_input()

    writing = module_command("shared", "write", path, token, str(2 * _SHARED_LIMIT))
    run_on_hosts([first.name], writing, limit=2 * _SHARED_LIMIT, transport=transport, on_line=hear_writer)
    return explain_shared(first.name, others, said, path=output.path, folder=output.existing)


def explain_shared(first: str, others: Sequence[str], said: dict[str, str], *, path: str, folder: str) -> list[Finding]:
    """Turn the hosts' reports about the file into findings."""
    flag = f"--output_dir {path}"
    if said.get(first) != WRITTEN:
        reason = said.get(first, "no answer")
        message = f"{first}: {flag}: no file can be written in {folder} ({reason})"
        return [error("output_not_writable", [first], message, "choose another folder, or make it writable")]
    blind = [host for host in others if said.get(host) == NOT_SEEN]
    silent = [host for host in others if said.get(host) not in (SEEN, NOT_SEEN)]
    findings = []
    if blind:
        message = f"{flag} is not shared: {enumerate_names(blind)} cannot read what {first} writes in {folder}"
        fix = f"use a folder that all hosts share; otherwise keep {first} as first host: only it can resume"
        findings.append(warning("output_not_shared", blind, message, fix))
    if silent:
        message = f"{flag}: {enumerate_names(silent)} did not report whether the file of {first} can be read there"
        findings.append(error("no_answer", silent, message, "check whether its file system hangs there"))
    return findings
