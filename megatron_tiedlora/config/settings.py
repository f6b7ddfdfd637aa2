"""The settings of a training run, checked: their defaults, and what fits together.

The declarations are in `train_fields.py`. Checks that need the model, the world size or a file are made where those are
known.
"""

import re
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationInfo, field_validator, model_validator
from pydantic.functional_validators import ModelWrapValidatorHandler  # pydantic itself names it from 2.11 on

from megatron_tiedlora.base.messages import as_given, nearest_name, shown, user_path
from megatron_tiedlora.config.fields import flag_value, marked, validate_settings
from megatron_tiedlora.config.presets import is_preset
from megatron_tiedlora.config.train_fields import (
    DEFAULT_MODEL,
    DEFAULT_TASK,
    PAPER_DEFAULTS,
    TASK_DEFAULTS,
    TRACKER_NAMES,
    TrainFields,
)

NO_TRAIN_FILE = "--task custom needs --train_file (JSONL with prompt and completion, or a hub id)"


def _parse_trackers(value: Any) -> Any:
    """The names of `--report_to`, none twice. A value that is not a text or a list of texts is unchanged.

    Raises:
        ValueError: a name is unknown.
    """
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        return value
    found = tuple(dict.fromkeys(name.strip().lower() for name in value if name.strip()))
    if found == ("none",):
        return ()
    for name in found:
        if name not in TRACKER_NAMES:
            near = nearest_name(name, TRACKER_NAMES)
            raise ValueError(f"--report_to: {shown(name)} is unknown{near}; known: {', '.join(TRACKER_NAMES)}, or none")
    return found


