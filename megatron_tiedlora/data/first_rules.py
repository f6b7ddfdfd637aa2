"""Rows as version 0.1 read them (--data_rules 1): four shapes, of which the first one that a row has is read.

Runs of that version are resumed and evaluated by these rules, so what they give must not change: a chat's turns have a
role and a content and nothing else, in any order, and the last one is the answer. Leaves the text of a chat to `chat`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from megatron_tiedlora.base.errors import UserError, shown
from megatron_tiedlora.config.data_fields import FIRST_DATA_RULES
from megatron_tiedlora.data.fields import checked_text, describe_fields, required_text, required_texts, without
from megatron_tiedlora.data.shapes import REFERENCES, alpaca_prompt
from megatron_tiedlora.data.task import Parts
from megatron_tiedlora.data.turns import ASSISTANT, Conversation

# The fields that a shape needs, and those that it may have. A later shape is not looked for.
_SHAPES = (
    (("messages",), ()),
    (("instruction", "output"), ("input",)),
    (("prompt", "completion"), ()),
    (("input", "output"), ()),
)


def parts_by_first_rules(row: Mapping[str, Any], source: str, *, columns: Collection[str] = ()) -> Parts:
    """The parts of a row.

    Args:
        columns: our fields that --columns names, which the shape reads. Version 0.1 did not have that flag.

    Raises:
        UserError: the row has no shape, or a field of it is missing, empty or no text; names source and field.
    """
    for needs, may in _SHAPES:
        if all(name in row for name in needs) and set(columns) <= {*needs, *may, REFERENCES}:
            break
    else:
        expected = " or ".join("{" + ", ".join(map(repr, needs)) + "}" for needs, _ in _SHAPES)
        said = f"{source}: the row has {describe_fields(row)}; by --data_rules {FIRST_DATA_RULES} it needs {expected}"
        raise UserError(f"{said}; name your fields with --columns OURS=YOURS[,...]")
    references = row.get(REFERENCES)
    more = () if references is None else required_texts(references, REFERENCES, source)
    fields = without(row, needs[-1], REFERENCES)
    if needs == ("messages",):
        chat = _conversation(row["messages"], source)
        return Parts(fields, None, (chat.answer, *more), conversation=chat)
    prompt, answer = (required_text(row, name, source) for name in needs)
    if "instruction" in needs:
        context = row.get("input")
        context = "" if context is None else checked_text(context, "input", source, allow_empty=True)
        prompt = alpaca_prompt(prompt, context)
    return Parts({**fields, "prompt": prompt}, prompt, (answer, *more))


def _conversation(messages: Any, source: str) -> Conversation:
    """The turns of a chat, of which the last is the answer."""
    if not isinstance(messages, list) or len(messages) < 2:
        said = f"{source}: field 'messages' is {shown(messages)}, not a list of at least two messages"
        raise UserError(f"{said}; correct or remove the row")
    turns = []
    for number, message in enumerate(messages, start=1):
        where = f"{source}, message {number}"
        if not isinstance(message, Mapping):
            raise UserError(f"{where}: is {shown(message)}, not an object with 'role' and 'content'; correct the row")
        turns.append({name: required_text(message, name, where) for name in ("role", "content")})
    if turns[-1]["role"] != ASSISTANT:
        said = f"{source}: the last message is from {shown(turns[-1]['role'])}, not from 'assistant'"
        raise UserError(f"{said}; remove that message, or the row")
    last = len(turns) - 1
    names = tuple(f"message {number}" for number in range(1, len(turns) + 1))
    return Conversation(tuple(turns), tuple(number == last for number in range(len(turns))), None, names)
