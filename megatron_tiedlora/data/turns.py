"""Conversations: the turns of a row, checked, in the one form that chat templates read.

Owns roles, content parts, tool calls, which turns are trained, and the order of turns. Leaves the fields of a row to
`shapes`, and text to `chat`. Everything but a turn's flags is passed on as the template's own variables.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_tiedlora.base.errors import UserError, shown
from megatron_tiedlora.data.fields import checked_text

ASSISTANT, USER, TOOL = "assistant", "user", "tool"
_OPENING = ("system", "developer")
ROLES = (*_OPENING, USER, ASSISTANT, TOOL)
_SAME_ROLE = {"function": TOOL, "observation": TOOL, "function_response": TOOL, "human": USER, "gpt": ASSISTANT,
              "chatgpt": ASSISTANT, "bing": ASSISTANT, "bard": ASSISTANT, "model": ASSISTANT}  # fmt: skip
_CALL_ROLE = "function_call"  # of ShareGPT: an assistant's turn whose value is the call, as JSON

REASONING = ("reasoning_content", "reasoning", "thinking")
_PASSED_ON = ("name", "tool_calls", "tool_call_id", *REASONING)
_UNREAD = ("images", "image", "videos", "video", "audios", "audio", "documents", "refusal")
_FLAGS = ("train", "weight", "loss")


@dataclass(frozen=True)
class Conversation:
    """The turns of a sample.

    messages: each with `role`, `content` and what else a template reads; the last one is the assistant's.
    trained: by message, whether it is supervised; only the assistant's are.
    tools: JSON schemas of functions; None if there are none.
    """

    messages: tuple[Mapping[str, Any], ...]
    trained: tuple[bool, ...]
    tools: tuple[Mapping[str, Any], ...] | None = None

    @property
    def answer(self) -> str:
        """Content of the last turn; '' if that only calls tools."""
        return self.messages[-1].get("content") or ""

    @property
    def answers(self) -> tuple[int, ...]:
        """The indices of the assistant's turns."""
        return tuple(index for index, message in enumerate(self.messages) if message["role"] == ASSISTANT)

    def with_last_turn_trained(self) -> Conversation:
        """The same turns, of which at most the last is supervised."""
        return replace(self, trained=(False,) * (len(self.trained) - 1) + self.trained[-1:])

    def without_first_exchange(self) -> Conversation | None:
        """The turns without the first user turn and all up to the next one; None if no supervised turn would be left.

        System turns at the start stay.
        """
        users = [index for index, message in enumerate(self.messages) if message["role"] == USER]
        if len(users) < 2 or not any(self.trained[users[1] :]):
            return None
        keep = [*range(users[0]), *range(users[1], len(self.messages))]
        return replace(
            self,
            messages=tuple(self.messages[index] for index in keep),
            trained=tuple(self.trained[index] for index in keep),
        )


def read_messages(value: Any, name: str, source: str, *, tools: Any = None) -> Conversation:
    """The conversation of a list of turns, {role, content} or {from, value}, in field `name` of a row.

    Raises:
        UserError: a turn is incomplete or out of order, or there is none to train on; names the source and message.
    """
    if not isinstance(value, list | tuple) or not value:
        raise UserError(f"{source}: field {name!r} is not a list of messages; give at least a user's and an answer")
    messages, trained = [], []
    for number, item in enumerate(value, start=1):
        where = f"{source}, message {number}"
        if not isinstance(item, Mapping):
            raise UserError(f"{where}: is not an object with 'role' and 'content'; correct the row")
        message = _message(item, where)
        messages.append(message)
        trained.append(_is_trained(item, message["role"], where))
    return make_conversation(messages, trained, source, tools=tools)


def make_conversation(
    messages: Sequence[Mapping[str, Any]], trained: Sequence[bool], source: str, *, tools: Any = None
) -> Conversation:
    """The conversation of checked turns. Raises UserError as `read_messages` does."""
    _check_order([message["role"] for message in messages], source)
    if not any(trained):
        raise UserError(f"{source}: no turn of the assistant is to be trained (train, weight or loss); remove the row")
    return Conversation(tuple(messages), tuple(trained), _tools(tools, source))


def _message(item: Mapping[str, Any], where: str) -> dict[str, Any]:
    """One turn with the names that templates know."""
    role_field, content_field = ("from", "value") if "from" in item and "role" not in item else ("role", "content")
    role, content = checked_text(item.get(role_field), role_field, where), item.get(content_field)
    if unread := next((name for name in _UNREAD if item.get(name)), None):
        raise UserError(f"{where}: {unread!r} is not read, only text is; remove the row, or the field if it is no data")
    if role == _CALL_ROLE:
        call = _parsed(checked_text(content, content_field, where), content_field, where)
        return {"role": ASSISTANT, "content": "", "tool_calls": _calls([call], where)}
    role = _SAME_ROLE.get(role, role)
    passed = {name: plain_json(item[name], name, where) for name in _PASSED_ON if item.get(name) not in (None, [], "")}
    calls = passed.get("tool_calls", [item["function_call"]] if item.get("function_call") else None)
    if calls is not None:
        passed["tool_calls"] = _calls(calls, where)
    elif content_field not in item:
        raise UserError(f"{where}: {content_field!r} is missing; the message has {', '.join(map(repr, item))}")
    may_be_empty = calls is not None or role in (TOOL, *_OPENING)
    return {"role": role, "content": _content(content, content_field, where, may_be_empty=may_be_empty), **passed}


