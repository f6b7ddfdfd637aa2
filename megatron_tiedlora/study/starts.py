"""Starts one command of a study, waits for its end, and passes signals on to it.

A command is tiedlora train or tiedlora evaluate under the `deepspeed` launcher. Its end is judged by the files that
it writes, not by its exit status, which a launcher may lose.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from megatron_tiedlora.base.atomic import make_way_for_log
from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.cluster.launchers import read_user_file
from megatron_tiedlora.cluster.running import Session, StopSignals
from megatron_tiedlora.config.fields import flag_value
from megatron_tiedlora.runtime.launch_env import free_port

POLL_SECONDS = 0.1
LOG_MARK = "$ "  # precedes the command line of each start in a log
_TERMINAL_CODE, _BAR_MARK = re.compile(r"\x1b\[[0-9;]*[A-Za-z]"), "%|"


@dataclass(frozen=True)
class ScriptStart:
    """One start of a script.

    Attributes:
        settings: the script's flags, by name.
        launcher: arguments of the `deepspeed` launcher.
        log: its output is appended to this file.
        lock: descriptor that the launcher keeps open, so that the study stays locked while it lives.
        words: further words of the command line.
    """

    script: Literal["train", "evaluate"]
    settings: Mapping[str, Any]
    launcher: tuple[str, ...]
    log: Path
    lock: int
    words: tuple[str, ...] = ()

    @property
    def arguments(self) -> tuple[str, ...]:
        """The settings as flags, without those that are None, and the further words."""
        flags = (f"--{name}={flag_value(value)}" for name, value in self.settings.items() if value is not None)
        return (*flags, *self.words)


class LaunchedChild(Session):
    """A `deepspeed` launcher in its own session, and its ranks on this host.

    A signalled launcher ends before its ranks, which save first, so their ends are awaited too. If it is signalled
    while it starts, it may end without signalling the ranks that it was about to start. These are signalled here.
    """

    def __init__(self, process: subprocess.Popen[bytes], program: str) -> None:
        super().__init__(process, program)
        self._signal = 0  # the one it was sent
        self._scans = 0  # without a process; one scan can miss a process while it loads its program

    def ended(self) -> bool:
        """Whether launcher and ranks have ended. Ranks that have appeared since a signal get it now."""
        launcher_ended = self.process.poll() is not None
        if not self._signal and not launcher_ended:
            return False
        if self._signal == signal.SIGKILL:
            self.kill()
        elif self._signal:
            self.tell(self.ranks(), self._signal)
        self._scans = 0 if self.here() or not launcher_ended else self._scans + 1
        return self._scans > 1

    def interrupt(self, number: int) -> None:
        """Signal the launcher. The ranks that run already notice its end; they save first, and then end."""
        self._signal, self._told = number, {rank.pid for rank in self.ranks()}
        self.process.send_signal(number)

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send SIGKILL to all, and to processes that are just being started as soon as they are seen."""
        self._signal = number
        super().kill(number)


Start = Callable[[ScriptStart], LaunchedChild]


def deepspeed_starter(scripts: Path) -> Start:
    """Return a function that starts the scripts in folder `scripts` with the `deepspeed` of this interpreter.

    Raises:
        UserError: there is no launcher; the function raises it if the log or the launcher cannot be opened.
    """
    launcher = Path(sys.executable).with_name("deepspeed")
    if not launcher.is_file():
        raise UserError(f"{launcher}: no such launcher; run the sweep with the python that DeepSpeed is installed for")

    def start(command: ScriptStart) -> LaunchedChild:
        script = str(scripts / f"{command.script}.py")
        words = [str(launcher), *command.launcher, script, *command.arguments]
        try:
            command.log.parent.mkdir(parents=True, exist_ok=True)
            make_way_for_log(command.log)
            with command.log.open("a+b", buffering=0) as log:
                log.seek(max(0, log.seek(0, os.SEEK_END) - 1))
                cut = log.read(1) not in (b"", b"\n")  # a kill may leave a part of a progress bar
                mark = f"\n{LOG_MARK}" if cut else LOG_MARK
                log.write(f"{mark}{shlex.join(words)}\n".encode())
                return LaunchedChild(_launch(words, log, command.lock), script)
        except OSError as error:
            raise UserError(f"{command.log}: cannot be written ({error.strerror or error})") from error

    return start


def _launch(words: Sequence[str], log: IO[bytes], lock: int) -> subprocess.Popen[bytes]:
    sent = os.memfd_create("deepspeed_env")  # may hold secrets, so it is not a file that others can read
    try:
        # On other hosts DeepSpeed sets PYTHONPATH to start with the current folder; this file overrides it.
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
            start_new_session=True,  # so that Ctrl-C in the terminal reaches it only once, through the sweep
            pass_fds=(lock, sent),
        )
    except OSError as error:
        raise UserError(f"{words[0]}: cannot be started ({error.strerror or error})") from error
    finally:
        os.close(sent)


def with_port(launcher: Sequence[str]) -> tuple[str, ...]:
    """Launcher arguments with a free port for the rendezvous, unless they name one."""
    if any(word.split("=")[0] == "--master_port" for word in launcher):
        return tuple(launcher)
    return (*launcher, "--master_port", str(free_port()))


# The end of a command ---------------------------------------------------------------------------------------------


def wait_for_end(
    child: LaunchedChild, name: str, *, stop: StopSignals, show: Callable[[], None], say: Callable[[str], object]
) -> None:
    """Wait until a command has ended, and `show` meanwhile how far it is.

    The first signal is passed on to it, once; after that only Ctrl-C counts, which kills it: schedulers send SIGTERM
    twice. An error of `show` (a full disk) acts like SIGTERM, and is raised when the command has ended.
    """
    heard, told, error = len(stop.received), False, None
    while not _has_ended(child):
        new, heard = stop.received[heard:], len(stop.received)
        if new and not told:
            told = True
            child.interrupt(new.pop(0))
            say(f"stopping: {name} saves first (Ctrl-C once more: kill)")
        if signal.SIGINT in new:
            child.kill()
        if error is None:
            try:
                show()
            except BaseException as caught:
                error = caught
                if not told:
                    child.interrupt(signal.SIGTERM)
                    told = True
                with suppress(Exception):
                    say(f"stopping: {name} saves first ({error})")
        time.sleep(POLL_SECONDS)
    if error is not None:
        raise error


def _has_ended(child: LaunchedChild) -> bool:
    try:
        return child.ended()
    except OSError:  # its state cannot be read any more
        return True


def last_lines(log: Path, count: int = 12) -> list[str]:
    """The last lines of output of a command's last start, without progress bars."""
    if not log.is_file():
        return []
    with log.open("rb") as stream:
        stream.seek(max(0, log.stat().st_size - 20_000))
        lines = stream.read().decode(errors="replace").split("\n")
    starts = [index for index, line in enumerate(lines) if line.startswith(LOG_MARK)]
    last = lines[starts[-1] + 1 :] if starts else lines
    shown = (_TERMINAL_CODE.sub("", line.rstrip().rsplit("\r", 1)[-1]).rstrip() for line in last)
    return [line for line in shown if line and _BAR_MARK not in line][-count:]
