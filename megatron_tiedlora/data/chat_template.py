"""Renders conversations with the tokenizer's chat template, a program that may come from an untrusted model folder.

transformers runs it in Jinja's sandbox. That blocks access to files and objects, but not unlimited time and memory,
even within one call of a built-in function. So it runs in a forked process, which has the tokenizer in its present
state. The kernel limits the memory of that process, and it is killed if it takes too long.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any, NoReturn

import psutil

from megatron_tiedlora.base.errors import UserError, one_line
from megatron_tiedlora.data.limits import limited

# Templates take milliseconds; the first call, which loads Jinja, takes some tenths of a second. They need a few times
# the memory of the text, and add some kB to it.
_SECONDS, _MEMORY = 1.0, 2**28
_OWN_CHARACTERS, _RATIO = 100_000, 10
_SILENCE = 60.0  # wall-clock seconds without an answer, for a process that gets no CPU time
_PARENT_DEATH_SIGNAL = 1  # Linux's prctl: PR_SET_PDEATHSIG


class ChatTemplate:
    """A tokenizer's chat template in its own process, which starts with the first conversation."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._process: psutil.Process | None = None
        self._connection: Connection | None = None

    def render(self, turns: Sequence[Mapping[str, str]], source: str) -> str:
        """Return the prompt for a conversation whose next turn is the assistant's.

        Raises:
            UserError: the template rejects the turns or fails; it needs more than a second of CPU time or 256 MiB;
                its text is longer than ten times the conversation's plus 100,000 characters.
        """
        longest = _OWN_CHARACTERS + _RATIO * sum(len(text) for turn in turns for text in turn.values())
        answer = self._ask({"turns": list(turns), "longest": longest})
        text = answer.get("text")
        if isinstance(text, str):
            return text
        name = getattr(self._tokenizer, "name_or_path", "the tokenizer")
        reason = one_line(str(answer.get("reason")))
        raise UserError(f"{source}: the chat template of {name} {reason}; give other rows or another --tokenizer")

    def close(self) -> None:
        """End the process."""
        if self._connection is not None:
            self._connection.close()
        if self._process is not None:
            with suppress(psutil.Error):
                self._process.kill()
            with suppress(OSError):
                os.waitpid(self._process.pid, 0)
        self._connection = self._process = None

    def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The answer of the process, or a reason if it ends before it answers."""
        if self._process is None or self._connection is None:
            self._start()
        assert self._process is not None and self._connection is not None
        before, deadline = _seconds(self._process), time.monotonic() + _SILENCE
        _send(self._connection, request)
        while not self._connection.poll(0.05):
            if _seconds(self._process) - before > _SECONDS:
                self.close()
                return {"reason": f"takes more than {_SECONDS:g} s for these messages"}
            if time.monotonic() > deadline:
                self.close()
                return {"reason": f"gave no answer within {_SILENCE:g} s"}
        answer = _receive(self._connection)
        if answer is None:
            self.close()
            return {"reason": "ended its process"}
        return answer

    def _start(self) -> None:
        self._connection, theirs = Pipe()
        parent = os.getpid()
        if (pid := os.fork()) == 0:
            self._connection.close()
            _serve(self._tokenizer, theirs, parent)
        theirs.close()
        self._process = psutil.Process(pid)


@contextmanager
def opened_template(tokenizer: Any) -> Iterator[ChatTemplate | None]:
    """Yield the tokenizer's chat template, or None if it has none (or there is no tokenizer). Closes it afterwards."""
    if not getattr(tokenizer, "chat_template", None):
        yield None
        return
    chat = ChatTemplate(tokenizer)
    try:
        yield chat
    finally:
        chat.close()


def _seconds(process: psutil.Process) -> float:
    """CPU time that the process has used so far."""
    try:
        times = process.cpu_times()
    except psutil.Error:  # it has ended, which its connection shows
        return 0.0
    return float(times.user + times.system)


# In the process ---------------------------------------------------------------------------------------------------


def _serve(tokenizer: Any, connection: Connection, parent: int) -> NoReturn:
    """Answer requests until the other end is closed. Never returns into the parent's code."""
    status = 1
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # do not inherit the parent's handlers
            signal.signal(number, signal.SIG_DFL)
        ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL)
        with limited(memory=_MEMORY):
            while os.getppid() == parent and (request := _receive(connection)) is not None:
                _send(connection, _render(tokenizer, request["turns"], request["longest"]))
        status = 0
    finally:
        os._exit(status)


def _render(tokenizer: Any, turns: list[Any], longest: int) -> dict[str, str]:
    try:
        text = str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    except MemoryError:
        return {"reason": f"needs more than {_MEMORY:,} bytes for these messages"}
    except Exception as error:  # a template is a program: it may reject roles, or fail in any other way
        return {"reason": one_line(f"rejects these messages ({error})")}
    if len(text) > longest:
        return {"reason": f"makes {len(text):,} characters from these messages (the limit is {longest:,})"}
    return {"text": text}


def _send(connection: Connection, content: Mapping[str, Any]) -> None:
    with suppress(BrokenPipeError):  # the other end is closed, which the next read shows
        connection.send_bytes(json.dumps(content).encode())


def _receive(connection: Connection) -> dict[str, Any] | None:
    """The next message, or None if the other end is closed."""
    try:
        content = json.loads(connection.recv_bytes())
    except (EOFError, ConnectionError):
        return None
    return content if isinstance(content, dict) else None
