"""Every setting of tiedlora evaluate: the model and its sharding, the rows to answer, and the output folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import field_validator, model_validator

from megatron_tiedlora.base.base_formats import BASE_NAMES, UNQUANTISED
from megatron_tiedlora.config.data_fields import (
    ADD_BOS_HELP,
    CHAT_TEMPLATE_HELP,
    COLUMNS_HELP,
    FILES_HELP,
    SPECIAL_TOKENS_HELP,
    AddBos,
    SpecialTokensInText,
    boolean_word,
    checked_columns,
)
from megatron_tiedlora.config.fields import LONGEST_WAIT_MINUTES, CommandSettings, optional_field, setting_field
from megatron_tiedlora.config.tasks import DEFAULT_MODEL, DEFAULT_TASK, TASK_NAMES

GROUPS = {
    "run": "where answers and scores go",
    "model": "the model that generates the answers",
    "parallel": "model sharding (data-parallel size = world size / (tensor x pipeline))",
    "data": "the rows that are answered and scored",
}

_ADAPTERS = ("adapter", "adapters")
_AS_TRAINED = "[as in the adapter's run]"


class EvaluateSettings(CommandSettings):
    """The settings of one evaluation, validated and frozen.

    Values that depend on the model or the task stay None here and are resolved later: `model` (the adapter's base, or
    the demo), `output_dir`, `dtype`, `max_length`, `max_new_tokens`, `limit`.
    """

    prog: ClassVar[str] = "tiedlora evaluate"
    about: ClassVar[str] = "Answer a task's rows by greedy decoding and score them, with or without an adapter."
    groups: ClassVar[Mapping[str, str]] = GROUPS
    missing: ClassVar[Mapping[str, str]] = {"task": "with --model or --adapter, give --task or --test_file"}
    instead: ClassVar[Sequence[tuple[str, str]]] = (_ADAPTERS,)

    output_dir: str | None = optional_field("run", "new folder for the files (default: evaluations/MODEL-TASK-ADAPTER)")
    take_over: bool = setting_field(
        "run", "take --output_dir over from another start that is writing it; that one then writes nothing", False
    )
    seed: int = setting_field(
        "run", "seed for carving the validation split from training rows; the run's seed gives its split", 1234, ge=0
    )
    timeout_minutes: float = setting_field(
        "run", "longest wait for another rank before the job fails", 30.0, gt=0, le=LONGEST_WAIT_MINUTES
    )

    model: str | None = optional_field(
        "model",
        "demo, a HF folder (a merged one too) or hub id; with --adapter also a folder of models, where its base is"
        " found by its hashes (default: the adapter's base, or demo)",
    )
    adapter: str | None = optional_field(
        "model", "native adapter (RUN/adapter), or PEFT LoRA or VeRA folder (default: none)"
    )
    adapters: tuple[str, ...] | None = optional_field(
        "model",
        "several adapters of one base, scored in one start: NAME=FOLDER or FOLDER, which may be as of --adapter, a run,"
        " a folder of runs (also of a run with --adapters), or a pattern in quotes (default: none)",
        words=True,
    )
    base_differs: bool = setting_field(
        "model", "use the adapter although base or tokenizer differ from those that it was trained with", False
    )
    merge_adapter: bool = setting_field("model", "add the adapter to the weights instead of keeping it separate", False)
    tokenizer: str | None = optional_field(
        "model", "HF folder, hub id or a bare SentencePiece tokenizer.model (default: the model's own)"
    )
    dtype: Literal["bf16", "fp32"] | None = optional_field(
        "model",
        "precision of the base, and of an adapter that is added to it [bf16; demo: fp32 on a CPU without bf16"
        " instructions]",
    )
    base: str | None = optional_field(
        "model",
        "storage format of the linears of all blocks; none: that of --dtype [as in the adapter's run, or none]",
        choices=(*BASE_NAMES, UNQUANTISED),
    )
    max_length: int | None = optional_field(
        "model",
        "maximum prompt tokens, as in training; longer prompts lose their middle (default: the model's positions minus"
        " --max_new_tokens)",
        ge=8,
    )

    tensor_parallel: int = setting_field(
        "parallel", "ranks that share each layer; must divide heads and widths", 1, ge=1
    )
    pipeline_parallel: int = setting_field("parallel", "stages that share the layers", 1, ge=1)

    task: str = setting_field("data", "format of the rows, and how answers are scored", choices=TASK_NAMES)
    split: Literal["test", "validation"] = setting_field("data", "which rows", "test")
    test_file: str | None = optional_field(
        "data", f"rows of the test split: {FILES_HELP} (default: the task's own)"
    )
    validation_file: str | None = optional_field(
        "data", "rows of the validation split (default: carved from the training rows with --seed, as in training)"
    )
    train_file: str | None = optional_field("data", "training rows, to carve the validation split from")
    prompt_template: str | None = optional_field("data", "override the task's prompt, with {field} names of its rows")
    columns: str | None = optional_field("data", COLUMNS_HELP)
    chat_template: str | None = optional_field("data", f"{CHAT_TEMPLATE_HELP} {_AS_TRAINED}")
    add_bos: AddBos | None = optional_field("data", f"{ADD_BOS_HELP} {_AS_TRAINED}")
    special_tokens_in_text: SpecialTokensInText | None = optional_field("data", f"{SPECIAL_TOKENS_HELP} {_AS_TRAINED}")
    max_new_tokens: int | None = optional_field(
        "data", "maximum tokens of an answer [500, or half of a shorter context; demo 200]", ge=1
    )
    batch_size: int = setting_field(
        "data",
        "prompts per data-parallel rank that are answered together; with --adapters up to four times as many, of each"
        " adapter so many",
        16,
        ge=1,
    )
    limit: int | None = optional_field("data", "answer only the first N rows [all; demo 24]", ge=1)

    _one_adapter_as_list = field_validator("adapters", mode="before")(
        lambda value: [value] if isinstance(value, str) else value
    )
    _add_bos_as_word = field_validator("add_bos", mode="before")(boolean_word)

    _check_columns = field_validator("columns")(checked_columns)

    @model_validator(mode="before")
    @classmethod
    def _fill_defaults(cls, values: dict[str, Any]) -> dict[str, Any]:
        filled = dict(values)
        files = ("test_file", "validation_file", "train_file")
        if "task" not in filled and any(name in filled for name in files):
            filled["task"] = "custom"
        elif "task" not in filled and filled.get("model", DEFAULT_MODEL) == DEFAULT_MODEL:
            filled |= {"task": DEFAULT_TASK} if filled.keys().isdisjoint(_ADAPTERS) else {}
        return filled

    @model_validator(mode="after")
    def _check(self) -> EvaluateSettings:
        if self.adapter is not None and self.adapters is not None:
            raise ValueError("give either --adapter or --adapters")
        if self.adapters == ():
            raise ValueError("--adapters is empty; give folders of adapters")
        if self.merge_adapter and self.adapter is None:
            raise ValueError("--merge_adapter needs --adapter")
        if self.base_differs and self.adapter is None and self.adapters is None:
            raise ValueError("--base_differs needs --adapter")
        if self.validation_file is not None and self.train_file is not None:
            raise ValueError("--train_file is read only without --validation_file; give one of the two")
        unread = ("validation_file", "train_file") if self.split == "test" else ("test_file",)
        for name in unread:
            if getattr(self, name) is not None:
                other = "validation" if self.split == "test" else "test"
                raise ValueError(f"--{name} needs --split {other}; this command answers the {self.split} rows")
        return self
