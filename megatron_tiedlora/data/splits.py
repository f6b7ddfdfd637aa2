"""The samples of a split: a task's record turns rows from files, the hub or a generator into examples.

Owns which source a split has, how validation rows are carved from training rows, how rows of one sample are merged,
and the user's prompt template. Leaves names of files to `sources`, the meaning of a row to its task, the text of chats
to `chat`, and the answer's leading space to `examples.join_answer`.
"""

from __future__ import annotations

import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.config.evaluate_settings import EvaluateSettings
from megatron_tiedlora.config.settings import Settings
from megatron_tiedlora.data.chat import Chat, opened_chat
from megatron_tiedlora.data.control_tokens import marked, unmarked
from megatron_tiedlora.data.examples import Example, join_answer
from megatron_tiedlora.data.fields import checked_text, describe_fields, is_text
from megatron_tiedlora.data.order import permutation
from megatron_tiedlora.data.readers import Row
from megatron_tiedlora.data.reading import Reading
from megatron_tiedlora.data.shapes import OUR_FIELDS, renamed
from megatron_tiedlora.data.sources import Group, Source, mixed, parse_sources, read_sources, without_rows
from megatron_tiedlora.data.tables import read_hub_rows
from megatron_tiedlora.data.task import Parts, Split, Task
from megatron_tiedlora.data.tasks import get_task

Files = Mapping[str, str | Path | None]
"""Split name -> what `sources` reads. A missing key or None means that none was given."""

_CARVE_STREAM = 2**32  # epochs use the streams from 0 on, so held-out rows are drawn from a stream far above


def load_split(
    task: str | Task,
    split: Split,
    *,
    files: Files,
    seed: int,
    prompt_template: str | None = None,
    tokenizer: Any = None,
    limit: int | None = None,
    reading: Reading | None = None,
) -> list[Example]:
    """Return the samples of one split in file order (at most the first `limit`).

    The rows come from `files[split]`. Without it they come from the task's own source (hub or generator), if no file
    of another split was given. If there is no validation part, one is carved from train with `seed`, and the train
    split then excludes those rows. Held-out rows of one sample (see `Task.merge_by`) become one example with all
    their references; in the train split every row is an example, and is repeated as the weights of its files demand.

    Raises UserError if the task is unknown, the split has no source, a file is unreadable, a field of a row is missing
    or empty (naming file and line), rows of a file have several shapes, or the template has an unknown field.
    """
    entry = get_task(task) if isinstance(task, str) else task
    template = _check_template(prompt_template) if prompt_template else None
    reading = replace(reading or Reading(), template_fields=_names(template or ""))
    rows = _split_rows(entry, split, files=files, seed=seed, reading=reading)
    samples = [[row] for row in rows] if split == "train" else _merged(entry, rows)
    shapes: dict[str, tuple[str, str]] = {}
    examples = []
    with opened_chat(tokenizer, reading) as chat:
        for sample in samples[:limit]:
            parts = [_parts(entry, row, source, reading) for row, source in sample]
            _check_one_shape(parts[0], sample[0][1], shapes, reading)
            examples.append(_to_example(entry, parts, sample[0][1], template, chat))
    return examples


def read_split(
    settings: Settings | EvaluateSettings, split: Split, *, tokenizer: Any, limit: int | None = None
) -> list[Example]:
    """`load_split` with the task, files, seed and template of a command's settings."""
    return load_split(
        settings.task,
        split,
        files={"train": settings.train_file, "validation": settings.validation_file, "test": settings.test_file},
        seed=settings.seed,
        prompt_template=settings.prompt_template,
        tokenizer=tokenizer,
        limit=limit,
        reading=Reading.of(settings),
    )


# Splits -----------------------------------------------------------------------------------------------------


def _find_source(task: Task, split: Split, *, files: Files) -> Literal["file", "own", "carve"] | None:
    if files.get(split):
        return "file"
    if any(files.get(name) for name in ("train", "validation", "test")):
        # A run on the user's own files never mixes them with the hub's rows.
        return "carve" if split == "validation" and files.get("train") else None
    own = task.hub.splits if task.hub else {}
    if task.generate or split in own:
        return "own"
    return "carve" if split == "validation" and "train" in own else None


def _split_rows(task: Task, split: Split, *, files: Files, seed: int, reading: Reading) -> list[Row]:
    source = _find_source(task, split, files=files)
    if source is None:
        raise UserError(f"--task {task.name} has no {split} data; give --{split}_file")
    if source == "carve":
        rows = [row for group in _read_all(task, "train", files=files, reading=reading) for row in group.rows]
        held_out = _held_out(task, rows, seed=seed)
        if not held_out.any():
            raise UserError(
                f"{rows[0][1]}: one sample cannot be split into train and validation; give --validation_file"
            )
        return [row for row, taken in zip(rows, held_out, strict=True) if taken]
    groups = _read_all(task, split, files=files, reading=reading)
    if split != "train":
        return [row for group in groups for row in group.rows]
    if _find_source(task, "validation", files=files) == "carve":
        rows = [row for group in groups for row in group.rows]
        groups = without_rows(groups, _held_out(task, rows, seed=seed).tolist())
    return mixed(groups, seed=seed)


