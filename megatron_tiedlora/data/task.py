"""What a task is: one small record that says where its rows are, how a prompt is built, and what is scored.

Owns the record. The records themselves are one file each in `tasks`; reading splits by them is left to `splits`, file
formats to `readers`, and the metrics, which are only named here, to the evaluation package.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from megatron_tiedlora.data.readers import Row

Split = Literal["train", "validation", "test"]


@dataclass(frozen=True)
class Parts:
    """What a task makes of one row.

    fields: what a prompt template may name: the row's own fields without the answer.
    prompt: the prompt where the task builds it by itself, else None for "fill the template".
    answers: accepted texts, at least one; the first is what is trained on.
    choices: the texts of which the first answer is one, in the row's order; empty where there is no choice.
    """

    fields: Mapping[str, Any]
    prompt: str | None
    answers: tuple[str, ...]
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class HubSource:
    """Where a task's own rows are on the hub.

    splits: our split -> the hub's; validation is taken out of train where it is not there.
    parquet_branch: the repo holds a loading script, which `datasets` refuses: read the hub's parquet copy of it.
    """

    id: str
    splits: Mapping[str, str]
    config: str | None = None
    parquet_branch: bool = False


@dataclass(frozen=True)
class Task:
    """One task.

    name: that of its file.
    fields: what every row must have, for messages too; empty where rows have several shapes.
    template: the prompt with {field} names; empty where `parts` builds the prompt itself.
    parts: (row, source, chat template or None) -> `Parts`; raises UserError naming source and field.
    metrics: names of scores in the evaluation package; the first is the task's own.
    stop: a prediction ends before this text; None where only end-of-sequence ends it.
    hub: the task's own rows; None where there are none but the user's.
    validation_rows: how many rows are taken out of a large train part (5 % of a small one).
    merge_by: held-out rows that agree in this field are one sample with several references.
    unfold: (row, source) -> flat rows, for files whose rows are nested.
    read_files: (argument, flag) -> rows, or None for "as any other file": formats that only this task has.
    generate: split -> rows, for a task without files; whatever the run's seed, so that held-out parts stay comparable.
    scored_rows: how many test rows are decoded by default, the first ones, also before and after training. None: all of
        them, and in training those of a given file only.
    max_new_tokens: the default of --max_new_tokens.
    micro_batch_rows: the default of --micro_batch_size where a GPU does not take more (see `default_rows`).
    exports_merged: whether a run also merges its adapter at the end, and verifies its exports.
    fp32_on_slow_cpus: whether --dtype is fp32 by default on CPUs without instructions for bf16.
    """

    name: str
    fields: tuple[str, ...]
    template: str
    parts: Callable[[Mapping[str, Any], str, Any], Parts]
    metrics: tuple[str, ...]
    stop: str | None = None
    hub: HubSource | None = None
    validation_rows: int = 500
    merge_by: str | None = None
    unfold: Callable[[Mapping[str, Any], str], Iterator[Row]] | None = None
    read_files: Callable[[str, str], list[Row] | None] | None = None
    generate: Callable[[Split], Iterable[Row]] | None = None
    scored_rows: int | None = None
    max_new_tokens: int = 500
    micro_batch_rows: int = 1
    exports_merged: bool = False
    fp32_on_slow_cpus: bool = False
