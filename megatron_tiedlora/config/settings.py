"""Declare every setting of a training run once: type, default, help text, group, effect, and other names.

`cli.py` turns the declarations into flags, and a YAML file uses the same flat names. A new setting needs one
declaration here and the code that uses it. `PAPER_DEFAULTS` and `TASK_DEFAULTS` hold the defaults that depend on the
task. This module rejects contradictory settings. Checks that need the model, the world size or a file are elsewhere.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import ValidationInfo, field_validator, model_validator
from pydantic.functional_validators import ModelWrapValidatorHandler  # pydantic itself exports it since 2.11

from megatron_tiedlora.base.messages import as_given, user_path
from megatron_tiedlora.base.methods import METHOD_NAMES
from megatron_tiedlora.base.presets import PRESETS, is_preset
from megatron_tiedlora.base.shapes import BASE_NAMES, QKV
from megatron_tiedlora.config import fields
from megatron_tiedlora.config.fields import FILES_HELP, CommandSettings, flag_value, setting_field
from megatron_tiedlora.config.other_names import OTHER_DTYPES, OTHER_FORMATS, OTHER_GPUS, OTHER_METHODS, OTHER_SCHEDULES

# The tasks are in data/, which config must not import.
_FOLDER = Path(__file__).resolve().parent.parent / "data" / "tasks"

TASK_NAMES: tuple[str, ...] = tuple(sorted(file.stem for file in _FOLDER.glob("[!_]*.py")))

# Defaults of a command without --model and --task.
DEFAULT_MODEL, DEFAULT_TASK, DEFAULT_SEED = "demo", "demo", 1234

PAPER_DEFAULTS: Mapping[str, Any] = {
    "global_batch_size": 256,
    "max_steps": 2000,
    "learning_rate": 1e-4,
    "warmup_steps": 50,
    "eval_interval": 30,
    "max_length": 4096,
}
# Defaults of tasks, where they differ from the paper's defaults.
TASK_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "demo": {
        "global_batch_size": 24,
        "max_steps": 20,
        "learning_rate": 3e-2,
        "warmup_steps": 2,
        "eval_interval": 10,
        "max_length": 512,
    },
}


Schedule = Literal["cosine", "linear", "constant"]  # training/build.py implements them
GPU_NAMES = ("a100-80", "a800", "h20", "h100", "h800", "h200", "b200", "b300")  # planning/machines.py describes them
HOW_LONG = ("epochs", "max_steps")  # settings that both set the length of training
SMALLEST_ALPHA, LARGEST_ALPHA = 1e-6, 1e6  # all useful values are between these limits
NO_TRAIN_FILE = "--task custom needs --train_file (JSONL with prompt and completion, or a hub id)"

_run = partial(setting_field, "run", decides="nothing")
_dry_run = partial(_run, of_dry_run=True)
_model = partial(setting_field, "model", decides="model")
_adapter = partial(setting_field, "adapter", decides="adapter", per_adapter=True)
_layout = partial(setting_field, "parallel", decides="layout")
_data = partial(setting_field, "data", decides="data", per_adapter=True)
_rows = partial(_data, default=None, by_content=True, holds="rows")
_speed = partial(setting_field, "speed", decides="layout")
_training = partial(setting_field, "optimisation", decides="training", per_adapter=True)

_OF_GRID = "the sweep trains the values of --{}".format


class Settings(CommandSettings, command="train"):
    """The settings of one training run, validated and frozen.

    Fields that are not given get the defaults of their task (`TASK_DEFAULTS`, else `PAPER_DEFAULTS`). Values that
    depend on the model or the world size stay None here and are resolved later: `dtype`, `layers`, `init_std_a`,
    `init_std_b`, `micro_batch_size`, `output_dir`; so is a `learning_rate` of "auto". The default of `max_length` is
    lowered to the model's limit. With `epochs`, the number of steps is computed when the data is known.
    """

    about: ClassVar[str] = """\
Fine-tune a language model with Tied-LoRA: as one process, or as one rank of a launcher.

    tiedlora train --model FOLDER --train_file data.jsonl --output_dir runs/first         your model and rows
    tiedlora train --model FOLDER --train_file data.jsonl --dry_run                       what it needs; nothing trains

