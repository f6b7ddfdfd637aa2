"""A task is one small record: where its rows are, how a prompt is built, and how answers are scored.

Owns the record's class. The records are in `tasks`, one file each. Leaves reading splits to `splits`, file formats to
`readers`, and the metrics, which are only named here, to the evaluation package.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from megatron_tiedlora.data.readers import Row
from megatron_tiedlora.data.reading import Reading
from megatron_tiedlora.data.turns import Conversation

Split = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class Parts:
    """The parts that a task makes from one row.

    fields: what a prompt template may name: the row's own fields without the answer.
    prompt: the prompt if the task builds it itself; None: fill the template.
    answers: accepted texts, at least one; training uses the first.
    choices: all choices in the row's order, including the first answer; empty if the task has no choices.
    endings: the choices as they follow the prompt; by default each after one space.
    conversation: the turns of a chat, which has neither prompt nor answer of its own.
    shape: the name of the row's shape, which all rows of a file share; '' for tasks with rows of one shape.
    """

    fields: Mapping[str, Any]
    prompt: str | None
    answers: tuple[str, ...]
    choices: tuple[str, ...] = ()
    endings: tuple[str, ...] = ()
    conversation: Conversation | None = None
    shape: str = ""


@dataclass(frozen=True)
class HubSource:
    """The task's own rows on the hub.

    splits: our split -> the hub's; without validation, it is carved from train.
    parquet_branch: read the hub's parquet copy, for a repo with a loading script, which `datasets` rejects.
    """

    id: str
    splits: Mapping[str, str]
    config: str | None = None
    parquet_branch: bool = False


@dataclass(frozen=True)
class Task:
    """One task.

    name: the name of its file.
    fields: fields that every row must have, also for messages; empty if rows have several shapes.
    template: the prompt with {field} names; empty if `parts` builds the prompt itself.
    parts: (row, source, what the user decided about rows) -> `Parts`; raises UserError naming source and field.
    metrics: names of metrics in the evaluation package; the first is the task's own.
    stop: a prediction ends before this text; None: only end-of-sequence ends it.
    hub: the task's own rows; None if there are only the user's.
    validation_rows: how many rows are carved from a large train part (from a small one, 5 %).
    merge_by: held-out rows with the same value of this field are one sample with several references.
    unfold: (row, source) -> flat rows, for files with nested rows.
    read_files: (argument, flag) -> a function that reads rows, for formats that only this task
        has; None: read it like any other file.
    generate: split -> rows, for a task without files; independent of the run's seed, so that scores are comparable.
    scored_rows: how many test rows are answered by default, also before and after training. None: all of them, and in
        training only those of a file that is given.
    max_new_tokens: the default of --max_new_tokens.
    micro_batch_rows: the default of --micro_batch_size, except with packing on a GPU (see `default_rows`).
    exports_merged: whether a run also merges its adapter at the end, and verifies its exports.
    fp32_on_slow_cpus: whether --dtype is fp32 by default on CPUs without instructions for bf16.
    """

    name: str
    fields: tuple[str, ...]
    template: str
    parts: Callable[[Mapping[str, Any], str, Reading], Parts]
    metrics: tuple[str, ...]
    stop: str | None = None
    hub: HubSource | None = None
    validation_rows: int = 500
    merge_by: str | None = None
    unfold: Callable[[Mapping[str, Any], str], Iterator[Row]] | None = None
    read_files: Callable[[str, str], Callable[[], Iterable[Row]] | None] | None = None
    generate: Callable[[Split], Iterable[Row]] | None = None
    scored_rows: int | None = None
    max_new_tokens: int = 500
    micro_batch_rows: int = 1
    exports_merged: bool = False
    fp32_on_slow_cpus: bool = False
