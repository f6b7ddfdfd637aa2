"""Settings in YAML, the DeepSpeed JSON and values on command lines, broken: one clear line, or settings that can be;
and settings, paths and folders of studies that are made to harm."""

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
from fuzzing import Draw, cases, explore, outcome, refused
from support.folders import ROOT
from support.native_files import with_adapter, write_native
from support.run_helpers import Base, write_base
from support.sweep_runs import write_run, write_study
from valid import METRICS, check_settings

from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.checkpoint.sources import find_model
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
from megatron_tiedlora.config.settings import Settings, make_settings
from megatron_tiedlora.data.readers import read_rows
from megatron_tiedlora.data.tokenizer import load_tokenizer
from megatron_tiedlora.engine.engine_json import EngineConfig, load_engine_config
from megatron_tiedlora.evaluation.plan import plan_evaluations
from megatron_tiedlora.planning.report import dry_run_report
from megatron_tiedlora.runtime.run_folder import MetricsLog, RunFolder, choose_run_folder
from megatron_tiedlora.study.plan import plan_sweep
from megatron_tiedlora.study.record import RunEnd, StudyFolder, check_folder, read_run

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


# Made to harm -------------------------------------------------------------------------------------------------------


_BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}, *a{i - 1}]\n" for i in range(1, 60))
_MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}, *a{i - 1}]}}\n" for i in range(1, 40))


@pytest.mark.parametrize(("text", "said"), [
    (_BOMB + "rank: *a59\n", "anchors and aliases are not supported"),
    (_MERGES, "anchors and aliases are not supported"),
    ("rank: &r 8\nalpha: *r\n", "anchors and aliases are not supported"),
    ("rank: &r [*r]\n", "anchors and aliases are not supported"),
    ("model: !!python/object/apply:os.system ['touch gone']\n", "could not determine a constructor"),
    ("model: !!python/name:os.system\n", "could not determine a constructor"),
    ("!!python/object/new:os.system ['touch gone']\n", "could not determine a constructor"),
    ("model: !mine x\n", "could not determine a constructor"),
    ("rank: 8\nrank: 9\n", "'rank' appears twice"),
    ("rank: 8\n---\nrank: 9\n", "another document"),
    ("rank:\t8\n\tmodel: x\n", "not valid YAML"),
    ("rank: " + "[" * 50_000, "nested too deeply"),
    ("- " * 20_000, "nested too deeply"),
    ("rank: 2001-99-99\n", "cannot be read"),
    ("rank: !!bool x\n", "cannot be read"),
    ("rank: !!timestamp x\n", "cannot be read"),
    ("rank: !!int ''\n", "cannot be read"),
    ("rank: " + "9" * 5000, "cannot be read"),
    ("rank: 0x" + "f" * 5000, "--rank an integer of 20000 bits"),
    ("? 0x" + "f" * 5000 + "\n: 1", "unknown setting an integer of 20000 bits"),
    ("? [a, b]\n: 1\n", "unhashable key"),
    ("? {a: b}\n: 1\n", "unhashable key"),
    ("rank: true\n", "--rank True"),
    ("layers: [1, true]\n", "--layers [1, True]"),
    ("max_steps: .inf\n", "--max_steps inf"),
    ("learning_rate: 1e400\n", "--learning_rate 1e400"),
    ("max_steps: ²\n", "--max_steps ²"),
    ('output_dir: "a\\0b"\n', "--output_dir 'a\\x00b'"),
    ('model: "\\ud800"\n', "--model '\\ud800'"),
    ("a" * 2**18 + ": 1\n", "is larger than 262,144 bytes"),
    ("? " + "x" * 5000 + "\n: 1\n", "unknown setting"),
    ("max_steps: 0x" + "f" * 5000, "--max_steps an integer"),
    ("max_steps: '" + "9" * 5000 + "'", "--max_steps 9999"),
    (b"\xff\xfer\0a\0n\0k\0:\0 \x008\0", "not UTF-8"),
])  # fmt: skip
@pytest.mark.timeout(30)
def test_yaml_that_is_made_to_harm(area: Path, text: str | bytes, said: str) -> None:
    file = area / "settings.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(area, lambda: parse_settings(["--config", str(file)], Settings), str(file), "--", said=said)


