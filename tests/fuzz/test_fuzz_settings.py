"""Settings in YAML, the DeepSpeed JSON and values on command lines, broken: one clear line, or settings that can be."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from damage import STRANGE, broken_file, changed_fields, clear, damaged, odd_place
from fuzzing import Draw, cases, explore, outcome
from support.folders import ROOT
from support.native_files import with_adapter, write_native
from support.run_helpers import Base, write_base
from valid import check_settings

from megatron_tiedlora.cluster.start import launch
from megatron_tiedlora.config.adapter_settings import EvaluateSettings
from megatron_tiedlora.config.batch import BatchPlan
from megatron_tiedlora.config.cli import parse_settings
from megatron_tiedlora.config.fields import CommandSettings
from megatron_tiedlora.config.job_settings import (
    DoctorSettings,
    LaunchSettings,
    SweepCommand,
    SweepSettings,
    parse_launch,
    parse_sweep,
)
from megatron_tiedlora.config.settings import Settings
from megatron_tiedlora.engine.engine_json import EngineConfig, load_engine_config
from megatron_tiedlora.evaluation.plan import plan_evaluations
from megatron_tiedlora.planning.report import dry_run_report
from megatron_tiedlora.study.plan import plan_sweep

BATCHES = BatchPlan(global_batch_size=8, micro_batch_size=2, data_parallel=2)

COMMANDS: Mapping[str, tuple[dict[str, Any], Callable[[list[str]], Any]]] = {
    "train": (
        {"model": "llama2-7b", "task": "squad", "method": "tl6", "rank": 8, "layers": [1, 4], "learning_rate": 1e-4,
         "warmup_steps": 5, "max_steps": 10, "packing": True, "compile": "auto", "prompt_template": "Q: {question}",
         "save_interval_minutes": 2.5, "train_file": "rows.jsonl", "output_dir": "out"},
        lambda argv: parse_settings(argv, Settings),
    ),
    "evaluate": (
        {"model": "llama2-7b", "task": "gsm8k", "adapter": "run/adapter", "limit": 3, "split": "test", "dtype": "fp32"},
        lambda argv: parse_settings(argv, EvaluateSettings),
    ),
    "sweep": (
        {"output_dir": "study", "methods": ["lora", "tl6"], "ranks": [2, 8], "learning_rates": [1e-4, 1e-5],
         "single_layers": "paper", "model": "llama2-7b", "task": "squad", "max_steps": 10,
         "launcher_args": "--num_gpus 2"},
        parse_sweep,
    ),
}  # fmt: skip


def check_found(found: object) -> None:
    """Settings that were read can be."""
    if isinstance(found, SweepCommand):
        check_settings(found.settings)
        check_settings(found.train)
    elif isinstance(found, CommandSettings):
        check_settings(found)


@cases("yaml")
def test_broken_yaml(area: Path, examples: int) -> None:
    file = area / "settings.yaml"

    def body(draw: Draw) -> object:
        content, parse = COMMANDS[draw.say(draw.choice(sorted(COMMANDS)))]
        clear(file)
        changed = changed_fields(draw, content) if draw.chance() else content
        raw = yaml.safe_dump(changed, sort_keys=False).encode()
        file.write_bytes(raw if changed is not content else damaged(draw, raw))
        if draw.chance(0.05):
            odd_place(draw, file)
        found = outcome(lambda: parse(["--config", str(file)]), unchanged=area, names=(str(file), "--"))
        check_found(found)
        return found

    explore("yaml", examples, body)


# The DeepSpeed JSON -----------------------------------------------------------------------------------------------

ENGINE = {
    "zero_optimization": {"stage": 2, "reduce_bucket_size": 1000, "overlap_comm": False,
                          "offload_optimizer": {"device": "cpu", "pin_memory": True}},
    "train_batch_size": 8, "gradient_accumulation_steps": "auto", "gradient_clipping": 0.5, "steps_per_print": 10,
    "wall_clock_breakdown": False, "flops_profiler": {"enabled": False}, "log_level": "info",
}  # fmt: skip


@cases("engine")
def test_a_broken_engine_json(area: Path, examples: int) -> None:
    file = area / "engine.json"

    def body(draw: Draw) -> object:
        file.write_bytes(broken_file(draw, file.name, json.dumps(ENGINE).encode()))
        found = outcome(
            lambda: load_engine_config(str(file), batches=BATCHES, gradient_clipping=0.5),
            unchanged=area,
            names=(str(file),),
        )
        if isinstance(found, EngineConfig):
            assert found.zero_stage in range(4) and found.values["train_batch_size"] == 8
            assert found.values["gradient_clipping"] == 0.5
            for name, value in found.values["zero_optimization"].items():
                assert not name.endswith("bucket_size") or value >= 1, f"{name} of {value}"
        return found

    explore("engine", examples, body)


# Command lines ----------------------------------------------------------------------------------------------------

VALUES = [
    "", " ", "0", "1", "2", "3", "-1", "8", "64", "1e3", "1e-4", "0.5", "-0.0", "nan", "inf", "1e400", "9" * 400,
    "0x10", "1_000", "²", "٣", "true", "false", "none", "None", "auto", "all", "1,2", "1,,2", "2,1", "1,1", ",",
    "lora", "tl6", "tl5,lora", "custom", "demo", "squad", "gsm8k", "loss", "bleu", "exact_match", "zero1.json",
    "zero3.json", "../x", "/", "/dev/null", "/etc/passwd", "~", "~nobody-of-that-name", "x" * 300, "x/" * 3000,
    "\x1b[2J", "a\nb", "\udcff", "é", "{prompt}", "{0.__class__}", "{", "--rank", "-h", "'", '"', "a b", "$(id)",
    "; id", "`id`", "%h", "[::1]", "--num_gpus 2", "--no_python", "paper", "llama2-7b", "gpt-2b-001", "a/b", "full",
    "selective", "bf16", "fp32",
]  # fmt: skip
WORDS = ["--nothing=1", "x", "--", "--rank", "-x", "--config=", "--config=/dev/zero", "--config=.", "\udcff"]


def no_output(run: Callable[[], Any]) -> Any:
    """What `run` returns; what it prints, which is mostly the user's own values, is dropped."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        return run()


