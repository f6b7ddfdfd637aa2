"""Conversations made prompts by the tokenizer's chat template, which is a program out of a stranger's model folder.

transformers runs it in Jinja's sandbox, which lets it reach no files and no objects, but lets it take time and memory
without end, also within one call of a built-in function. So it runs in a process of its own, which is ended where it
takes too much, and which the kernel gives no more memory. It is forked, since it needs the tokenizer as it is here.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

import psutil

from megatron_tiedlora.base.errors import UserError, one_line
from megatron_tiedlora.data.limits import limited

# Templates take milliseconds (the first, which loads Jinja, some tenths of a second) and a few times the text; they add
# some kB of their own to it.
_SECONDS, _MEMORY = 1.0, 2**28
_OWN_CHARACTERS, _RATIO = 100_000, 10
_SILENCE = 60.0  # seconds without an answer, of which a process that gets a processor needs none
_PARENT_DEATH_SIGNAL = 1  # Linux's prctl: PR_SET_PDEATHSIG


class ChatTemplate:
    """A tokenizer's chat template in its process, which is started with the first conversation."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._process: psutil.Process | None = None
        self._socket: socket.socket | None = None

    def render(self, turns: Sequence[Mapping[str, str]], source: str) -> str:
        """The prompt of a conversation whose next turn is the assistant's.

        Raises:
            UserError: the template rejects the turns or fails; it takes more than a second of a processor or 256 MiB;
                its text is longer than 100,000 characters and ten times the conversation's.
        """
        longest = _OWN_CHARACTERS + _RATIO * sum(len(text) for turn in turns for text in turn.values())
        answer = self._ask({"turns": list(turns), "longest": longest})
        text = answer.get("text")
        if isinstance(text, str):
            return text
        place = getattr(self._tokenizer, "name_or_path", "the tokenizer")
        reason = one_line(str(answer.get("reason")))
        raise UserError(f"{source}: the chat template of {place} {reason}; give other rows or another --tokenizer")

    def close(self) -> None:
        """End the process."""
        if self._socket is not None:
            self._socket.close()
        if self._process is not None:
            with suppress(psutil.Error):
                self._process.kill()
            with suppress(OSError):
                os.waitpid(self._process.pid, 0)
        self._socket = self._process = None

    def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """What the process answers; a reason where it is ended before it does."""
        if self._process is None or self._socket is None:
            self._start()
        assert self._process is not None and self._socket is not None
        before, deadline = _seconds(self._process), time.monotonic() + _SILENCE
        with self._socket.makefile("rwb") as stream:
            _send(stream, request)
            while not select.select([self._socket], [], [], 0.05)[0]:
                if _seconds(self._process) - before > _SECONDS:
                    self.close()
                    return {"reason": f"takes more than {_SECONDS:g} s for these messages"}
                if time.monotonic() > deadline:
                    self.close()
                    return {"reason": f"gave no answer within {_SILENCE:g} s"}
            answer = _receive(stream)
        if answer is None:
            self.close()
            return {"reason": "ended its process"}
        return answer

    def _start(self) -> None:
        self._socket, theirs = socket.socketpair()
        parent = os.getpid()
        if (pid := os.fork()) == 0:
            self._socket.close()
            _serve(self._tokenizer, theirs, parent)
        theirs.close()
        self._process = psutil.Process(pid)


@contextmanager
def opened_template(tokenizer: Any) -> Iterator[ChatTemplate | None]:
    """The tokenizer's chat template, or None where there is none (or no tokenizer); closed at the end."""
    if not getattr(tokenizer, "chat_template", None):
        yield None
        return
    chat = ChatTemplate(tokenizer)
    try:
        yield chat
    finally:
        chat.close()


def _seconds(process: psutil.Process) -> float:
    """Of a processor, that the process has taken so far."""
    try:
        times = process.cpu_times()
    except psutil.Error:  # it has ended, of which its socket tells
        return 0.0
    return float(times.user + times.system)


# In the process ---------------------------------------------------------------------------------------------------


def _serve(tokenizer: Any, connection: socket.socket, parent: int) -> NoReturn:
    """Answer until the other end is closed. Returns to nothing that the parent was about."""
    status = 1
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # the parent's handlers are not for this one
            signal.signal(number, signal.SIG_DFL)
        ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL)
        with connection.makefile("rwb") as stream, limited(memory=_MEMORY):
            while os.getppid() == parent and (request := _receive(stream)) is not None:
                _send(stream, _render(tokenizer, request["turns"], request["longest"]))
        status = 0
    finally:
        os._exit(status)


def _render(tokenizer: Any, turns: list[Any], longest: int) -> dict[str, str]:
    try:
        text = str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    except MemoryError:
        return {"reason": f"needs more than {_MEMORY:,} bytes for these messages"}
    except Exception as error:  # a template is a program: it may refuse roles, or fail in any other way
        return {"reason": one_line(f"refuses these messages ({error})")}
    if len(text) > longest:
        return {"reason": f"makes {len(text):,} characters of these messages, where {longest:,} are the most"}
    return {"text": text}


def _send(stream: Any, content: Mapping[str, Any]) -> None:
    message = json.dumps(content).encode()
    with suppress(BrokenPipeError):  # the other end is gone, of which the next look tells
        stream.write(len(message).to_bytes(8, "little") + message)
        stream.flush()


def _receive(stream: Any) -> dict[str, Any] | None:
    """The next message, or None where the other end is closed."""
    try:
        size = stream.read(8)
        message = stream.read(int.from_bytes(size, "little"))
    except ConnectionError:
        return None
    content = json.loads(message) if message else None
    return content if isinstance(content, dict) else None
