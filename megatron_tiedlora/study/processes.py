"""How the commands of a study are started, watched and stopped; which commands, and when, is jobs.py's.

A command is launch/train.py or launch/evaluate.py under the `deepspeed` launcher. Its end is judged by the files that
it leaves and not by its exit status, which a launcher may lose.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal, Protocol

import psutil

from megatron_tiedlora.base.atomic import make_way_for_log
from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.cluster.forwarded_env import read_user_file
from megatron_tiedlora.config.sweep_settings import names_port
from megatron_tiedlora.runtime.launch_env import free_port
from megatron_tiedlora.runtime.stopping import alive

LOG_MARK = "$ "  # before the command, at every start that a log tells of
LOOK_SECONDS = 5.0  # between looks at what a launcher has started, for the case that it dies


@dataclass(frozen=True)
class Command:
    """One start of a script.

    Attributes:
        settings: the script's flags, by name.
        launcher: arguments of the `deepspeed` launcher.
        log: what it prints is added to this file.
        lock: descriptor that the launcher keeps open, so that the study stays locked while it lives.
    """

    script: Literal["train", "evaluate"]
    settings: Mapping[str, Any]
    launcher: tuple[str, ...]
    log: Path
    lock: int

    @property
    def arguments(self) -> tuple[str, ...]:
        """The settings as flags; None is left out."""
        return tuple(f"--{name}={flag_text(value)}" for name, value in self.settings.items() if value is not None)


class Child(Protocol):
    """A command that was started."""

    def ended(self) -> bool:
        """Whether it and all that it started are gone."""

    def interrupt(self, number: int) -> None:
        """Tell it to stop, by a signal; it saves and ends in its own time."""

    def kill(self) -> None:
        """End it at once, with all that it started."""


Start = Callable[[Command], Child]


def flag_text(value: Any) -> str:
    """A value as the command line takes it."""
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


@dataclass
class LaunchedChild:
    """A `deepspeed` launcher in a session of its own, with its ranks.

    A launcher that is told to stop ends before its ranks, which save first; so their ends are waited for too. One that
    is told while it starts may end without having told those that it was about to start: `script` tells them by their
    command line, and they are told here.
    """

    process: subprocess.Popen[bytes]
    script: str
    _started: list[psutil.Process] = field(default_factory=list)
    _looked: float = field(default_factory=time.monotonic)
    _told: int = 0
    _untold: list[psutil.Process] = field(default_factory=list)  # not the script yet when the launcher was told

    def ended(self) -> bool:
        """Whether launcher and ranks are gone."""
        alone = self.process.poll() is not None
        if self._told or alone or time.monotonic() - self._looked > LOOK_SECONDS:
            newcomers = self._remember()
            if self._told:
                self._untold = [process for process in [*self._untold, *newcomers] if not self._tell_late(process)]
        self._started = [process for process in self._started if alive(process)]
        return alone and not self._started

    def interrupt(self, number: int) -> None:
        """Signal the launcher, whose ranks notice its end; remember them."""
        self._remember()
        self._told, self._untold = number, [process for process in self._started if not self._is_script(process)]
        with suppress(ProcessLookupError):
            self.process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL to all, and to what is just being started as soon as it is seen."""
        self._remember()
        self._told, self._untold = signal.SIGKILL, []
        for process in self._started:
            with suppress(psutil.Error):
                process.kill()
        with suppress(ProcessLookupError):
            self.process.kill()

    def _remember(self) -> list[psutil.Process]:
        """Note what has been started in the launcher's session since the last look; returns it."""
        self._looked = time.monotonic()
        known = {self.process.pid, *(process.pid for process in self._started)}
        found = [process for process in psutil.process_iter() if process.pid not in known and self._is_mine(process)]
        self._started += found
        return found

    def _is_mine(self, process: psutil.Process) -> bool:
        try:
            return os.getsid(process.pid) == self.process.pid and alive(process)
        except OSError:  # it has just ended
            return False

    def _tell_late(self, process: psutil.Process) -> bool:
        """Signal it once it is the script, which a fork becomes a moment later; whether that is done."""
        if not alive(process):
            return True
        if not self._is_script(process):
            return False
        with suppress(psutil.Error):
            process.send_signal(self._told)
        return True

    def _is_script(self, process: psutil.Process) -> bool:
        try:
            return self.script in process.cmdline()
        except psutil.Error:
            return False


