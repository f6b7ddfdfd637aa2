"""Converts a conversation to text, with the chat template or as lines that begin with `User:` and `Assistant:`.

This module also decides which parts of the text are supervised, and checks that the template knows all roles and
fields. The module `chat_template` runs the template, and the module `encode` tokenises the text.
"""

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_tiedlora.base.files import read_small_text
from megatron_tiedlora.base.messages import UserError, shown, user_path
from megatron_tiedlora.data.chat_template import ChatTemplate, TemplateNames, has_marks
from megatron_tiedlora.data.task import Example, Reading, Segment, join_answer
from megatron_tiedlora.data.turns import ASSISTANT, CALLS, REASONING, TOOL, Conversation

_PLAIN_ROLES = ("system", "user", ASSISTANT)  # every template can write these
_TOOL_ROLES = (TOOL, "observation", "environment")  # names of one role in different templates
_WORD = re.compile(r"\w+")


class Chat:
    """Converts conversations to text. It runs the tokenizer's chat template in a separate process, so `close` must be
    called. The tokenizer may be None, for example if the text is not tokenised.

    Attributes:
        reading: the user's options for reading rows.
        templated: whether there is a chat template. A template also writes the tokens at the start and end of a text.
    """

    def __init__(self, tokenizer: Any, reading: Reading) -> None:
        self.reading = reading
        self._control = _control_tokens(tokenizer, reading.special_tokens)
        self.templated = bool(getattr(tokenizer, "chat_template", None))
        self._tokenizer, self._name = tokenizer, chat_writer(tokenizer, reading)
        self._template = ChatTemplate(tokenizer, reading.chat_template) if self.templated else None
        self._names: dict[bool, TemplateNames] = {}  # by whether there are tools; these may have their own template

    def segments(self, conversation: Conversation, source: str) -> tuple[tuple[Segment, ...], int]:
        """Return the segments of a conversation's text, and the number of segments before the last answer. Raises
        UserError if the template fails, does not know a role, or would ignore a field."""
        if self.reading.train_on == "last_turn":
            conversation = conversation.with_last_turn_alone()
        self._check_known(conversation, source)
        conversation = self._guarded(conversation, source)
        parts = self._lines(conversation) if self._template is None else self._rendered(conversation, source)
        last = max(index for index, (_, answer) in enumerate(parts) if answer is not None)
        before = self._joined(parts[:last])
        return (*before, *self._joined(parts[last:])), len(before)

    def close(self) -> None:
        """Stop the process that runs the template."""
        if self._template is not None:
            self._template.close()

    # The next methods divide a text into parts: (text, None), or (text of an answer, whether the answer is supervised).

    def _rendered(self, conversation: Conversation, source: str) -> list[tuple[str, bool | None]]:
        assert self._template is not None
        turns = conversation.turns
        wanted = [index for index, turn in enumerate(turns) if turn.trained or turn is turns[-1]]
        tool = next((role for role in _TOOL_ROLES if role in self._names[bool(conversation.tools)].constants), TOOL)
        messages = [{**turn.message, "role": tool} if turn.message["role"] == TOOL else turn.message for turn in turns]
        names = [turn.name for turn in turns]
        tools = conversation.tools or ()
        text, spans = self._template.render(messages, source, answers=wanted, names=names, tools=tools)
        self._check_written(conversation, text, source)
        parts: list[tuple[str, bool | None]] = []
        position = 0
        for index, (start, end) in zip(wanted, spans, strict=True):
            parts += [(text[position:start], None), (text[start:end], turns[index].trained)]
            position = end
        return [*parts, (text[position:], None)]

    def _lines(self, conversation: Conversation) -> list[tuple[str, bool | None]]:
        parts: list[tuple[str, bool | None]] = []
        for number, turn in enumerate(conversation.turns):
            message = turn.message
            head = f"{'' if number == 0 else chr(10)}{message['role'].capitalize()}:"
            if message["role"] == ASSISTANT:
                parts += [(head, None), (join_answer(head, message["content"]), turn.trained)]
            else:
                parts.append((f"{head} {message['content']}", None))
        return parts

    def _joined(self, parts: Sequence[tuple[str, bool | None]]) -> list[Segment]:
        """Return the segments of a text from its parts. Adjacent unsupervised parts become one segment."""
        texts: list[tuple[str, bool, bool]] = []
        for text, answer in parts:
            ends = answer is not None and self._template is None
            if texts and not answer and not texts[-1][1] and not texts[-1][2]:
                texts[-1] = (texts[-1][0] + text, False, ends)
            elif text:
                texts.append((text, bool(answer), ends))
        return [segment for text, supervised, ends in texts for segment in self.cut(text, supervised, ends=ends)]

    def cut(self, text: str, supervised: bool, *, ends: bool = False) -> list[Segment]:
        """Divide a text into segments, so that each marked control token is tokenised as plain text."""
        parts = [(text, False)]
        if self.reading.special_tokens == "plain" and (_START in text or _END in text):
            marked = [start.partition(_END) for start in text.split(_START)]
            parts = [part for token, end, after in marked for part in ((token, bool(end)), (after, False))]
            parts = [(part.replace(_END, ""), plain) for part, plain in parts if part] or [("", False)]
        segments = [Segment(part, supervised, plain=plain) for part, plain in parts]
        return [*segments[:-1], replace(segments[-1], ends=ends)]

    def _guarded(self, conversation: Conversation, source: str) -> Conversation:
        """Return the conversation with marks around its control tokens. Raises UserError as `guard` does."""
        turns = []
        for turn in conversation.turns:
            where, message = f"{source}, {turn.name}", dict(turn.message)
            for name, value in turn.message.items():
                message[name] = self.guard(value, "the text" if name == "content" else f"field {name!r}", where)
            turns.append(replace(turn, message=message))
        return Conversation(tuple(turns), self.guard(conversation.tools, "field 'tools'", source))

    def guard(self, value: Any, what: str, source: str) -> Any:
        """Return `value` (a text, or JSON with texts) with marks around its control tokens. `what` is its name in
        errors. Raises UserError for a control token if the user has not chosen how to tokenise control tokens."""
        if isinstance(value, dict):
            return {self.guard(key, what, source): self.guard(item, what, source) for key, item in value.items()}
        if not isinstance(value, str):
            return [self.guard(item, what, source) for item in value] if isinstance(value, list | tuple) else value
        is_plain = self.reading.special_tokens == "plain"
        if is_plain and (_START in value or _END in value):
            raise UserError(f"{source}: {what} contains U+FDD0 or U+FDD1, which are not characters; remove them")
        if self._control is None or (found := self._control.search(value)) is None:
            return value
        if is_plain:
            return self._control.sub(f"{_START}\\g<0>{_END}", value)
        raise UserError(
            f"{source}: {what} contains {found[0]!r}, a control token of the tokenizer; give"
            " --special_tokens_in_text plain to tokenise it as text, or control to tokenise it as that token"
        )

    def _check_known(self, conversation: Conversation, source: str) -> None:
        """Raise UserError if the chat template, or the plain format, would ignore a field or does not know a role."""
        names, has_tools = TemplateNames(), bool(conversation.tools)
        if self._template is not None:
            if has_tools not in self._names:
                text = _template_text(self._tokenizer, self.reading, tools=[] if has_tools else None)
                self._names[has_tools] = self._template.names(text, source)
            names = self._names[has_tools]
        if conversation.tools and "tools" not in names.variables:
            raise UserError(f"{source}: 'tools' is not read by {self._name}; {self._fix}, or remove the field")
        for turn in conversation.turns:
            message, where = turn.message, f"{source}, {turn.name}"
            for field in (*CALLS, *REASONING):
                if field in message and field not in names.fields:
                    other = next((name for name in REASONING if field in REASONING and name in names.fields), None)
                    rename = "" if other is None else f"rename it {other!r}, "  # the template's name for a thought
                    said = f"{where}: {field!r} is not read by {self._name}"
                    raise UserError(f"{said}; {self._fix}, {rename}or remove the field")
            role, calls = message["role"], "tool_calls" in names.fields  # such a template also writes answers of tools
            written = (*_PLAIN_ROLES, *names.constants, *((TOOL,) if calls or names.constants & {*_TOOL_ROLES} else ()))
            if role not in written and self.reading.special_tokens == "refuse":
                said = f"{where}: role {shown(role)} is not known to {self._name}"
                raise UserError(f"{said}; {self._fix}, or --special_tokens_in_text plain to write this role unchanged")

    def _check_written(self, conversation: Conversation, text: str, source: str) -> None:
        """Raise UserError if the template omits a tool call or a turn's longest word. Other words are not checked."""
        for turn in conversation.turns:
            message = turn.message
            content = str(message["content"] or "").rpartition("</think>")[2]  # earlier thoughts may be left out
            word = max(_WORD.findall(content), key=len, default="")
            calls = [call["function"]["name"] for call in message.get("tool_calls", ())]
            for dropped, what in ((word, f"the text ({shown(content)})"), *((name, "a tool call") for name in calls)):
                if dropped not in text:
                    said = f"{source}, {turn.name}: {self._name} does not write {what}"
                    raise UserError(f"{said}; give another --chat_template, or remove the row")

    @property
    def _fix(self) -> str:
        return f"give {'another' if self.templated else 'a'} --chat_template"


