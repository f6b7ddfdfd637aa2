"""Every setting of tiedlora evaluate: the model and its sharding, the rows to answer, and the output folder."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar, Literal

from pydantic import model_validator

from megatron_tiedlora.base.shapes import BASE_NAMES, UNQUANTISED
from megatron_tiedlora.config.fields import (
    FILES_HELP,
    AddBos,
    ColumnNames,
    CommandSettings,
    SpecialTokensInText,
    marked,
    setting_field,
    shared_field,
)
from megatron_tiedlora.config.other_names import ADAPTER_NAMES
from megatron_tiedlora.config.settings import DEFAULT_MODEL, DEFAULT_TASK, Settings

_same = partial(shared_field, Settings, shared=False)  # a setting of the same name, with a value of its own
_train = partial(shared_field, Settings)  # of a run that is evaluated, the run's


def _as_trained(name: str) -> Any:
    help_text = f"{Settings.model_fields[name].description} [as in the adapter's run]"
    return _train(name, help_text, default=None, as_trained=True)


class EvaluateSettings(CommandSettings, command="evaluate"):
    """The settings of one evaluation, validated and frozen.

    Values that depend on the model or the task stay None here and are resolved later: `model` (the adapter's base, or
    the demo), `output_dir`, `dtype`, `max_length`, `max_new_tokens`, `limit`.
    """

    about: ClassVar[str] = "Answer a task's rows by greedy decoding and score them, with or without an adapter."
    groups: ClassVar[Mapping[str, str]] = {
        "run": "where answers and scores go",
        "model": "the model that generates the answers",
        "parallel": "model sharding (data-parallel size = world size / (tensor x pipeline))",
        "data": "the rows that are answered and scored",
    }
    missing: ClassVar[Mapping[str, str]] = {"task": "with --model or --adapter, give --task or --test_file"}
    instead: ClassVar[Sequence[tuple[str, str]]] = (("adapter", "adapters"),)

    output_dir: str | None = _same(
        "output_dir", "new folder for the files (default: evaluations/MODEL-TASK-ADAPTER)", per_adapter=True,
    )
    take_over: bool = _same(
        "take_over", "take --output_dir over from another start that is writing it; that one then writes nothing",
    )
    seed: int = _train(
        "seed", "seed for carving the validation split from training rows; the run's seed gives its split",
    )
    timeout_minutes: float = _train("timeout_minutes", "longest wait for another rank before the job fails")

    model: str | None = _train(
        "model",
        "demo, a HF folder (a merged one too) or hub id; with --adapter also a folder of models, where its"
        " base is found by its hashes (default: the adapter's base, or demo)",
        default=None,
    )
    adapter: str | None = setting_field(
        "model", "native adapter (RUN/adapter), or PEFT LoRA or VeRA folder (default: none)", None, per_adapter=True,
        other_names=ADAPTER_NAMES,
    )
    adapters: tuple[str, ...] | None = setting_field(
        "model",
        "several adapters of one base, scored in one start: NAME=FOLDER or FOLDER, which may be as of --adapter, a run,"
        " a folder of runs (also of a run with --adapters), or a pattern in quotes (default: none)",
        None, words=True, per_adapter=True,
    )
    base_differs: bool = _same(
        "base_differs", "use the adapter although base or tokenizer differ from those that it was trained with",
        group="model",
    )
    merge_adapter: bool = setting_field("model", "add the adapter to the weights instead of keeping it separate", False)
    tokenizer: str | None = _train("tokenizer")
    dtype: Literal["bf16", "fp32"] | None = _train(
        "dtype",
        "precision of the base, and of an adapter that is added to it [bf16; demo: fp32 on a CPU without bf16"
        " instructions]",
    )
    base: str | None = _train(
        "base", "storage format of the linears of all blocks; none: that of --dtype [as in the adapter's run, or none]",
        choices=(*BASE_NAMES, UNQUANTISED),
    )
    max_length: int | None = _same(
        "max_length",
        "maximum prompt tokens, as in training; longer prompts lose their middle (default: the model's positions minus"
        " --max_new_tokens)",
        default=None,
    )

    tensor_parallel: int = _train("tensor_parallel")
    pipeline_parallel: int = _train("pipeline_parallel", "stages that share the layers")

    task: str = _train("task", "format of the rows, and how answers are scored")
    split: Literal["test", "validation"] = setting_field("data", "which rows", "test")
    test_file: str | None = _train("test_file", f"rows of the test split: {FILES_HELP} (default: the task's own)")
    validation_file: str | None = _same(
        "validation_file",
        "rows of the validation split (default: carved from the training rows with --seed, as in training)",
    )
    train_file: str | None = _same("train_file", "training rows, to carve the validation split from")
    prompt_template: str | None = _train("prompt_template")
    columns: ColumnNames = _train("columns")
    chat_template: str | None = _as_trained("chat_template")
    add_bos: AddBos | None = _as_trained("add_bos")
    special_tokens_in_text: SpecialTokensInText | None = _as_trained("special_tokens_in_text")
    max_new_tokens: int | None = _train("max_new_tokens")
    batch_size: int = setting_field(
        "data",
        "prompts per data-parallel rank that are answered together; with --adapters up to four times as many, of each"
        " adapter so many",
        16, ge=1, other_names="batch bs eval_batch_size per_device_eval_batch_size",
    )
    limit: int | None = setting_field(
        "data", "answer only the first N rows [all; demo 24]", None, ge=1,
        other_names="max_samples num_samples eval_samples",
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_defaults(cls, values: dict[str, Any]) -> dict[str, Any]:
        filled = dict(values)
        if "task" not in filled and any(name in filled for name in marked(cls, holds="rows")):
            filled["task"] = "custom"
        elif "task" not in filled and filled.get("model", DEFAULT_MODEL) == DEFAULT_MODEL:
            filled |= {"task": DEFAULT_TASK} if filled.keys().isdisjoint(cls.instead[0]) else {}
        return filled

    def check(self) -> None:
        """Raise ValueError for settings that do not fit each other."""
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
