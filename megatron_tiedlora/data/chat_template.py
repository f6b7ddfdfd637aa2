"""Renders conversations with the tokenizer's chat template, a program that may come from an untrusted model folder.

transformers runs the template in Jinja's sandbox. The sandbox blocks access to files and objects, but it does not limit
time and memory. So the template runs in a forked process, which has a copy of the tokenizer. The kernel limits the
memory of that process, and the parent kills it if it takes too long. The forked process renders conversations, finds
the span of each answer in the text, and finds the names that a template reads.
"""

import json
import os
import re
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any, NoReturn

import psutil
from jinja2 import Environment, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser

from megatron_tiedlora.base.child_process import end_with_parent, limited
from megatron_tiedlora.base.messages import UserError, one_line, shown

# A template takes milliseconds; the first call, which loads Jinja, takes some tenths of a second. Rendering needs a few
# times the memory of the text. A template adds some kB to the messages. Each answer needs up to six renderings.
_SECONDS, _SECONDS_PER_ANSWER, _MEMORY = 1.0, 0.02, 2**28
_OWN_CHARACTERS, _RATIO = 100_000, 10
_SILENCE = 60.0  # maximum wall-clock seconds per request; ends the wait for a process that gets no CPU time

Objects = Sequence[Mapping[str, Any]]  # messages, or schemas of tools
Span = tuple[int, int]  # start and end of an answer in a text
Rendered = tuple[str, tuple[Span, ...]]  # the text that the template writes, and the spans of the requested answers


class ChatTemplate:
    """Runs a tokenizer's chat template in a separate process, which starts with the first request. `name` is the name
    of the template in error messages."""

    def __init__(self, tokenizer: Any, name: str | None = None) -> None:
        self._tokenizer = tokenizer
        self._name = name or getattr(tokenizer, "name_or_path", "the tokenizer")
        self._running: tuple[psutil.Process, Connection] | None = None

    def render(
        self, messages: Objects, source: str, *, answers: Sequence[int], names: Sequence[str], tools: Objects = ()
    ) -> Rendered:
        """Return the text of a conversation, and the spans of the assistant's turns whose indices are in `answers`.

        If the template marks every answer with {% generation %}, each marked text is a span. Otherwise the turns before
        an answer are rendered with a generation prompt, and the span is the text that the answer adds.

        Args:
            names: the name of each turn in error messages.

        Raises:
            UserError: the template rejects the turns, fails, or changes a turn when more turns follow. It is also
                raised if the template needs more than 256 MiB of memory, or more than 1 s of CPU time (plus 0.02 s per
                answer). Its text may have at most 100,000 characters plus ten times the conversation's length.
        """
        turns = {"messages": list(messages), "tools": list(tools) if tools else None, "names": list(names)}
        longest = _OWN_CHARACTERS + _RATIO * _num_characters([turns["messages"], turns["tools"]])
        answer = self._answered({**turns, "answers": list(answers), "longest": longest}, source)
        return answer["text"], tuple((int(start), int(end)) for start, end in answer["answers"])

    def names(self, text: str, source: str) -> "TemplateNames":
        """Return the names that the template `text` reads. Raises UserError if `text` is invalid or takes too long."""
        found = self._answered({"template": text, "answers": ()}, source)
        return TemplateNames(**{name: frozenset(words) for name, words in found["found"].items()})

    def close(self) -> None:
        """Stop the process that runs the template."""
        if self._running is not None:
            process, connection = self._running
            connection.close()
            with suppress(psutil.Error):
                process.kill()
            with suppress(OSError):
                os.waitpid(process.pid, 0)
        self._running = None

    def _answered(self, request: Mapping[str, Any], source: str) -> dict[str, Any]:
        """Send a request to the process and return its answer. Raises UserError if this fails or takes too long."""
        process, connection = self._running or self._start()
        before, deadline = _seconds(process), time.monotonic() + _SILENCE
        most, late = _SECONDS + _SECONDS_PER_ANSWER * len(request["answers"]), ""
        _send(connection, request)
        while not late and not connection.poll(0.05):
            if _seconds(process) - before > most:
                late = f"takes more than {_SECONDS:g} s for these messages"
            elif time.monotonic() > deadline:
                late = f"did not finish within {_SILENCE:g} s"
        answer = None if late else _receive(connection)
        if answer is None:
            self.close()
            answer = {"reason": late or "ended its process"}
        if "reason" not in answer:
            return answer
        reason, fix = one_line(str(answer["reason"])), answer.get("fix", "change the rows or the --chat_template")
        raise UserError(f"{source}: the chat template of {self._name} {reason}; {fix}")

    def _start(self) -> tuple[psutil.Process, Connection]:
        (ours, theirs), parent = Pipe(), os.getpid()
        if (pid := os.fork()) == 0:
            ours.close()
            _serve(self._tokenizer, theirs, parent)
        theirs.close()
        self._running = psutil.Process(pid), ours
        return self._running


