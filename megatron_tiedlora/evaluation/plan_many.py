"""The plans of an evaluation of several adapters of one base, checked before the base is loaded."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_tiedlora.base.errors import UserError, as_given, shown
from megatron_tiedlora.base.paths import last_name
from megatron_tiedlora.base.wording import count_text
from megatron_tiedlora.checkpoint.base_identity import identify_model
from megatron_tiedlora.config.evaluate_settings import EvaluateSettings
from megatron_tiedlora.config.fields import validate_settings
from megatron_tiedlora.convert.export_many import adapter_name, find_adapters
from megatron_tiedlora.evaluation.answering import Questions, ScoredSet
from megatron_tiedlora.evaluation.held_out import read_held_out
from megatron_tiedlora.evaluation.plan import EvaluationPlan, plan_evaluation
from megatron_tiedlora.evaluation.results import TABLE_FILE
from megatron_tiedlora.model.fused_attention import AttentionRoute

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Plans = Mapping[str, EvaluationPlan]  # by the adapter's name; they differ in the adapter and in what follows from it

_OWN = ("adapter", "adapters", "output_dir")  # settings that do not decide which rows are answered, and how
_LONGEST_NAME = 240  # bytes


def named_adapters(given: Sequence[str]) -> dict[str, Path]:
    """The folders that the values of --adapters name, by the adapter's name: NAME of NAME=FOLDER, or the run's.

    Raises:
        UserError: a value names no adapter, two have one name, or a name cannot be that of a folder beside the table. A
            folder that is no adapter is found when it is read.
    """
    found: dict[str, Path] = {}
    for value in given:
        name, is_named, path = value.partition("=")
        is_named = is_named if "/" not in name else ""
        folders = find_adapters([path if is_named else value], flag="--adapters", runs=True)
        if is_named and len(folders) > 1:
            why = f"{path} holds {len(folders)} adapters"
            raise UserError(f"--adapters {as_given(value)}: {why}; give NAME=FOLDER for each")
        for folder in folders:
            own = name if is_named else adapter_name(folder)
            if not own or own.startswith(".") or own == TABLE_FILE or len(os.fsencode(own)) > _LONGEST_NAME:
                why = f"{shown(own)} cannot be a folder's name"
                raise UserError(f"--adapters {as_given(value)}: {why}; give NAME=FOLDER")
            if found.setdefault(own, folder) != folder:
                raise UserError(f"--adapters: {found[own]} and {folder} are both named {own}; give NAME=FOLDER")
    return found


def plan_evaluations(settings: EvaluateSettings, *, rank: int, world_size: int) -> dict[str, EvaluationPlan]:
    """The plan of each of --adapters; without them one plan, whose name is "".

    Raises:
        UserError: names the adapter, if it does not fit, or is of another base than the others.
    """
    if settings.adapters is None:
        return {"": plan_evaluation(settings, rank=rank, world_size=world_size)}
    given = {name: value for name, value in settings.model_dump(exclude_none=True).items() if name != "adapters"}
    plans: dict[str, EvaluationPlan] = {}
    identify = cache(identify_model)
    for name, folder in named_adapters(settings.adapters).items():
        try:
            own = validate_settings({**given, "adapter": str(folder)}, EvaluateSettings)
            plans[name] = plan_evaluation(own, rank=rank, world_size=world_size, identify=identify)
            _check_same_base(next(iter(plans.items())), plans[name])
        except UserError as error:
            raise UserError(f"--adapters: {name}: {error}") from None
    return plans


def _check_same_base(first: tuple[str, EvaluationPlan], plan: EvaluationPlan) -> None:
    name, other = first
    folder, expected = (one.source.weights_folder().resolve() for one in (plan, other))
    if folder != expected:
        raise UserError(
            f"its base is {plan.source.name}, and that of {name} is {other.source.name}; evaluate them apart, or give"
            " one with --model"
        )
    if plan.base != other.base:
        raise UserError(
            f"its base would be in {plan.base or plan.dtype_name}, and that of {name} in"
            f" {other.base or other.dtype_name}; give --base"
        )


def name_of_all(plans: Plans) -> str:
    """MODEL-TASK-ADAPTER, or MODEL-TASK-N-adapters, for the output folder's name."""
    first = next(iter(plans.values()))
    if len(plans) == 1:
        return first.name
    return f"{last_name(first.source.name)}-{first.task.name}-{count_text(len(plans), 'adapter').replace(' ', '-')}"


def read_questions(plans: Plans) -> dict[str, Questions]:
    """What each adapter is to answer. Rows that several answer in the same way are read once.

    Raises:
        UserError: as `read_held_out`.
    """
    read: dict[str, tuple[PreTrainedTokenizerBase, ScoredSet]] = {}
    found = {}
    for name, plan in plans.items():
        same = {key: value for key, value in plan.settings.model_dump().items() if key not in _OWN}
        key = repr((same, plan.longest_prompt, plan.limit))
        if key not in read:
            read[key] = read_held_out(plan)
        tokenizer, scored = read[key]
        found[name] = Questions(scored, tokenizer, plan.max_new_tokens, plan.settings.batch_size, name)
    return found


def headline_of_all(plans: Plans, questions: Mapping[str, Questions], attention: AttentionRoute) -> list[str]:
    """A few lines about the evaluation, to print before its progress bar."""
    (name, plan), *others = plans.items()
    scored = questions[name].scored
    lines = plan.headline(
        len(scored.examples), scored.num_truncated, attention, scored.chat_note, adapters=len(plans)
    )
    if not others:
        return lines
    shared = set(plan.notes).intersection(*(other.notes for _, other in others))
    lines = [line for line in lines if not line.startswith("note ") or line.removeprefix("note       ") in shared]
    for own, of_own in plans.items():
        lines.append(f"adapter    {own}: {of_own.adapter_name}, from {of_own.settings.adapter}")
        lines += [f"note       {own}: {note}" for note in of_own.notes if note not in shared]
    return lines