def _train(argv: Sequence[str]) -> CommandSettings:
    settings = parse_settings([*argv, "--dry_run=true"], Settings)
    no_output(lambda: print(dry_run_report(settings).text))
    return settings


def _evaluate(argv: Sequence[str]) -> CommandSettings:
    settings = parse_settings(argv, EvaluateSettings)
    plan_evaluations(settings, rank=0, world_size=1)[""]
    return settings


def _sweep(argv: Sequence[str]) -> SweepCommand:
    command = parse_sweep([*argv, "--dry_run=true"])
    no_output(lambda: print("\n".join(plan_sweep(command).dry_run_lines())))
    return command


def _run(argv: Sequence[str]) -> int:
    return int(no_output(lambda: launch(parse_launch([*argv, "--show_command=true"]), scripts=ROOT / "launch")))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    made = write_base(tmp_path_factory.mktemp("base"))
    write_native(made.folder / "adapter", made.model, with_adapter(made.model, "tl6")[2])
    (made.folder / "hosts").write_text("localhost slots=2\n")
    return made


@cases("flags")
def test_values_on_the_command_line(base: Base, area: Path, examples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is accepted is planned too, as far as that goes without starting anything."""
    monkeypatch.setenv("MEGATRON_TIEDLORA_CACHE", str(base.cache))
    train, test = base.arguments(output_dir="out"), base.validation
    commands: Mapping[str, tuple[type[CommandSettings], list[str], Callable[[Sequence[str]], Any]]] = {
        "train": (Settings, train, _train),
        "evaluate": (
            EvaluateSettings,
            [f"--model={base.model}", f"--adapter={base.folder / 'adapter'}", "--task=custom", f"--test_file={test}"],
            _evaluate,
        ),
        "sweep": (
            SweepSettings,
            ["--output_dir=study", f"--model={base.model}", f"--train_file={base.train}", f"--test_file={test}",
             "--task=custom", "--ranks=2", "--methods=tl6"],
            _sweep,
        ),
        "run": (LaunchSettings, ["--num_gpus=2", *train], _run),
        "doctor": (DoctorSettings, [f"--hostfile={base.folder / 'hosts'}"],
                   partial(parse_settings, kind=DoctorSettings)),
    }  # fmt: skip
    strange = [str(value) for value in STRANGE if isinstance(value, int | float | str) and "\0" not in str(value)]

    def body(draw: Draw) -> object:
        kind, given, run = commands[draw.say(draw.choice(["train", "train", *commands]))]
        names = sorted(kind.model_fields) + (sorted(Settings.model_fields) if kind is LaunchSettings else [])
        argv = list(given)
        for name in draw.sample([name for name in names if name != "show_command"], draw.randint(1, 2)):
            value = draw.choice(VALUES) if draw.chance(0.8) else draw.choice(strange)
            argv.append(draw.say(f"--{name}={value}")[:20_000])
        if draw.chance(0.05):
            argv.append(draw.choice(WORDS))
        found = outcome(lambda: run(argv), unchanged=area, names=("",))
        check_found(found)
        return found

    explore("flags", examples, body)
