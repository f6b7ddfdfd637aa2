"""Defines the task GSM8K: a word problem and its worked answer, which ends with `#### N`."""

from collections.abc import Mapping
from typing import Any

from megatron_tiedlora.data.readers import required_text, without
from megatron_tiedlora.data.tables import HubData
from megatron_tiedlora.data.task import Parts, Reading, Task


def question_parts(row: Mapping[str, Any], source: str, _: Reading) -> Parts:
    """Return the `Parts` of a row with `question` and `answer`. Training uses the whole worked answer."""
    required_text(row, "question", source)
    return Parts(without(row, "answer"), None, (required_text(row, "answer", source),))


TASK = Task(
    name="gsm8k",
    fields=("question", "answer"),
    template="Question: {question}\nAnswer:",
    parts=question_parts,
    metrics=("gsm8k",),
    # Worked answers have several lines, so a line break does not end them. But a model that was not trained to stop
    # writes a new question after the answer, in the format of the prompt.
    stop="\nQuestion:",
    hub={split: HubData("openai/gsm8k", split, "main") for split in ("train", "test")},
    validation_rows=473,  # leaves 7,000 to train on
)