def chat_writer(tokenizer: Any, reading: Reading) -> str:
    """Return a phrase for messages that names the chat template or, without one, describes the plain format."""
    if not getattr(tokenizer, "chat_template", None):
        return "the plain format with User: and Assistant: (the tokenizer has no chat template)"
    return f"the chat template of {reading.chat_template or getattr(tokenizer, 'name_or_path', 'the tokenizer')}"


def chat_note(tokenizer: Any, reading: Reading) -> str:
    """Return a note for a run's first log lines. It names the chat template and the answers that are supervised."""
    said = f"{chat_writer(tokenizer, reading)}; {'every' if reading.train_on == 'all_turns' else 'the last'} answer"
    if not tokenizer.chat_template:
        return f"{said} is supervised"
    how = "its generation marks" if has_marks(_template_text(tokenizer, reading)) else "comparing its renderings"
    return f"{said} is supervised, found by {how}"


def _template_text(tokenizer: Any, reading: Reading, *, tools: Any = None) -> str:
    try:
        return str(tokenizer.get_chat_template(tools=tools))
    except ValueError as error:  # there are several templates, and none is the default
        raise UserError(f"{chat_writer(tokenizer, reading)}: {error}; give one with --chat_template") from None


def read_chat_template(file: str | Path) -> str:
    """Return the text of the --chat_template file. Raises UserError if it is missing, empty or not a text file."""
    path = user_path(file)
    if not path.is_file():
        raise UserError(f"--chat_template {file}: no such file; give the file of a Jinja template")
    text = read_small_text(path, kind="a chat template")
    if not text.strip():
        raise UserError(f"--chat_template {file}: the file is empty; give the file of a Jinja template")
    return text


