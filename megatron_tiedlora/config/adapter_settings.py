"""Declares the settings of commands that read adapters: evaluate, merge, export, import, verify, index, serve, push."""

import re
import shlex
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, model_validator

from megatron_tiedlora.base.shapes import BASE_NAMES, UNQUANTISED
from megatron_tiedlora.config import fields
from megatron_tiedlora.config.fields import FILES_HELP, CommandSettings, setting_field, shared_field
from megatron_tiedlora.config.other_names import ADAPTER_NAMES, OTHER_DTYPES, OUTPUT_NAMES
from megatron_tiedlora.config.settings import DEFAULT_MODEL, DEFAULT_TASK, Settings

_same = partial(shared_field, Settings, shared=False)  # a setting of its own with the name of a training setting
_train = partial(shared_field, Settings)  # a setting with the same meaning as in tiedlora train
_flag = partial(setting_field, "")
_plain = partial(_same, group="")  # like `_same`, for a command without groups
_model = partial(
    _plain, "model",
    "the base model: folder, hub id or demo; or a folder of models, where it is found by its hashes [the base that the"
    " adapter names]", default=None, metavar="M",
)
_adapter = partial(_flag, metavar="DIR", other_names=ADAPTER_NAMES)
_output = partial(_flag, metavar="DIR", other_names=OUTPUT_NAMES)
_take_over = partial(_plain, "take_over", "take DIR over from another launch that is writing it")
_base_differs = partial(
    _plain, "base_differs",
    help_text="continue although base or tokenizer differ from those in training; the output records this",
)
_filter = partial(setting_field, "find", help_text="for find and verify: pattern with * and ?", default=None)
_dtype = partial(_flag, other_values=OTHER_DTYPES)
_NEW_FOLDER = "folder to write; must not exist"


def _as_trained(name: str) -> Any:
    help_text = f"{Settings.model_fields[name].description} [as in the adapter's run]"
    return _train(name, help_text, default=None, as_trained=True)


