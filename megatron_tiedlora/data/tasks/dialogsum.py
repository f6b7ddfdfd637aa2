"""Defines the task DialogSum: a conversation and its short summary. Held-out samples have up to three summaries.

The hub has one row per summary, with the field `summary`. The original release has one row per conversation, with the
fields `summary1`, `summary2` and `summary3`. In both cases a held-out conversation is one sample with all references.
"""

from collections.abc import Mapping
from typing import Any

from megatron_tiedlora.data.readers import required_text, without, without_line_breaks
from megatron_tiedlora.data.tables import HubData
from megatron_tiedlora.data.task import Parts, Reading, Task

_ANSWERS = ("summary", "summary1", "summary2", "summary3")


def _parts(row: Mapping[str, Any], source: str, _: Reading) -> Parts:
    required_text(row, "dialogue", source)
    names = [name for name in _ANSWERS if row.get(name) is not None] or ["summary"]
    # Generation would stop at a line break inside a summary. ROUGE reads a line break and a space in the same way.
    answers = tuple(without_line_breaks(required_text(row, name, source)) for name in names)
    return Parts(without(row, *_ANSWERS), None, answers)


TASK = Task(
    name="dialogsum",
    fields=("dialogue",),
    template="{dialogue}\nSummary:",
    parts=_parts,
    metrics=("rougeL",),
    stop="\n",  # a summary is one paragraph, and a base model continues with another turn
    hub={split: HubData("knkarthick/dialogsum", split) for split in ("train", "validation", "test")},
    merge_by="dialogue",
)
