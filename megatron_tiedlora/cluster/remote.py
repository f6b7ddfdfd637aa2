"""Run a command on each of many hosts at once: over ssh, with srun inside a Slurm allocation, or on this machine.

Every command has a hard time limit. Its standard input stays open as long as its caller lives, so a command that
watches for the end of its input ends with its caller, however the caller ends.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Literal

AT_ONCE = 64  # hosts contacted at the same time by default
ALIVE_SECONDS, ALIVE_COUNT = 5, 2  # ssh gives up a silent connection after their product
CONNECT_SECONDS = 10
SSH_SETTINGS: Mapping[str, str | int] = {
    "BatchMode": "yes",
    "ConnectTimeout": CONNECT_SECONDS,
    "ServerAliveInterval": ALIVE_SECONDS,
    "ServerAliveCountMax": ALIVE_COUNT,
    "ControlMaster": "no",  # a shared connection would hide a lost host, and outlive us
    "ControlPath": "none",
}
_GRACE_SECONDS = 1.0  # after the limit: for the remote command to end when its input ends, and again after SIGTERM

_SRUN_STATUS = re.compile(r"srun: error: \S+: task \S+: Exited with exit code")  # follows the command's own output

Route = Literal["ssh", "srun", "local"]
OnLine = Callable[["RemoteCommand", str], None]
OnDone = Callable[["Done"], None]


@dataclass(frozen=True)
class Done:
    """How a command on a host ended.

    Attributes:
        status: its exit status; 255 if ssh could not connect or lost the host, None if the time limit ended it.
    """

    host: str
    status: int | None
    stdout: str
    stderr: str
    seconds: float

    @property
    def last_words(self) -> str:
        """The last informative line on its stderr; '' if there is none."""
        lines = [line.strip() for line in self.stderr.splitlines() if line.strip() and not _SRUN_STATUS.match(line)]
        return lines[-1] if lines else ""


@dataclass(frozen=True)
class Transport:
    """How commands get to the hosts.

    Attributes:
        route: `srun` only works inside an allocation; `local` is this machine, whatever the host is called.
        environment: variables to set on the host; they override the host's own.
        folder: working folder on the host; None keeps the route's default.
    """

    route: Route = "ssh"
    ssh_port: int | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    folder: Path | None = None

    def words(self, host: str, command: Sequence[str], *, limit: float) -> list[str]:
        """The local command line that runs `command` on `host`."""
        line = self._shell_line(command)
        if self.route == "ssh":
            return ["ssh", *ssh_options(self.ssh_port, limit=limit), host, line]
        if self.route == "srun":
            # One step per host, beside anything else in the allocation, on all cores of the allocation there.
            step = ["--nodes=1", "--ntasks=1", f"--nodelist={host}", "--overlap"]
            step += ["--cpu-bind=none", "--unbuffered", "--quiet"]
            return ["srun", *step, "/bin/sh", "-c", line]
        return ["/bin/sh", "-c", line]

    def _shell_line(self, command: Sequence[str]) -> str:
        """A command line that every login shell understands (csh has no `export`)."""
        values = [f"{name}={value}" for name, value in self.environment.items()]
        line = f"exec {shlex.join(['env', *values, *command] if values else command)}"
        return f"cd {shlex.quote(str(self.folder))} && {line}" if self.folder is not None else line


def ssh_options(port: int | None, *, limit: float) -> list[str]:
    """ssh options: ask nothing, share no connection, and give up a silent host or connection."""
    settings = {**SSH_SETTINGS, "ConnectTimeout": max(1, min(CONNECT_SECONDS, int(limit)))}
    options = ["-T", "-a", "-x", *(word for name, value in settings.items() for word in ("-o", f"{name}={value}"))]
    return options if port is None else [*options, "-p", str(port)]


class RemoteCommand:
    """A command that runs on a host; `on_line` gets it with each line and can write to its input."""

    def __init__(self, host: str, words: Sequence[str]) -> None:
        self.host = host
        self._limited = self._output_over = False
        self._begin = time.monotonic()
        # A pipe could fill up while the output is read.
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            words,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            errors="replace",
            bufsize=1,
            start_new_session=True,  # so that it can be ended together with all that ssh starts (a ProxyCommand)
        )

    def send(self, line: str) -> None:
        """Write a line to the command's standard input; do nothing if the command has ended."""
        with suppress(OSError, ValueError):
            _pipe(self._process.stdin).write(f"{line}\n")

    def close_input(self) -> None:
        """Close the command's standard input, which asks it to end."""
        with suppress(OSError, ValueError):
            _pipe(self._process.stdin).close()

    def end(self) -> None:
        """Ask the command and everything it started to end, then force them to, within two grace times."""
        self.close_input()
        if self._ends() and self._output_over:  # otherwise something that it started still runs
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)
            self._ends()

    def _ends(self) -> bool:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_GRACE_SECONDS)
            return True
        return False

    def follow(self, on_line: OnLine | None, *, limit: float) -> Done:
        """Read the command's output until it ends or the time limit is reached."""
        timer = threading.Timer(max(0.0, self._begin + limit - time.monotonic()), self._pass_limit)
        timer.start()
        lines: list[str] = []
        try:
            for line in _pipe(self._process.stdout):
                lines.append(line)
                if on_line is not None:
                    on_line(self, line.rstrip("\n"))
            self._output_over = True
            status: int | None = self._process.wait()
        finally:
            timer.cancel()
            self.end()
            _pipe(self._process.stdout).close()
        self._errors.seek(0)
        errors = self._errors.read().decode(errors="replace")
        self._errors.close()
        if self._limited:
            status = None
        return Done(self.host, status, "".join(lines), errors, time.monotonic() - self._begin)

    def _pass_limit(self) -> None:
        self._limited = True
        self.end()