def _held_out(task: Task, rows: Sequence[Row], *, seed: int) -> NDArray[np.bool_]:
    """Return which train rows are used for validation, (num_rows,) bool; none if there is only one sample.

    Rows of one sample stay together: a model must not be evaluated on what it was trained on.
    """
    numbers = np.array(_sample_numbers(task, rows))
    num_samples = int(numbers.max()) + 1
    large = num_samples >= 10 * task.validation_rows
    count = task.validation_rows if large else min(max(1, num_samples // 20), num_samples - 1)
    taken = np.zeros(num_samples, dtype=bool)
    taken[permutation(num_samples, seed=seed, stream=_CARVE_STREAM)[:count]] = True
    return taken[numbers]


def _sample_numbers(task: Task, rows: Iterable[Row]) -> list[int]:
    """The 0-based number of each row's sample in file order. Rows with the same `merge_by` field share a number."""
    seen: dict[Any, int] = {}
    numbers = []
    for index, (row, _) in enumerate(rows):
        key = row.get(task.merge_by) if task.merge_by else None
        numbers.append(seen.setdefault(key if isinstance(key, str) else index, len(seen)))
    return numbers


def _merged(task: Task, rows: Sequence[Row]) -> list[list[Row]]:
    """The rows of each sample, in file order of their first row."""
    samples: dict[int, list[Row]] = {}
    for number, row in zip(_sample_numbers(task, rows), rows, strict=True):
        samples.setdefault(number, []).append(row)
    return list(samples.values())


def _read_all(task: Task, split: Split, *, files: Files, reading: Reading) -> list[Group]:
    given = str(files.get(split) or "")
    rows = task.read_files(given, f"--{split}_file", reading) if given and task.read_files else None
    if rows is None and given and not (task.hub and given == task.hub.id and split in task.hub.splits):
        groups = read_sources(parse_sources(given, f"--{split}_file"), split=split)
    else:
        if rows is None and task.generate:
            rows = list(task.generate(split))
        elif rows is None:
            assert task.hub is not None
            hub = task.hub
            rows = read_hub_rows(
                hub.id, split=hub.splits[split], config_name=hub.config, parquet_branch=hub.parquet_branch
            )
        groups = [Group(Source(given or task.name), rows)]
    groups = [replace(group, rows=_unfolded(task, group.rows, reading)) for group in groups]
    for group in groups:
        if not group.rows:
            raise UserError(f"{group.source.name}: holds no samples of task {task.name}; give another file")
    return groups


def _unfolded(task: Task, rows: list[Row], reading: Reading) -> list[Row]:
    """The rows under our names, and flat where the task's are nested."""
    if reading.columns is not None:
        known = frozenset() if task.fields else OUR_FIELDS
        rows = [(renamed(row, reading.columns, source, known=known), source) for row, source in rows]
    return rows if task.unfold is None else [flat for row, source in rows for flat in task.unfold(row, source)]


# Prompts ----------------------------------------------------------------------------------------------------


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


def _guarded(
    fields: Mapping[str, Any], chat: Chat, source: str, *, only: Sequence[str] | None = None
) -> dict[str, Any]:
    """The fields, of which the texts named `only` (default: all) have control tokens marked, or are rejected."""
    return {
        name: chat.control.guard(value, f"field {name!r}", source)
        if isinstance(value, str) and (only is None or name in only)
        else value
        for name, value in fields.items()
    }


def _check_one_shape(parts: Parts, source: str, shapes: dict[str, tuple[str, str]], reading: Reading) -> None:
    """Raise UserError if a file's first row has another shape than `parts`. `shapes`: by file, of its first row."""
    file = source.rpartition(":")[0]
    shape, first = shapes.setdefault(file, (parts.shape, source))
    if parts.shape != shape and not reading.first_rules:
        raise UserError(
            f"{source}: a row of shape {parts.shape} in a file whose first row ({first}) has shape {shape}; give each"
            " shape a file of its own"
        )


def _parts(task: Task, row: Mapping[str, Any], source: str, reading: Reading) -> Parts:
    for name in task.fields:
        if row.get(name) is None:
            expected = ", ".join(repr(field) for field in task.fields)
            found = f"{source}: field {name!r} is missing; the row has {describe_fields(row)}"
            raise UserError(f"{found}, and task {task.name} reads {expected}")
    parts = task.parts(row, source, reading)
    if not parts.answers:
        raise UserError(f"{source}: the row has no answer; every row needs at least one")
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
        raise UserError(f"--prompt_template {template!r}: holds half of a surrogate pair, which is not text")
    for name, spec, conversion in names:
        if not name.isidentifier() or spec or conversion:
            raise UserError(f"--prompt_template {template!r}: {{{name}}} is not a plain {{field}} name")
    return template.replace("\\n", "\n")


def _fill(template: str, fields: Mapping[str, Any], source: str) -> str:
    for name in _names(template):
        if name not in fields:
            known = ", ".join(sorted(fields)) or "none"
            raise UserError(f"--prompt_template: {source} has no field {name!r}; the fields for prompts are {known}")
        if not isinstance(fields[name], str):
            raise UserError(f"--prompt_template: {source}: field {name!r} is not text; use another field")
        checked_text(fields[name], name, source, allow_empty=True)
    return template.format_map(fields)
