"""Defines the task SQuAD 1.1: a question about a paragraph. The answer is a span of the paragraph."""

from collections.abc import Iterator, Mapping
from typing import Any

from megatron_tiedlora.base.messages import UserError, shown
from megatron_tiedlora.data.readers import required_text, required_texts, without
from megatron_tiedlora.data.tables import HubData, Row
from megatron_tiedlora.data.task import Parts, Reading, Task


def _parts(row: Mapping[str, Any], source: str, _: Reading) -> Parts:
    """Return the `Parts` of a row. Answers are {"text": [...]} on the hub and [{"text": ...}, ...] in nested JSON."""
    required_text(row, "context", source)
    required_text(row, "question", source)
    answers = row["answers"]
    texts = answers.get("text") if isinstance(answers, Mapping) else answers
    if isinstance(texts, list):
        texts = [text.get("text") if isinstance(text, Mapping) else text for text in texts]
    return Parts(without(row, "answers"), None, required_texts(texts, "answers", source))


def _unfold(row: Mapping[str, Any], source: str) -> Iterator[Row]:
    """Yield flat rows from an article of nested SQuAD (paragraphs[].qas[]). A flat row is yielded unchanged."""
    if "paragraphs" not in row:
        yield dict(row), source
        return
    for number, paragraph in enumerate(_objects(row, "paragraphs", source), start=1):
        where = f"{source}, paragraph {number}"
        for index, question in enumerate(_objects(paragraph, "qas", where), start=1):
            flat = {"context": paragraph.get("context"), "title": row.get("title"), **question}
            yield flat, f"{where}, question {index}"


def _objects(row: Mapping[str, Any], name: str, source: str) -> list[Mapping[str, Any]]:
    items = row.get(name)
    if not isinstance(items, list) or not all(isinstance(item, Mapping) for item in items):
        said = f"{source}: field {name!r} of nested SQuAD is {shown(items)}, not a list of objects"
        raise UserError(f"{said}; correct the row")
    return items


TASK = Task(
    name="squad",
    fields=("context", "question", "answers"),
    template="Context: {context} Question: {question} Answer:",
    parts=_parts,
    metrics=("squad", "squad_f1"),
    stop="\n",  # answers are spans of one paragraph, and a base model continues with another paragraph
    # The hub has no public test split. Papers report results on the validation split.
    hub={"train": HubData("rajpurkar/squad", "train"), "test": HubData("rajpurkar/squad", "validation")},
    validation_rows=4800,
    unfold=_unfold,
)
