"""The text of a conversation: written by the chat template, or as lines `User: ...` and `Assistant: ...`.

Owns what is supervised in it, and which roles and fields a template knows. Leaves the template's process to
`chat_template`, and tokens to `encode`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_tiedlora.base.errors import UserError, shown
from megatron_tiedlora.base.paths import user_path
from megatron_tiedlora.base.text_files import read_small_text
from megatron_tiedlora.data.chat_template import ChatTemplate
from megatron_tiedlora.data.control_tokens import ControlTokens
from megatron_tiedlora.data.examples import Segment, join_answer
from megatron_tiedlora.data.reading import Reading
from megatron_tiedlora.data.rendering import has_marks
from megatron_tiedlora.data.turns import ASSISTANT, REASONING, Conversation

_PLAIN_ROLES = ("system", "user", ASSISTANT)  # every template writes these, in one way or another


class Chat:
    """How the rows of a data set become text. It runs the tokenizer's chat template, so it has to be closed.

    Attributes:
        reading: what the user decided.
        control: the tokenizer's control tokens in a row's texts.
        templated: whether there is a chat template.
    """

    def __init__(self, tokenizer: Any, reading: Reading) -> None:
        self.reading = reading
        self.control = ControlTokens(tokenizer, reading.special_tokens)
        self.templated = bool(getattr(tokenizer, "chat_template", None))
        self._tokenizer = tokenizer
        self._template = ChatTemplate(tokenizer, reading.chat_template) if self.templated else None

    def segments(self, conversation: Conversation, source: str) -> tuple[tuple[Segment, ...], int]:
        """The text of a conversation, and how many of its segments are before the last answer.

        Raises:
            UserError: the template does not know a role, would drop a field, or fails.
        """
        if self.reading.train_on == "last_turn":
            conversation = conversation.with_last_turn_trained()
            if not conversation.trained[-1]:
                raise UserError(f"{source}: the last turn is not to be trained, so --train_on last_turn has none")
        if self.reading.first_rules:
            return self._by_first_rules(conversation, source)
        self._check_known(conversation, source)
        conversation = self._guarded(conversation, source)
        parts = self._lines(conversation) if self._template is None else self._rendered(conversation, source)
        last = max(index for index, (_, answer) in enumerate(parts) if answer is not None)
        before = self._joined(parts[:last])
        return (*before, *self._joined(parts[last:])), len(before)

    def close(self) -> None:
        """End the template's process."""
        if self._template is not None:
            self._template.close()

    # The parts of a text: (text, None) or (an answer's text, whether it is supervised).

    def _rendered(self, conversation: Conversation, source: str) -> list[tuple[str, bool | None]]:
        assert self._template is not None
        trained = [index for index in conversation.answers if conversation.trained[index]]
        wanted = sorted({*trained, conversation.answers[-1]})
        found = self._template.render(conversation.messages, source, answers=wanted, tools=conversation.tools)
        parts: list[tuple[str, bool | None]] = []
        position = 0
        for index, (start, end) in zip(wanted, found.answers, strict=True):
            parts += [(found.text[position:start], None), (found.text[start:end], conversation.trained[index])]
            position = end
        return [*parts, (found.text[position:], None)]

    def _lines(self, conversation: Conversation) -> list[tuple[str, bool | None]]:
        parts: list[tuple[str, bool | None]] = []
        for number, (message, trained) in enumerate(zip(conversation.messages, conversation.trained, strict=True)):
            head = f"{'' if number == 0 else chr(10)}{message['role'].capitalize()}:"
            if message["role"] == ASSISTANT:
                parts += [(head, None), (join_answer(head, message["content"]), trained)]
            else:
                parts.append((f"{head} {message['content']}", None))
        return parts

    def _joined(self, parts: Sequence[tuple[str, bool | None]]) -> list[Segment]:
        """Segments of parts; neighbours that are not supervised are one, so that they are tokenised together."""
        texts: list[tuple[str, bool, bool]] = []
        for text, answer in parts:
            ends = answer is not None and self._template is None
            if texts and not answer and not texts[-1][1] and not texts[-1][2]:
                texts[-1] = (texts[-1][0] + text, False, ends)
            elif text:
                texts.append((text, bool(answer), ends))
        return [segment for text, supervised, ends in texts for segment in self.cut(text, supervised, ends=ends)]

    def cut(self, text: str, supervised: bool, *, ends: bool = False) -> list[Segment]:
        """The segments of a text that may have marked control tokens."""
        pieces = self.control.pieces(text)
        return [
            Segment(piece, supervised, plain=plain, ends=ends and number == len(pieces))
            for number, (piece, plain) in enumerate(pieces, start=1)
        ]

    def _guarded(self, conversation: Conversation, source: str) -> Conversation:
        """The conversation with the control tokens of its texts marked, or rejected."""
        messages = [
            {
                name: self.control.guard(value, f"field {name!r}", f"{source}, message {number}")
                for name, value in message.items()
            }
            for number, message in enumerate(conversation.messages, start=1)
        ]
        tools = self.control.guard(conversation.tools, "field 'tools'", source)
        return replace(conversation, messages=tuple(messages), tools=tools)

    def _by_first_rules(self, conversation: Conversation, source: str) -> tuple[tuple[Segment, ...], int]:
        """Version 0.1: the prompt of the last answer, and its content with an end-of-sequence token."""
        before = conversation.messages[:-1]
        if self._template is not None:
            prompt = self._template.render_prompt(before, source)
        else:
            lines = [f"{message['role'].capitalize()}: {message['content']}" for message in before]
            prompt = "\n".join([*lines, "Assistant:"])
        answer = join_answer(prompt, conversation.answer)
        return (Segment(prompt), Segment(answer, supervised=True, ends=True)), 1

    def _check_known(self, conversation: Conversation, source: str) -> None:
        """Raise UserError for what the template, or lines without one, would drop or not know."""
        calls = any("tool_calls" in message for message in conversation.messages)
        fields = (("tools", bool(conversation.tools)), ("tool_calls", calls))
        template = self._template_text(conversation.tools) if self.templated else ""
        for name, used in fields:
            if used and name not in template:
                raise UserError(f"{source}: {name!r} is not read by {self.name}; {self._fix}")
        thinks = any(name in message for message in conversation.messages for name in REASONING)
        if thinks and not any(name in template for name in REASONING):
            raise UserError(f"{source}: {REASONING[0]!r} is not read by {self.name}; {self._fix}, or remove the field")
        if self.reading.special_tokens != "refuse":
            return
        for role in dict.fromkeys(message["role"] for message in conversation.messages):
            if role not in _PLAIN_ROLES and not re.search(rf"['\"]{re.escape(role)}['\"]", template):
                raise UserError(
                    f"{source}: role {shown(role)} is not known to {self.name}; {self._fix}, or"
                    " --special_tokens_in_text plain to write it as it stands"
                )

    @property
    def name(self) -> str:
        """What writes the text of conversations, in words."""
        if not self.templated:
            return "lines of User: and Assistant: (the tokenizer has no chat template)"
        given = self.reading.chat_template
        return f"the chat template of {given or getattr(self._tokenizer, 'name_or_path', 'the tokenizer')}"

    @property
    def _fix(self) -> str:
        return f"give {'another' if self.templated else 'a'} --chat_template"

    def _template_text(self, tools: Any) -> str:
        try:
            return str(self._tokenizer.get_chat_template(tools=tools))
        except ValueError as error:  # several templates, none of which is the default
            raise UserError(f"{self.name}: {error}; give one with --chat_template") from None

    def note(self) -> str:
        """How conversations are read, for the first lines of a run."""
        what = "every answer" if self.reading.train_on == "all_turns" else "the last answer"
        if self.reading.first_rules or not self.templated:
            return f"{self.name}; {what} is supervised"
        how = "its generation marks" if has_marks(self._template_text(None)) else "comparing its renderings"
        return f"{self.name}; {what} is supervised, found by {how}"


def chat_writer(tokenizer: Any, reading: Reading) -> str:
    """What writes the text of conversations with a tokenizer, in words."""
    with opened_chat(tokenizer, reading) as chat:
        return chat.name


def chat_note(tokenizer: Any, reading: Reading) -> str:
    """How conversations are read with a tokenizer."""
    with opened_chat(tokenizer, reading) as chat:
        return chat.note()


@contextmanager
def opened_chat(tokenizer: Any, reading: Reading) -> Iterator[Chat]:
    """Yield the `Chat` of a tokenizer, which may be None. Closes it afterwards."""
    chat = Chat(tokenizer, reading)
    try:
        yield chat
    finally:
        chat.close()


def set_chat_template(tokenizer: Any, file: str | Path | None) -> None:
    """Give the tokenizer the chat template of --chat_template; its own stays without one.

    Raises:
        UserError: the file is missing, not text, or empty.
    """
    if file is None:
        return
    path = user_path(file)
    if not path.is_file():
        raise UserError(f"--chat_template {file}: no such file; give a Jinja template")
    text = read_small_text(path, kind="a chat template")
    if not text.strip():
        raise UserError(f"--chat_template {file}: is empty; give a Jinja template")
    tokenizer.chat_template = text