@pytest.mark.parametrize("name", ["../../../elsewhere", "..", "/", "step_10/../step_10", "x" * 5000, "\0", "\udcff"])
def test_latest_of_a_run_leads_nowhere_else(area: Path, name: str) -> None:
    run = write_run(area / "study", "lora-r2-lr1e-4")
    elsewhere = area / "study" / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "trainer_state.json").write_text('{"best_metric": 7.0}')
    (run / "checkpoints" / "latest").write_bytes(name.encode("utf-8", "surrogateescape"))
    assert read_run(run) == RunEnd("failed", "it ended without a finite value on validation", 10, None)


@pytest.mark.parametrize("name", ["runs", "groups", "scores", "logs", "runs/lora-r2-lr1e-4", "groups/x"])
def test_a_study_with_links_for_folders_is_refused(area: Path, name: str) -> None:
    study = write_study(area / "study", learning_rates=[1e-4])
    (area / "again").symlink_to(study)
    for folder in (study, area / "again"):  # which the user names
        check_folder(StudyFolder(folder))
    (study / name).parent.mkdir(exist_ok=True)
    (study / name).symlink_to(area / "away")
    refused(area, lambda: check_folder(StudyFolder(study)), f"{study / name} is a link")


@pytest.mark.parametrize("changes", [{"state": "finished\n"}, {"state": None}, {"state": ["finished"]}, {"state": 1}])
def test_a_status_of_no_known_state_is_a_run_that_was_cut_off(area: Path, changes: dict[str, Any]) -> None:
    run = write_run(area / "study", "lora-r2-lr1e-4")
    (run / "run_status.json").write_text(json.dumps({"state": "finished", "step": 10, "reason": "x", **changes}))
    assert read_run(run) == RunEnd("cut off")


def test_a_resumed_log_is_strict_json_whatever_was_there(area: Path) -> None:
    run = RunFolder(area / "run")
    run.path.mkdir()
    run.metrics.write_bytes(b"\xff\n[]\n" + METRICS + b'{"step": 2, "split": "test", "loss": 1}\n{"st')
    MetricsLog(run, resumed_step=2, evaluated_step=2).close()
    assert run.metrics.read_bytes().splitlines() == METRICS.splitlines()[:2]


@pytest.mark.parametrize("name", ["~nobody-of-that-name/x", "x" * 300, "x/" * 3000])
def test_what_reads_a_path_says_that_it_is_none(area: Path, name: str) -> None:
    """Also where no command has looked at it before."""
    batches, settings = BatchPlan(global_batch_size=8, micro_batch_size=2, data_parallel=2), make_settings({})
    for reads in (
        partial(find_model, name),
        partial(load_tokenizer, name),
        partial(read_rows, name),
        partial(load_engine_config, name, batches=batches, gradient_clipping=0.5),
        partial(choose_run_folder, settings.completed(output_dir=name)),
        partial(choose_run_folder, settings.completed(resume=name)),
    ):
        refused(area, reads, "is not a path")


def test_a_choice_of_bytes_that_are_not_utf8_is_one_line(area: Path) -> None:
    call = partial(parse_settings, ["--task=\udcff"], Settings)
    refused(area, call, r"--task \udcff: ", said="input should be one of")


def test_a_wrong_value_names_the_file_that_it_is_in(area: Path) -> None:
    file = area / "s.yaml"
    file.write_text("rank: 0\nmax_steps: 5\n")
    starts = {"": f"{file}: --rank 0", "--rank=-1": "--rank -1", "--rank=2 --max_steps=0": "--max_steps 0"}
    for argv, start in starts.items():
        with pytest.raises(UserError) as error:
            parse_settings([f"--config={file}", *argv.split()], Settings)
        assert str(error.value).startswith(start)


def test_a_sweep_s_folder_that_can_be_none(area: Path) -> None:
    file = area / "sweep.yaml"
    for value in ("~nobody-of-that-name", "x" * 300, "0x" + "f" * 5000):
        file.write_text(f"output_dir: {value}\n")
        refused(area, lambda: parse_sweep([f"--config={file}"]), f"{file}: --output_dir")
