"""Renders conversations with the tokenizer's chat template, a program that may come from an untrusted model folder.

transformers runs it in Jinja's sandbox. That blocks access to files and objects, but not unlimited time and memory,
even within one call of a built-in function. So it runs in a forked process, which has the tokenizer in its present
state. The kernel limits the memory of that process, and it is killed if it takes too long.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any, NoReturn

import psutil

from megatron_tiedlora.base.child_process import end_with_parent, limited
from megatron_tiedlora.base.errors import UserError, one_line
from megatron_tiedlora.data.rendering import Rendered, TemplateNames, TurnsChange, render_with_spans, template_names

# Templates take milliseconds; the first call, which loads Jinja, takes some tenths of a second. They need a few times
# the memory of the text, and add some kB to it. A conversation is rendered up to six times for each of its answers.
_SECONDS, _SECONDS_PER_ANSWER, _MEMORY = 1.0, 0.02, 2**28
_OWN_CHARACTERS, _RATIO = 100_000, 10
_SILENCE = 60.0  # wall-clock seconds without an answer, for a process that gets no CPU time


class ChatTemplate:
    """A tokenizer's chat template in its own process, which starts with the first conversation.

    Args:
        name: what the template is called in messages.
    """

    def __init__(self, tokenizer: Any, name: str | None = None) -> None:
        self._tokenizer = tokenizer
        self._name = name or getattr(tokenizer, "name_or_path", "the tokenizer")
        self._process: psutil.Process | None = None
        self._connection: Connection | None = None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        source: str,
        *,
        answers: Sequence[int],
        tools: Sequence[Mapping[str, Any]] | None = None,
        names: Sequence[str] = (),
    ) -> Rendered:
        """Return the text of a conversation, with the spans of the assistant's turns whose indices are `answers`.

        The template's generation marks give a span, if there is one for each answer of the assistant. Otherwise a turn
        is what its rendering adds to that of the turns before it, with the start of an answer.

        Args:
            names: what each turn is called in errors.

        Raises:
            UserError: the template rejects the turns or fails; it writes a turn in another way once others follow; it
                needs more than a second of CPU time or 256 MiB; its text is longer than ten times the conversation's
                plus 100,000 characters.
        """
        turns = {"messages": list(messages), "tools": list(tools) if tools else None, "names": list(names)}
        longest = _OWN_CHARACTERS + _RATIO * _num_characters([turns["messages"], turns["tools"]])
        answer = self._answered({**turns, "answers": list(answers), "longest": longest}, source)
        return Rendered(answer["text"], tuple((int(start), int(end)) for start, end in answer["answers"]))

    def names(self, text: str, source: str) -> TemplateNames:
        """Return the names that a template's `text` reads. Raises UserError if it is broken, or takes too long."""
        found = self._answered({"template": text, "answers": ()}, source)
        return TemplateNames(**{name: frozenset(words) for name, words in found["found"].items()})

    def _answered(self, request: Mapping[str, Any], source: str) -> dict[str, Any]:
        """The answer of the process. Raises UserError with its reason if there is none."""
        answer = self._ask(request)
        if "reason" not in answer:
            return answer
        reason = one_line(str(answer.get("reason")))
        fix = answer.get("fix", "give other rows, or another --chat_template")
        raise UserError(f"{source}: the chat template of {self._name} {reason}; {fix}")

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
        most = _SECONDS + _SECONDS_PER_ANSWER * len(request["answers"])
        _send(self._connection, request)
        while not self._connection.poll(0.05):
            if _seconds(self._process) - before > most:
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
        end_with_parent(parent)
        with limited(memory=_MEMORY):
            while os.getppid() == parent and (request := _receive(connection)) is not None:
                _send(connection, _render(tokenizer, request))
        status = 0
    finally:
        os._exit(status)


def _render(tokenizer: Any, request: Mapping[str, Any]) -> dict[str, Any]:
    if "template" in request:
        return _names(request["template"])
    try:
        found = render_with_spans(
            tokenizer, request["messages"], request["tools"], request["answers"], names=request["names"]
        )
    except MemoryError:
        return {"reason": f"needs more than {_MEMORY:,} bytes for these messages"}
    except TurnsChange as error:
        fix = "give --train_on last_turn, or a --chat_template that marks answers with {% generation %}"
        return {"reason": str(error), "fix": fix}
    except Exception as error:  # a template is a program: it may reject roles, or fail in any other way
        return {"reason": one_line(f"rejects these messages ({error})")}
    if len(found.text) > request["longest"]:
        return {
            "reason": f"makes {len(found.text):,} characters from these messages (the limit is {request['longest']:,})"
        }
    return {"text": found.text, "answers": found.answers}


def _names(text: str) -> dict[str, Any]:
    try:
        return {"found": {name: sorted(words) for name, words in vars(template_names(text)).items()}}
    except MemoryError:
        return {"reason": f"needs more than {_MEMORY:,} bytes to be parsed"}
    except Exception as error:  # a template is a stranger's program
        return {"reason": f"is no Jinja template ({one_line(str(error))})", "fix": "give another --chat_template"}


def _num_characters(value: Any) -> int:
    """Length of all texts in a value of JSON."""
    if isinstance(value, str):
        return len(value)
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return sum(map(_num_characters, parts))


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
