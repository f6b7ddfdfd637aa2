"""Which settings of a run may differ from those of the checkpoint that it continues.

Those in `LAYOUT_SETTINGS` may, as they do not change what is computed. --epochs may, since only the number of steps
that follows from it counts. --max_steps may if the schedule does not depend on it, which is so if it is constant.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.base.shapes import QKV
from megatron_tiedlora.config.fields import flag_value
from megatron_tiedlora.training.plan import LAYOUT_SETTINGS, RunPlan

# What runs of earlier versions did without recording it: QKV alone, one schedule, AdamW's own betas, no dropout.
_EARLIER = {
    **{"targets": [QKV], "data_rules": 1, "schedule": "cosine", "beta1": 0.9, "beta2": 0.999, "dropout": 0.0},
    **{"init_from": None, "base": None},
}


def check_resumed_settings(
    plan: RunPlan, saved: Mapping[str, Any], *, step: int = 0, data_sha256: str, source: str
) -> None:
    """Raise UserError if a checkpoint's settings contradict the plan's; it names the setting and both values.

    Args:
        saved: the settings in the checkpoint, which is of `step` and called `source`.
    """
    saved, settings = {**_EARLIER, **saved}, plan.settings
    for name, value in plan.resolved_settings().items():
        if name in LAYOUT_SETTINGS or name == "epochs" or name not in saved:
            continue
        if name == "max_new_tokens" and settings.eval_metric == "loss":  # changes nothing in such a run
            continue
        before = saved[name]
        if (list(before) if isinstance(before, (list, tuple)) else before) == value:
            continue
        if name == "max_steps" and saved["schedule"] == settings.schedule == "constant":
            if settings.max_steps < step:
                raise UserError(f"{source}: is of step {step}, after {_steps_in_words(plan)}; give at least {step}")
            continue
        was, now = ("left out" if given is None else flag_value(given) for given in (before, value))
        found = f"{source}: trained with --{name} {was}, but now it is"
        if name == "max_steps":
            raise UserError(
                f"{found} {_steps_in_words(plan)}, and --schedule {saved['schedule']} reaches 0 at --max_steps (only"
                " --schedule constant, from the first step on, lets a run go on); resume with the same value, or start"
                f" a new run with --init_from {source}"
            )
        raise UserError(f"{found} {now}; resume with the same value")
    if saved.get("data_sha256") != data_sha256:
        raise UserError(
            f"{source}: trained on other data than --train_file and --validation_file now hold (or it is truncated or"
            " tokenised differently). Resume with the same data"
        )


def _steps_in_words(plan: RunPlan) -> str:
    """The number of steps, and what it was counted from."""
    epochs = plan.settings.epochs
    return f"{plan.settings.max_steps}" + ("" if epochs is None else f" (--epochs {epochs:g})")
