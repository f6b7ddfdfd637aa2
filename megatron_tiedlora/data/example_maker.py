"""Makes the samples of a task from its rows: the user's prompt template, and the checks that all tasks share.

Leaves the meaning of a row to its task, the text of chats to `chat`, and the answer's leading space to
`examples.join_answer`.
"""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from megatron_tiedlora.base.errors import UserError, shown
from megatron_tiedlora.data.chat import Chat, marked, unmarked
from megatron_tiedlora.data.examples import Example, join_answer
from megatron_tiedlora.data.fields import checked_text, describe_fields, is_text
from megatron_tiedlora.data.reading import Reading
from megatron_tiedlora.data.tables import Row
from megatron_tiedlora.data.task import Parts, Task


class ExampleMaker:
    """Turns the rows of a sample into its example.

    Args:
        template: as `checked_template` returns it.
        reading: what the user decided; with the names of the template's fields.
    """

    def __init__(self, task: Task, *, template: str | None, chat: Chat) -> None:
        self._task, self._template, self._chat = task, template, chat
        self._reading = chat.reading

    def example(self, sample: Sequence[Row]) -> tuple[Example, str]:
        """The example of a sample's rows, and the name of the first row's shape.

        Prompt and answer are those of the first row, references those of all.

        Raises:
            UserError: a field is missing, empty or of another kind, or the template names one that is not there; the
                message names file and line.
        """
        parts = [_parts(self._task, row, source, self._reading) for row, source in sample]
        return _to_example(self._task, parts, sample[0][1], self._template, self._chat), parts[0].shape


class OneShape:
    """Checks that all rows of a file have one shape."""

    def __init__(self) -> None:
        self._first: dict[str, tuple[str, str]] = {}

    def check(self, shape: str, source: str) -> None:
        """Raise UserError if the first row of the file of `source` had another shape."""
        expected, first = self._first.setdefault(source.rpartition(":")[0], (shape, source))
        if shape != expected:
            raise UserError(
                f"{source}: a row of shape {shape} in a file whose first row ({first}) has shape {expected}; give each"
                " shape a file of its own"
            )


def with_template(reading: Reading, prompt_template: str | None) -> tuple[Reading, str | None]:
    """What the user decided with the fields that a template names, and the checked template."""
    template = _check_template(prompt_template) if prompt_template else None
    return replace(reading, template_fields=_names(template or "")), template


def _to_example(task: Task, parts: Sequence[Parts], source: str, template: str | None, chat: Chat) -> Example:
    """The example of a sample: prompt and answer of its first row, and the references of all its rows."""
    first = parts[0]
    references = tuple(dict.fromkeys(answer.strip() for row_parts in parts for answer in row_parts.answers))
    if first.conversation is not None and template is None:
        segments, num_prompt = chat.segments(first.conversation, source)
        return Example(
            prompt="".join(segment.text for segment in segments[:num_prompt]),
            completion=first.answers[0],
            source=source,
            references=references,
            segments=segments,
            num_prompt=num_prompt,
            conversation=first.conversation,
            templated=chat.templated,
        )
    prompt = _prompt(task, first, source, template, chat)
    follows = [chat.control.guard(ending, "the answer", source) for ending in first.endings]
    answer = chat.control.guard(first.answers[0], "the answer", source)
    right = first.choices.index(first.answers[0]) if follows else -1
    completion = follows[right] if follows else join_answer(prompt, answer)
    before, after = chat.cut(prompt, False), chat.cut(completion, True, ends=True)
    return Example(
        prompt=unmarked(prompt),
        completion=unmarked(completion),
        source=source,
        references=references,
        choices=first.choices,
        endings=tuple(map(unmarked, follows)),
        segments=(*before, *after),
        num_prompt=len(before),
    )


def _prompt(task: Task, parts: Parts, source: str, template: str | None, chat: Chat) -> str:
    """The prompt of a row that is no chat, with marks at control tokens that are plain text."""
    fields = parts.fields
    if template is not None and parts.conversation is not None:
        if len(parts.conversation.answers) > 1 and chat.reading.train_on != "last_turn":
            raise UserError(f"{source}: --prompt_template makes one answer of a chat; give --train_on last_turn too")
        segments, num_prompt = chat.segments(parts.conversation, source)
        fields = {**_guarded(fields, chat, source, only=_names(template)), "prompt": marked(segments[:num_prompt])}
    elif parts.prompt is None or template is not None:
        fields = _guarded(fields, chat, source, only=_names(template or task.template))
    if template is not None:
        prompt = _fill(template, fields, source)
    elif parts.prompt is None:
        prompt = task.template.format_map(fields)
    else:
        prompt = chat.control.guard(parts.prompt, "field 'prompt'", source)
    if not prompt and parts.shape != "text":
        raise UserError(f"{source}: the prompt is empty; check the fields or --prompt_template")
    return prompt


def _guarded(fields: Mapping[str, Any], chat: Chat, source: str, *, only: Sequence[str]) -> dict[str, Any]:
    """The fields, of which the texts named `only` have control tokens marked, or are rejected."""
    return {
        name: chat.control.guard(value, f"field {name!r}", source) if isinstance(value, str) and name in only else value
        for name, value in fields.items()
    }


def _parts(task: Task, row: Mapping[str, Any], source: str, reading: Reading) -> Parts:
    for name in task.fields:
        if row.get(name) is None:
            expected = ", ".join(repr(field) for field in task.fields)
            found = f"{source}: field {name!r} is missing; the row has {describe_fields(row)}"
            fix = "name your fields with --columns OURS=YOURS[,...]"
            raise UserError(f"{found}, and task {task.name} reads {expected}; {fix}")
    parts = task.parts(row, source, reading)
    if not parts.answers:
        raise UserError(f"{source}: the row has no answer; give one, or remove the row")
    return parts


def _names(template: str) -> tuple[str, ...]:
    """The fields that a checked template names."""
    return tuple(name for _, name, _, _ in string.Formatter().parse(template) if name is not None)


def _check_template(template: str) -> str:
    r"""Return the checked template, with each typed \n (a shell's quotes hold no newline) replaced by a newline."""
    try:
        names = [(name, spec, conv) for _, name, spec, conv in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise UserError(f"--prompt_template {template!r}: {error}; write {{field}}, or {{{{ for a brace") from error
    if not is_text(template):
        raise UserError(f"--prompt_template {template!r}: holds half of a surrogate pair, which is not text; remove it")
    for name, spec, conversion in names:
        if not name.isidentifier() or spec or conversion:
            found = f"--prompt_template {template!r}: {{{name}}} is not a plain {{field}} name"
            raise UserError(f"{found}; write {{{{ for a brace")
    return template.replace("\\n", "\n")


def _fill(template: str, fields: Mapping[str, Any], source: str) -> str:
    for name in _names(template):
        if name not in fields:
            known = ", ".join(sorted(fields)) or "none"
            raise UserError(f"--prompt_template: {source} has no field {name!r}; the fields for prompts are {known}")
        if not isinstance(fields[name], str):
            found = f"--prompt_template: {source}: field {name!r} is {shown(fields[name])}, not text"
            raise UserError(f"{found}; use another field")
        checked_text(fields[name], name, source, allow_empty=True)
    return template.format_map(fields)
