"""Which names a chat template reads, what it writes for a conversation, and the span of each answer in that.

It runs in the process of `chat_template`, which limits it, since a template is a stranger's file. Names are found by
Jinja's syntax tree: a comment, or a part of another word, is no name. The span of answer i is
[common start of render(turns before i, with the start of an answer) and the whole, length of render(turns up to i)].
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from jinja2 import Environment, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser

from megatron_tiedlora.base.errors import shown

_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_THOUGHT_END = "</think>"  # some templates write an empty thought before the last answer only


@dataclass(frozen=True)
class TemplateNames:
    """The names in a template.

    variables: names that it reads, such as tools in `{% if tools %}`.
    fields: what it reads of an object, as message.tool_calls or message['tool_calls'], and all `constants`.
    constants: texts in its code, such as those that it compares roles with; without those that it only writes.
    """

    variables: frozenset[str] = frozenset()
    fields: frozenset[str] = frozenset()
    constants: frozenset[str] = frozenset()


class _Generation(Extension):
    """Parses {% generation %}, the mark around what the assistant generates."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own declaration

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The nodes inside of it."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def template_names(text: str) -> TemplateNames:
    """The names in a template's text. Raises whatever Jinja does for a broken one."""
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


@dataclass(frozen=True)
class Rendered:
    """A conversation as the template writes it.

    text: all of it.
    answers: (start, end) in the text of each answer that was asked for.
    """

    text: str
    answers: tuple[tuple[int, int], ...] = ()


class TurnsChange(ValueError):
    """The template writes a turn in another way once others follow, so its span cannot be found."""


def has_marks(template: str) -> bool:
    """Whether a template marks what the assistant generates, with {% generation %}."""
    return _GENERATION.search(template) is not None


def render_with_spans(
    tokenizer: Any,
    messages: Sequence[Any],
    tools: Sequence[Any] | None,
    answers: Sequence[int],
    *,
    names: Sequence[str] = (),
) -> Rendered:
    """The messages with the spans of those with the indices `answers`.

    Args:
        names: what each message is called in errors; by default "message 1" and so on.

    Raises:
        TurnsChange: a span cannot be found. Whatever the template raises.
    """
    if marked := _by_marks(tokenizer, messages, tools):
        return Rendered(marked.text, tuple(marked.answers[_number(messages, index)] for index in answers))
    names = names or [f"message {number}" for number in range(1, len(messages) + 1)]
    whole = _render(tokenizer, messages, tools)
    return Rendered(whole, tuple(_span(tokenizer, messages, tools, whole, index, names) for index in answers))


def _by_marks(tokenizer: Any, messages: Sequence[Any], tools: Sequence[Any] | None) -> Rendered | None:
    """The spans of all answers by the template's generation marks; None unless each answer is one piece of them."""
    if not has_marks(tokenizer.get_chat_template(tools=tools)):
        return None
    text, marks = _marked(tokenizer, messages, tools)
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if len(marks) == len(answers):
        return Rendered(text, tuple(marks))
    # Some templates mark the end of the whole as well. The marks before an answer are those of the turns before it.
    before = [len(_marked(tokenizer, messages[:index], tools, starts_answer=True)[1]) for index in answers]
    pieces = [marks[first:last] for first, last in pairwise([*before, len(marks)])]
    if not all(pieces) or any(one[1] != other[0] for piece in pieces for one, other in pairwise(piece)):
        return None
    return Rendered(text, tuple((piece[0][0], piece[-1][1]) for piece in pieces))


def _marked(
    tokenizer: Any, messages: Sequence[Any], tools: Sequence[Any] | None, *, starts_answer: bool = False
) -> tuple[str, list[tuple[int, int]]]:
    """The text of messages, and the spans that the template marks."""
    from transformers.utils.chat_template_utils import render_jinja_template

    # It returns (texts, spans by text), which its own annotation does not say.
    found: Any = render_jinja_template(
        conversations=[list(messages)],
        tools=None if tools is None else list(tools),
        chat_template=tokenizer.get_chat_template(tools=tools),
        return_assistant_tokens_mask=True,
        add_generation_prompt=starts_answer,
        **tokenizer.special_tokens_map,
    )
    (text,), (spans,) = found
    return text, [(start, end) for start, end in spans]


def _number(messages: Sequence[Any], index: int) -> int:
    """How many answers there are before the message `index`."""
    return sum(message["role"] == "assistant" for message in messages[:index])


def _span(
    tokenizer: Any,
    messages: Sequence[Any],
    tools: Sequence[Any] | None,
    whole: str,
    index: int,
    names: Sequence[str],
) -> tuple[int, int]:
    """The span of the answer `index` in the rendering of all messages."""
    prompt = _render(tokenizer, messages[:index], tools, starts_answer=True)
    start = _common(prompt, whole)
    if start < len(prompt):  # the start of an answer may hold more than an answer has, such as an open thought
        before = _render(tokenizer, messages[:index], tools)
        if not whole.startswith(before):
            raise TurnsChange(f"writes what comes before {names[index]} in another way once that follows")
        # What the answer has in common with that start belongs to the answer, so look where another one would begin.
        other = _render(tokenizer, [*messages[:index], {**messages[index], "content": _OTHER}], tools)
        begins = other.find(_OTHER)
        if begins >= 0 and whole.startswith(other[:begins]):
            start = min(start, begins)
    until = _render(tokenizer, messages[: index + 1], tools)
    if whole.startswith(until):
        return start, len(until)
    end = getattr(tokenizer, "eos_token", None) or ""
    ended = until.endswith(end) and _render(tokenizer, messages[:index], tools).endswith(end)
    if ended and whole.startswith(until.removesuffix(end)):  # the template ends every text with it, whatever is last
        return start, len(until) - len(end)
    # As the last turn it may be written with an empty thought before its text: compare what comes after that.
    text = str(messages[index].get("content") or "").strip()
    longest_extra = until.find(text, start) if text else until.find(_THOUGHT_END, start) + len(_THOUGHT_END) + 2
    for extra in range(start, max(longest_extra, 0) + 1):
        added = until[start:extra]
        if (not added or _is_empty_thought(added)) and whole.startswith(until[extra:], start):
            return start, start + len(until) - extra
    raise TurnsChange(f"writes {names[index]} ({shown(text[:40])}) in another way once others follow")


def _is_empty_thought(text: str) -> bool:
    """Whether a text is the end of a thought in which nothing is thought, with or without its start."""
    return text.rstrip().endswith(_THOUGHT_END) and not re.sub("</?think>", "", text).strip()


_OTHER = "\ue000\ue001"  # an answer that begins like no other text: two characters for private use


def _common(first: str, second: str) -> int:
    """Length of the common start of two texts."""
    if second.startswith(first):
        return len(first)
    same = (one == other for one, other in zip(first, second, strict=False))
    return next((length for length, equal in enumerate(same) if not equal), min(len(first), len(second)))


def _render(
    tokenizer: Any, messages: Sequence[Any], tools: Sequence[Any] | None, *, starts_answer: bool = False
) -> str:
    more: Mapping[str, Any] = {} if tools is None else {"tools": list(tools)}
    return str(
        tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=starts_answer, **more)
    )
