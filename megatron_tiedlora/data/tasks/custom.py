"""Your own rows, in the shapes of `shapes`. All rows of a file have one shape.

A row of any shape may list more accepted answers in `references`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_tiedlora.data.fields import required_texts, without
from megatron_tiedlora.data.reading import Reading
from megatron_tiedlora.data.shapes import REFERENCES, find_shape
from megatron_tiedlora.data.task import Parts, Task


def _parts(row: Mapping[str, Any], source: str, reading: Reading) -> Parts:
    """A template may use the row's fields without the answers, and `prompt`, which is the default prompt.

    Raises UserError naming the source with its fields and the shapes, or the field that is empty.
    """
    if reading.first_rules:  # which did not read them
        row = without(row, "system", "history")
    shape = find_shape(row, source, named=reading.template_fields, strict=not reading.first_rules)
    content = shape.read(row, source)
    references = row.get(REFERENCES)
    more = () if references is None else required_texts(references, REFERENCES, source)
    fields = without(row, *shape.answer_fields, REFERENCES)
    chat = content.conversation
    if chat is not None:
        return Parts(fields, None, (chat.answer, *more), conversation=chat, shape=shape.name)
    return Parts({**fields, "prompt": content.prompt}, content.prompt, (content.answer, *more), shape=shape.name)


TASK = Task(name="custom", fields=(), template="", parts=_parts, metrics=("exact_match",))