def _pipe(stream: IO[str] | None) -> IO[str]:
    assert stream is not None
    return stream


class HostCommands:
    """Runs commands on many hosts, one thread per host; any thread may call `end_all` to end those that still run.

    Args:
        on_line, on_done: called in the host's own thread, with each line of output and when the command has ended.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        limit: float,
        on_line: OnLine | None = None,
        on_done: OnDone | None = None,
        at_once: int = AT_ONCE,
    ) -> None:
        self._transport, self._limit, self._at_once = transport, limit, at_once
        self._on_line, self._on_done = on_line, on_done
        self._running: dict[str, RemoteCommand] = {}
        self._lock = threading.Lock()
        self._ended = False

    def run(self, commands: Mapping[str, Sequence[str]]) -> dict[str, Done]:
        """Run each host's command and wait until all have ended. An exception (Ctrl-C) ends all of them first."""
        pool = ThreadPoolExecutor(max_workers=max(1, min(self._at_once, len(commands))))
        try:
            futures = {host: pool.submit(self._one, host, command) for host, command in commands.items()}
            return {host: future.result() for host, future in futures.items()}
        finally:
            self.end_all()
            pool.shutdown(cancel_futures=True)

    def end_all(self) -> None:
        """End the running commands and start no more."""
        with self._lock:
            self._ended = True
            running = list(self._running.values())
        for command in running:  # first ask all of them, then wait for each
            command.close_input()
        for command in running:
            command.end()

    def _one(self, host: str, command: Sequence[str]) -> Done:
        with self._lock:
            if self._ended:
                return Done(host, None, "", "not started: another host has failed", 0.0)
            try:
                started = RemoteCommand(host, self._transport.words(host, command, limit=self._limit))
            except OSError as error:
                return Done(host, 127, "", f"{error.filename or self._transport.route}: {error.strerror}", 0.0)
            self._running[host] = started
        try:
            done = started.follow(self._on_line, limit=self._limit)
        finally:
            with self._lock:
                del self._running[host]
        if self._on_done is not None:
            self._on_done(done)
        return done


def run_on_hosts(
    hosts: Sequence[str],
    command: Sequence[str],
    *,
    limit: float,
    transport: Transport,
    on_line: OnLine | None = None,
) -> dict[str, Done]:
    """Run the same command on all hosts at once, each with a hard time limit.

    Args:
        limit: in seconds; a host where the command runs longer has status None.
        on_line: called with each line of output as it arrives, in the host's own thread.
    """
    return HostCommands(transport, limit=limit, on_line=on_line).run(dict.fromkeys(hosts, command))
