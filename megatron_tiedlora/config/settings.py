"""Every setting of a training run, declared once: its name, type, default, help text and group.

Owns the values and the checks that need only the values. Checks that need the model, the world size or a file are
made where those are known. `cli.py` turns the fields below into flags; a YAML file uses the same flat names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from pydantic import ValidationInfo, field_validator, model_validator
from pydantic.functional_validators import ModelWrapValidatorHandler  # pydantic itself names it from 2.11 on

from megatron_tiedlora.base.base_formats import BASE_NAMES
from megatron_tiedlora.base.errors import as_given
from megatron_tiedlora.base.methods import METHOD_NAMES
from megatron_tiedlora.base.paths import user_path
from megatron_tiedlora.base.shapes import QKV
from megatron_tiedlora.config.data_fields import (
    ADD_BOS_HELP,
    CHAT_TEMPLATE_HELP,
    COLUMNS_HELP,
    FILES_HELP,
    SPECIAL_TOKENS_HELP,
    TRAIN_ON_HELP,
    AddBos,
    SpecialTokensInText,
    TrainOn,
    boolean_word,
    checked_columns,
)
from megatron_tiedlora.config.fields import (
    BASE_HELP,
    KEEP_TRANSPOSED_HELP,
    LONGEST_WAIT_MINUTES,
    PRODUCTS_HELP,
    TARGETS_HELP,
    CommandSettings,
    comma_separated,
    flag_value,
    optional_field,
    parse_targets,
    setting_field,
    validate_settings,
)
from megatron_tiedlora.config.presets import PRESETS, is_preset
from megatron_tiedlora.config.tasks import DEFAULT_MODEL, DEFAULT_TASK, PAPER_DEFAULTS, TASK_DEFAULTS, TASK_NAMES
from megatron_tiedlora.config.trackers import TENSORBOARD, TRACKER_NAMES, parse_trackers

Schedule = Literal["cosine", "linear", "constant"]  # training/optimizer.py has what they are
GPU_NAMES = ("a100-80", "h100", "h200", "b200")  # planning/cards.py has what they are
SMALLEST_ALPHA, LARGEST_ALPHA = 1e-6, 1e6  # wider than any range that trains
ABOUT = """\
Fine-tune a language model with Tied-LoRA: as one process, or as one rank of a launcher.

    tiedlora train --model FOLDER --train_file data.jsonl --output_dir runs/first         your model and rows
    tiedlora train --model FOLDER --train_file data.jsonl --dry_run                       what it needs; nothing trains