def _seconds(process: psutil.Process) -> float:
    """Return the CPU time that the process has used so far, in seconds."""
    try:
        times = process.cpu_times()
    except psutil.Error:  # the process has ended; the caller sees this at the connection
        return 0.0
    return float(times.user + times.system)


# In the process ---------------------------------------------------------------------------------------------------


def _serve(tokenizer: Any, connection: Connection, parent: int) -> NoReturn:
    """Answer requests until the parent closes the connection, then exit the process. This function never returns."""
    status = 1
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # do not inherit the parent's handlers
            signal.signal(number, signal.SIG_DFL)
        end_with_parent(parent)
        with limited(memory=_MEMORY):
            while os.getppid() == parent and (request := _receive(connection)) is not None:
                _send(connection, _answer(tokenizer, request))
        status = 0
    finally:
        os._exit(status)


def _answer(tokenizer: Any, request: Mapping[str, Any]) -> dict[str, Any]:
    parses = "template" in request
    try:
        if parses:
            return {"found": {name: sorted(words) for name, words in vars(template_names(request["template"])).items()}}
        given = request["messages"], request["tools"], request["answers"]
        text, spans = render_with_spans(tokenizer, *given, names=request["names"])
    except MemoryError:
        return {"reason": f"needs more than {_MEMORY:,} bytes {'to be parsed' if parses else 'for these messages'}"}
    except TurnsChange as error:
        fix = "give --train_on last_turn, or a --chat_template that marks answers with {% generation %}"
        return {"reason": str(error), "fix": fix}
    except Exception as error:  # a template is foreign code: it may reject roles, or fail in any other way
        if parses:
            return {"reason": f"is not valid Jinja ({one_line(str(error))})", "fix": "give another --chat_template"}
        return {"reason": one_line(f"rejects these messages ({error})")}
    if len(text) > (longest := request["longest"]):
        return {"reason": f"produces {len(text):,} characters from these messages (the limit is {longest:,})"}
    return {"text": text, "answers": spans}


def _num_characters(value: Any) -> int:
    """Return the total length of all texts in a JSON value, in characters."""
    if isinstance(value, str):
        return len(value)
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return sum(map(_num_characters, parts))


def _send(connection: Connection, content: Mapping[str, Any]) -> None:
    with suppress(BrokenPipeError):  # the other end is closed, and the next read will fail
        connection.send_bytes(json.dumps(content).encode())


def _receive(connection: Connection) -> dict[str, Any] | None:
    """Return the next message, or None if the other process has closed the connection."""
    try:
        content = json.loads(connection.recv_bytes())
    except (EOFError, ConnectionError):
        return None
    return content if isinstance(content, dict) else None


# Rendering in the process ---------------------------------------------------------------------------------------------
#
# Names are found in a template's syntax tree, not in comments or parts of words. The span of answer i starts where
# render(turns before i, with a generation prompt) and the whole text first differ. It ends at the length of
# render(turns up to i).


_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_THOUGHT_END = "</think>"  # some templates write an empty thought before the last answer only


@dataclass(frozen=True)
class TemplateNames:
    """The names in a template.

    variables: names of variables that the template reads, such as tools in `{% if tools %}`.
    fields: names of fields that it reads, as in message.tool_calls or message['tool_calls'], and all `constants`.
    constants: strings in its code, such as the roles with which it compares. Strings that it only writes are excluded.
    """

    variables: frozenset[str] = frozenset()
    fields: frozenset[str] = frozenset()
    constants: frozenset[str] = frozenset()


class _Generation(Extension):
    """Parses {% generation %}, which marks the text that the assistant generates."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own declaration

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """Return the syntax nodes between {% generation %} and {% endgeneration %}."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def template_names(text: str) -> TemplateNames:
    """Return the names in the text of a template. Raises the errors of Jinja if the template is not valid."""
    tree = Environment(autoescape=False, extensions=[_Generation, "jinja2.ext.loopcontrols"]).parse(text)
    writers = tree.find_all((nodes.Output, nodes.Add, nodes.Concat))
    written = {id(child) for node in writers for child in node.iter_child_nodes()}
    constants = frozenset(
        node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str) and id(node) not in written
    )
    return TemplateNames(
        frozenset(node.name for node in tree.find_all(nodes.Name) if node.ctx == "load"),
        frozenset(node.attr for node in tree.find_all(nodes.Getattr)) | constants,
        constants,
    )


class TurnsChange(ValueError):
    """Raised if the template writes a turn differently when more turns follow, so that its span cannot be found."""


