"""The samples of a split: a task's record turns rows from files, the hub or a generator into examples.

Owns how validation rows are taken from training rows, and how rows of one sample are merged. Leaves names of files and
reading to `sources`, and texts to `example_maker`.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping
from contextlib import closing
from itertools import islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.base.paths import user_path
from megatron_tiedlora.config.evaluate_settings import EvaluateSettings
from megatron_tiedlora.config.settings import Settings
from megatron_tiedlora.data.chat import Chat, read_chat_template
from megatron_tiedlora.data.example_maker import ExampleMaker, OneShape, with_template
from megatron_tiedlora.data.examples import Example
from megatron_tiedlora.data.order import permutation
from megatron_tiedlora.data.readers import checked_files, looks_like_path
from megatron_tiedlora.data.reading import Reading
from megatron_tiedlora.data.sources import Files, RowStream, mixed, parse_sources, row_stream, source_kind
from megatron_tiedlora.data.tables import Row
from megatron_tiedlora.data.task import Split, Task
from megatron_tiedlora.data.tasks import get_task

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
    of another split was given. If there is no validation part, one is taken from train with `seed`, and the train
    split then excludes those rows. Held-out rows of one sample (see `Task.merge_by`) become one example with all
    their references; in the train split every row is an example, and is repeated as the weights of its files demand.

    Raises UserError if the task is unknown, the split has no source, a file is unreadable, a field of a row is missing
    or empty (naming file and line), rows of a file have several shapes, or the template has an unknown field.
    """
    entry = get_task(task) if isinstance(task, str) else task
    reading, template = with_template(reading or Reading(), prompt_template)
    if split == "train":
        samples: Iterable[list[Row]] = ([row] for row in _train_rows(entry, files=files, seed=seed, reading=reading))
    else:
        samples = _held_out_samples(entry, split, files=files, seed=seed, reading=reading)
    one_shape, examples = OneShape(), []
    with closing(Chat(tokenizer, reading)) as chat:
        maker = ExampleMaker(entry, template=template, chat=chat)
        for sample in islice(samples, limit):
            example, shape = maker.example(sample)
            one_shape.check(shape, example.source)
            examples.append(example)
    return examples


def read_split(
    settings: Settings | EvaluateSettings, split: Split, *, tokenizer: Any, limit: int | None = None
) -> list[Example]:
    """`load_split` with the task, files, seed and template of a command's settings."""
    return load_split(
        settings.task,
        split,
        files=files_of(settings),
        seed=settings.seed,
        prompt_template=settings.prompt_template,
        tokenizer=tokenizer,
        limit=limit,
        reading=Reading.of(settings),
    )


def files_of(settings: Settings | EvaluateSettings) -> Files:
    """The files of a command's settings."""
    return {"train": settings.train_file, "validation": settings.validation_file, "test": settings.test_file}


def local_names(settings: Settings | EvaluateSettings) -> Iterator[str]:
    """The paths and patterns that the data flags name. Hub ids, and formats that only a task reads, are not among them.

    Raises:
        UserError: the value of a flag is not valid.
    """
    files = {} if get_task(settings.task).read_files is not None else files_of(settings)
    for split, given in files.items():
        for source in parse_sources(str(given), f"--{split}_file") if given else ():
            if looks_like_path(source.name) or user_path(source.name).exists():
                yield source.name


def check_files_exist(settings: Settings | EvaluateSettings) -> None:
    """Raise UserError if a file that a data flag or --chat_template names does not exist. It needs no slow import."""
    for name in local_names(settings):
        if not (path := user_path(name)).exists():
            checked_files(path, name)
    if settings.chat_template is not None:
        read_chat_template(settings.chat_template)


def _train_rows(task: Task, *, files: Files, seed: int, reading: Reading) -> list[Row]:
    stream = row_stream(task, "train", files=files, reading=reading)
    numbered = list(stream)
    sizes = np.bincount([number for number, _ in numbered], minlength=len(stream.sources)).tolist()
    held_out = np.zeros(len(numbered), dtype=bool)
    if source_kind(task, "validation", files) == "carve":
        numbers = SampleNumbers(task)
        held_out = held_out_rows(task, np.array([numbers.of(row) for _, (row, _) in numbered]), seed=seed)
    return [numbered[row][1] for row in mixed(stream.sources, sizes, held_out, seed=seed).rows.tolist()]


def _held_out_samples(task: Task, split: Split, *, files: Files, seed: int, reading: Reading) -> list[list[Row]]:
    """The rows of each sample of a split that is not trained on, in file order of their first row."""
    numbers, samples = SampleNumbers(task), dict[int, list[Row]]()
    if source_kind(task, split, files) == "carve":
        stream = row_stream(task, "train", files=files, reading=reading)
        of_rows = np.array([numbers.of(row) for _, (row, _) in stream])
        taken = check_held_out(held_out_rows(task, of_rows, seed=seed), stream)
        pairs = ((number, row) for number, is_taken, (_, row) in zip(of_rows, taken, stream, strict=True) if is_taken)
    else:
        stream = row_stream(task, split, files=files, reading=reading)
        pairs = ((numbers.of(row), (row, source)) for _, (row, source) in stream)
    for number, row in pairs:
        samples.setdefault(int(number), []).append(row)
    return list(samples.values())


def held_out_rows(task: Task, numbers: NDArray[np.int64], *, seed: int) -> NDArray[np.bool_]:
    """Which train rows are used for validation, (num_rows,) bool; none if there is only one sample.

    Rows of one sample stay together: a model must not be evaluated on what it was trained on.

    Args:
        numbers: (num_rows,) the number of each row's sample, as `SampleNumbers` gives it.
    """
    num_samples = int(numbers.max()) + 1
    large = num_samples >= 10 * task.validation_rows
    count = task.validation_rows if large else min(max(1, num_samples // 20), num_samples - 1)
    taken = np.zeros(num_samples, dtype=bool)
    taken[permutation(num_samples, seed=seed, stream=_CARVE_STREAM)[:count]] = True
    return taken[numbers]


def check_held_out(held_out: NDArray[np.bool_], stream: RowStream) -> NDArray[np.bool_]:
    """`held_out`. Raises UserError if it has no row."""
    if not held_out.any():
        name = stream.sources[0].name
        raise UserError(f"{name}: one sample cannot be split into train and validation; give --validation_file")
    return held_out


class SampleNumbers:
    """The 0-based number of each row's sample in file order. Rows with the same `merge_by` field share a number."""

    def __init__(self, task: Task) -> None:
        self._field = task.merge_by
        self._rows = 0
        self._seen: dict[Hashable, int] = {}

    def of(self, row: Mapping[str, Any]) -> int:
        """The number of the next row."""
        self._rows += 1
        if self._field is None:
            return self._rows - 1
        key = row.get(self._field)
        return self._seen.setdefault(key if isinstance(key, str) else self._rows, len(self._seen))
