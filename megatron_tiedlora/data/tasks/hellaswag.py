r"""Defines the task HellaSwag: the start of a scene and four endings, one of which is correct.

A prompt is the cleaned text `{activity_label}: {ctx_a} {ctx_b.capitalize()}`. The answer is one space and the cleaned
text of the correct ending, even if the cleaned text starts with a space. The prompt does not contain the endings. A
prompt template can add them with {context} and {endings}.
"""

import re
from collections.abc import Mapping
from typing import Any

from megatron_tiedlora.base.messages import UserError, shown
from megatron_tiedlora.data.readers import checked_text, required_text, required_texts, without
from megatron_tiedlora.data.tables import HubData
from megatron_tiedlora.data.task import Parts, Reading, Task

# Half of the rows come from WikiHow articles, whose headings and steps are in brackets. If a bracket is not closed on
# its line, the rest of the line is one match, which `clean` keeps; otherwise the search would take quadratic time.
_BRACKETS = re.compile(r"\[[^\]\n]*\]?")


def clean(text: str) -> str:
    """Return the text as lm-evaluation-harness cleans it. " [title]" becomes a full stop and a space, other text in
    brackets is removed, and two spaces become one. White space next to a removed bracket is kept, even at the ends."""
    text = text.strip().replace(" [title]", ". ")
    text = _BRACKETS.sub(lambda found: "" if found[0].endswith("]") else found[0], text)
    return text.replace("  ", " ")


def _parts(row: Mapping[str, Any], source: str, reading: Reading) -> Parts:
    second = checked_text(row["ctx_b"], "ctx_b", source, allow_empty=True).capitalize()
    start = f"{required_text(row, 'ctx_a', source)} {second}"
    query = clean(f"{required_text(row, 'activity_label', source)}: {start}")
    context = query.rstrip()
    endings = required_texts(row["endings"], "endings", source)
    cleaned = (clean(ending) for ending in endings)
    # An ending that consists only of brackets keeps them.
    choices = tuple(text if text.strip() else ending.strip() for text, ending in zip(cleaned, endings, strict=True))
    shown_choices = tuple(choice.strip() for choice in choices)
    numbered = "\n".join(f"{number}. {choice}" for number, choice in enumerate(shown_choices, start=1))
    fields = {**without(row, "label"), "context": context, "endings": numbered}
    right = _label(row, len(choices), source)
    # White space at the end of the prompt is scored with the ending, as in the harness.
    follow = tuple(f"{query[len(context) :]} {choice}" for choice in choices)
    return Parts(fields, None, (choices[right],), choices, follow)


def _label(row: Mapping[str, Any], num_endings: int, source: str) -> int:
    """Return the 0-based index of the correct ending. The label is an integer in the release, and text on the hub."""
    label = row.get("label")
    if label is None or str(label).strip() in ("", "-1"):
        raise UserError(
            f"{source}: field 'label' is missing or empty, as in HellaSwag's test split, so the row cannot be scored; "
            "give the validation split (of Rowan/hellaswag, or hellaswag_val.jsonl)"
        )
    text = str(label).strip()
    if isinstance(label, bool | float) or text not in map(str, range(num_endings)):
        raise UserError(f"{source}: field 'label' is {shown(label)}; expected 0 to {num_endings - 1}; correct the row")
    return int(text)


TASK = Task(
    name="hellaswag",
    fields=("activity_label", "ctx_a", "ctx_b", "endings"),
    template="{context}",
    parts=_parts,
    metrics=("accuracy", "accuracy_loglikelihood"),
    stop="\n",  # an ending is one line
    # The hub's test split has no labels. Papers report results on the validation split.
    hub={"train": HubData("Rowan/hellaswag", "train"), "test": HubData("Rowan/hellaswag", "validation")},
    validation_rows=2000,  # 5 % of 39,905; the accuracy then has a standard error of one point
)
