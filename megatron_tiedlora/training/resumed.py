"""Which settings of a run may differ from those of the checkpoint that it continues.

Those that are not `compared` may, as they do not change what is computed. --epochs may, since only the number of steps
that follows from it counts. --max_steps may if the schedule does not depend on it, which is so if it is constant. A
warm-up that was not given is the checkpoint's.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.config.fields import declared, flag_value
from megatron_tiedlora.config.settings import Settings
from megatron_tiedlora.training.plan import RunPlan
from megatron_tiedlora.training.profiling import steps_over


def check_resumed_settings(
    plan: RunPlan, saved: Mapping[str, Any], *, step: int = 0, data_sha256: str, source: str
) -> None:
    """Raise UserError if a checkpoint's settings contradict the plan's; it names the setting and both values.

    Args:
        saved: the settings in the checkpoint, which is of `step` and called `source`.
    """
    settings, marks = plan.settings, declared(Settings)
    for name, value in plan.resolved_settings().items():
        if not marks[name].compared or name == "epochs" or name not in saved:
            continue
        if name == "max_new_tokens" and settings.eval_metric == "loss":  # changes nothing in such a run
            continue
        before = saved[name]
        if (list(before) if isinstance(before, (list, tuple)) else before) == value:
            continue
        if name == "max_steps" and saved.get("schedule") == settings.schedule == "constant":
            if settings.max_steps < step:
                raise UserError(f"{source}: is of step {step}, after {_steps_in_words(plan)}; give at least {step}")
            continue
        if name == "warmup_steps" and name not in settings.model_fields_set and (kept := _warmup(saved)) is not None:
            if kept > settings.max_steps:
                raise UserError(
                    f"{source}: trained with a warm-up of {kept} steps, longer than {_steps_in_words(plan)}; give at"
                    f" least {kept} steps"
                )
            continue  # see with_kept_warmup
        was, now = ("left out" if given is None else flag_value(given) for given in (before, value))
        found = f"{source}: trained with --{name} {was}, but now it is"
        if name == "max_steps":
            raise UserError(
                f"{found} {_steps_in_words(plan)}, and --schedule {saved.get('schedule')} reaches 0 at --max_steps"
                " (only --schedule constant, from the first step on, lets a run continue); resume with the same value,"
                f" or start a new run with --init_from {shlex.quote(source)}"
            )
        same = f"leave it out, or give {was}" if name == "warmup_steps" else "resume with the same value"
        raise UserError(f"{found} {now}; {same}")
    if settings.resume != "auto" and (over := steps_over(settings.profile, step)):  # the headline notes it with auto
        left = f"give steps from {step + 1} to {settings.max_steps}" if step < settings.max_steps else "leave it out"
        raise UserError(f"{over}; {left}")
    if saved.get("data_sha256") != data_sha256:
        raise UserError(
            f"{source}: trained on other data than --train_file and --validation_file now hold (or it is truncated or"
            " tokenised differently). Resume with the same data"
        )


def with_kept_warmup(plan: RunPlan, saved: Mapping[str, Any] | None) -> RunPlan:
    """The plan of a run that continues one of the settings `saved` (None: a new run), with the warm-up of that one.

    The default warm-up is shortened to the number of steps, so that of a run which was made longer would differ.
    """
    if saved is None or "warmup_steps" in plan.settings.model_fields_set or (kept := _warmup(saved)) is None:
        return plan
    return replace(plan, settings=plan.settings.completed(warmup_steps=kept))


def _warmup(saved: Mapping[str, Any]) -> int | None:
    """The warm-up in a checkpoint's settings, which are anything that JSON can hold; None if it is no number."""
    found = saved.get("warmup_steps")
    return found if type(found) is int and found >= 0 else None


def _steps_in_words(plan: RunPlan) -> str:
    """The number of steps, and what it was counted from."""
    epochs = plan.settings.epochs
    return f"{plan.settings.max_steps}" + ("" if epochs is None else f" (--epochs {epochs:g})")
