"""Tasks as one table: where the rows are, how a prompt is built, what is scored.

Adding a task is one entry in `TASKS`. Owns prompts, fields and splits; leaves file formats to `readers`,
the answer's leading space to `examples.join_answer` and metrics (named here) to the evaluation package.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from megatron_tiedlora.config.errors import UserError
from megatron_tiedlora.data.custom import custom_parts
from megatron_tiedlora.data.examples import Example, join_answer
from megatron_tiedlora.data.fields import required_text
from megatron_tiedlora.data.order import permutation
from megatron_tiedlora.data.readers import Row, read_rows

Split = Literal["train", "validation", "test"]
Files = Mapping[str, str | Path | None]
"""Split name -> local file or hub id; a missing key or None means that none was given."""

_CARVE_STREAM = 2**32  # epochs use the streams from 0 up, so the held-out rows are drawn from one far above


@dataclass(frozen=True)
class Task:
    """One entry of the table.

    template: the prompt with {field} names; empty where `parts` builds the prompt itself.
    parts: (row, source, tokenizer) -> (prompt fields, prompt or None for "use the template", answers).
    unfold: (row, source) -> flat rows; only for nested files.
    generate: split -> rows, for a task without files; whatever the run's seed, so that held-out parts stay comparable.
    hub_splits: our split -> the hub's; validation is taken out of train when it is not there.
    validation_rows: how many rows are taken out of a large train part (5 % of a small one).
    metric: name of the score in the evaluation package.
    """

    name: str
    metric: str
    template: str
    parts: Callable[[Mapping[str, Any], str, Any], tuple[dict[str, Any], str | None, tuple[str, ...]]]
    hub_id: str | None = None
    hub_config: str | None = None
    hub_splits: Mapping[str, str] = field(default_factory=dict)
    validation_rows: int = 500
    unfold: Callable[[Mapping[str, Any], str], Iterator[Row]] | None = None
    generate: Callable[[Split], Iterable[Row]] | None = None


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
    """Return the samples of one split, in file order (at most `limit`, the first ones).

    The rows come from `files[split]`; without it from the task's own source (hub or generator), as long as no
    file of another split was given. Where there is no validation part, one is taken out of train with `seed`,
    and the train split then leaves those rows out.

    Raises UserError: unknown task, no source for the split, unreadable file, a row with a missing or empty
    field (named by file and line), a template with an unknown field.
    """
    entry = get_task(task) if isinstance(task, str) else task
    rows = _split_rows(entry, split, files=files, seed=seed)
    template = _check_template(prompt_template) if prompt_template else None
    return [_to_example(entry, row, source, template, tokenizer) for row, source in rows[:limit]]


def get_task(name: str) -> Task:
    """Return the entry called `name`; raises UserError with the known names."""
    if name not in TASKS:
        raise UserError(f"--task {name!r} is not known; tasks are {', '.join(sorted(TASKS))}")
    return TASKS[name]


def split_available(task: str | Task, split: Split, *, files: Files) -> bool:
    """Tell, without reading anything, whether `load_split` has a source for this split."""
    return _find_source(get_task(task) if isinstance(task, str) else task, split, files=files) is not None


# Splits -----------------------------------------------------------------------------------------------------


def _find_source(task: Task, split: Split, *, files: Files) -> Literal["file", "own", "carve"] | None:
    if files.get(split):
        return "file"
    if any(files.get(name) for name in ("train", "validation", "test")):
        # A run on the user's own files never mixes in the hub's rows.
        return "carve" if split == "validation" and files.get("train") else None
    if task.generate or split in task.hub_splits:
        return "own"
    return "carve" if split == "validation" and "train" in task.hub_splits else None


def _split_rows(task: Task, split: Split, *, files: Files, seed: int) -> list[Row]:
    source = _find_source(task, split, files=files)
    if source is None:
        raise UserError(f"--task {task.name} has no {split} data here; give --{split}_file")
    if source == "carve":
        rows = _read_all(task, "train", files=files, seed=seed)
        held_out = _held_out(task, len(rows), seed=seed)
        if not held_out.any():
            raise UserError(f"{rows[0][1]}: one row cannot be split into train and validation; give --validation_file")
        return [row for row, taken in zip(rows, held_out, strict=True) if taken]
    rows = _read_all(task, split, files=files, seed=seed)
    if split == "train" and _find_source(task, "validation", files=files) == "carve":
        held_out = _held_out(task, len(rows), seed=seed)
        return [row for row, taken in zip(rows, held_out, strict=True) if not taken]
    return rows


def _held_out(task: Task, num_rows: int, *, seed: int) -> np.ndarray:
    """Return which train rows serve as validation, (num_rows,) bool; none when there is a single row."""
    large = num_rows >= 10 * task.validation_rows
    count = task.validation_rows if large else min(max(1, num_rows // 20), num_rows - 1)
    mask = np.zeros(num_rows, dtype=bool)
    mask[permutation(num_rows, seed=seed, stream=_CARVE_STREAM)[:count]] = True
    return mask


def _read_all(task: Task, split: Split, *, files: Files, seed: int) -> list[Row]:
    name = files.get(split)
    if name:
        rows = read_rows(name, split=split)
    elif task.generate:
        rows = list(task.generate(split))
    else:
        assert task.hub_id is not None
        rows = read_rows(task.hub_id, split=task.hub_splits[split], config_name=task.hub_config)
    if task.unfold:
        rows = [flat for row, source in rows for flat in task.unfold(row, source)]
    if not rows:
        raise UserError(f"{name or task.hub_id or task.name}: holds no samples of task {task.name}")
    return rows


# Prompts ----------------------------------------------------------------------------------------------------


def _to_example(task: Task, row: Mapping[str, Any], source: str, template: str | None, tokenizer: Any) -> Example:
    fields, prompt, answers = task.parts(row, source, tokenizer)
    if template is not None:
        prompt = _fill(template, fields, source)
    elif prompt is None:
        prompt = task.template.format_map(fields)
    if not prompt:
        raise UserError(f"{source}: the prompt is empty; check the fields or --prompt_template")
    return Example(
        prompt=prompt,
        completion=join_answer(prompt, answers[0]),
        source=source,
        references=tuple(answer.strip() for answer in answers),
    )


def _check_template(template: str) -> str:
    r"""Return the template with a typed-out \n (all a shell's quotes can hold) made a newline."""
    try:
        names = [(name, spec, conv) for _, name, spec, conv in string.Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise UserError(f"--prompt_template {template!r}: {error}; write {{field}}, and {{{{ for a brace") from error
    for name, spec, conversion in names:
        if not name.isidentifier() or spec or conversion:
            raise UserError(f"--prompt_template {template!r}: {{{name}}} is not a plain {{field}} name")
    return template.replace("\\n", "\n")


def _fill(template: str, fields: Mapping[str, Any], source: str) -> str:
    names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    for name in names:
        if name not in fields:
            known = ", ".join(sorted(fields)) or "none"
            raise UserError(f"--prompt_template: {source} has no field {name!r}; fields for the prompt are {known}")
        if not isinstance(fields[name], str):
            raise UserError(f"--prompt_template: {source}: field {name!r} is not a text")
    return template.format_map(fields)


# The tasks --------------------------------------------------------------------------------------------------


def _gsm8k_parts(row: Mapping[str, Any], source: str, _: Any) -> tuple[dict[str, Any], str | None, tuple[str, ...]]:
    required_text(row, "question", source)
    return _without(row, "answer"), None, (required_text(row, "answer", source),)


def _squad_parts(row: Mapping[str, Any], source: str, _: Any) -> tuple[dict[str, Any], str | None, tuple[str, ...]]:
    """Answers are {"text": [...]} on the hub and [{"text": ...}, ...] in the nested JSON."""
    required_text(row, "context", source)
    required_text(row, "question", source)
    answers = row.get("answers")
    texts = answers.get("text") if isinstance(answers, Mapping) else answers
    if isinstance(texts, list | tuple):
        texts = [text.get("text") if isinstance(text, Mapping) else text for text in texts]
    if not isinstance(texts, list) or not texts:
        raise UserError(f"{source}: field 'answers' is missing or empty; every question needs at least one answer text")
    return _without(row, "answers"), None, tuple(required_text({"answers": text}, "answers", source) for text in texts)


def _unfold_squad(row: Mapping[str, Any], source: str) -> Iterator[Row]:
    """Yield flat rows from an article of nested SQuAD (paragraphs[].qas[]); a flat row is yielded as it is."""
    if "paragraphs" not in row:
        yield dict(row), source
        return
    for number, paragraph in enumerate(_objects(row, "paragraphs", source), start=1):
        place = f"{source}, paragraph {number}"
        for index, question in enumerate(_objects(paragraph, "qas", place), start=1):
            flat = {"context": paragraph.get("context"), "title": row.get("title"), **question}
            yield flat, f"{place}, question {index}"


def _objects(row: Mapping[str, Any], name: str, source: str) -> list[Mapping[str, Any]]:
    items = row.get(name)
    if not isinstance(items, list) or not all(isinstance(item, Mapping) for item in items):
        raise UserError(f"{source}: field {name!r} is not a list of objects, as nested SQuAD has it")
    return items


def _demo_rows(split: Split) -> Iterator[Row]:
    from megatron_tiedlora.data.demo import demo_examples

    for number, row in enumerate(demo_examples(split), start=1):
        yield row, f"demo {split}: row {number}"


def _without(row: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The fields a prompt may use: all but the answer."""
    return {key: value for key, value in row.items() if key != name}


_GSM8K_TEMPLATE = "Question: {question}\nAnswer:"

TASKS: Mapping[str, Task] = {
    task.name: task
    for task in (
        Task(name="custom", metric="exact_match", template="", parts=custom_parts),
        Task(
            name="gsm8k",
            metric="gsm8k",
            template=_GSM8K_TEMPLATE,
            parts=_gsm8k_parts,
            hub_id="openai/gsm8k",
            hub_config="main",
            hub_splits={"train": "train", "test": "test"},
            validation_rows=473,
        ),
        Task(
            name="squad",
            metric="squad",
            template="Context: {context} Question: {question} Answer:",
            parts=_squad_parts,
            hub_id="rajpurkar/squad",
            # The hub has no public test part: its validation part is what papers report.
            hub_splits={"train": "train", "test": "validation"},
            validation_rows=4800,
            unfold=_unfold_squad,
        ),
        Task(
            name="demo",
            metric="gsm8k",
            template=_GSM8K_TEMPLATE,
            parts=_gsm8k_parts,
            generate=_demo_rows,
        ),
    )
}