class EvaluateSettings(CommandSettings, command="evaluate"):
    """The settings of one evaluation, validated and frozen.

    Values that depend on the model or the task stay None here and are resolved later: `model` (the adapter's base, or
    the demo), `output_dir`, `dtype`, `max_length`, `max_new_tokens`, `limit`.
    """

    about: ClassVar[str] = "Answer a task's rows and score the answers, with or without an adapter."
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
        "take_over", "take --output_dir over from another launch that is writing it; that launch then stops writing",
    )
    seed: int = _train("seed", "seed of --temperature")
    split_seed: int | None = _train(
        "split_seed", "seed of the split of validation rows off training rows; give the run's [seed]", default=None,
    )
    timeout_minutes: float = _train("timeout_minutes", "longest wait for another rank before the job fails")

    model: str | None = _train(
        "model", "demo, a HF folder (a merged one too) or hub id; with --adapter also a folder of models, where its"
        " base is found by its hashes (default: the adapter's base, or demo)", default=None,
    )
    adapter: str | None = setting_field(
        "model", "native adapter (RUN/adapter), or PEFT LoRA or VeRA folder (default: none)", None, per_adapter=True,
        other_names=ADAPTER_NAMES,
    )
    adapters: tuple[str, ...] | None = setting_field(
        "model", "several adapters of one base, scored in one launch: NAME=FOLDER or FOLDER, where FOLDER is as in"
        " --adapter, a run, a folder of runs (also of a run with --adapters), or a pattern in quotes (default: none)",
        None, words=True, per_adapter=True,
    )
    engine: Literal["own", "vllm"] = setting_field(
        "model", "what generates the answers: this package, or vLLM in one process, which starts --tensor_parallel"
        " others", "own",
    )
    base_differs: bool = _same("base_differs", "use the adapter although base or tokenizer differ", group="model")
    merge_adapter: bool = setting_field("model", "add the adapter to the weights instead of keeping it separate", False)
    tokenizer: str | None = _train("tokenizer")
    dtype: Literal["bf16", "fp32"] | None = _train(
        "dtype", "precision of the base, and of an adapter that is added to it [bf16; demo: fp32 on a CPU without bf16"
        " instructions]",
    )
    base: str | None = _train(
        "base", "storage format of the linears of all blocks; none: as --dtype says [as in the adapter's run, or none]",
        choices=(*BASE_NAMES, UNQUANTISED),
    )
    max_length: int | None = _same(
        "max_length", "maximum prompt tokens, as in training; longer prompts lose their middle (default: the model's"
        " positions minus --max_new_tokens)", default=None,
    )

    tensor_parallel: int = _train("tensor_parallel")
    pipeline_parallel: int = _train("pipeline_parallel", "stages, each with some of the layers")

    task: str = _train("task", "format of the rows, and how answers are scored")
    split: Literal["test", "validation"] = setting_field("data", "which rows", "test")
    test_file: str | None = _train("test_file", f"rows of the test split: {FILES_HELP} (default: the task's own)")
    validation_file: str | None = _same(
        "validation_file",
        "rows of the validation split (default: split off the training rows with --seed, as in training)",
    )
    train_file: str | None = _same("train_file", "training rows, from which the validation rows are split off")
    prompt_template: str | None = _train("prompt_template")
    columns: fields.ColumnNames = _train("columns")
    chat_template: str | None = _as_trained("chat_template")
    add_bos: fields.AddBos | None = _as_trained("add_bos")
    special_tokens_in_text: fields.SpecialTokensInText | None = _as_trained("special_tokens_in_text")
    max_new_tokens: int | None = _train("max_new_tokens")
    batch_size: int = setting_field(
        "data", "prompts per data-parallel rank that are answered together; with --adapters this number for each"
        " adapter, and at most four times this number in all [--engine vllm: 256]",
        16, ge=1, other_names="batch bs eval_batch_size per_device_eval_batch_size",
    )
    temperature: float = setting_field(
        "data", "sample answers from softmax(logits / T); 0: greedy decoding", 0.0, ge=0, metavar="T",
        other_names="do_sample temp",
    )
    top_p: float = setting_field(
        "data", "with --temperature: sample only from the most likely tokens with a total probability of at least P",
        1.0, gt=0, le=1, metavar="P",
    )
    top_k: int = setting_field(
        "data", "with --temperature: sample only from the K most likely tokens, before --top_p; 0: from all",
        0, ge=0, metavar="K",
    )
    limit: int | None = setting_field(
        "data", "answer only the first N rows [all; demo 24]", None, ge=1,
        other_names="max_samples num_samples eval_samples",
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_defaults(cls, values: dict[str, Any]) -> dict[str, Any]:
        filled = dict(values)
        if "task" not in filled and any(name in filled for name in fields.marked(cls, holds="rows")):
            filled["task"] = "custom"
        elif "task" not in filled and filled.get("model", DEFAULT_MODEL) == DEFAULT_MODEL:
            filled |= {"task": DEFAULT_TASK} if filled.keys().isdisjoint(cls.instead[0]) else {}
        if filled.get("engine") == "vllm":
            filled.setdefault("batch_size", 256)
        return filled

    def _check_fit(self) -> None:
        if self.adapter is not None and self.adapters is not None:
            raise ValueError("give either --adapter or --adapters, not both")
        if self.top_p < 1 and self.temperature == 0:
            raise ValueError(f"--top_p {self.top_p:g} needs --temperature above 0; decoding is greedy without it")
        if self.top_k and self.temperature == 0:
            raise ValueError(f"--top_k {self.top_k} needs --temperature above 0; decoding is greedy without it")
        if self.adapters == ():
            raise ValueError("--adapters is empty; give folders of adapters")
        if self.merge_adapter and self.adapter is None:
            raise ValueError("--merge_adapter needs --adapter")
        own = {
            "--merge_adapter; merge with tiedlora merge": self.merge_adapter,
            "--pipeline_parallel; give --tensor_parallel": self.pipeline_parallel > 1,
            f"--base {self.base}; give --base {UNQUANTISED}": self.base not in (None, UNQUANTISED),
            f"--temperature {self.temperature:g}; give 0, or 0.01 or more": 0 < self.temperature < 0.01,
        }
        for name in (name for name, is_set in own.items() if is_set and self.engine == "vllm"):
            raise ValueError(f"--engine vllm does not work with {name}")
        if self.base_differs and self.adapter is None and self.adapters is None:
            raise ValueError("--base_differs needs --adapter")
        if self.validation_file is not None and self.train_file is not None:
            raise ValueError("--train_file is read only without --validation_file; give one of the two")
        unread = ("validation_file", "train_file") if self.split == "test" else ("test_file",)
        for name in unread:
            if getattr(self, name) is not None:
                other = "validation" if self.split == "test" else "test"
                raise ValueError(f"--{name} needs --split {other}; this command answers the {self.split} rows")


def adapter_flags(adapter: str, settings: "MergeSettings | ExportSettings") -> str:
    """Return the flags that the user gave for an adapter and its base. A message puts them into a suggested command."""
    words = ["--adapter", adapter, *(["--model", settings.model] if settings.model else [])]
    return shlex.join([*words, *(["--base_differs"] if settings.base_differs else [])])


class MergeSettings(CommandSettings, command="merge"):
    """The settings of one merge, validated and frozen."""

    about: ClassVar[str] = "Merge an adapter into its base model: a plain Hugging Face checkpoint for vLLM and others."
    examples: ClassVar[str] = """\
example:
  tiedlora merge --adapter runs/demo/adapter --output runs/demo/merged

Each file of the base is copied, but adapted weights are computed, some rows at a time: W + B A in fp32, cast once. The
command needs 50 MB of memory in addition to PyTorch and the adapter, for any model. All other bytes are copied without
a check, but with --dtype all weights are computed. Computed weights that are not finite are rejected. If the base is
quantised (--onto trained), all weights are computed, in the dtype of its embedding or in --dtype.

The free disk space is checked first. DIR is written atomically. Ctrl-C and SIGTERM leave no files behind. After a
kill -9 or a crash, the same command removes the unfinished files and starts from the beginning.
"""

    adapter: str = _adapter("a run's adapter/ folder or one of its checkpoints, or a PEFT LoRA or VeRA")
    model: str | None = _model()
    output: fields.FilePath = _output(_NEW_FOLDER)
    take_over: bool = _take_over()
    base_differs: bool = _base_differs()
    dtype: Literal["bf16", "fp16", "fp32"] | None = _dtype("dtype of the written weights [as stored in the base]", None)
    onto: Literal["original", "trained"] = _flag(
        "after a run with --base: the stored base, or its dequantised weights, as in training", "original",
    )
    tokenizer: str | None = _plain(
        "tokenizer", "tokenizer to include: folder, hub id or tokenizer.model [the base's own]", metavar="T",
    )


class ExportSettings(CommandSettings, command="export"):
    """The settings of one export, validated and frozen."""

    about: ClassVar[str] = "Export tied adapters as LoRA for PEFT, vLLM, SGLang and llama.cpp; only the tying is lost."
    examples: ClassVar[str] = """\
examples:
  tiedlora export --adapter runs/demo/adapter --output runs/demo/peft
  tiedlora export --adapter 'runs/*/adapter' --output exports --dtype bf16

Padding the rank with zeros does not change what the adapter computes; it is for programs that accept only certain
ranks. The adapter's own files are copied to DIR/native, where tiedlora import finds them. If there are several adapters
or a pattern in quotes, each adapter is written to DIR/NAME, named after its folder or run. Each folder is written
atomically. PEFT's config names the base by its hub id, by --base_name, or else by the name of its folder. vLLM's
filesystem resolver accepts an export only if this name is the --model of the server.
"""

    adapter: tuple[str, ...] = _adapter("native adapters: runs' adapter/ folders or patterns", words=True)
    model: str | None = _model()
    output: fields.FilePath = _output(_NEW_FOLDER)
    take_over: bool = _take_over()
    base_differs: bool = _base_differs()
    dtype: Literal["fp32", "bf16", "fp16"] = _dtype("dtype of the tensors", "fp32")
    base_name: str | None = _flag("name of the base in PEFT's config, such as its hub id", None, metavar="NAME")
    pad_rank_to: int | None = _flag("write rank N, padded with zeros", None)


class ImportSettings(CommandSettings, command="import"):
    """The settings of one import, validated and frozen."""

    about: ClassVar[str] = "Convert a PEFT LoRA or VeRA to an equal native adapter, to merge, evaluate or train it."
    examples: ClassVar[str] = """\
example:
  tiedlora import --peft downloads/lora --model meta-llama/Llama-2-7b-hf --output adapters/lora

An export of this project becomes the original tied adapter again, byte for byte, unless its PEFT files were changed.
Any other LoRA or VeRA becomes an equal lora or vera. Only factors that must be multiplied into B are rounded, once to
fp32: an alpha / r of single modules (rank_pattern, alpha_pattern), or VeRA's vectors. DIR is written atomically.
"""

    peft: fields.FilePath = _flag("folder of a PEFT adapter, in safetensors", metavar="DIR")
    model: str | None = _model()
    output: fields.FilePath = _output(_NEW_FOLDER)
    take_over: bool = _take_over()
    base_differs: bool = _base_differs(help_text="continue although M is not the base of the export in DIR")


class VerifySettings(CommandSettings, command="verify"):
    """The settings of one verification of exports, validated and frozen."""

    about: ClassVar[str] = "Check exports of an adapter by their bits and logits; the exit status is 1 if any differ."
    examples: ClassVar[str] = """\
example:
  tiedlora verify --adapter runs/demo/adapter --merged runs/demo/merged --peft runs/demo/peft

Every tensor of the merged files is compared bit by bit: with base + adapter, added in fp32 and cast once, or with the
base. A PEFT folder that this package exported is compared bit by bit with the adapter's export; any other PEFT folder
only by its logits. Then logits are computed one layer at a time, which needs the memory of one layer. transformers and
PEFT load the exports too, if the model has at most 8 GB in fp32, because they need memory for the full model.

Columns: largest and mean difference relative to the largest logit, KL divergence in nats per position, and how often
the most likely token is the same, over random tokens.
"""

    adapter: str = _adapter("a run's adapter/ folder or one of its checkpoints, or a PEFT LoRA or VeRA")
    model: str | None = _model()
    merged: fields.FilePath | None = _flag("output of tiedlora merge", None, metavar="DIR")
    peft: fields.FilePath | None = _flag("output of tiedlora export", None, metavar="DIR")
    dtype: Literal["fp32", "bf16"] = _dtype("dtype in which the layers compute the logits", "fp32")
    inside: str | None = _flag(
        "libraries that load exports: transformers, peft, transformers,peft or none [both, up to 8 GB in fp32]", None,
        flag="in", metavar="NAMES",
    )
    base_differs: bool = _base_differs(help_text="compare even if the base differs from the one in training")

    def _check_fit(self) -> None:
        if self.merged is None and self.peft is None:
            raise ValueError("there is nothing to check; give --merged DIR, --peft DIR or both")


class IndexSettings(CommandSettings, command="index"):
    """The settings of one call of tiedlora index, validated and frozen."""

    about: ClassVar[str] = "Index a folder of native adapters; name, tag, find, verify, compare or delete them."
    examples: ClassVar[str] = """\
examples:
  tiedlora index runs                                  write runs/adapters.sqlite
  tiedlora index runs find --method tl6 --task 'squad*'
  tiedlora index runs verify --base_model '*7b*'
  tiedlora index runs diff one-run another-run
  tiedlora index runs alias prod one-run               requests for prod get it; --remove removes the alias
  tiedlora index runs tag one-run keep reviewed        --remove removes the tags
  tiedlora index runs lineage prod                     --init_from, base and data, with their hashes
  tiedlora index runs gc                               list what no alias needs; --delete deletes it

The index has a row for each native adapter below DIR: path, name, base and its hashes, method, rank, alpha, targets,
layers, trained parameters, task, scores, run, hashes of --init_from, checkpoints and data, sha256, size and date.
Checkpoints and exports of runs are not indexed, and links are not followed. If an adapter cannot be read, it is
reported and skipped, and the exit status is 1. Aliases and tags are kept. An alias of no adapter is reported too.
`verify` reads every adapter, checks its checksums, and exits with 1 if an adapter is damaged or has changed since it
was indexed. `diff` exits with 1 if the two adapters differ. `gc` keeps runs and adapters with an alias or the tag
`keep`, all from which these were started, and runs and sweeps that have not ended. Any program can read the file.
"""

    folder: fields.FilePath = _flag("folder with adapters, at any depth", metavar="DIR", positional=True)
    action: Literal["build", "find", "verify", "diff", "alias", "tag", "lineage", "gc"] = _flag(
        "build, find, verify, diff, alias, tag, lineage or gc", "build", metavar="ACTION", positional=True,
    )
    adapters: tuple[str, ...] = _flag(
        "paths, aliases or names of adapters: two for diff, one for lineage; for alias: NAME ADAPTER, or NAME --remove;"
        " for tag: ADAPTER TAG...",
        (), metavar="ADAPTER", positional=True, words=True,
    )
    name: str | None = _filter()
    base_model: str | None = _filter()
    method: str | None = _filter()
    rank: int | None = _filter(help_text="for find and verify")
    targets: Annotated[str | None, BeforeValidator(lambda value: ",".join(fields.parse_targets(value)))] = _filter(
        help_text=f"for find: {fields.TARGETS_HELP}", metavar="TEXT[,TEXT...]",
    )
    task: str | None = _filter()
    data: str | None = _filter(help_text="for find and verify: pattern for the names and hashes of the run's data")
    alias: str | None = _filter()
    tag: str | None = _filter()
    remove: bool = _flag("for alias and tag: remove it", False)
    delete: bool = _flag("for gc: delete what it lists", False)
    as_json: bool = _flag("for find: one JSON object per line", False, flag="json")

    @property
    def wanted(self) -> dict[str, Any]:
        """Return the values that rows of the index must match, by column."""
        return {name: value for name in FILTERS if (value := getattr(self, name)) is not None}

    def _check_fit(self) -> None:
        action = self.action
        if self.wanted and action not in ("find", "verify"):
            raise ValueError(f"--{next(iter(self.wanted))} is for find and verify, not for {action}")
        given = {"json": self.as_json, "remove": self.remove, "delete": self.delete}
        for flag, actions in {"json": ("find",), "remove": ("alias", "tag"), "delete": ("gc",)}.items():
            if given[flag] and action not in actions:
                raise ValueError(f"--{flag} is for {' and '.join(actions)}, not for {action}")
        if action not in _WORDS and self.adapters:
            raise ValueError(f"{action} takes no name of an adapter; give {self.adapters[0]} with --name")
        least, most, what = _WORDS.get(action, (0, 0, ""))
        fewer = action == "alias" and self.remove
        if not least - fewer <= len(self.adapters) <= most - fewer:
            raise ValueError(f"{action}: give {what}")
        for label in {"alias": self.adapters[:1], "tag": self.adapters[1:]}.get(action, ()):
            if not re.fullmatch(LABEL, label):
                known = "letters, digits and . _ + @ : -, with a letter or digit first"
                raise ValueError(f"{action} {label}: is not {known}")


LABEL = r"^[A-Za-z0-9][A-Za-z0-9._+@:-]{0,127}$"  # an alias or tag
_WORDS = {  # of an action: the smallest and largest number of words, and what they are
    "diff": (2, 2, "the names or paths of two adapters"),
    "lineage": (1, 1, "one adapter"),
    "tag": (2, 100, "ADAPTER TAG..."),
    "alias": (2, 2, "NAME ADAPTER, or NAME --remove"),
}
FILTERS = fields.marked(IndexSettings, group="find")


class ServeSettings(CommandSettings, command="serve"):
    """The settings of one vLLM server of adapters, validated and frozen."""

    about: ClassVar[str] = "Print and run the command of a vLLM server that finds the adapters in a folder by name."
    examples: ClassVar[str] = """\
examples:
  tiedlora serve --model meta-llama/Llama-2-7b-hf --adapters runs
  tiedlora serve --model M --adapters runs --dry_run -- --port 8001 --tensor-parallel-size 2

This needs vLLM 0.26 or later in the same environment. An adapter's name in requests is its path in DIR: `support` is
DIR/support, DIR/support/adapter or DIR/support/native; or, with an index (tiedlora index DIR), the name of its run. The
first request loads it, without an export or a restart. If its base or its checksums differ, only this request fails.

--slots tied keeps tied adapters and VeRA as they are stored, which needs 11 to 88 times less memory than expanded
LoRAs. It cannot serve plain LoRAs. `both` has slots of both kinds. `expanded` has only vLLM's own slots.
"""

    model: str = _plain("model", "the base model: folder or hub id", default=..., metavar="M")
    adapters: fields.FilePath = _flag("folder with adapters, at any depth", metavar="DIR")
    slots: Literal["tied", "both", "expanded"] | None = _flag("kind of slots [as the adapters in DIR need]", None)
    max_loras: int | None = _flag("slots: adapters in one batch [all, up to 64 tied ones or 8 others]", None, ge=1)
    hub: tuple[str, ...] = _flag("owners whose hub repositories are loaded too", (), metavar="OWNER", words=True)
    dry_run: bool = _flag("print the command and start nothing", False)
    flags: tuple[str, ...] = _flag("flags of vLLM, after --", (), metavar="FLAG", positional=True, words=True)

    def _check_fit(self) -> None:
        if wrong := [owner for owner in self.hub if not owner or "/" in owner or "," in owner]:
            raise ValueError(f"--hub {wrong[0]}: is not an owner; give the part of a hub id before the slash")


LICENCE = r"[a-z0-9][a-z0-9.+-]{0,63}"  # the id of a licence in a model card's metadata


class PushSettings(CommandSettings, command="push"):
    """The settings of one upload to the Hugging Face hub, validated and frozen."""

    about: ClassVar[str] = "Publish a run's adapter on the Hugging Face hub, with a model card."
    examples: ClassVar[str] = """\
examples:
  tiedlora push runs/demo --repo me/demo-tied --dry_run --output published
  tiedlora push runs/demo --repo me/demo-tied --base_name HuggingFaceTB/SmolLM2-135M-Instruct

The repository gets the adapter as LoRA for PEFT and vLLM, the native files in native/, a model card with base, method,
scores, licence, the training command and versions, and the plot of the losses. These files contain no path of this
host. Log in with `hf auth login`, or set HF_TOKEN.
"""

    run: str = _flag("run folder, or the folder of a native adapter", metavar="RUN", positional=True)
    repo: str = _flag("repository on the hub", metavar="OWNER/NAME", other_names="repo_id hub_model_id push_to_hub")
    model: str | None = _model()
    base_name: str | None = _flag("hub id of the base [as given to --model in training]", None, metavar="ID")
    licence: str | None = _flag(
        "the adapter's licence in the hub's spelling, such as apache-2.0 [as in the base's README.md, or none]", None,
        flag="license", metavar="ID",
    )
    private: bool = _flag("make a new repository private", False)
    dry_run: bool = _flag("write the folder and upload nothing", False)
    output: fields.FilePath | None = _output("keep the uploaded files in this folder, which must not exist", None)
    base_differs: bool = _base_differs(help_text="continue although the base differs")

    def _check_fit(self) -> None:
        if self.licence is not None and not re.fullmatch(LICENCE, self.licence):
            raise ValueError(f"--license {self.licence}: is not an id of the hub, such as apache-2.0 or llama2")
        if self.dry_run and self.output is None:
            raise ValueError("--dry_run writes the folder; give it with --output DIR")
