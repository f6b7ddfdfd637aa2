"""Run `tiedlora NAME ...` from the table `COMMANDS`. Only the module of command NAME is imported, so that `--help` is
fast.

A new command needs a row in this table, a settings class and a function in commands/.
"""

import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

from megatron_tiedlora.base.installation import __version__
from megatron_tiedlora.base.messages import aligned_lines, nearest_name, show

_LOCAL_RANK = ("--local_rank", "--local-rank")
PROGRAM = "tiedlora"


@dataclass(frozen=True)
class Command:
    """A command of tiedlora.

    Attributes:
        main: the function in commands/ as MODULE:NAME. The function takes the settings and returns the exit status.
        settings: the settings class or the parsing function in config/, as MODULE:NAME. A parsing function takes the
            command-line arguments.
        about: the description of the command in `tiedlora --help`.
        is_rank: whether a launcher may start several ranks of this command. Then only one rank prints an error.
    """

    name: str
    main: str
    settings: str
    about: str
    is_rank: bool = False


COMMANDS = (
    Command("train", "train:main", "settings:Settings",
            "fine-tune a model, in one process or as one rank of a job", is_rank=True),
    Command("run", "jobs:run", "job_settings:parse_launch",
            "start `train` on GPUs and hosts, watch it, and report how it ended"),
    Command("evaluate", "evaluate:main", "adapter_settings:EvaluateSettings",
            "generate answers to a task's held-out rows, and score them", is_rank=True),
    Command("sweep", "jobs:sweep", "job_settings:parse_sweep",
            "train methods x ranks x learning rates, and write tables"),
    Command("doctor", "jobs:doctor", "job_settings:DoctorSettings", "check the hosts of a job before it starts"),
    Command("plan", "jobs:plan", "job_settings:parse_plan", "find the fastest parallel configuration for a cluster"),
    Command("merge", "convert:merge", "adapter_settings:MergeSettings", "merge an adapter into its base model"),
    Command("export", "convert:export", "adapter_settings:ExportSettings",
            "write an adapter as LoRA for PEFT, vLLM and others"),
    Command("import", "convert:import_adapter", "adapter_settings:ImportSettings",
            "convert a PEFT LoRA or VeRA to a native adapter"),
    Command("verify", "convert:verify", "adapter_settings:VerifySettings", "check a merged folder or an export"),
    Command("index", "jobs:index", "adapter_settings:IndexSettings",
            "index a folder of adapters; name, tag, find, verify and compare them"),
    Command("serve", "convert:serve", "adapter_settings:ServeSettings", "serve a folder of adapters by name with vLLM"),
    Command("serve-training", "serve_training:main", "service_settings:ServiceSettings",
            "train the adapters of many clients on one base, by the tinker protocol", is_rank=True),
    Command("push", "jobs:push", "adapter_settings:PushSettings", "publish a run's adapter on the Hugging Face hub"),
    Command("convert-nemo", "convert:convert", "tool_settings:ConvertNemoSettings",
            "convert GPT-2B-001 from its .nemo file"),
    Command("check-gpu", "jobs:check_gpu", "tool_settings:CheckGpuSettings", "check what this machine's GPUs can do"),
    Command("bench", "jobs:bench", "tool_settings:BenchSettings",
            "measure a training step or generation", is_rank=True),
    Command("prepare-demo", "prepare_demo:main", "tool_settings:PrepareDemoSettings",
            "make the demo model (needs the extra demo)"),
    Command("random-model", "convert:make_random", "tool_settings:RandomModelSettings",
            "write a random model, `tiny` for a first try"),
    Command("recipes", "jobs:recipes", "tool_settings:RecipesSettings",
            "write batch scripts and YAML files for Slurm, Kubernetes and SkyPilot"),
    Command("env", "jobs:env", "tool_settings:EnvSettings", "print versions, devices and variables for a bug report"),
)

