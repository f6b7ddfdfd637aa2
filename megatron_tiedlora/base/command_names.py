"""The table of commands: what `tiedlora NAME` runs, and the script in launch/ or tools/ of a clone that does the same.

A new command is one row here, a class of settings and one module in commands/.
"""

from __future__ import annotations

from dataclasses import dataclass

PROGRAM = "tiedlora"


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        module: its module in commands/, which has `main(settings)`, the exit status.
        settings: what of config/ reads its command line: a class of settings, or a function of the words.
        about: the line in the list of `tiedlora --help`.
        script: the script that does the same, or '' if there is none.
        is_rank: whether a launcher starts it as several ranks, of which one reports an error for all.
    """

    name: str
    module: str
    settings: str
    about: str
    script: str = ""
    is_rank: bool = False


COMMANDS = (
    Command("train", "train", "settings:Settings",
            "fine-tune a model, as one process or a rank of many", "launch/train.py", is_rank=True),
    Command("run", "run", "launch_settings:parse_launch",
            "start `train` on GPUs and hosts, watch it, and say how it ended", "launch/run.py"),
    Command("evaluate", "evaluate", "evaluate_settings:EvaluateSettings",
            "answer a task's held-out rows and score them", "launch/evaluate.py", is_rank=True),
    Command("sweep", "sweep", "sweep_settings:parse_sweep",
            "train methods x ranks x learning rates, and write tables", "launch/sweep.py"),
    Command("doctor", "doctor", "doctor_settings:DoctorSettings",
            "examine the hosts of a job before it starts", "launch/doctor.py"),
    Command("plan", "plan", "plan_settings:parse_plan",
            "find the fastest layout of a cluster before it is booked", "tools/plan.py"),
    Command("merge", "merge", "adapter_settings:MergeSettings",
            "merge an adapter into its base model", "tools/merge_adapter.py"),
    Command("export", "export", "adapter_settings:ExportSettings",
            "write an adapter as LoRA for PEFT, vLLM and others", "tools/export_peft.py"),
    Command("import", "import_adapter", "adapter_settings:ImportSettings",
            "read a PEFT LoRA or VeRA as a native adapter", "tools/import_peft.py"),
    Command("verify", "verify", "adapter_settings:VerifySettings",
            "check a merged folder or an export", "tools/verify_export.py"),
    Command("index", "index", "adapter_settings:IndexSettings",
            "index a folder of adapters; find, verify and compare them"),
    Command("push", "push", "adapter_settings:PushSettings", "publish a run's adapter on the Hugging Face hub"),
    Command("convert-nemo", "convert_nemo", "tool_settings:ConvertNemoSettings",
            "convert GPT-2B-001 from its .nemo file", "tools/convert_nemo.py"),
    Command("check-gpu", "check_gpu", "tool_settings:CheckGpuSettings",
            "check what this machine's GPUs can do", "tools/check_gpu.py"),
    Command("bench", "bench", "bench_settings:BenchSettings",
            "measure a training step or decoding", "tools/bench_step.py", is_rank=True),
    Command("prepare-demo", "prepare_demo", "tool_settings:PrepareDemoSettings",
            "make the demo model (needs the extra demo)", "tools/prepare_demo.py"),
    Command("random-model", "random_model", "tool_settings:RandomModelSettings",
            "write a random model, `tiny` for a try", "tools/write_random_model.py"),
    Command("env", "env", "tool_settings:EnvSettings", "versions, devices and variables, for a bug report"),
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


def find_command(name: str) -> Command | None:
    """The command called `name`; an underscore counts as a dash."""
    return next((command for command in COMMANDS if command.name == name.replace("_", "-")), None)


def other_command(name: str) -> str:
    """The command of ours that other tools call `name`; '' if there is none."""
    return _OTHER_NAMES.get(name.replace("_", "-").lower(), "")
