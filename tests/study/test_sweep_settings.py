"""What a sweep is told: its own settings and the runs', and what is refused before anything starts."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.run_helpers import Base
from support.sweep_runs import LAUNCH, planned, study_arguments, sweep_here, write_study
from support.task_files import refusal

from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.config.job_settings import parse_sweep
from megatron_tiedlora.data.tasks import TASKS
from megatron_tiedlora.runtime.stopping import StopSignals
from megatron_tiedlora.study.plan import SweepPlan, plan_sweep
from megatron_tiedlora.study.record import Point, StudyFolder, check_resumable, make_grid, write_record
from megatron_tiedlora.study.sweep import Sweep

RUNS = [f"{m}-r{r}-lr{rate}" for m in ("lora", "tl6") for r in (2, 3) for rate in ("2e-1", "5e-2")]


class Started(Exception):
    """What a sweep starts first."""


def first_start(plan: SweepPlan, private: Path) -> tuple[Any, ...]:
    """The job that a sweep starts first."""

    def begin(job: Any, log: Path, lock: int) -> Any:
        raise Started(job)

    with pytest.raises(Started) as started:
        Sweep(plan, private, LAUNCH, begin, 0, StopSignals()).run()
    return started.value.args[0]


def test_the_papers_grid_is_the_default() -> None:
    grid = make_grid(parse_sweep(["--output_dir=x"]), 32)
    assert len(grid.points) == 56 and len({run.name for p in grid.points for run in grid.runs(p)}) == 112
    assert grid.learning_rates == (1e-4, 1e-5) and {point.rank for point in grid.points} == {2, 4, 8, 16, 32, 64, 128}
    assert not grid.table3


def test_single_layers_bring_tl5_of_their_rank_once() -> None:
    argv = ["--output_dir=x", "--methods=tl5,tl6", "--ranks=16,8", "--single_layers=2,1", "--single_layer_rank=4"]
    grid = make_grid(parse_sweep(argv), 3)
    names = [run.name for point in grid.points for run in grid.runs(point)][-6:]
    assert names == [f"{a}-lr{r}{b}" for a, b in (("lora-r4", "-layer2"), ("lora-r4", "-layer1"), ("tl5-r4", ""))
                     for r in ("1e-4", "1e-5")]  # fmt: skip
    assert Point("tl5", 4) not in grid.table
    assert len(make_grid(parse_sweep([*argv[:4], "--single_layer_rank=16"]), 3).points) == 4 + 2


def test_yaml_holds_names_of_both_and_the_command_line_wins(tmp_path: Path) -> None:
    file = tmp_path / "s.yaml"
    file.write_text("output_dir: x\nranks: [4, 8]\nlearning_rates: 1e-3\nmax_steps: 7\ndtype: fp32\nmethods: lora\n")
    command = parse_sweep(["--config", str(file), "--ranks=2", "--max_steps", "9"])
    settings = command.settings
    assert (settings.ranks, settings.learning_rates, settings.methods) == ((2,), (1e-3,), ("lora",))
    assert dict(command.given) == {"max_steps": "9", "dtype": "fp32"} and command.train.max_steps == 9
    file.write_text("output_dir: x\nrankz: 3\n")
    assert "s.yaml: unknown setting 'rankz' (did you mean rank" in refusal(parse_sweep, ["--config", str(file)])


def test_former_settings_of_a_study_are_answered_with_what_replaces_them(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "study")
    with (folder / "sweep.yaml").open("a") as file:
        file.write("runs_at_once: 3\ngpus_per_run: 1\n")
    said = refusal(parse_sweep, [f"--output_dir={folder}"])
    assert "sweep.yaml: unknown settings 'runs_at_once' (" in said and "--together N limits" in said


def write_started(base: Base, folder: Path, *flags: str, file: Path | None = None, **changes: Any) -> Path:
    """The folder of a sweep that was started, and cut off before its first command."""
    plan = planned((base, file or base.validation), folder, *flags, **changes)
    folder.mkdir()
    write_record(plan.folder, plan.command, plan.base)
    return folder


def test_a_list_of_adapters_that_a_kill_left_half_written(base: Base, tmp_path: Path) -> None:
    folder = write_started(base, tmp_path / "out", "--together=8")
    left = folder / "groups" / ".writing-lora-r2-lr2e-1.yaml-0123abcd"
    left.parent.mkdir()
    for item in (left, left.with_name("lora-r2-lr2e-1.yaml")):
        item.write_text("[")
    plan = plan_sweep(parse_sweep([f"--output_dir={folder}"]))
    write_record(plan.folder, plan.command, plan.base)
    assert [item.name for item in left.parent.iterdir()] == ["lora-r2-lr2e-1.yaml"]
    left.with_name("other").write_text("")
    assert "groups/other is not a folder" in refusal(sweep_here, [f"--output_dir={folder}"])


def test_the_folder_alone_starts_runs_as_before(base: Base, tmp_path: Path) -> None:
    flags = ("--launcher_args=--num_gpus 2", "--together=3")
    folder = write_started(base, tmp_path / "out", *flags, micro_batch_size=1)

    def starts(*flags: str) -> tuple[Any, ...]:
        plan = plan_sweep(parse_sweep([f"--output_dir={folder}", *flags]))
        write_record(plan.folder, plan.command, plan.base)
        return first_start(plan, tmp_path).size, plan.command.settings.together

    assert starts() == (2, 3)
    assert starts("--launcher_args=--num_gpus 4") == starts() == (4, 3)
    assert starts("--together=auto") == starts() == (4, "auto")


def test_the_base_is_scored_in_the_format_of_the_runs(base: Base, tmp_path: Path) -> None:
    for given in (None, "nf4"):
        flags = [] if given is None else [f"--base={given}"]
        plan = planned((base, base.validation), tmp_path / "study", *flags)
        words = first_start(plan, tmp_path).arguments
        assert not any(word.startswith("--adapter") for word in words)
        assert [word for word in words if word.startswith("--base=")] == flags


def test_other_rows_under_the_same_name_are_refused(base: Base, tmp_path: Path) -> None:
    rows, again = tmp_path / "rows.jsonl", [f"--output_dir={tmp_path / 'out'}", "--dry_run"]
    rows.write_bytes(base.validation.read_bytes())
    folder = write_started(base, tmp_path / "out", file=rows)
    known = json.loads((folder / "base.json").read_text())["file_sha256"]
    files = (base.train, base.validation, rows)
    assert known == {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    assert sweep_here(again) == 0
    rows.write_text(rows.read_text() + '{"prompt": "a", "completion": "b"}\n')
    assert refusal(sweep_here, again).startswith(f"{rows}: changed, added or removed since the sw")


@pytest.mark.parametrize(
    ("flags", "rows"), [((), 48), (("--test_limit=3",), 3), (("--test_file={file}",), 30)], ids=["own", "limit", "file"]
)
def test_all_test_rows_of_the_demo_are_scored(base: Base, tmp_path: Path, flags: tuple[str, ...], rows: int) -> None:
    file = tmp_path / "test.jsonl"
    file.write_text('{"question": "1 + 1?", "answer": "2\\n#### 2"}\n' * 30)
    argv = [f"--output_dir={tmp_path / 'out'}", f"--model={base.model}", "--task=demo", "--max_length=64"]
    argv += ["--ranks=2"]  # more than the model has widths for are rejected
    plan = plan_sweep(parse_sweep([*argv, *(flag.format(file=file) for flag in flags)]))
    assert f"--limit={rows}" in first_start(plan, tmp_path).arguments
    limit = TASKS["demo"].scored_rows
    assert limit is not None and limit < 30  # else the limit would not be needed


REFUSED = [
    ("--methods=lora,tl7", "--methods tl7: input should be one of 'lora', 'vera', 'tl1'"),
    ("--methods=", "--methods is empty"),
    ("--ranks=", "--ranks is empty"),
    ("--learning_rates=", "--learning_rates is empty"),
    ("--ranks=2,0", "--ranks 0: ranks start at 1"),
    ("--ranks=2,4,2", "--ranks has 2 twice"),
    ("--ranks=two", "--ranks two: input should be a valid integer"),
    ("--methods=tl6,tl6", "--methods has tl6 twice"),
    ("--learning_rates=1e-4,0.0001", "--learning_rates has 0.0001 twice"),
    ("--learning_rates=-1", "--learning_rates -1: a learning rate must be above 0"),
    ("--learning_rates=inf", "--learning_rates inf: input should be a finite number"),
    ("--single_layers=0", "--single_layers 0: single layers start at 1"),
    ("--single_layers=4", "--single_layers 4: the model has layers 1 to 3"),
    ("--single_layers=none", "--single_layers none: "),
    ("--rank=4", "--rank cannot be given to a sweep: the sweep trains the values of --ranks"),
    ("--method=tl6", "--method cannot be given to a sweep: the sweep trains the values of --methods"),
    ("--learning_rate=1", "--learning_rate cannot be given to a sweep"),
    ("--layers=1", "--layers cannot be given to a sweep: the sweep adapts all layers"),
    ("--resume=none", "--resume cannot be given to a sweep"),
    ("--world_size=2", "--world_size cannot be given to a sweep"),
    ("--ranks=2,64", "--rank 64: qkv has 32 inputs"),
    ("--max_step=4", "unknown argument --max_step (did you mean --max_steps?)"),
    ("--method_s=4", "unknown argument --method_s (did you mean --methods?)"),
    ("--max_steps=0", "--max_steps 0: input should be greater than or equal to 1"),
    ("--task=squat", "--task squat: "),
    ("--test_file=none.jsonl", "none.jsonl: no such file"),
    ("--train_file=none.jsonl", "none.jsonl: no such file"),
    ("--max_length=100000", "--max_length 100000: "),
    ("--tensor_parallel=3 --launcher_args=--num_gpus=3", "--tensor_parallel 3 does not divide"),
    ("--tensor_parallel=3", "--launcher_args: 1 rank is not a multiple of --tensor_parallel 3"),
    ("--eval_metric=bleu", "--eval_metric bleu is not a metric of task custom"),
    ("--model=nowhere/", "--model nowhere/: no such folder"),
    ("--gpus_per_run=1", "unknown argument --gpus_per_run (the groups of a sweep run one after another on all GPUs"),
    ("--runs_at_once=2", "unknown argument --runs_at_once (the groups of a sweep run one after another on all GPUs"),
    ("--launcher_args='x", "--launcher_args 'x: no closing quotation"),
    ("--together=0", "--together 0: give auto, or an integer of at least 1"),
    ("--together=many", "--together many: "),
    ("--ds_config=zero2.json", "--ds_config zero2.json: ZeRO-2 clips"),
    ("--report_to=wandb", "--report_to wandb is not implemented for --adapters"),
    ("--share_micro_batches=false", "--share_micro_batches cannot be given to a sweep: the runs of a group share"),
    ("--launcher_args=--include=localhost:1", "--launcher_args: unknown argument --include"),
    ("--launcher_args=--max_restarts=2", "--launcher_args: --max_restarts is a flag of tiedlora run only; remove it"),
    ("--halving=true --together=1", "learning rates that train together; give --together auto, or 2 or more"),
    ("--halving=true --learning_rates=1", "--halving compares learning rates; give two or more"),
    ("--halving=true --eval_metric=exact_match", "remove --eval_metric exact_match"),
    ("--tables_from=a", "cannot be combined with --tables_from"),
]


@pytest.mark.parametrize(("flags", "line"), REFUSED, ids=[flags for flags, _ in REFUSED])
def test_refused_with_one_line_and_nothing_started(base: Base, tmp_path: Path, flags: str, line: str) -> None:
    folder = tmp_path / "out"
    assert line in refusal(sweep_here, [*study_arguments(base, base.validation, folder), *flags.split(" ")])
    assert not folder.exists()


def test_a_task_without_a_test_set_needs_a_file(base: Base, tmp_path: Path) -> None:
    arguments = study_arguments(base, base.validation, tmp_path / "out", test_file=None)
    assert "--task custom has no test set of its own; give one with --test_file" in refusal(sweep_here, arguments)


def test_what_a_resumed_study_may_change(base: Base, tmp_path: Path) -> None:
    """Nothing that decides a number; and where a run would compare contents, a study compares names as well."""
    arguments = study_arguments(base, base.validation, tmp_path / "out")
    record, folder = plan_sweep(parse_sweep(arguments)).base, StudyFolder(write_started(base, tmp_path / "out"))
    for name in ("save_interval", "keep_checkpoints", "eval_batch_size"):
        check_resumable(folder, parse_sweep([*arguments, f"--{name}=1"]), record)
    for flag in (
        *(f"--{name}=0.5" for name in ("weight_decay", "dropout", "tokenizer")),
        *("--seed=77", "--patience=77", "--prompt_template={prompt}!", "--chat_template=other"),
        "--columns=prompt=completion",
    ):
        said = f"the sweep was started with {flag.partition('=')[0]} .*, but the value is now .*; give the original"
        with pytest.raises(UserError, match=said):
            check_resumable(folder, parse_sweep([*arguments, flag]), record)


def test_a_folder_with_other_things(base: Base, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    for folder, line in ((tmp_path / "mine", "holds other files"), (tmp_path / "mine" / "letter.txt", "is a file")):
        assert line in refusal(sweep_here, study_arguments(base, base.validation, folder))
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["letter.txt"]


def test_a_folder_of_a_start_that_was_cut_off_at_once(base: Base, tmp_path: Path) -> None:
    (tmp_path / ".owner").touch()
    (tmp_path / ".writing-sweep.yaml-0123abcd").write_text("meth")
    assert sweep_here([*study_arguments(base, base.validation, tmp_path), "--dry_run"]) == 0


def test_the_dry_run_shows_what_trains_together(
    base: Base, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    argv = [*study_arguments(base, base.validation, tmp_path / "out"), "--dry_run"]

    def groups(*flags: str) -> list[str]:
        assert sweep_here([*argv, *flags]) == 0
        lines = capsys.readouterr().out.splitlines()
        first = next(n for n, line in enumerate(lines, 1) if line.startswith("  groups to train together"))
        rows = [line.split(None, 3) for line in lines[first : lines.index("", first)]]
        assert [row[0] for row in rows] == [str(number) for number in range(1, len(rows) + 1)]
        assert all(float(row[1]) > 0 and row[2] in ("MB", "GB") for row in rows)
        return [row[3] for row in rows]

    pairs = [", ".join(RUNS[i : i + 2]) for i in range(0, 8, 2)]
    assert groups("--together=8") == groups("--together=auto") == [", ".join(RUNS)]
    assert groups("--together=5") == [", ".join(pairs[:2]), ", ".join(pairs[2:])]
    assert groups("--together=3") == pairs  # the runs of a point are not divided
    plan = plan_sweep(parse_sweep(argv))
    for together, expected in ((4, [", ".join(RUNS[:4]), ", ".join(RUNS[4:])]), (1, RUNS)):
        needed = plan.needed_bytes(tuple(plan.grid.all_runs[:together]))  # of the widest; and of all that begin there
        monkeypatch.setattr("psutil.virtual_memory", lambda needed=needed: SimpleNamespace(available=needed / 0.8 + 1))
        assert groups("--together=auto") == expected
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=1.0))
    assert groups("--together=auto") == RUNS  # less than one needs
    assert groups("--together=auto", "--halving=true") == pairs  # what is compared stays together


def test_a_shape_can_be_listed_and_not_trained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [f"--output_dir={tmp_path / 'out'}", "--model=llama2-7b", "--task=squad"]
    argv += ["--ranks=8", "--learning_rates=1e-4"]
    assert sweep_here([*argv, "--dry_run", "--single_layers=paper"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "sweep   18 runs and 19 scores of llama2-7b on squad (squad)"
    counts = {line.split()[0]: line.split()[1] for line in lines if "to do" in line and "-lr" in line}
    assert counts["lora-r8-lr1e-4"] == "4,194,304" and counts["tl6-r8-lr1e-4"] == "524,544"
    assert counts["lora-r16-lr1e-4-layer32"] == counts["tl5-r16-lr1e-4"] == "262,144" and len(counts) == 18
    assert lines[-1] == "  18 to do" and not (tmp_path / "out").exists()
    assert "llama2-7b is a shape without weights" in refusal(sweep_here, argv)
    assert not (tmp_path / "out").exists()