def chat_template_sha256(file: str | Path) -> str:
    """Return a hash of the text of a chat template file. Raises UserError as `read_chat_template` does."""
    return hashlib.sha256(read_chat_template(file).encode()).hexdigest()


# Control tokens -------------------------------------------------------------------------------------------------------


_START, _END = "\ufdd0", "\ufdd1"  # Unicode noncharacters, reserved for internal use by programs


def _control_tokens(tokenizer: Any, meaning: str) -> re.Pattern[str] | None:
    """Return a pattern that finds the tokenizer's control tokens in a text. Return None if the tokenizer has no control
    tokens or reads them as plain text, or if `meaning` (the value of --special_tokens_in_text) is `control`."""
    if tokenizer is None or meaning == "control" or getattr(tokenizer, "split_special_tokens", False):
        return None
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    found = {str(token) for token in added if token.special} | set(getattr(tokenizer, "all_special_tokens", ()))
    longest_first = sorted((token for token in found if token.strip()), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if longest_first else None


def template_end_ids(tokenizer: Any, examples: Iterable[Example]) -> frozenset[int]:
    """Return the ids of the control tokens that the chat template writes at the end of the last answers."""
    control, found = _control_tokens(tokenizer, "plain"), set[str]()
    last = control and re.compile(rf"({control.pattern})\s*\Z")
    for example in (example for example in examples if example.conversation and tokenizer.chat_template):
        text = "".join(segment.text for segment in example.segments[example.num_prompt :] if not segment.plain)
        while last and (token := last.search(text)):
            found.add(token[1])
            text = text[: token.start()]
    return frozenset(map(int, tokenizer.convert_tokens_to_ids(sorted(found))))


def with_marks(segments: Iterable[Segment]) -> str:
    """Return the joined text of segments, with marks around each segment for which `plain` is set."""
    return "".join(f"{_START}{segment.text}{_END}" if segment.plain else segment.text for segment in segments)


def without_marks(text: str) -> str:
    """Return the text without the marks around control tokens."""
    return text.replace(_START, "").replace(_END, "")
