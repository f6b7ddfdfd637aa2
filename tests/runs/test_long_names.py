"""Names that no file can have, and places that cannot be written: one line and status 2, from every command."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from support.folders import ROOT
from support.sweep_runs import no_start

from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.base.output_folder import last_name
from megatron_tiedlora.cluster.start import launch
from megatron_tiedlora.commands.front import call
from megatron_tiedlora.config.job_settings import parse_launch, parse_sweep
from megatron_tiedlora.config.settings import make_settings
from megatron_tiedlora.runtime.run_folder import MetricsLog, RunFolder, choose_run_folder, run_name
from megatron_tiedlora.study.sweep import sweep


def no_sweep(argv: Sequence[str]) -> int:
    """A sweep that starts nothing."""
    return sweep(parse_sweep(argv), scripts=ROOT / "launch", begin=no_start)


# By command: how it is started, what else it needs, and its flags of files and folders.
MODEL = "--model=llama2-7b"
COMMANDS: Mapping[str, tuple[Callable[[Sequence[str]], Any], list[str], str]] = {
    "train": (partial(call, "train"), ["--dry_run", MODEL],
              "config model tokenizer ds_config output_dir resume train_file"),
    "run": (lambda argv: launch(parse_launch(argv), scripts=ROOT / "launch"), ["--show_command", MODEL, "--task=gsm8k"],
            "config model tokenizer ds_config output_dir resume hostfile"),
    "sweep": (no_sweep, ["--output_dir=study", MODEL, "--task=gsm8k", "--dry_run"],
              "config model tokenizer ds_config output_dir train_file test_file"),
    "tables": (no_sweep, ["--output_dir=study"], "tables_from"),
    "doctor": (partial(call, "doctor"), [], "config hostfile json output_dir"),
    "merge": (partial(call, "merge"), ["--adapter=a", "--output=o"], "adapter output"),
    "export": (partial(call, "export"), ["--adapter=a", "--output=o"], "adapter output"),
    "verify": (partial(call, "verify"), ["--adapter=a", "--merged=m"], "adapter merged peft"),
    "prepare": (partial(call, "prepare_demo"), [], "output"),
    "random": (partial(call, "random_model"), [MODEL, "--output=o"], "model output"),
}  # fmt: skip
NAMES = {
    "a user": "~nobody-of-that-name/x",
    "long": "n" * 300,
    "very long": "n" * 5000,
    "deep": f"{'n' * 200}/" * 25,
    "NUL": "a\0b",
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_name_that_no_file_has(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    start, needed, flags = COMMANDS[name]
    for flag in flags.split():
        for value in NAMES.values():
            given = [word for word in needed if not word.startswith(f"--{flag}=")]
            with pytest.raises(UserError) as caught:
                start([*given, f"--{flag}={value}"])
            assert len(str(caught.value)) < 1300, flag
            expected = "is not a path" in str(caught.value) or "are not text" in str(caught.value)
            assert expected or name == "random", caught
    assert os.listdir(tmp_path) == []


def test_a_long_model_name_leaves_room_in_the_run_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert last_name("meta-llama/Llama-2-7b-hf/") == "Llama-2-7b-hf" and last_name("é" * 99) == "é" * 40
    settings = make_settings({"model": f"./{'n' * 255}", "task": "gsm8k"})
    folder = choose_run_folder(settings)
    folder.path.mkdir(parents=True)
    assert folder.path.name == f"{'n' * 80}-gsm8k-tl6-r8"
    for targets, ending in (("all", "tl6-r8-all"), ("qkv,o_proj", "tl6-r8-qkv+o_proj")):
        assert run_name(make_settings({"model": "m", "task": "gsm8k", "targets": targets})) == f"m-gsm8k-{ending}"


def test_a_tensorboard_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("")
    with pytest.raises(UserError, match=r"tensorboard: cannot be written .*make it a folder that you own"):
        MetricsLog(RunFolder(tmp_path), resumed_step=0)


def test_a_log_that_was_replaced_is_not_written(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    log = MetricsLog(folder, resumed_step=0, report_to=())
    folder.metrics.unlink()
    folder.metrics.mkdir()
    with pytest.raises(UserError, match=r"logs cannot be written .*was replaced"):
        log.write({"step": 1, "split": "train", "loss": 0.5})