def deepspeed_starter(scripts: Path) -> Start:
    """Starts the scripts in folder `scripts` with the `deepspeed` of this interpreter.

    Raises:
        UserError: there is none; from the starter: the log cannot be written, or the launcher cannot be started.
    """
    launcher = Path(sys.executable).with_name("deepspeed")
    if not launcher.is_file():
        raise UserError(f"{launcher}: no such launcher; run the sweep with the python that DeepSpeed is installed for")

    def start(command: Command) -> Child:
        script = str(scripts / f"{command.script}.py")
        words = [str(launcher), *command.launcher, script, *command.arguments]
        try:
            command.log.parent.mkdir(parents=True, exist_ok=True)
            make_way_for_log(command.log)
            with command.log.open("a+b", buffering=0) as log:
                log.seek(max(0, log.seek(0, os.SEEK_END) - 1))
                cut = log.read(1) not in (b"", b"\n")  # by a kill, in the middle of a progress bar
                mark = f"\n{LOG_MARK}" if cut else LOG_MARK
                log.write(f"{mark}{shlex.join(words)}\n".encode())
                return LaunchedChild(_launch(words, log, command.lock), script)
        except OSError as error:
            raise UserError(f"{command.log}: cannot be written ({error.strerror or error})") from error

    return start


def _launch(words: Sequence[str], log: IO[bytes], lock: int) -> subprocess.Popen[bytes]:
    sent = os.memfd_create("deepspeed_env")  # may hold secrets, so no other process finds it
    try:
        # On other hosts DeepSpeed puts the current folder before PYTHONPATH; what this file says comes after that.
        named = {"PYTHONPATH": os.environ.get("PYTHONPATH", "")}
        named |= read_user_file(os.environ) if any(word.startswith(("-H", "--ho")) for word in words) else {}
        os.write(sent, "".join(f"{name}={value}\n" for name, value in named.items()).encode())
        return subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            # The current folder may hold another user's Python files.
            env={**os.environ, "PYTHONSAFEPATH": "1", "DS_ENV_FILE": f"/proc/self/fd/{sent}"},
            start_new_session=True,  # a Ctrl-C in the terminal reaches it through the sweep, once
            pass_fds=(lock, sent),
        )
    except OSError as error:
        raise UserError(f"{words[0]}: cannot be started ({error.strerror or error})") from error
    finally:
        os.close(sent)


# Where a command runs ---------------------------------------------------------------------------------------------


def launcher_slots(
    *, launcher_args: str | None, gpus_per_run: int | None, runs_at_once: int, gpus: Sequence[str]
) -> tuple[tuple[str, ...], ...]:
    """Launcher arguments of each place where a command can run at the same time as those in the others.

    Args:
        gpus: of this machine, as the launcher counts them.

    Raises:
        UserError: fewer GPUs than a run is to have.
    """
    if gpus_per_run is None:
        return (tuple(shlex.split(launcher_args or "")),) * runs_at_once
    count = len(gpus) // gpus_per_run
    if not count:
        raise UserError(f"--gpus_per_run {gpus_per_run}: this machine has {len(gpus)} GPUs to give")
    places = (gpus[index * gpus_per_run : (index + 1) * gpus_per_run] for index in range(count))
    return tuple(("--include", f"localhost:{','.join(place)}") for place in places)


def with_port(launcher: Sequence[str]) -> tuple[str, ...]:
    """Launcher arguments with a port of its own for the ranks to meet, unless they name one."""
    if names_port(launcher):
        return tuple(launcher)
    return (*launcher, "--master_port", str(free_port()))
