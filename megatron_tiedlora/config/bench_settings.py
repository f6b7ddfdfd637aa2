"""Every setting of tiedlora bench: what is measured, of which model, and on which samples."""

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar, Literal

from pydantic import model_validator

from megatron_tiedlora.base.messages import UserError, as_given
from megatron_tiedlora.config.fields import (
    CommandSettings,
    Targets,
    declared,
    flag_value,
    setting_field,
    shared_field,
    validate_settings,
)
from megatron_tiedlora.config.settings import Settings

GROUPS_OF = {
    "step": ("run", "model", "step", "samples", "against", "adapters"),
    "layout": ("run", "model", "step", "samples", "layout"),
    "scaling": ("run", "model", "step", "scaling"),
    "decoding": ("run", "model", "decoding"),
}
# Defaults of --what scaling that differ from the others'.
SCALING_DEFAULTS: dict[str, Any] = {"model": "llama2-7b", "num_layers": 2, "rows": 1, "supervised": 1.0}
_WITHOUT_TASK = ("supervised", "documents", "micro_batches")
_WITH_TASK = ("samples", "train_file", "padded_rows", "packing")

_train = partial(shared_field, Settings)  # of the run whose step is measured


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

--what step runs in one process: forward and backward over all micro-batches and AdamW's step, without an engine. All
sides take turns and share process, allocator and threads. The memory of each side is measured in a process of its own.

With --adapters K, K adapters of one base take a step of --rows x --length made-up tokens each: one after another, then
together in shared micro-batches, as `tiedlora train --adapters` does. A third side is one adapter with all the tokens.

--what layout measures the step of tiedlora train on all ranks, through the same plan, build and DeepSpeed engine. A
step lasts as long as on the slowest rank. The report also has the peak memory of each stage, and the messages and bytes
of one step by group, compared with what --dry_run predicts. Weights of a preset are drawn in place on each rank.

--what scaling measures a step at several values of one quantity, in turns, while the others stay as given.

--what decoding generates the same number of tokens from the same prompts, greedily and with a key-value cache; neither
side stops early. Times are of a whole batch, prompts included.

