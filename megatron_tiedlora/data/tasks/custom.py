"""Your own rows, in the shapes of `shapes`. All rows of a file have one shape.

A row of any shape may list more accepted answers in `references`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.data.fields import required_texts, without
from megatron_tiedlora.data.reading import Reading
from megatron_tiedlora.data.shapes import REFERENCES, find_shape
from megatron_tiedlora.data.task import Parts, Task
from megatron_tiedlora.data.turns import Conversation


def _parts(row: Mapping[str, Any], source: str, reading: Reading) -> Parts:
    """A template may use the row's fields without the answers, and `prompt`, which is the default prompt.

    Raises UserError naming the source with its fields and the shapes, or the field that is empty.
    """
    shape = find_shape(row, source, named=reading.template_fields, columns=reading.columns)
    content = shape.read(row, source)
    references = row.get(REFERENCES)
    more = () if references is None else required_texts(references, REFERENCES, source)
    fields = without(row, *shape.answer_fields, REFERENCES)
    if content.conversation is None:
        return Parts({**fields, "prompt": content.prompt}, content.prompt, (content.answer, *more), shape=shape.name)
    chat = _chat(content.conversation, source, reading)
    return Parts(fields, None, (chat.answer, *more), conversation=chat, shape=shape.name)


def _chat(chat: Conversation, source: str, reading: Reading) -> Conversation:
    """The turns with what is supervised, or scored, in them.

    Raises:
        UserError: nothing is supervised; names the turn with the flag, and the fix.
    """
    if not reading.trains:
        return chat.with_last_turn_scored()
    if not any(chat.trained):
        raise UserError(
            f"{source}: no answer of the assistant is to be trained (train, weight or loss is false in each); remove"
            " the row, or let an answer be trained"
        )
    if reading.train_on == "last_turn" and not chat.trained[-1]:
        raise UserError(
            f"{source}, {chat.names[-1]}: is not to be trained (train, weight or loss), and --train_on last_turn trains"
            " nothing else; remove the row, or give --train_on all_turns"
        )
    return chat


TASK = Task(name="custom", fields=(), template="", parts=_parts, metrics=("exact_match",))