# Names of commands in other tools. For any other unknown name the most similar command is suggested.
_OTHER_NAMES = {
    **dict.fromkeys(("finetune", "fine-tune", "sft", "tune", "pt", "pretrain", "fit"), "train"),
    **dict.fromkeys(("launch", "torchrun", "deepspeed", "start"), "run"),
    **dict.fromkeys(("eval", "infer", "inference", "generate", "predict", "test"), "evaluate"),
    **dict.fromkeys(("merge-lora", "merge-adapter", "merge-peft"), "merge"),
    **dict.fromkeys(("push-to-hub", "upload", "publish"), "push"),
    **dict.fromkeys(("version", "info", "collect-env"), "env"),
}


def find_command(name: str) -> Command | None:
    """Return the command `name`, or None. An underscore in the name is read as a dash."""
    return next((command for command in COMMANDS if command.name == name.replace("_", "-")), None)


def help_text() -> str:
    """Return the text of `tiedlora --help`."""
    return "\n".join(
        [
            f"usage: {PROGRAM} COMMAND [...]      {PROGRAM} COMMAND --help      {PROGRAM} --version",
            "",
            "Tied-LoRA fine-tuning of language models on DeepSpeed.",
            "",
            *aligned_lines([(command.name, command.about) for command in COMMANDS], align="<", indent="  "),
            "",
            f"  {PROGRAM} prepare-demo; {PROGRAM} train    trains the demo model in this one process (extra demo)",
            f"  {PROGRAM} run --num_gpus 4 ...           trains on four GPUs of this machine (extra train)",
        ]
    )


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command whose name is the first argument, and exit with its status, or with 2 if it does not exist."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0].partition("=")[0] in _LOCAL_RANK:  # from a launcher; ranks are read from the environment
        words = words[1 if "=" in words[0] else 2 :]
    if words[:1] == ["help"]:
        words = [*words[1:2], "--help"]
    if not words:
        _leave(f"error: give a command; `{PROGRAM} --help` lists them", status=2)
    name, *rest = words
    if name in ("-h", "--help"):
        _leave(help_text())
    if name in ("-V", "--version"):
        _leave(f"{PROGRAM} {__version__}")
    command = find_command(name)
    if command is None:
        ours = _OTHER_NAMES.get(name.replace("_", "-").lower())
        near = f" (here it is {PROGRAM} {ours})" if ours else nearest_name(name, [one.name for one in COMMANDS])
        _leave(f"error: {PROGRAM} {name}: no such command{near}; `{PROGRAM} --help` lists them", status=2)
    run(command.name, rest)


def run(name: str, argv: Sequence[str] | None = None, **options: Any) -> NoReturn:
    """Run a command, and exit with its status.

    Args:
        argv: the command-line arguments after the command's name; by default those of this process.
        options: additional keyword arguments for the function `Command.main`.
    """
    # `tiedlora --help` does not need these imports.
    from megatron_tiedlora.config.cli import run_command
    from megatron_tiedlora.runtime.launch_env import first_to_fail

    command = find_command(name)
    assert command is not None
    words = sys.argv[1:] if argv is None else argv
    run_command(partial(call, name, **options), words, reports=first_to_fail if command.is_rank else lambda: True)


def call(name: str, argv: Sequence[str], **options: Any) -> int:
    """Parse the arguments of a command, run the command and return its exit status.

    The command's module, which may import torch, is imported only if the arguments are valid.

    Raises:
        UserError: an argument is invalid, or the command failed.
    """
    from megatron_tiedlora.config.cli import parse_settings

    command = find_command(name)
    assert command is not None
    reader = _of_package(f"config.{command.settings}")
    settings = parse_settings(argv, reader) if isinstance(reader, type) else reader(argv)
    return int(_of_package(f"commands.{command.main}")(settings, **options))


def _of_package(where: str) -> Any:
    """Import and return the object `where` of this package, given as MODULE:NAME."""
    module, _, name = where.partition(":")
    return getattr(importlib.import_module(f"megatron_tiedlora.{module}"), name)


def _leave(text: str, *, status: int = 0) -> NoReturn:
    """Print the text and exit. The text goes to stderr if `status` is not 0."""
    show(*text.split("\n"), file=sys.stderr if status else None)
    sys.exit(status)