def _content(content: Any, name: str, where: str, *, may_be_empty: bool) -> str:
    """Text, or the texts of content parts, one a line as servers of text models join them."""
    if isinstance(content, list | tuple):
        parts = []
        for part in content:
            kind = part.get("type", "text") if isinstance(part, Mapping) else "text"
            text = part.get("text") if isinstance(part, Mapping) else part
            if kind != "text":
                said = f"{where}: a content part of type {shown(kind)} is not read"
                raise UserError(f"{said}, only text is; remove the row")
            parts.append(checked_text(text, f"{name}.text", where, allow_empty=True))
        content = "\n".join(parts)
    if content is None and may_be_empty:
        return ""
    return checked_text(content, name, where, allow_empty=may_be_empty)


def _is_trained(item: Mapping[str, Any], role: str, where: str) -> bool:
    """Whether a turn is supervised: the assistant's, unless `train` or `loss` is false or `weight` is 0."""
    trained = role == ASSISTANT
    for name in _FLAGS:
        value = item.get(name)
        if value is None:
            continue
        if value not in (0, 1):  # true and false too
            raise UserError(f"{where}: {name!r} is {shown(value)}; a turn is trained (true, 1) or not (false, 0)")
        if value and role != ASSISTANT and name == "train":
            raise UserError(f"{where}: 'train' is true for role {role!r}; only turns of the assistant are trained")
        trained = trained and bool(value)
    return trained


_MAY_FOLLOW = {USER: (None, *_OPENING, ASSISTANT), ASSISTANT: (USER, TOOL), TOOL: (ASSISTANT, TOOL)}


def _check_order(roles: Sequence[str], source: str) -> None:
    """Raise UserError if the turns do not alternate. A role that is not in `ROLES` may stand anywhere."""
    before: str | None = None
    for number, role in enumerate(roles, start=1):
        where = f"{source}, message {number}"
        if role in _OPENING and before not in (None, *_OPENING):
            raise UserError(f"{where}: a {role!r} turn after {before!r}; it has to come first")
        known = role in _MAY_FOLLOW and (before is None or before in ROLES)
        if known and before not in _MAY_FOLLOW[role]:
            after = "at the start" if before is None else f"after {before!r}"
            raise UserError(f"{where}: turns are out of order: {role!r} {after}; correct or remove the row")
        before = role
    if roles[-1] != ASSISTANT:
        raise UserError(f"{source}: the last message is from {roles[-1]!r}, not from 'assistant'; remove it or the row")


# Tools ------------------------------------------------------------------------------------------------------


def _tools(value: Any, source: str) -> tuple[Mapping[str, Any], ...] | None:
    """Schemas of functions, each as {"type": "function", "function": ...}; a text is read as JSON."""
    if value is None or value in ("", [], ()):
        return None
    found = _parsed(value, "tools", source) if isinstance(value, str) else plain_json(value, "tools", source)
    if not isinstance(found, list) or not all(isinstance(tool, dict) for tool in found):
        raise UserError(f"{source}: field 'tools' is not a list of functions' schemas; correct the row")
    return tuple(tool if "function" in tool else {"type": "function", "function": tool} for tool in found) or None


def _calls(value: Any, where: str) -> list[dict[str, Any]]:
    """Tool calls as {"type": "function", "function": {"name", "arguments"}}, with arguments as an object."""
    found = _parsed(value, "tool_calls", where) if isinstance(value, str) else plain_json(value, "tool_calls", where)
    if not isinstance(found, list) or not all(isinstance(call, dict) for call in found):
        raise UserError(f"{where}: 'tool_calls' is not a list of calls; correct the row")
    calls = []
    for call in found:
        function = call.get("function", call)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise UserError(f"{where}: a tool call without the name of its function; correct the row")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):  # as OpenAI has it; templates expect an object, and servers parse it too
            arguments = _parsed(arguments, "arguments", where)
        outer = {"type": "function", **call} if "function" in call else {"type": "function"}
        calls.append({**outer, "function": {**function, "arguments": arguments}})
    return calls


def _parsed(text: str, name: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise UserError(f"{where}: field {name!r} is not JSON: {shown(text)}") from None


def plain_json(value: Any, name: str, where: str) -> Any:
    """`value` without the empty fields that tables add to rows of different objects.

    Raises:
        UserError: it holds something other than JSON.
    """
    try:
        return json.loads(json.dumps(_without_nulls(value)))
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{where}: field {name!r} holds something other than JSON ({error}); correct the row") from None


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list | tuple) else value