Most runs need few of the flags: --model, --train_file, --validation_file, --output_dir, --method, --rank,
--learning_rate, --epochs, --global_batch_size and --max_length."""
    groups: ClassVar[Mapping[str, str]] = {
        "run": "the run folder, and how the run starts",
        "model": "the frozen base model",
        "adapter": "what is trained",
        "parallel": "model sharding (data-parallel size = world size / (tensor x pipeline))",
        "data": "the rows to train on",
        "speed": "settings that trade memory for time",
        "optimisation": "batches, steps and learning rate",
    }
    missing: ClassVar[Mapping[str, str]] = {"task": "with --model other than demo, give --task or --train_file"}
    instead: ClassVar[Sequence[tuple[str, str]]] = (HOW_LONG,)

    ds_config: str = _run(
        "DeepSpeed JSON with engine options; searched in the current folder, then in ds_configs/", "zero2.json",
        decides="layout", holds="path",
    )
    output_dir: str | None = _run(
        "run folder (default: a new one, runs/MODEL-TASK-METHOD-rRANK[-TARGETS])", None, per_adapter=True,
        of_group=True, holds="path", lasts="start",
        other_names="output out_dir save_dir run_name save_path save output_path logging_dir experiment_name",
    )
    seed: int = _run(
        "seed of the initialisation and of the order of samples", DEFAULT_SEED, ge=0, decides="data", per_adapter=True,
        other_names="random_seed data_seed",
    )
    split_seed: int = _run(
        "seed of the split-off validation rows [seed]", ge=0, decides="data", per_adapter=True, derived=True,
    )
    resume: str = _run(
        "none, auto (the last checkpoint of the run folder) or the path of a checkpoint", "none", holds="path",
        lasts="start", other_names="resume_from_checkpoint resume_from load_checkpoint",
        decided_by={"sweep": "the sweep always resumes its runs where they stopped"},
    )
    keep_checkpoints: int = _run(
        "how many of the newest checkpoints to keep, in addition to the best", 3, ge=1,
        other_names="save_total_limit keep_last save_top_k max_checkpoints",
    )
    adapters: str | None = _run(
        "train several adapters of one base together: a YAML list with the name and settings of each adapter", None,
        of_group=True, holds="path",
        decided_by={"sweep": "the sweep makes its own lists of adapters; --together limits their length"},
    )
    share_micro_batches: bool = _run(
        "with --adapters: fill a micro-batch with rows of several adapters if one adapter has too few", True,
        decides="layout", of_group=True,
        decided_by={"sweep": "the runs of a group share micro-batches"},
    )
    halving: bool = _run(
        "with --adapters: of adapters that differ only in the learning rate, stop those whose validation loss is higher"
        " by more than the noise",
        False, of_group=True,
    )
    take_over: bool = _run(
        "with --resume: take the run folder over from another launch, which then stops writing", False,
        lasts="command",
    )
    base_differs: bool = _run(
        "with --resume or --init_from: continue although base or tokenizer differ from those of the adapter",
        False, lasts="command",
    )
    dry_run: bool = _dry_run(
        "print parameters, sharding, memory, messages, batches and one sample; train nothing", False,
        decided_by={"plan": "a plan is a dry run of every layout"},
    )
    world_size: int | None = _dry_run(
        "with --dry_run: the number of ranks to plan for", None, ge=1,
        decided_by={
            "plan": "give --nodes and --gpus_per_node, or --ranks_on_cpu",
            "sweep": "the launcher decides how many ranks a run has (--launcher_args)",
        },
    )
    plan_for: Literal["cpu", "gpu"] | None = _dry_run(
        "with --dry_run: the device type to plan for (default: what this machine has)", None,
        decided_by={"plan": "give --gpu, or --ranks_on_cpu", "sweep": "the dry run of a sweep only lists runs"},
    )
    gpu: str | None = _dry_run(
        "with --dry_run: plan for this card, and predict its speed and whether its memory is enough (status 1 if not)",
        None, choices=GPU_NAMES, other_values=OTHER_GPUS,
        decided_by={"plan": "give it on the command line"},
    )
    deterministic: bool = _run(
        "bit-identical runs for one parallel layout, hosts and versions; slower on GPUs", False, decides="layout",
    )
    report_to: fields.Trackers = _run(
        f"trackers that also get the metrics: none, or some of {', '.join(fields.TRACKER_NAMES)}",
        (fields.TENSORBOARD,), other_names="logger log_with trackers tracker loggers",
    )
    profile: fields.StepRange = _run(
        "FIRST:LAST, steps that torch's profiler records; each rank writes RUN/profile/rank_N.json.gz", None,
        of_group=True, other_names="profiler use_profiler torch_profiler",
    )
    timeout_minutes: float = _run(
        "longest wait for a rank, or for a process that tokenises the data", 30.0, gt=0, le=fields.LONGEST_WAIT_MINUTES,
    )

    model: str = _model(
        f"demo, a HF folder or hub id, or a shape for dry runs ({', '.join(PRESETS)})", DEFAULT_MODEL, by_content=True,
        holds="path",
        other_names="model_name_or_path model_name model_id base_model base_model_name_or_path model_path checkpoint",
    )
    tokenizer: str | None = _model(
        "HF folder, hub id or a bare SentencePiece tokenizer.model (default: the model's own)", None, decides="data",
        by_content=True, holds="path",
        other_names="tokenizer_name_or_path tokenizer_name tokenizer_path tokenizer_model",
    )
    dtype: Literal["bf16", "fp32"] | None = _model(
        "dtype of the frozen base; adapters are always fp32 [bf16; demo: fp32 on a CPU without bf16 instructions]",
        None, other_values=OTHER_DTYPES, other_names="torch_dtype precision mixed_precision bnb_4bit_compute_dtype",
    )
    base: str | None = _model(
        "storage format of the frozen linears of all blocks, with 4 or 8 bits per weight; the rest of the base and all"
        " computation use --dtype (default: --dtype)",
        None, choices=BASE_NAMES, other_values=OTHER_FORMATS,
        other_names="quantization quantization_bit quantize quant quantization_config",
    )
    products: Literal["fp8"] | None = _model(
        "fp8: with --base fp8, matmuls in fp8: activations and gradients of these linears are rounded to fp8, with a"
        " scale for each row; for GPUs of compute capability 8.9 or more, emulated on a CPU. The adapter's inputs are"
        " not rounded. Scales of activations in row-parallel layers, and of gradients in column-parallel layers, depend"
        " on --tensor_parallel (default: matmuls in --dtype)",
        None,
    )
    keep_transposed: bool = _model(
        "with --products fp8: keep a transposed copy of the fp8 weights, one byte per weight, for speed", False,
        decides="layout",
    )
    max_length: int = _model(
        "maximum tokens of a sample; longer prompts lose their middle (at most the model's limit)", ge=8,
        decides="data", derived=True,
        other_names="max_seq_length max_seq_len seq_length seq_len sequence_len cutoff_len block_size model_max_length"
        " max_len max_tokens context_length sequence_length max_sequence_length",
    )

    init_from: str | None = _adapter(
        "start with the values of an adapter (native, checkpoint or PEFT folder), and use its method, rank, alpha,"
        " targets and layers (default: initialise by method and seed)",
        None, decides="training", holds="path",
        other_names="lora_path adapter_name_or_path peft_model_id warm_start pretrained_adapter adapter",
        decided_by={"sweep": "the sweep trains each adapter from the initial values of its method"},
    )
    method: str = _adapter(
        "which of the paper's configurations", "tl6", choices=METHOD_NAMES, other_values=OTHER_METHODS,
        other_names="peft_type peft_method tuner_type train_type finetuning_type peft adapter_type lora",
        decided_by={"sweep": _OF_GRID("methods")},
    )
    rank: int = _adapter(
        "rank r of A and B", 8, ge=1, other_names="lora_r r lora_rank lora_dim adapter_dim low_rank",
        decided_by={"sweep": _OF_GRID("ranks")},
    )
    alpha: float | None = _adapter(
        "the update is scaled by alpha / rank (default: the rank)", None, ge=SMALLEST_ALPHA, le=LARGEST_ALPHA,
        derived=True, other_names="lora_alpha lora_scale lora_scaling",
    )
    rslora: bool = _adapter(
        "rank-stabilised LoRA: scale the update by alpha / sqrt(rank)", False, derived=True, other_names="use_rslora",
    )
    layers: fields.Layers = _adapter(
        "adapted layers, 1-based, e.g. 8 or 1,4,8 (default: all)", None, derived=True,
        other_names="layers_to_transform lora_layers num_lora_layers",
        decided_by={"sweep": "the sweep adapts all layers, and one at a time with --single_layers"},
    )
    targets: fields.Targets = _adapter(fields.TARGETS_HELP, (QKV,))
    init_std_a: float | None = _adapter("init std of A (default: by method)", None, gt=0, le=1e3, derived=True)
    init_std_b: float | None = _adapter(
        "init std of B, for methods that do not initialise B to zero (default: by method)", None, gt=0, le=1e3,
        derived=True,
    )
    dropout: float = _adapter(
        "LoRA's dropout: probability that an input of the update is dropped in training", 0.0, ge=0, le=0.9,
        decides="training", other_names="lora_dropout adapter_dropout",
    )

    tensor_parallel: int = _layout(
        "ranks over which each layer is sharded; must divide heads and widths", 1, ge=1,
        other_names="tp tp_size tensor_model_parallel_size tensor_parallel_size",
    )
    pipeline_parallel: int = _layout(
        "stages, each with some of the layers; needs ZeRO 0 or 1 (zero1.json)", 1, ge=1,
        other_names="pp pp_size pipeline_model_parallel_size pipeline_parallel_size",
    )
    sequence_parallel: bool = _layout(
        "with tensor parallel: shard activations along the sequence too", True, other_names="sp",
    )
    overlap: Literal["none", "halves"] = _layout(
        "halves: compute the two halves of a micro-batch alternately, so that tensor-parallel messages of one are sent"
        " while the other is computed; with tensor parallel, an even --micro_batch_size, and not with ZeRO-3",
        "none", other_names="tp_comm_overlap",
    )
    replica_check_steps: int = _layout(
        "compare copies of the adapter bit by bit in the first N steps and at saves (0: never)", 3, ge=0,
        decides="nothing",
    )

    task: str = _data("demo (generated), one of the paper's, or custom (your own rows)", choices=TASK_NAMES)
    train_file: str | None = _rows(
        f"training rows: {FILES_HELP}, with or without weights (a.jsonl:0.7,b.csv:0.3), or for iwslt2017 two aligned"
        " texts A.de,A.en (default: the task's own)",
        other_names="dataset dataset_name data data_path train_data train_dataset dataset_path train_files datasets",
    )
    validation_file: str | None = _rows(
        "validation rows, as above without weights (default: some of the training rows)",
        other_names="val_dataset eval_dataset validation_data val_data eval_file val_file validation_files",
    )
    test_file: str | None = _rows("test rows, answered and scored before and after training")
    prompt_template: str | None = _data(
        "prompt in place of the task's own, with {field} for each field of a row", None, by_content=True,
    )
    columns: fields.ColumnNames = _data(
        "which fields of your rows to read, as OURS=YOURS[,...], e.g. prompt=query,completion=response", None,
        by_content=True, other_names="column_mapping columns_mapping text_column dataset_text_field prompt_column",
    )
    train_on: fields.TrainOn = _data(
        "chats: supervise every answer of the assistant, or only the last one", "all_turns",
        other_names="assistant_only_loss train_on_inputs completion_only_loss loss_scale train_on_responses_only",
    )
    chat_template: str | None = _data(
        "Jinja file (default: the tokenizer's own; if it has none, lines as User: and Assistant:)", None,
        by_content=True, holds="path", other_names="template chat_template_path",
    )
    add_bos: fields.AddBos = _data(
        "put the beginning-of-sequence token before every sample (auto: as the tokenizer itself does)", "auto",
    )
    special_tokens_in_text: fields.SpecialTokensInText = _data(
        "control tokens (and roles that the chat template does not know) in your rows: reject the row, read them as"
        " plain text, or as the control tokens",
        "refuse",
    )
    max_new_tokens: int | None = _data(
        "maximum tokens of an answer [500, or half of a shorter context; demo 200]", None, ge=1, derived=True,
        other_names="max_tokens max_generated_tokens max_gen_tokens",
    )
    eval_batch_size: int = _data(
        "prompts per data-parallel rank that are answered together", 16, ge=1, decides="layout", per_adapter=False,
        other_names="per_device_eval_batch_size",
    )

    packing: bool = _speed(
        "pack samples into rows of --max_length; no attention across samples", True,
        other_names="sample_packing pack padding_free",
    )
    compile: Literal["auto", "true", "false"] = _speed(
        "compile elementwise kernels (auto: if possible, and the run is long enough to repay it)", "auto",
        other_names="torch_compile",
    )
    adapter_in_matmul: bool = _speed(
        "compute the adapter's update within the matmuls of qkv and gate_up, in 16 more columns of their weights: each"
        " sum is rounded once, not twice (rank up to 16, one adapter, base not quantised, no ZeRO-3)", False,
    )
    recompute: Literal["none", "selective", "full"] = _speed(
        "what to recompute in the backward pass instead of saving it: nothing, gate and up of the MLP, or whole layers",
        "none",
    )

    global_batch_size: int = _training("samples per step over all ranks", ge=1)
    micro_batch_size: int | None = _training(
        "maximum rows per rank and forward pass [1; demo: the largest divisor of a rank's rows up to 4; with --packing"
        " on a GPU: as many as fit in 8,192 tokens]",
        None, ge=1, decides="layout", per_adapter=False,
    )
    max_steps: int = _training(
        "optimizer steps", ge=1,
        other_names="steps num_steps train_iters max_iters total_steps num_training_steps iterations",
    )
    epochs: float | None = _training(
        "in place of --max_steps: passes over the training samples, at --global_batch_size samples per step", None,
        gt=0, le=1e6, other_names="num_train_epochs num_epochs n_epochs max_epochs epoch",
    )
    learning_rate: fields.LearningRate = _training(
        "peak learning rate of AdamW; auto: by a rule for method, rank, alpha, width, layers and linears, steps",
        other_names="lr learning_rates base_lr max_lr", decided_by={"sweep": _OF_GRID("learning_rates")},
    )
    rate_factors: fields.RateFactors = _training(
        "LoRA+: rates of single factors as multiples of --learning_rate, e.g. B=16 or B=8,u=2,v=2 (default: 1)", None,
    )
    weight_decay: float = _training("decoupled weight decay on all trained tensors", 0.01, ge=0, other_names="wd")
    beta1: float = _training("AdamW's decay of the mean of gradients", 0.9, ge=0, lt=1, other_names="adam_beta1")
    beta2: float = _training("AdamW's decay of the mean of their squares", 0.999, ge=0, lt=1, other_names="adam_beta2")
    schedule: Schedule = _training(
        "learning rate after warm-up: to 0 at the last step, or constant", "cosine", other_values=OTHER_SCHEDULES,
        other_names="lr_scheduler_type lr_scheduler scheduler lr_schedule lr_decay_style scheduler_type",
    )
    warmup_steps: int = _training(
        "linear warm-up from lr / warmup_steps; by default at most the number of steps", ge=0, derived=True,
        other_names="warmup num_warmup_steps lr_warmup_steps lr_warmup_iters warmup_iters",
    )
    gradient_clipping: float = _training(
        "maximum gradient norm; 0 disables clipping", 1.0, ge=0,
        other_names="max_grad_norm grad_clip clip_grad gradient_clip_val max_norm grad_norm",
    )
    eval_interval: int = _training("steps between evaluations on the validation rows", ge=1)
    eval_metric: str = _training(
        "how to choose the best checkpoint: loss, or a metric of the task", "loss", min_length=1, decides="data",
        other_names="metric_for_best_model load_best_model_at_end",
    )
    eval_samples: int | None = _training(
        "validation rows that are answered for --eval_metric (default: all)", None, ge=1, decides="data",
    )
    patience: int = _training(
        "evaluations without improvement before the run stops early", 10, ge=1,
        other_names="early_stopping_patience early_stopping",
    )
    save_interval: int = _training("steps between checkpoints (default: eval_interval)", ge=1, decides="nothing")
    save_interval_minutes: float | None = _training(
        "also save after this many minutes", None, gt=0, decides="nothing", per_adapter=False,
    )

    @classmethod
    def default_text(cls, name: str) -> str:
        """Return a field's default for the help: the paper's value, and the values of tasks that differ from it."""
        if name not in PAPER_DEFAULTS:
            return super().default_text(name)
        by_task = [f"{task} {values[name]:g}" for task, values in TASK_DEFAULTS.items() if name in values]
        return "; ".join([f"{PAPER_DEFAULTS[name]:g}", *by_task])

    @model_validator(mode="wrap")
    @classmethod
    def _with_defaults(cls, values: dict[str, Any], check: "ModelWrapValidatorHandler[Settings]") -> "Settings":
        """Return the settings with all defaults filled in. `model_fields_set` contains only the given fields."""
        made = check(cls._filled(values))
        object.__setattr__(made, "__pydantic_fields_set__", set(values))
        return made

    def completed(self, **values: Any) -> "Settings":
        """Return a copy with these values as defaults: `model_fields_set` still contains only the given fields."""
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
            filled["task"] = "custom"  # has no effect, because each adapter's entry is filled in separately
        elif "task" not in filled and (is_preset(as_given(filled["model"])) or filled.get("dry_run") in (True, "true")):
            filled["task"] = "custom"  # without data a dry run has full rows; a preset has no tokenizer to read data
        filled = {**PAPER_DEFAULTS, **TASK_DEFAULTS.get(as_given(filled.get("task")), {}), **filled}
        steps = as_given(filled["max_steps"])  # not validated yet
        if "warmup_steps" not in values and steps.isdecimal() and len(steps) < 16:
            filled["warmup_steps"] = min(filled["warmup_steps"], int(steps))
        if "init_from" not in filled:
            filled = {"alpha": filled.get("rank", 8), **filled}
        return {"save_interval": filled["eval_interval"], "split_seed": filled.get("seed", DEFAULT_SEED), **filled}

    @property
    def of_rows(self) -> "Settings":
        """The settings for reading rows, whose seed is --split_seed."""
        return self.completed(seed=self.split_seed)

    @property
    def names_data(self) -> bool:
        """Return whether there are rows to train on, from --train_file or the task."""
        return self.task != "custom" or self.train_file is not None

    @field_validator("*")
    @classmethod
    def _can_be_a_path(cls, value: Any, info: ValidationInfo) -> Any:
        if value is not None and fields.declared(cls)[str(info.field_name)].holds == "path":
            user_path(value, flag=f"--{info.field_name}")
        return value

    @model_validator(mode="after")
    def _check(self) -> "Settings":
        if self.layers is not None and (min(self.layers) < 1 or list(self.layers) != sorted(set(self.layers))):
            raise ValueError(f"--layers {flag_value(self.layers)}: give layer numbers from 1 on, strictly ascending")
        if self.epochs is not None and "max_steps" in self.model_fields_set:
            both = f"--epochs {self.epochs:g} and --max_steps {self.max_steps}"
            raise ValueError(f"{both} both set the length of training; give one")
        if self.epochs is None and self.warmup_steps > self.max_steps:
            more = f"--warmup_steps {self.warmup_steps} is more than --max_steps {self.max_steps}"
            raise ValueError(f"{more}; give fewer warm-up steps")
        if self.profile is not None and self.epochs is None and fields.profiled_steps(self.profile)[0] > self.max_steps:
            raise ValueError(f"--profile {self.profile} begins after --max_steps {self.max_steps}; give earlier steps")
        if not self.share_micro_batches and self.adapters is None:
            raise ValueError("--share_micro_batches needs --adapters; a single adapter shares no micro-batches")
        if self.halving and self.adapters is None:
            raise ValueError("--halving needs --adapters; it compares adapters that train together")
        if not (self.names_data or self.dry_run or self.adapters or is_preset(self.model)):
            raise ValueError(NO_TRAIN_FILE)
        for name in fields.marked(Settings, of_dry_run=True):
            if not self.dry_run and getattr(self, name) not in (None, False):
                raise ValueError(f"--{name} needs --dry_run; a run has the ranks and GPUs that its launcher gives it")
        if self.gpu is not None and self.plan_for == "cpu":
            raise ValueError(f"--gpu {self.gpu} plans for GPUs; remove --plan_for cpu")
        if self.take_over and self.resume == "none":
            raise ValueError("--take_over needs --resume; a new run has its own folder")
        if self.base_differs and self.resume == "none" and self.init_from is None:
            raise ValueError("--base_differs needs --resume or --init_from; a new adapter is trained on any base")
        if self.products is not None and self.base not in (None, "fp8"):
            raise ValueError(f"--products {self.products} needs --base fp8, not {self.base}")
        if self.keep_transposed and self.products is None:
            raise ValueError("--keep_transposed needs --products fp8; other matmuls need no transposed copy")
        if self.eval_samples is not None and self.eval_metric == "loss":
            raise ValueError("--eval_samples needs --eval_metric with a metric of the task; the loss uses all rows")
        return self


def make_settings(values: Mapping[str, Any]) -> Settings:
    """Return the training settings with these values by setting name.

    Raises:
        UserError: a name is unknown (the message suggests a known one), or a value is out of range.
    """
    return fields.validate_settings(values, Settings)