class Settings(TrainFields):
    """The settings of one run, validated and frozen.

    Fields left out take the defaults of their task (`TASK_DEFAULTS`, else `PAPER_DEFAULTS`). Values that depend on the
    model or the world size stay None here and are resolved later: `dtype`, `layers`, `init_std_a`, `init_std_b`,
    `micro_batch_size`, `output_dir`. The default of `max_length` is lowered to the model's limit, and with `epochs` the
    number of steps is counted once the data is known (`planning/run_plan.py`).
    """

    @classmethod
    def default_text(cls, name: str) -> str:
        """As for every command, but with the paper's default and those of tasks that have their own."""
        if name not in PAPER_DEFAULTS:
            return super().default_text(name)
        by_task = [f"{task} {values[name]:g}" for task, values in TASK_DEFAULTS.items() if name in values]
        return "; ".join([f"{PAPER_DEFAULTS[name]:g}", *by_task])

    @model_validator(mode="wrap")
    @classmethod
    def _with_defaults(cls, values: dict[str, Any], check: "ModelWrapValidatorHandler[Settings]") -> "Settings":
        """Fill in the defaults. `model_fields_set` holds only what was given."""
        made = check(cls._filled(values))
        object.__setattr__(made, "__pydantic_fields_set__", set(values))
        return made

    def completed(self, **values: Any) -> "Settings":
        """A copy with other defaults: `model_fields_set` still holds only what was given."""
        made = self.model_copy(update=values)
        object.__setattr__(made, "__pydantic_fields_set__", set(self.model_fields_set))
        return made

    @classmethod
    def _filled(cls, values: dict[str, Any]) -> dict[str, Any]:
        filled = dict(values)
        if "task" not in filled and "train_file" in filled:
            filled["task"] = "custom"
        elif "task" not in filled and filled.get("model", DEFAULT_MODEL) == DEFAULT_MODEL:
            filled["task"] = DEFAULT_TASK
        elif "task" not in filled and "adapters" in filled:
            filled["task"] = "custom"  # of no consequence: each adapter's entry is filled in by itself
        elif "task" not in filled and (is_preset(as_given(filled["model"])) or filled.get("dry_run") in (True, "true")):
            filled["task"] = "custom"  # a dry run without data has full rows; a preset has no tokenizer to read any
        filled = {**PAPER_DEFAULTS, **TASK_DEFAULTS.get(as_given(filled.get("task")), {}), **filled}
        steps = as_given(filled["max_steps"])  # not checked yet
        if "warmup_steps" not in values and steps.isdecimal() and len(steps) < 16:
            filled["warmup_steps"] = min(filled["warmup_steps"], int(steps))
        if "init_from" not in filled:
            filled = {"alpha": filled.get("rank", 8), **filled}
        return {"save_interval": filled["eval_interval"], **filled}

    @property
    def names_data(self) -> bool:
        """Whether there are rows to train on: those of --train_file, or the task's own."""
        return self.task != "custom" or self.train_file is not None

    @field_validator("layers", mode="before")
    @classmethod
    def _parse_layers(cls, value: Any) -> Any:
        whole = isinstance(value, list) and [str(part).lower() for part in value] in ([], ["all"], ["none"])
        return None if whole else value

    @field_validator("profile", mode="before")
    @classmethod
    def _is_range_of_steps(cls, value: Any) -> Any:
        if isinstance(value, int):  # YAML reads 3:5 as 3 * 60 + 5
            raise ValueError('--profile: in a YAML file, write FIRST:LAST in quotes, for example "3:5"')
        if isinstance(value, str):
            profiled_steps(value)
        return value

    _split_trackers = field_validator("report_to", mode="before")(_parse_trackers)

    @field_validator(*marked(TrainFields, holds="path"))
    @classmethod
    def _can_be_a_path(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None:
            user_path(value, flag=f"--{info.field_name}")
        return value

    @model_validator(mode="after")
    def _check(self) -> "Settings":
        if self.layers is not None and (min(self.layers) < 1 or list(self.layers) != sorted(set(self.layers))):
            raise ValueError(f"--layers {flag_value(self.layers)}: they count from 1, once each, in ascending order")
        if self.epochs is not None and "max_steps" in self.model_fields_set:
            both = f"--epochs {self.epochs:g} and --max_steps {self.max_steps}"
            raise ValueError(f"{both} both say how long to train; give one")
        if self.epochs is None and self.warmup_steps > self.max_steps:
            more = f"--warmup_steps {self.warmup_steps} is more than --max_steps {self.max_steps}"
            raise ValueError(f"{more}; lower the first")
        if self.profile is not None and self.epochs is None and profiled_steps(self.profile)[0] > self.max_steps:
            raise ValueError(f"--profile {self.profile} begins after --max_steps {self.max_steps}; give earlier steps")
        if not self.share_micro_batches and self.adapters is None:
            raise ValueError("--share_micro_batches needs --adapters; one adapter shares with none")
        if self.halving and self.adapters is None:
            raise ValueError("--halving needs --adapters; it compares adapters that train together")
        if not (self.names_data or self.dry_run or self.adapters or is_preset(self.model)):
            raise ValueError(NO_TRAIN_FILE)
        for name in marked(Settings, of_dry_run=True):
            if not self.dry_run and getattr(self, name) not in (None, False):
                raise ValueError(f"--{name} needs --dry_run; a run has the ranks and GPUs that its launcher gives it")
        if self.gpu is not None and self.plan_for == "cpu":
            raise ValueError(f"--gpu {self.gpu} plans for GPUs; remove --plan_for cpu")
        if self.take_over and self.resume == "none":
            raise ValueError("--take_over needs --resume; a new run has a folder of its own")
        if self.base_differs and self.resume == "none" and self.init_from is None:
            raise ValueError("--base_differs needs --resume or --init_from; a new adapter has a base of its own")
        if self.products is not None and self.base not in (None, "fp8"):
            raise ValueError(f"--products {self.products} needs --base fp8, not {self.base}")
        if self.keep_transposed and self.products is None:
            raise ValueError("--keep_transposed needs --products fp8; other matmuls need no transposed copy")
        if self.eval_samples is not None and self.eval_metric == "loss":
            raise ValueError("--eval_samples needs --eval_metric with a metric of the task; the loss uses all rows")
        return self


def profiled_steps(value: str | None) -> range:
    """The steps, counted from 1, of a --profile FIRST:LAST; none without it. Raises ValueError for any other text."""
    if value is None:
        return range(0)
    found = re.fullmatch(r"([1-9][0-9]{0,14}):([1-9][0-9]{0,14})", value)
    if found is None or int(found[1]) > int(found[2]):
        raise ValueError(f"--profile {value}: give FIRST:LAST, two steps that count from 1, for example 3:5")
    return range(int(found[1]), int(found[2]) + 1)


def make_settings(values: Mapping[str, Any]) -> Settings:
    """Validate flat names and values into Settings.

    Raises:
        UserError: a name is unknown (the message has the nearest known one), or a value is out of range.
    """
    return validate_settings(values, Settings)