Most runs need few of the flags: --model, --train_file, --validation_file, --output_dir, --method, --rank,
--learning_rate, --epochs, --global_batch_size and --max_length."""
GROUPS = {
    "run": "the run folder, and how the run starts",
    "model": "the frozen base model",
    "adapter": "what is trained",
    "parallel": "model sharding (data-parallel size = world size / (tensor x pipeline))",
    "data": "the rows to train on",
    "speed": "trade memory for time",
    "optimisation": "batches, steps and learning rate",
}
NO_TRAIN_FILE = "--task custom needs --train_file (JSONL with prompt and completion, or a hub id)"


class Settings(CommandSettings):
    """The settings of one run, validated and frozen.

    Fields left out take the defaults of their task (`TASK_DEFAULTS`, else `PAPER_DEFAULTS`). Values that depend on the
    model or the world size stay None here and are resolved later: `dtype`, `layers`, `init_std_a`, `init_std_b`,
    `micro_batch_size`, `output_dir`. The default of `max_length` is lowered to the model's limit, and with `epochs` the
    number of steps is counted once the data is known (`training/length.py`).
    """

    prog: ClassVar[str] = "tiedlora train"
    about: ClassVar[str] = ABOUT
    groups: ClassVar[Mapping[str, str]] = GROUPS
    missing: ClassVar[Mapping[str, str]] = {"task": "with --model other than demo, give --task or --train_file"}
    instead: ClassVar[Sequence[tuple[str, str]]] = (("epochs", "max_steps"),)

    ds_config: str = setting_field(
        "run", "DeepSpeed JSON with engine options; a bare name is looked up here, then in ds_configs/", "zero2.json"
    )
    output_dir: str | None = optional_field(
        "run", "run folder (default: a new one, runs/MODEL-TASK-METHOD-rRANK[-TARGETS])"
    )
    seed: int = setting_field("run", "seed of the initialisation and of the order of samples", 1234, ge=0)
    resume: str = setting_field(
        "run", "none, auto (the last checkpoint of the run folder) or the path of a checkpoint", "none"
    )
    keep_checkpoints: int = setting_field(
        "run", "how many of the newest checkpoints to keep, in addition to the best", 3, ge=1
    )
    adapters: str | None = optional_field(
        "run", "train several adapters of one base together: a YAML list with a name and own settings of each"
    )
    share_micro_batches: bool = setting_field(
        "run", "with --adapters: fill a micro-batch with rows of several adapters where one has too few", True
    )
    halving: bool = setting_field(
        "run",
        "with --adapters: of those that differ only in the learning rate, stop what is behind on validation by more"
        " than the noise",
        False,
    )
    take_over: bool = setting_field(
        "run", "with --resume: take the run folder over from a start that still has it, which then stops writing", False
    )
    base_differs: bool = setting_field(
        "run",
        "with --resume or --init_from: continue although base or tokenizer differ from those of the adapter there",
        False,
    )
    dry_run: bool = setting_field(
        "run", "print parameters, sharding, memory, messages, batches and one sample; train nothing", False
    )
    world_size: int | None = optional_field("run", "with --dry_run: the number of ranks to plan for", ge=1)
    plan_for: Literal["cpu", "gpu"] | None = optional_field(
        "run", "with --dry_run: the device type to plan for (default: what this machine has)"
    )
    gpu: str | None = optional_field(
        "run",
        "with --dry_run: plan for this card, and say how fast it is and whether it is large enough (status 1 if not)",
        choices=GPU_NAMES,
    )
    deterministic: bool = setting_field(
        "run", "bit-identical runs for one parallel layout, hosts and versions; slower on GPUs", False
    )
    report_to: tuple[str, ...] = setting_field(
        "run", f"where metrics.jsonl is shown as well: none, or some of {', '.join(TRACKER_NAMES)}", (TENSORBOARD,)
    )
    profile: str | None = optional_field(
        "run", "FIRST:LAST, steps that torch's profiler records; each rank writes RUN/profile/rank_N.json.gz"
    )
    timeout_minutes: float = setting_field(
        "run", "longest wait for a rank, or for a start that tokenises its data", 30.0, gt=0, le=LONGEST_WAIT_MINUTES
    )

    model: str = setting_field(
        "model", f"demo, a HF folder or hub id, or a shape for dry runs ({', '.join(PRESETS)})", DEFAULT_MODEL
    )
    tokenizer: str | None = optional_field(
        "model", "HF folder, hub id or a bare SentencePiece tokenizer.model (default: the model's own)"
    )
    dtype: Literal["bf16", "fp32"] | None = optional_field(
        "model",
        "dtype of the frozen base; adapters are always fp32 [bf16; demo: fp32 on a CPU without bf16 instructions]",
    )
    base: str | None = optional_field("model", BASE_HELP, choices=BASE_NAMES)
    products: Literal["fp8"] | None = optional_field("model", PRODUCTS_HELP)
    keep_transposed: bool = setting_field("model", KEEP_TRANSPOSED_HELP, False)
    max_length: int = setting_field(
        "model", "maximum tokens of a sample; longer prompts lose their middle (at most the model's limit)", ge=8
    )

    init_from: str | None = optional_field(
        "adapter",
        "start with the values of an adapter (native, checkpoint or PEFT folder); its method, rank, alpha, targets and"
        " layers hold (default: by method and seed)",
    )
    method: str = setting_field("adapter", "which of the paper's configurations", "tl6", choices=METHOD_NAMES)
    rank: int = setting_field("adapter", "rank r of A and B", 8, ge=1)
    alpha: float | None = optional_field(
        "adapter", "the update is scaled by alpha / rank (default: the rank)", ge=SMALLEST_ALPHA, le=LARGEST_ALPHA
    )
    layers: tuple[int, ...] | None = optional_field(
        "adapter", "adapted layers, 1-based, e.g. 8 or 1,4,8 (default: all)"
    )
    targets: tuple[str, ...] = setting_field("adapter", TARGETS_HELP, (QKV,))
    init_std_a: float | None = optional_field("adapter", "init std of A (default: by method)", gt=0, le=1e3)
    init_std_b: float | None = optional_field(
        "adapter", "init std of B, for methods that do not initialise B to zero (default: by method)", gt=0, le=1e3
    )

    dropout: float = setting_field(
        "adapter", "LoRA's dropout: probability that an input of the update is dropped in training", 0.0, ge=0, le=0.9
    )

    tensor_parallel: int = setting_field(
        "parallel", "ranks that share each layer; must divide heads and widths", 1, ge=1
    )
    pipeline_parallel: int = setting_field(
        "parallel", "stages that share the layers; needs ZeRO 0 or 1 (zero1.json)", 1, ge=1
    )
    sequence_parallel: bool = setting_field(
        "parallel", "with tensor parallel: shard activations along the sequence too", True
    )
    replica_check_steps: int = setting_field(
        "parallel", "compare copies of the adapter bit by bit in the first N steps and at saves (0: never)", 3, ge=0
    )

    task: str = setting_field(
        "data", "demo (generated), one of the paper's, or custom (your own rows)", choices=TASK_NAMES
    )
    train_file: str | None = optional_field(
        "data",
        f"training rows: {FILES_HELP}, with or without weights (a.jsonl:0.7,b.csv:0.3), or for iwslt2017 two aligned"
        " texts A.de,A.en (default: the task's own)",
    )
    validation_file: str | None = optional_field(
        "data", "validation rows, as above without weights (default: some of the training rows)"
    )
    test_file: str | None = optional_field("data", "test rows, answered and scored before and after training")
    prompt_template: str | None = optional_field("data", "override the task's prompt, with {field} names of its rows")
    columns: str | None = optional_field("data", COLUMNS_HELP)
    train_on: TrainOn = setting_field("data", TRAIN_ON_HELP, "all_turns")
    chat_template: str | None = optional_field("data", CHAT_TEMPLATE_HELP)
    add_bos: AddBos = setting_field("data", ADD_BOS_HELP, "auto")
    special_tokens_in_text: SpecialTokensInText = setting_field("data", SPECIAL_TOKENS_HELP, "refuse")
    max_new_tokens: int | None = optional_field(
        "data", "maximum tokens of an answer [500, or half of a shorter context; demo 200]", ge=1
    )

    eval_batch_size: int = setting_field("data", "prompts per data-parallel rank that are answered together", 16, ge=1)

    packing: bool = setting_field("speed", "pack samples into rows of --max_length; no attention across samples", True)
    compile: Literal["auto", "true", "false"] = setting_field(
        "speed", "compile elementwise kernels (auto: if possible, and the run is long enough to repay it)", "auto"
    )
    recompute: Literal["none", "selective", "full"] = setting_field(
        "speed",
        "what to recompute in the backward pass instead of saving it: nothing, gate and up of the MLP, or whole layers",
        "none",
    )

    global_batch_size: int = setting_field("optimisation", "samples per step over all ranks", ge=1)
    micro_batch_size: int | None = optional_field(
        "optimisation",
        "maximum rows per rank and forward pass [1; demo: the largest divisor of a rank's share up to 4; with --packing"
        " on a GPU: as many as fit in 8,192 tokens]",
        ge=1,
    )
    max_steps: int = setting_field("optimisation", "optimizer steps", ge=1)
    epochs: float | None = optional_field(
        "optimisation",
        "in place of --max_steps: passes over the training samples, at --global_batch_size samples per step",
        gt=0,
        le=1e6,
    )
    learning_rate: float = setting_field("optimisation", "peak learning rate of AdamW", gt=0)
    weight_decay: float = setting_field("optimisation", "decoupled weight decay on all trained tensors", 0.01, ge=0)
    beta1: float = setting_field("optimisation", "AdamW's decay of the mean of gradients", 0.9, ge=0, lt=1)
    beta2: float = setting_field("optimisation", "AdamW's decay of the mean of their squares", 0.999, ge=0, lt=1)
    schedule: Schedule = setting_field(
        "optimisation", "learning rate after warm-up: to 0 at the last step, or constant", "cosine"
    )
    warmup_steps: int = setting_field(
        "optimisation", "linear warm-up from lr / warmup_steps; by default at most the number of steps", ge=0
    )
    gradient_clipping: float = setting_field("optimisation", "maximum gradient norm; 0 disables clipping", 1.0, ge=0)
    eval_interval: int = setting_field("optimisation", "steps between evaluations on the validation rows", ge=1)
    eval_metric: str = setting_field(
        "optimisation", "how to choose the best checkpoint: loss, or a metric of the task", "loss", min_length=1
    )
    eval_samples: int | None = optional_field(
        "optimisation", "validation rows that are answered for --eval_metric (default: all)", ge=1
    )
    patience: int = setting_field(
        "optimisation", "evaluations without improvement before the run stops early", 10, ge=1
    )
    save_interval: int = setting_field("optimisation", "steps between checkpoints (default: eval_interval)", ge=1)
    save_interval_minutes: float | None = optional_field("optimisation", "also save after this many minutes", gt=0)

    @classmethod
    def default_text(cls, name: str) -> str:
        """As for every command, but with the paper's default and those of tasks that have their own."""
        if name not in PAPER_DEFAULTS:
            return super().default_text(name)
        by_task = [f"{task} {values[name]:g}" for task, values in TASK_DEFAULTS.items() if name in values]
        return "; ".join([f"{PAPER_DEFAULTS[name]:g}", *by_task])

    @model_validator(mode="wrap")
    @classmethod
    def _with_defaults(cls, values: dict[str, Any], check: ModelWrapValidatorHandler[Settings]) -> Settings:
        """Fill in the defaults. `model_fields_set` holds only what was given."""
        made = check(cls._filled(values))
        object.__setattr__(made, "__pydantic_fields_set__", set(values))
        return made

    def completed(self, **values: Any) -> Settings:
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
        whole = isinstance(value, str) and value.strip().lower() in ("", "all", "none")
        return None if whole else comma_separated(value)

    @field_validator("profile", mode="before")
    @classmethod
    def _is_range_of_steps(cls, value: Any) -> Any:
        if isinstance(value, int):  # YAML reads 3:5 as 3 * 60 + 5
            raise ValueError('--profile: in a YAML file, write FIRST:LAST in quotes, for example "3:5"')
        if isinstance(value, str):
            profiled_steps(value)
        return value

    _parse_trackers = field_validator("report_to", mode="before")(parse_trackers)
    _parse_targets = field_validator("targets", mode="before")(parse_targets)

    _add_bos_as_word = field_validator("add_bos", mode="before")(boolean_word)

    _check_columns = field_validator("columns")(checked_columns)

    @field_validator(
        "model", "tokenizer", "ds_config", "output_dir", "resume", "adapters", "init_from", "chat_template"
    )
    @classmethod
    def _can_be_a_path(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None:
            user_path(value, flag=f"--{info.field_name}")
        return value

    @model_validator(mode="after")
    def _check(self) -> Settings:
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
        for name in ("world_size", "plan_for", "gpu"):
            if getattr(self, name) is not None and not self.dry_run:
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


def profiled_steps(value: str) -> range:
    """The steps, counted from 1, of a --profile FIRST:LAST. Raises ValueError for any other text."""
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
