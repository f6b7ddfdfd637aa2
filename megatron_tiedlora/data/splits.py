"""The samples of a split: a task's record turns rows from files, the hub or a generator into examples.

Owns which source a split has, how validation rows are carved from training rows, how rows of one sample are merged,
and the user's prompt template. Leaves file formats to `readers`, the meaning of a row to its task, and the answer's
leading space to `examples.join_answer`.
"""

from __future__ import annotations

import string
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.config.evaluate_settings import EvaluateSettings
from megatron_tiedlora.config.settings import Settings
from megatron_tiedlora.data.chat_template import ChatTemplate, opened_template
from megatron_tiedlora.data.examples import Example, join_answer
from megatron_tiedlora.data.fields import checked_text, describe_fields, is_text
from megatron_tiedlora.data.order import permutation
from megatron_tiedlora.data.readers import Row, read_hub_rows, read_rows
from megatron_tiedlora.data.task import Parts, Split, Task
from megatron_tiedlora.data.tasks import get_task

Files = Mapping[str, str | Path | None]
"""Split name -> local file or hub id. A missing key or None means that none was given."""

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
) -> list[Example]:
    """Return the samples of one split in file order (at most the first `limit`).

    The rows come from `files[split]`. Without it they come from the task's own source (hub or generator), if no file
    of another split was given. If there is no validation part, one is carved from train with `seed`, and the train
    split then excludes those rows. Held-out rows of one sample (see `Task.merge_by`) become one example with all
    their references; in the train split every row is an example.

    Raises UserError if the task is unknown, the split has no source, a file is unreadable, a field of a row is missing
    or empty (naming file and line), or the template has an unknown field.
    """
    entry = get_task(task) if isinstance(task, str) else task
    rows = _split_rows(entry, split, files=files, seed=seed)
    template = _check_template(prompt_template) if prompt_template else None
    samples = [[row] for row in rows] if split == "train" else _merged(entry, rows)
    with opened_template(tokenizer) as chat:
        return [_to_example(entry, sample, template, chat) for sample in samples[:limit]]


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


def _split_rows(task: Task, split: Split, *, files: Files, seed: int) -> list[Row]:
    source = _find_source(task, split, files=files)
    if source is None:
        raise UserError(f"--task {task.name} has no {split} data; give --{split}_file")
    if source == "carve":
        rows = _read_all(task, "train", files=files)
        held_out = _held_out(task, rows, seed=seed)
        if not held_out.any():
            raise UserError(
                f"{rows[0][1]}: one sample cannot be split into train and validation; give --validation_file"
            )
        return [row for row, taken in zip(rows, held_out, strict=True) if taken]
    rows = _read_all(task, split, files=files)
    if split == "train" and _find_source(task, "validation", files=files) == "carve":
        held_out = _held_out(task, rows, seed=seed)
        return [row for row, taken in zip(rows, held_out, strict=True) if not taken]
    return rows


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


def _read_all(task: Task, split: Split, *, files: Files) -> list[Row]:
    given = str(files.get(split) or "")
    rows = task.read_files(given, f"--{split}_file") if given and task.read_files else None
    if rows is None and given and not (task.hub and given == task.hub.id and split in task.hub.splits):
        rows = read_rows(given, split=split)
    elif rows is None and task.generate:
        rows = list(task.generate(split))
    elif rows is None:
        assert task.hub is not None
        hub = task.hub
        rows = read_hub_rows(hub.id, split=hub.splits[split], config_name=hub.config, parquet_branch=hub.parquet_branch)
    if task.unfold:
        rows = [flat for row, source in rows for flat in task.unfold(row, source)]
    if not rows:
        raise UserError(f"{given or task.name}: holds no samples of task {task.name}; give another file")
    return rows


# Prompts ----------------------------------------------------------------------------------------------------


def _to_example(task: Task, rows: Sequence[Row], template: str | None, chat: ChatTemplate | None) -> Example:
    """The example of a sample: prompt and answer of its first row, and the references of all its rows."""
    parts = [_parts(task, row, source, chat) for row, source in rows]
    first, source = parts[0], rows[0][1]
    if template is not None:
        prompt = _fill(template, first.fields, source)
    else:
        prompt = task.template.format_map(first.fields) if first.prompt is None else first.prompt
    if not prompt:
        raise UserError(f"{source}: the prompt is empty; check the fields or --prompt_template")
    references = (answer.strip() for row_parts in parts for answer in row_parts.answers)
    return Example(
        prompt=prompt,
        completion=join_answer(prompt, first.answers[0]),
        source=source,
        references=tuple(dict.fromkeys(references)),
        choices=tuple(choice.strip() for choice in first.choices),
    )


def _parts(task: Task, row: Mapping[str, Any], source: str, chat: ChatTemplate | None) -> Parts:
    for name in task.fields:
        if row.get(name) is None:
            expected = ", ".join(repr(field) for field in task.fields)
            found = f"{source}: field {name!r} is missing; the row has {describe_fields(row)}"
            raise UserError(f"{found}, and task {task.name} reads {expected}")
    parts = task.parts(row, source, chat)
    if not parts.answers:
        raise UserError(f"{source}: the row has no answer; every row needs at least one")
    return parts


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
    names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    for name in names:
        if name not in fields:
            known = ", ".join(sorted(fields)) or "none"
            raise UserError(f"--prompt_template: {source} has no field {name!r}; the fields for prompts are {known}")
        if not isinstance(fields[name], str):
            raise UserError(f"--prompt_template: {source}: field {name!r} is not text; use another field")
        checked_text(fields[name], name, source, allow_empty=True)
    return template.format_map(fields)
