"""Settings of launch/evaluate.py from flags and YAML, and how long an answer may become."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.config.batch import resolve_max_new_tokens
from megatron_tiedlora.config.cli import build_parser, parse_settings
from megatron_tiedlora.config.evaluate_settings import EvaluateSettings
from megatron_tiedlora.data.tasks import get_task


def test_flags_are_those_of_the_interface() -> None:
    flags = (
        "model adapter adapters task test_file tensor_parallel pipeline_parallel dtype max_new_tokens batch_size limit"
        " output_dir merge_adapter split prompt_template tokenizer max_length seed timeout_minutes config train_file"
        " validation_file take_over base_differs columns chat_template add_bos special_tokens_in_text base"
    )
    parser = build_parser(EvaluateSettings)
    found = {option for action in parser._actions for option in action.option_strings}
    assert found == {f"--{flag}" for flag in flags.split()} | {"-h", "--help", "--local_rank", "--local-rank"}
    text = parser.format_help()
    positions = [text.index(f"\n{group}:\n") for group in EvaluateSettings.groups]
    assert positions == sorted(positions) and text.startswith("usage: tiedlora evaluate")


def test_values_of_a_file_are_those_of_flags(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("adapters: runs/a,b\nadd_bos: true\nbase: NF4\n")
    read = parse_settings([f"--config={tmp_path / 'a.yaml'}", "--task=squad"], EvaluateSettings)
    assert (read.adapters, read.add_bos, read.base) == (("runs/a,b",), "true", "nf4")


@pytest.mark.parametrize(
    ("argv", "task"),
    [([], "demo"), (["--model=demo"], "demo"), (["--model=x", "--test_file=f"], "custom"), (["--task=squad"], "squad")],
)
def test_the_task_that_is_meant(argv: list[str], task: str) -> None:
    assert parse_settings(argv, EvaluateSettings).task == task


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--model=x"], ["--task is required", "--test_file"]),
        (["--adapter=x"], ["--task is required"]),
        (["--merge_adapter"], ["--merge_adapter needs --adapter"]),
        (["--train_file=f"], ["--train_file needs --split validation"]),
        (["--split=validation", "--test_file=f"], ["--test_file needs --split test"]),
        (["--task=gsm8"], ["--task gsm8", "'squad'", "did you mean gsm8k?"]),
        (["--split=train"], ["--split train", "'validation'"]),
        (["--limit=0"], ["--limit 0"]),
        (["--batch_size=0"], ["--batch_size 0"]),
        (["--addapter=x"], ["--addapter", "did you mean --adapter?"]),
        (["--rank=8"], ["unknown argument --rank"]),
    ],
)
def test_refused_settings(argv: list[str], parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        parse_settings(argv, EvaluateSettings)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_yaml_holds_the_same_names(tmp_path: Path) -> None:
    file = tmp_path / "evaluate.yaml"
    file.write_text("task: gsm8k\nlimit: 5\nmerge_adapter: true\nadapter: a\n")
    settings = parse_settings(["--config", str(file), "--limit=7"], EvaluateSettings)
    assert (settings.task, settings.limit, settings.merge_adapter) == ("gsm8k", 7, True)
    file.write_text("limti: 5\n")
    with pytest.raises(UserError, match=r"evaluate.yaml: unknown setting 'limti' \(did you mean limit\?\)"):
        parse_settings(["--config", str(file)], EvaluateSettings)


@pytest.mark.parametrize(
    ("value", "positions", "task", "found"),
    [
        (None, 4096, "squad", 500),
        (None, 1000, "squad", 500),
        (None, 999, "squad", 499),
        (None, 256, "squad", 128),
        (None, 2048, "demo", 200),
        (None, 256, "demo", 128),
        (7, 256, "demo", 7),
        (255, 256, "squad", 255),
        (None, 1, "squad", 1),
    ],
)
def test_longest_answer(value: int | None, positions: int, task: str, found: int) -> None:
    assert resolve_max_new_tokens(value, positions, get_task(task).max_new_tokens) == found


@pytest.mark.parametrize("value", [256, 300])
def test_an_answer_that_leaves_no_room_for_a_prompt_is_refused(value: int) -> None:
    with pytest.raises(UserError, match=f"--max_new_tokens {value} .* at most 256 tokens"):
        resolve_max_new_tokens(value, 256, 500)