def has_marks(template: str) -> bool:
    """Return whether a template marks the assistant's text with {% generation %}."""
    return _GENERATION.search(template) is not None


def render_with_spans(
    tokenizer: Any, messages: Objects, tools: Objects | None, answers: Sequence[int], *, names: Sequence[str]
) -> Rendered:
    """Return the text of the messages, and the span of each message whose index is in `answers`. `names` has the name
    of each message in errors. Raises TurnsChange if a span cannot be found. Errors of the template are not caught."""
    if found := _by_marks(tokenizer, messages, tools):
        return found[0], tuple(found[1][index] for index in answers)
    render, eos = partial(_render, tokenizer, tools=tools), getattr(tokenizer, "eos_token", None) or ""
    whole = render(messages)
    return whole, tuple(_span(render, messages, whole, index, names[index], eos) for index in answers)


def _by_marks(tokenizer: Any, messages: Objects, tools: Objects | None) -> tuple[str, dict[int, Span]] | None:
    """Return the text and the marked span of each answer, or None if an answer has no marked span."""
    if not has_marks(tokenizer.get_chat_template(tools=tools)):
        return None
    text, marks = _marked(tokenizer, messages, tools)
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if len(marks) == len(answers):
        return text, dict(zip(answers, marks, strict=True))
    # Some templates also mark the end of the whole text. Marks before an answer are counted by rendering earlier turns.
    before = [len(_marked(tokenizer, messages[:index], tools, starts_answer=True)[1]) for index in answers]
    pieces = [marks[first:last] for first, last in pairwise([*before, len(marks)])]
    if not all(pieces) or any(one[1] != other[0] for piece in pieces for one, other in pairwise(piece)):
        return None
    return text, {index: (piece[0][0], piece[-1][1]) for index, piece in zip(answers, pieces, strict=True)}


def _marked(
    tokenizer: Any, messages: Objects, tools: Objects | None, *, starts_answer: bool = False
) -> tuple[str, list[Span]]:
    """Return the text of the messages, and the spans that the template marks."""
    from transformers.utils.chat_template_utils import render_jinja_template

    # The function returns (texts, spans per text); its annotation is wrong.
    found: Any = render_jinja_template(
        conversations=[list[Any](messages)],
        tools=None if tools is None else list[Any](tools),
        chat_template=tokenizer.get_chat_template(tools=tools),
        return_assistant_tokens_mask=True,
        add_generation_prompt=starts_answer,
        **tokenizer.special_tokens_map,
    )
    (text,), (spans,) = found
    return text, [(start, end) for start, end in spans]


def _span(render: Callable[..., str], messages: Objects, whole: str, index: int, name: str, eos: str) -> Span:
    """Return the span of message `index` in `whole`, the text of all messages. `name` names the message in errors."""
    prompt = render(messages[:index], starts_answer=True)
    start = len(os.path.commonprefix([prompt, whole]))  # noqa: RUF071 - compares characters; these are not paths
    if start < len(prompt):  # the generation prompt may have more text than the answer, such as an open thought
        before = render(messages[:index])
        if not whole.startswith(before):
            raise TurnsChange(f"writes the text before {name} differently when {name} follows")
        # Text that prompt and answer share belongs to the answer. So the span starts where another answer would begin.
        other = render([*messages[:index], {**messages[index], "content": _OTHER}])
        begins = other.find(_OTHER)
        if begins >= 0 and whole.startswith(other[:begins]):
            start = min(start, begins)
    until = render(messages[: index + 1])
    if whole.startswith(until):
        return start, len(until)
    if until.endswith(eos) and whole.startswith(until.removesuffix(eos)):  # the template ends the last turn with EOS
        return start, len(until) - len(eos)
    # A template may write an empty thought before the last answer only, so the text after the thought is compared.
    text = str(messages[index].get("content") or "").strip()
    longest_extra = until.find(text, start) if text else until.find(_THOUGHT_END, start) + len(_THOUGHT_END) + 2
    for extra in range(start, max(longest_extra, 0) + 1):
        added = until[start:extra]
        thought = added.rstrip().endswith(_THOUGHT_END) and not re.sub("</?think>", "", added).strip()
        if (not added or thought) and whole.startswith(until[extra:], start):
            return start, start + len(until) - extra
    raise TurnsChange(f"writes {name} ({shown(text[:40])}) differently when more turns follow")


_OTHER = "\ue000\ue001"  # a test answer that begins like no other text: two private-use characters


def _render(tokenizer: Any, messages: Objects, tools: Objects | None, *, starts_answer: bool = False) -> str:
    more: Mapping[str, Any] = {"add_generation_prompt": starts_answer, **({} if tools is None else {"tools": [*tools]})}
    return str(tokenizer.apply_chat_template(list(messages), tokenize=False, **more))
