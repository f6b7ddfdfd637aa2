"""DialogSum: a conversation and its summary in a sentence or two; held-out conversations have up to three summaries.

The hub repeats a conversation for each of its summaries, in rows of `summary`; the original release has one row with
`summary1`, `summary2` and `summary3`. Both give one held-out sample with all its references.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_tiedlora.data.fields import one_line, required_text, without
from megatron_tiedlora.data.task import HubSource, Parts, Task

_ANSWERS = ("summary", "summary1", "summary2", "summary3")


def _parts(row: Mapping[str, Any], source: str, _: Any) -> Parts:
    required_text(row, "dialogue", source)
    names = [name for name in _ANSWERS if row.get(name) is not None] or ["summary"]
    # A line break inside a summary would be where decoding stops; to ROUGE it is the same as a space.
    answers = tuple(one_line(required_text(row, name, source)) for name in names)
    return Parts(without(row, *_ANSWERS), None, answers)


TASK = Task(
    name="dialogsum",
    fields=("dialogue",),
    template="{dialogue}\nSummary:",
    parts=_parts,
    metrics=("rougeL",),
    stop="\n",  # a summary is one paragraph; a base model goes on with another turn
    hub=HubSource("knkarthick/dialogsum", {"train": "train", "validation": "validation", "test": "test"}),
    merge_by="dialogue",
)
