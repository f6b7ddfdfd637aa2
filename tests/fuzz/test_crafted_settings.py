"""Settings, paths and folders of studies that are made to harm: each is one clear line."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from fuzzing import refused
from support.sweep_runs import write_run, write_study
from valid import METRICS

from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.checkpoint.sources import find_model
from megatron_tiedlora.config.batch import BatchPlan
from megatron_tiedlora.config.cli import parse_settings
from megatron_tiedlora.config.job_settings import parse_sweep
from megatron_tiedlora.config.settings import Settings, make_settings
from megatron_tiedlora.data.readers import read_rows
from megatron_tiedlora.data.tokenizer import load_tokenizer
from megatron_tiedlora.engine.engine_json import load_engine_config
from megatron_tiedlora.runtime.run_folder import MetricsLog, RunFolder, choose_run_folder
from megatron_tiedlora.study.record import RunEnd, StudyFolder, check_folder, read_run

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