Seconds are medians over the repeats, after turns that are not counted. `of matmul` is the share of a bare matmul's
speed in the same run, on all ranks at once. Saved bytes are what autograd saves of all micro-batches of a step, beside
those that are planned. On a GPU the report also has MFU by the data sheet and the time by kernel class."""
    groups: ClassVar[Mapping[str, str]] = {
        "run": "what is measured",
        "model": "what takes the step, or generates",
        "step": "what is trained, and the size of the step (--what step, layout and scaling)",
        "samples": "real samples in place of made-up tokens (--what step and layout)",
        "against": "what takes turns with our step (--what step)",
        "adapters": "several adapters of one base, in turn and together (--what step)",
        "layout": "a training run's step on all ranks, as in tiedlora train (--what layout)",
        "scaling": "the values of each quantity, with commas between them, '' for none (--what scaling)",
        "decoding": "what is generated (--what decoding)",
    }

    what: Literal["step", "layout", "scaling", "decoding"] = setting_field(
        "run", "what to measure [step; layout with several ranks or a flag of a layout]",
    )
    repeats: int = setting_field("run", "turns of each that count", 5, ge=1)
    json_file: str | None = setting_field("run", "also write the figures to this file", None, flag="json")

    model: str = _train("model", "folder, hub id, demo, or a preset with random weights")
    dtype: Literal["bf16", "fp32"] = _train("dtype", "precision of the frozen base", default="bf16")
    base: str | None = _train("base")

    random_weights: bool = setting_field("step", "draw weights in the model's shape, as for a preset; read none", False)
    num_layers: int | None = setting_field("step", "layers of a model with random weights", None, ge=1)
    products: Literal["fp8"] | None = _train("products", group="step")
    keep_transposed: bool = _train("keep_transposed", group="step")
    method: str = _train("method", "what is trained here", group="step")
    targets: Targets = _train("targets", group="step")
    rank: int = _train("rank", "rank r of both sides", group="step")
    compile: Literal["auto", "true", "false"] = _train("compile", "our kernels, where it can be done", group="step")
    recompute: Literal["none", "selective", "full"] = _train("recompute", "of layers, on our side", group="step")
    rows: int = setting_field("step", "rows of a micro-batch", 4, ge=1)
    length: int = setting_field("step", "tokens of a made-up row, at most of a packed row", 512, ge=2)
    supervised: float = setting_field("step", "share of made-up tokens with a label, at the end", 0.5, gt=0, le=1)

    task: str | None = setting_field("samples", "take real samples of this task", None)
    train_file: str | None = _train("train_file", "its rows (default: the task's own)", group="samples")
    samples: int = setting_field("samples", "samples of one step", 32, ge=1)

    against: Literal["peft"] | None = setting_field("against", "what to run beside it", None)
    padded_rows: int = setting_field("against", "real samples of a padded batch there", 8, ge=1)

    adapters: int | None = setting_field("adapters", "adapters that take a step each", None, ge=1)
    shared_tokens: int | None = setting_field(
        "adapters", "most tokens of a shared micro-batch [all tokens]", None, ge=1,
    )

    tensor_parallel: int = _train("tensor_parallel", "ranks that share each layer", group="layout")
    pipeline_parallel: int = _train("pipeline_parallel", "stages that share the layers", group="layout")
    sequence_parallel: bool = _train("sequence_parallel", "shard activations between layers too", group="layout")
    ds_config: str = _train("ds_config", "DeepSpeed JSON with engine knobs", group="layout", default="zero1.json")
    packing: bool | None = setting_field("layout", "several samples of --task in a row [true]", None)
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

    @classmethod
    def default_text(cls, name: str) -> str:
        """The default as in every command, and that of scaling."""
        text = super().default_text(name)
        return f"{text or 'all'}; scaling {SCALING_DEFAULTS[name]}" if name in SCALING_DEFAULTS else text

    @model_validator(mode="before")
    @classmethod
    def _fill_defaults(cls, values: dict[str, Any]) -> dict[str, Any]:
        given = dict(values)
        groups = {name: own.group for name, own in declared(cls).items() if name in given}
        asks_for_layout = "layout" in groups.values() and "against" not in given
        what = given.setdefault("what", "layout" if asks_for_layout else "step")
        for name, group in groups.items():
            fitting = [known for known, read in GROUPS_OF.items() if group in read]
            value = as_given(flag_value(given[name]))
            if what in GROUPS_OF and what not in fitting:
                raise ValueError(f"--{name} {value} goes with --what {' or '.join(fitting)}, not {what}")
            if name in _WITH_TASK and "task" not in given:
                raise ValueError(f"--{name} {value} goes with --task")
            if name in _WITHOUT_TASK and "task" in given:
                raise ValueError(f"--{name} {value} is for made-up tokens, so not with --task")
        return {**(SCALING_DEFAULTS if what == "scaling" else {}), **given}

    def check(self) -> None:
        """Raise ValueError for settings that do not fit each other."""
        if self.labels < 1:
            raise ValueError(
                f"--supervised {self.supervised} with --length {self.length}: no token has a label; give more of one"
            )
        if self.against is None and "padded_rows" in self.model_fields_set:
            raise ValueError(f"--padded_rows {self.padded_rows} goes with --against peft")
        if self.adapters is None and self.shared_tokens is not None:
            raise ValueError(f"--shared_tokens {self.shared_tokens} goes with --adapters")
        for name in ("against", "task"):
            if self.adapters is not None and getattr(self, name) is not None:
                raise ValueError(f"--adapters {self.adapters} is not implemented with --{name}; leave one out")
        if self.against is not None and self.task is not None and self.samples % self.padded_rows:
            raise ValueError(f"--samples {self.samples} is not a multiple of --padded_rows {self.padded_rows}")
        if self.shared_tokens is not None and self.shared_tokens < self.adapter_tokens:
            raise ValueError(
                f"--shared_tokens {self.shared_tokens} is less than the micro-batch of one adapter, --rows {self.rows}"
                f" x --length {self.length}"
            )

    @property
    def adapter_tokens(self) -> int:
        """The tokens of one adapter's step with --adapters."""
        return self.rows * self.length

    @property
    def labels(self) -> int:
        """Labels that count in a made-up document, whose first token has no position that could predict it."""
        length = self.length // (self.documents or 1)
        return min(round(self.supervised * length), length - 1)

    @property
    def packs(self) -> bool:
        """Whether a row may hold several samples."""
        return self.packing if self.packing is not None else self.task is not None or self.documents is not None

    @property
    def step_micro_batches(self) -> int:
        """Made-up micro-batches per rank and step."""
        return self.micro_batches or (1 if self.pipeline_parallel == 1 else 2 * self.pipeline_parallel)

    def measured_on(self, world_size: int) -> str:
        """`what`, or `layout` for a step on several ranks. Raises UserError where it takes one process."""
        if world_size == 1 or self.what == "layout":
            return self.what
        beside = [name for name in ("against", "adapters") if getattr(self, name) is not None]
        if self.what != "step" or beside:
            flag = f"--{beside[0]} {getattr(self, beside[0])}" if beside else f"--what {self.what}"
            raise UserError(f"{flag} is for one process, so not for {world_size} ranks; start it without a launcher")
        return "layout"

    def one_step(self, **changes: Any) -> "BenchSettings":
        """The step that `--what scaling` measures, with `changes`. Raises UserError for values that do not fit."""
        names = (name for name, own in declared(BenchSettings).items() if own.group in ("model", "step"))
        return validate_settings({**{name: getattr(self, name) for name in names}, **changes}, BenchSettings)
