"""Reads and checks the turns of a conversation, and converts them to the format that chat templates read.

This module checks roles, content parts, tool calls, the order of turns, and which turns are supervised. The module
`custom` reads the fields of a row, and `chat` makes the text. A chat template does not receive the flags in `_FLAGS`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_tiedlora.base.messages import UserError, shown
from megatron_tiedlora.data.readers import checked_text, describe_fields

ASSISTANT, USER, TOOL = "assistant", "user", "tool"
_OPENING = ("system", "developer")
ROLES = (*_OPENING, USER, ASSISTANT, TOOL)
_SAME_ROLE = {"function": TOOL, "observation": TOOL, "function_response": TOOL, "tool_response": TOOL, "human": USER,
              "gpt": ASSISTANT, "chatgpt": ASSISTANT, "bing": ASSISTANT, "bard": ASSISTANT,
              "model": ASSISTANT}  # fmt: skip
_CALL_ROLES = ("function_call", "tool_call")  # an assistant's turn whose text is the call, as JSON

REASONING = ("reasoning_content", "reasoning", "thinking")
CALLS = ("tool_calls", "functions", "function_calls")  # the last two are texts, in OLMo 3's data
_PASSED_ON = ("name", "tool_call_id", *CALLS, *REASONING)
_UNREAD = ("images", "image", "videos", "video", "audios", "audio", "documents", "refusal")
_FLAGS = ("train", "weight", "loss")
# Other tools' names for the flags in `_FLAGS`. If a flag were ignored, turns could be supervised that should not be.
_UNREAD_FLAGS = ("training", "trainable", "train_detail", "training_detail", "mask", "masked", "loss_scale")


@dataclass(frozen=True)
class Turn:
    """One turn of a row.

    message: the fields `role` and `content`, and other fields that a template may read.
    trained: whether the turn is supervised.
    name: the name of the turn in messages, such as "message 2" (counted in the user's row) or "field 'system'".
    """

    message: Mapping[str, Any]
    trained: bool
    name: str


@dataclass(frozen=True)
class Conversation:
    """The turns of a sample.

    turns: the turns in order. The last is from the assistant, and only turns of the assistant are supervised.
    tools: the JSON schemas of functions; None if there are no tools.
    """

    turns: tuple[Turn, ...]
    tools: tuple[Mapping[str, Any], ...] | None = None

    def with_last_turn_alone(self, *, scored: bool = False) -> "Conversation":
        """Return the conversation in which at most the last turn is supervised. If `scored`, the last turn is marked as
        supervised even if its flags are false, because predictions are compared with it."""
        *before, last = self.turns
        others = [replace(turn, trained=False) for turn in before]
        return replace(self, turns=(*others, replace(last, trained=scored or last.trained)))

    def without_first_exchange(self) -> "Conversation | None":
        """Return the conversation without its first user turn and the turns up to the next user turn. Return None if no
        supervised turn would be left.

        System turns at the start are kept.
        """
        users = [index for index, turn in enumerate(self.turns) if turn.message["role"] == USER]
        if len(users) < 2 or not any(turn.trained for turn in self.turns[users[1] :]):
            return None
        return replace(self, turns=(*self.turns[: users[0]], *self.turns[users[1] :]))


def read_turns(value: Any, field: str, source: str, *, prefix: str = "") -> list[Turn]:
    """Return the turns of a field with a list of messages, each {role, content} or {from, value}. Raises UserError if a
    message is not valid. The error contains the source and the message's name (`prefix` and its number)."""
    if not isinstance(value, list | tuple) or not value:
        what = f"{source}: field {field!r} is {shown(value)}, not a list of messages"
        raise UserError(f"{what}; give at least a user's message and an answer")
    turns = []
    for number, item in enumerate(value, start=1):
        name = f"{prefix}message {number}"
        where = f"{source}, {name}"
        if not isinstance(item, Mapping):
            raise UserError(f"{where}: is {shown(item)}, not an object with 'role' and 'content'; correct the row")
        message = _message(item, where)
        turns.append(Turn(message, _is_trained(item, message["role"], where), name))
    return turns


def make_conversation(turns: Sequence[Turn], row: Mapping[str, Any], source: str) -> Conversation:
    """Return a conversation with these turns and the tools in the row's field `tools` or `functions`. Raises UserError
    if the turns are out of order, or if the schemas of the tools are not valid."""
    _check_order(turns, source)
    return Conversation(tuple(turns), _tools(row, source))


def _message(item: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the message of one turn, with the role and field names that templates know."""
    role_field, content_field = ("from", "value") if "from" in item and "role" not in item else ("role", "content")
    if role_field not in item:
        raise UserError(f"{where}: 'role' is missing; the message has {describe_fields(item)}; add its role")
    role, content = checked_text(item[role_field], role_field, where), item.get(content_field)
    if unread := next((name for name in _UNREAD if item.get(name)), None):
        raise UserError(f"{where}: {unread!r} is not read, because only text is supported; remove the field or the row")
    if unread := next((name for name in _UNREAD_FLAGS if item.get(name) is not None), None):
        said = f"{where}: {unread!r} is {shown(item[unread])}, and is not read"
        raise UserError(f"{said}; give 'train' (true or false) instead, which sets whether the turn is supervised")
    if role in _CALL_ROLES:
        call = _parsed(checked_text(content, content_field, where), content_field, where)
        return {"role": ASSISTANT, "content": "", "tool_calls": _calls(call if type(call) is list else [call], where)}
    role = _SAME_ROLE.get(role, role)
    passed = {name: plain_json(item[name], name, where) for name in _PASSED_ON if item.get(name) not in (None, [], "")}
    if "tool_calls" in passed and item.get("function_call"):
        raise UserError(f"{where}: has both 'tool_calls' and 'function_call'; remove one of them")
    calls = passed.get("tool_calls", [item["function_call"]] if item.get("function_call") else None)
    if calls is not None:
        passed["tool_calls"] = _calls(calls, where)
    elif content_field not in item and "function_calls" not in passed:
        said = f"{where}: {content_field!r} is missing; the message has {describe_fields(item)}"
        raise UserError(f"{said}; add its text, or remove the row")
    may_be_empty = calls is not None or "function_calls" in passed or role in (TOOL, *_OPENING)
    return {"role": role, "content": _content(content, content_field, where, may_be_empty=may_be_empty), **passed}


def _content(content: Any, name: str, where: str, *, may_be_empty: bool) -> str:
    """Return the content as text. Content parts are joined with newlines, as servers of text models do."""
    if isinstance(content, list | tuple):
        parts = []
        for part in content:
            kind = part.get("type", "text") if isinstance(part, Mapping) else "text"
            text = part.get("text") if isinstance(part, Mapping) else part
            if kind != "text":
                said = f"{where}: a content part of type {shown(kind)} is not supported"
                raise UserError(f"{said}, because only text is; remove the row")
            parts.append(checked_text(text, f"{name}.text", where, allow_empty=True))
        content = "\n".join(parts)
    if content is None and may_be_empty:
        return ""
    return checked_text(content, name, where, allow_empty=may_be_empty)


def _is_trained(item: Mapping[str, Any], role: str, where: str) -> bool:
    """Return whether a turn is supervised: it is from the assistant, and none of its `_FLAGS` is false or 0."""
    trained = role == ASSISTANT
    for name in _FLAGS:
        value = item.get(name)
        if value is None:
            continue
        if value not in (0, 1):  # true and false too
            raise UserError(f"{where}: {name!r} is {shown(value)}; give true or 1 to train on this turn, or false or 0")
        if value and role != ASSISTANT and name == "train":
            said = f"{where}: 'train' is {shown(value)} for role {shown(role)}"
            raise UserError(f"{said}; only turns of the assistant are supervised; remove it")
        trained = trained and bool(value)
    return trained


_MAY_FOLLOW = {USER: (None, *_OPENING, ASSISTANT), ASSISTANT: (USER, TOOL), TOOL: (ASSISTANT, TOOL)}


def _check_order(turns: Sequence[Turn], source: str) -> None:
    """Raise UserError if the turns are not in a valid order. A role that is not in `ROLES` may be anywhere."""
    before: str | None = None
    for turn in turns:
        where, role = f"{source}, {turn.name}", turn.message["role"]
        if role in _OPENING and before not in (None, *_OPENING):
            raise UserError(f"{where}: a {role!r} turn follows {shown(before)}; move it to the start or remove the row")
        known = role in _MAY_FOLLOW and (before is None or before in ROLES)
        if known and before not in _MAY_FOLLOW[role]:
            after = "at the start" if before is None else f"after {before!r}"
            raise UserError(f"{where}: turns are out of order: {role!r} {after}; correct or remove the row")
        before = role
    if before != ASSISTANT:
        said = f"{source}: the last message is from {shown(before)}, not from 'assistant'"
        raise UserError(f"{said}; remove that message, or the row")


# Tools ------------------------------------------------------------------------------------------------------


def _tools(row: Mapping[str, Any], source: str) -> tuple[Mapping[str, Any], ...] | None:
    """Return tool schemas as {"type": "function", "function": ...}, or None without tools. Texts are parsed as JSON."""
    if row.get("tools") and row.get("functions"):
        raise UserError(f"{source}: the row has both 'tools' and 'functions'; remove one of them")
    field = "functions" if row.get("functions") else "tools"
    value = row.get(field)
    if value is None or value in ("", [], ()):
        return None
    found = _parsed(value, field, source) if isinstance(value, str) else plain_json(value, field, source)
    if not isinstance(found, list) or not all(isinstance(tool, dict) for tool in found):
        said = f"{source}: field {field!r} is {shown(found)}, not a list of function schemas"
        raise UserError(f"{said}; give a list, or remove the field")
    return tuple(tool if "function" in tool else {"type": "function", "function": tool} for tool in found) or None


def _calls(value: Any, where: str) -> list[dict[str, Any]]:
    """Return tool calls as {"type": "function", "function": {"name", "arguments"}}, with arguments as an object."""
    found = _parsed(value, "tool_calls", where) if isinstance(value, str) else plain_json(value, "tool_calls", where)
    if not isinstance(found, list) or not all(isinstance(call, dict) for call in found):
        raise UserError(f"{where}: 'tool_calls' is {shown(found)}, not a list of calls; correct the row")
    calls = []
    for call in found:
        function = call.get("function", call)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise UserError(f"{where}: a tool call has no function name ({shown(call)}); correct the row")
        if "parameters" in function and "arguments" not in function:
            raise UserError(f"{where}: a tool call has 'parameters' ({shown(call)}); name them 'arguments'")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):  # OpenAI's format; templates expect an object, as servers pass it
            arguments = _parsed(arguments, "arguments", where) if arguments.strip() else {}
        if not isinstance(arguments, dict):
            said = f"{where}: 'arguments' of the tool call are {shown(arguments)}, not an object"
            raise UserError(f"{said} of named arguments; correct the row")
        outer = {"type": "function", **call} if "function" in call else {"type": "function"}
        calls.append({**outer, "function": {**function, "arguments": arguments}})
    return calls


def _parsed(text: str, name: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise UserError(f"{where}: field {name!r} is {shown(text)}, which is not JSON; correct the row") from None


def plain_json(value: Any, name: str, where: str) -> Any:
    """Return `value` without null fields, which tables add to rows. Raises UserError if it is not JSON."""
    try:
        return json.loads(json.dumps(_without_nulls(value)))
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{where}: field {name!r} has a value that is not JSON ({error}); correct the row") from None


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list | tuple) else value
