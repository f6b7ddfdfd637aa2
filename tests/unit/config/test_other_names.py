"""Names from other tools: the tables hold, and every command answers with its own names, or not at all."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from task_files import refusal, write

from megatron_tiedlora.config.cli import parse_settings
from megatron_tiedlora.config.evaluate_settings import EvaluateSettings
from megatron_tiedlora.config.fields import names_elsewhere
from megatron_tiedlora.config.other_names import (
    NOT_OFFERED,
    OTHER_DTYPES,
    OTHER_FORMATS,
    OTHER_GPUS,
    OTHER_METHODS,
    OTHER_SCHEDULES,
    SENTENCES,
    _settings_in,
    name_hint,
)
from megatron_tiedlora.config.plan_settings import parse_plan
from megatron_tiedlora.config.settings import Settings
from megatron_tiedlora.config.sweep_settings import SweepSettings, parse_sweep
from megatron_tiedlora.config.tool_settings import ExportSettings, MergeSettings, PushSettings

KINDS = [Settings, *(EvaluateSettings, SweepSettings, MergeSettings, ExportSettings, PushSettings)]


def test_the_names_are_of_settings_that_exist_and_none_is_ours() -> None:
    assert set().union(*map(_settings_in, SENTENCES.values())) <= set(Settings.model_fields)
    ours = names_elsewhere(Settings)
    tables = [ours.keys(), SENTENCES.keys(), NOT_OFFERED.keys()]
    assert len(ours) > 150 and sum(map(len, tables)) == len(set().union(*tables))
    assert not set().union(*tables) & set(Settings.model_fields)
    for name in (*names_elsewhere(*KINDS), *SENTENCES, *NOT_OFFERED):
        assert name == name.replace("-", "_").lower()


@pytest.mark.parametrize(
    ("flag", "answer"),
    [
        ("--lr", "--learning_rate"),
        ("--num_train_epochs", "--epochs"),
        ("--num-train-epochs", "--epochs"),
        ("--lora_r", "--rank"),
        ("--bf16", "--dtype bf16"),
        ("--load_in_4bit", "here it is --base nf4"),
        ("--fp8", "here it is --base fp8"),
        ("--target_modules", "--targets: qkv (q_proj"),
        ("--per_device_train_batch_size", "--micro_batch_size"),
        ("--gradient_accumulation_steps", "--global_batch_size"),
        ("--lr_scheduler_type", "--schedule"),
        ("--max_seq_length", "--max_length"),
        ("--wandb_project", "--report_to"),
        ("--fp16", "fp16 is not offered"),
        ("--deepspeed", "--ds_config"),
        ("--LR", "--learning_rate"),
        ("--num_gpus", "--num_gpus N"),
    ],
)
def test_flags(flag: str, answer: str) -> None:
    message = refusal(lambda: parse_settings([flag, "1"], Settings))
    assert message.startswith(f"unknown argument {flag} (") and answer in message and message.endswith("; see --help")
    assert "did you mean" not in message


@pytest.mark.parametrize(("rank", "lora_alpha"), [(8, 1.0), (16, 32.0), (5, 0.5)])
def test_the_alpha_of_rank_stabilised_lora(rank: int, lora_alpha: float) -> None:
    """The formula of the answer gives the scale of PEFT's own layer, for every lora_alpha."""
    message = refusal(lambda: parse_settings(["--use_rslora", "true"], Settings))
    formula = message.partition("give alpha = ")[2].partition(")")[0] + ")"
    assert formula == "lora_alpha x sqrt(rank)"
    alpha = eval(formula.replace(" x ", " * "), {"lora_alpha": lora_alpha, "sqrt": math.sqrt, "rank": rank})
    config = LoraConfig(r=rank, lora_alpha=lora_alpha, use_rslora=True, target_modules=["0"])
    layer = get_peft_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), config).base_model.model[0]
    assert alpha / rank == pytest.approx(layer.scaling["default"])
    assert "the scale is alpha / rank" in message


def test_a_slip_is_still_guessed_and_what_is_like_nothing_is_not() -> None:
    assert name_hint("--learning-rate", ["--learning_rate"], {}) == " (did you mean --learning_rate?)"
    assert name_hint("--rnak", ["--rank", "--alpha"], {}) == " (did you mean --rank?)"
    assert name_hint("--gibberish", ["--help", "--rank"], {}) == ""


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lr: 1e-4\n", "unknown setting 'lr' (here it is learning_rate)"),
        ("load_in_4bit: true\n", "unknown setting 'load_in_4bit' (here it is base nf4)"),
        ("zzz: 1\nrank: 4\nlr: 1e-4\n3: 4\n", "unknown settings 'zzz', 'lr' (here it is learning_rate), 3"),
        (
            "".join(f"z{number}: 1\n" for number in range(10_000)),
            f"unknown settings {', '.join(map(repr, ['z0', 'z1', 'z2', 'z3', 'z4', 'z5', 'z6', 'z7']))} and 9992 more",
        ),
    ],
    ids=lambda text: text[:20],
)
def test_keys_of_a_file_have_no_dashes_and_all_that_are_unknown_are_told(tmp_path: Path, text: str, said: str) -> None:
    file = write(tmp_path / "mine.yaml", text)
    assert refusal(lambda: parse_settings([f"--config={file}"], Settings)) == f"{file}: {said}"


def test_names_in_a_program_have_no_dashes() -> None:
    said = "unknown settings 'rnk' (did you mean rank?), 'zzz'; see --help"
    assert refusal(lambda: Settings(rnk=1, zzz=2)) == said


# Values ---------------------------------------------------------------------------------------------------------------


def test_a_warm_up_follows_a_number_of_steps_that_is_written_as_a_power() -> None:
    assert parse_settings(["--max_steps=1e1", "--task=gsm8k"], Settings).warmup_steps == 10


def test_lists_of_other_commands_fold_too() -> None:
    sweep = parse_sweep(["--output_dir=x", "--methods=TL5,lora", "--single_layers=Paper", "--together=AUTO"]).settings
    assert (sweep.methods, sweep.single_layers, sweep.together) == (("tl5", "lora"), "paper", "auto")
    assert parse_settings(["--adapter=a", "--output=b", "--dtype=BFloat16"], MergeSettings).dtype == "bf16"
    plan = parse_plan(["--model=llama2-7b", "--gpu=H100-80GB", "--formats=4bit,NONE"]).settings
    assert (plan.gpu, plan.formats) == ("h100", ("nf4", "none"))


def test_the_table_of_values_names_what_exists() -> None:
    for names in (OTHER_METHODS, OTHER_FORMATS, OTHER_DTYPES, OTHER_SCHEDULES, OTHER_GPUS):
        assert set().union(*map(_settings_in, names.values())) <= set(Settings.model_fields)
        assert all(name == name.replace("_", "-").lower() for name in names)
