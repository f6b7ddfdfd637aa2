"""The table of commands: what `tiedlora NAME` runs, and the script in launch/ or tools/ of a clone that does the same.

Texts of this package name a command by its script, `python tools/merge_adapter.py`. `for_user` words them for a user
who has not started a script: `tiedlora merge`. A new command is one row here and one module in commands/.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path

PROGRAM = "tiedlora"


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        module: its module in commands/, which has `main(argv)`, the exit status.
        about: the line in the list of `tiedlora --help`.
        script: the script that does the same, or '' if there is none.
        is_rank: whether a launcher starts it as several ranks, of which one reports an error for all.
    """

    name: str
    module: str
    about: str
    script: str = ""
    is_rank: bool = False


COMMANDS = (
    Command("train", "train", "fine-tune a model, as one process or a rank of many", "launch/train.py", is_rank=True),
    Command("run", "run", "start `train` on GPUs and hosts, watch it, and say how it ended", "launch/run.py"),
    Command("evaluate", "evaluate", "answer a task's held-out rows and score them", "launch/evaluate.py", is_rank=True),
    Command("sweep", "sweep", "train methods x ranks x learning rates, and write tables", "launch/sweep.py"),
    Command("doctor", "doctor", "examine the hosts of a job before it starts", "launch/doctor.py"),
    Command("plan", "plan", "find the fastest layout of a cluster before it is booked", "tools/plan.py"),
    Command("merge", "merge", "merge an adapter into its base model", "tools/merge_adapter.py"),
    Command("export", "export", "write an adapter as LoRA for PEFT, vLLM and others", "tools/export_peft.py"),
    Command("import", "import_adapter", "read a PEFT LoRA or VeRA as a native adapter", "tools/import_peft.py"),
    Command("verify", "verify", "check a merged folder or an export", "tools/verify_export.py"),
    Command("index", "index", "index a folder of adapters; find, verify and compare them"),
    Command("push", "push", "publish a run's adapter on the Hugging Face hub"),
    Command("convert-nemo", "convert_nemo", "convert GPT-2B-001 from its .nemo file", "tools/convert_nemo.py"),
    Command("check-gpu", "check_gpu", "check what this machine's GPUs can do", "tools/check_gpu.py"),
    Command("bench", "bench", "measure a training step or decoding", "tools/bench_step.py", is_rank=True),
    Command("prepare-demo", "prepare_demo", "make the demo model (needs the extra demo)", "tools/prepare_demo.py"),
    Command("random-model", "random_model", "write random weights; tiny trains at once", "tools/write_random_model.py"),
    Command("env", "env", "versions, devices and variables, for a bug report"),
)

# What other tools call a command; what is in no table is guessed by its spelling.
_OTHER_NAMES = {
    **dict.fromkeys(("finetune", "fine-tune", "sft", "tune", "pt", "pretrain", "fit"), "train"),
    **dict.fromkeys(("launch", "torchrun", "deepspeed", "start"), "run"),
    **dict.fromkeys(("eval", "infer", "inference", "generate", "predict", "test"), "evaluate"),
    **dict.fromkeys(("merge-lora", "merge-adapter", "merge-peft"), "merge"),
    **dict.fromkeys(("push-to-hub", "upload", "publish"), "push"),
    **dict.fromkeys(("version", "info", "collect-env"), "env"),
    "serve": "export, which prints the command of `vllm serve`",
}
_BY_SCRIPT = {command.script: command for command in COMMANDS if command.script}
_SCRIPTS = "|".join(map(re.escape, _BY_SCRIPT))
_CALL = re.compile(rf"(?:python3? |(deepspeed (?:--num_gpus \S+ )?))?(?<![\w/.])({_SCRIPTS})\b")
_GAP = re.compile(r"(?<=\S)  +(?=\S)")


def find_command(name: str) -> Command | None:
    """The command called `name`; an underscore counts as a dash."""
    return next((command for command in COMMANDS if command.name == name.replace("_", "-")), None)


def other_command(name: str) -> str:
    """The command of ours that other tools call `name`; '' if there is none."""
    return _OTHER_NAMES.get(name.replace("_", "-").lower(), "")


def started_as_script() -> bool:
    """Whether this process runs a script of launch/ or tools/, and not the installed command."""
    return "/".join(Path(sys.argv[0]).absolute().parts[-2:]) in _BY_SCRIPT


def program_name(script_name: str) -> str:
    """How a usage line names this program: as the script `NAME.py` that was started, or as `tiedlora NAME`."""
    if not started_as_script():
        for script, command in _BY_SCRIPT.items():
            if Path(script).name == script_name:
                return f"{PROGRAM} {command.name}"
    return script_name


def for_user(text: str) -> str:
    """`text`, with `tiedlora NAME` in place of each script, unless this process runs a script itself."""
    if started_as_script():
        return text
    return "\n".join(_reworded(line) for line in text.split("\n"))


def _reworded(line: str) -> str:
    found = _CALL.search(line)
    if found is None:
        return line
    new = _CALL.sub(_as_command, line)
    # A column of notes that follows the calls stays aligned.
    gap = _GAP.search(new, found.start())
    if gap is None:
        return new
    width = max(2, gap.end() - gap.start() + len(line) - len(new))
    return f"{new[: gap.start()]}{' ' * width}{new[gap.end() :]}"


def _as_command(call: re.Match[str]) -> str:
    launcher, name = call[1], _BY_SCRIPT[call[2]].name
    if launcher is None:
        return f"{PROGRAM} {name}"
    if name == "train":
        return f"{PROGRAM} run {launcher.removeprefix('deepspeed ')}".rstrip()
    return f"{launcher}--no_python {PROGRAM} {name}"
