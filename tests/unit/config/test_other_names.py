"""Names from other tools: the tables hold, and every command answers with its own names, or not at all."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.commands.front import call
from megatron_tiedlora.config.cli import parse_settings
from megatron_tiedlora.config.evaluate_settings import EvaluateSettings
from megatron_tiedlora.config.fields import CommandSettings, names_elsewhere
from megatron_tiedlora.config.launch_settings import parse_launch
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
from megatron_tiedlora.config.train_fields import TASK_DEFAULTS


def refusal(*argv: str, kind: type[CommandSettings] = Settings) -> str:
    with pytest.raises(UserError) as caught:
        parse_settings(list(argv), kind)
    return str(caught.value)


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
    message = refusal(flag, "1")
    assert message.startswith(f"unknown argument {flag} (") and answer in message and message.endswith("; see --help")
    assert "did you mean" not in message


@pytest.mark.parametrize(("rank", "lora_alpha"), [(8, 1.0), (16, 32.0), (5, 0.5)])
def test_the_alpha_of_rank_stabilised_lora(rank: int, lora_alpha: float) -> None:
    """The formula of the answer gives the scale of PEFT's own layer, for every lora_alpha."""
    message = refusal("--use_rslora", "true")
    formula = message.partition("give alpha = ")[2].partition(")")[0] + ")"
    assert formula == "lora_alpha x sqrt(rank)"
    alpha = eval(formula.replace(" x ", " * "), {"lora_alpha": lora_alpha, "sqrt": math.sqrt, "rank": rank})
    config = LoraConfig(r=rank, lora_alpha=lora_alpha, use_rslora=True, target_modules=["0"])
    layer = get_peft_model(torch.nn.Sequential(torch.nn.Linear(2, 2)), config).base_model.model[0]
    assert alpha / rank == pytest.approx(layer.scaling["default"])
    assert "the scale is alpha / rank" in message


def test_keys_of_a_file_and_of_a_program_have_no_dashes(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("lr: 1e-4\n")
    assert refusal("--config", str(file)) == f"{file}: unknown setting 'lr' (here it is learning_rate)"
    file.write_text("load_in_4bit: true\n")
    assert "'load_in_4bit' (here it is base nf4)" in refusal("--config", str(file))


def test_a_command_answers_with_its_own_names_only() -> None:
    assert refusal("--lr=1", kind=EvaluateSettings) == "unknown argument --lr; see --help"
    assert "(here it is --model)" in refusal("--model_name_or_path=x", kind=EvaluateSettings)
    assert "(here it is --adapter)" in refusal("--lora_path=x", kind=EvaluateSettings)
    assert "(here it is --batch_size)" in refusal("--batch=4", kind=EvaluateSettings)
    with pytest.raises(UserError, match=r"--lr \(here it is --learning_rates\)"):
        parse_sweep(["--output_dir=x", "--lr=1"])
    with pytest.raises(UserError, match=r"--hub_model_id \(here it is --repo\)"):
        call("push", ["run", "--hub_model_id=x"])
    assert refusal("--hub_model_id=x").endswith("(a run does not upload anything); see --help")
    with pytest.raises(UserError, match=r"--lora_alpha \(here it is --alpha\)"):
        parse_sweep(["--output_dir=x", "--lora_alpha=4"])


def test_an_unknown_flag_is_named_before_a_missing_one() -> None:
    both = r"^unknown arguments --lora \(here it is --adapter\), --output_dir \(here it is --output\); see --help$"
    with pytest.raises(UserError, match=both):
        call("merge", ["--lora", "x", "--output_dir", "y"])
    with pytest.raises(UserError, match=r"^unknown argument --output_dir \(here it is --output\)"):
        call("merge", ["--adapter=x", "--output_dir=y"])
    with pytest.raises(UserError, match=r"^the following arguments are required: --output$"):
        call("merge", ["--adapter", "a --b"])


def test_a_slip_is_still_guessed_and_what_is_like_nothing_is_not() -> None:
    assert name_hint("--learning-rate", ["--learning_rate"], {}) == " (did you mean --learning_rate?)"
    assert name_hint("--rnak", ["--rank", "--alpha"], {}) == " (did you mean --rank?)"
    assert name_hint("--gibberish", ["--help", "--rank"], {}) == ""


# Several unknown names ------------------------------------------------------------------------------------------------


def test_all_unknown_names_are_told_at_once(tmp_path: Path) -> None:
    said = "unknown arguments --lora_r (here it is --rank), --lr (here it is --learning_rate), --zzz; see --help"
    assert refusal("--lora_r=8", "--model=demo", "--lr", "1e-4", "--zzz", "3", "--lora_r=9") == said
    for parse in (parse_launch, parse_plan, parse_sweep):
        with pytest.raises(UserError, match=r"^unknown arguments --lora_alpha \(.*\), --zzz; see --help$"):
            parse(["--lora_alpha", "8", "--rank=4", "--zzz=1"])
    file = tmp_path / "mine.yaml"
    file.write_text("zzz: 1\nrank: 4\nlr: 1e-4\n3: 4\n")
    assert refusal("--config", str(file)) == f"{file}: unknown settings 'zzz', 'lr' (here it is learning_rate), 3"
    with pytest.raises(UserError, match=r"^unknown settings 'rnk' \(did you mean rank\?\), 'zzz'; see --help$"):
        Settings(rnk=1, zzz=2)
    file.write_text("".join(f"z{number}: 1\n" for number in range(10_000)))
    assert refusal("--config", str(file)).endswith("'z6', 'z7' and 9992 more")


def test_a_stray_word_is_named() -> None:
    assert refusal("extra", "words") == "unknown arguments 'extra', 'words'; see --help"
    assert refusal("--dry_run", "extra") == "--dry_run extra: give true or false, or nothing after --dry_run"


# Values ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--method=TL6", "tl6"),
        ("--method=LoRA", "lora"),
        ("--base=NF4", "nf4"),
        ("--base=4bit", "nf4"),
        ("--base=4-bit", "nf4"),
        ("--base=QLoRA", "nf4"),
        ("--base=load_in_8bit", "int8"),
        ("--dtype=BF16", "bf16"),
        ("--dtype=torch.bfloat16", "bf16"),
        ("--schedule=constant_with_warmup", "constant"),
        ("--recompute=Full", "full"),
        ("--train_on=last-turn", "last_turn"),
        ("--targets=QKV,O_proj", ("qkv", "o_proj")),
        ("--report_to=WandB", ("wandb",)),
        ("--task=DEMO", "demo"),
        ("--max_steps=1e3", 1000),
        ("--max_steps=1.5e2", 150),
        ("--layers=1E0,2", (1, 2)),
    ],
)
def test_values_fold_case_and_know_what_others_call_them(flag: str, value: object) -> None:
    name = flag.removeprefix("--").partition("=")[0]
    settings = parse_settings([flag], Settings)
    assert getattr(settings, name) == value
    assert settings.max_length == TASK_DEFAULTS["demo"]["max_length"]


def test_a_warm_up_follows_a_number_of_steps_that_is_written_as_a_power() -> None:
    assert parse_settings(["--max_steps=1e1", "--task=gsm8k"], Settings).warmup_steps == 10
    assert "--max_steps 15e-1: input should be a valid integer" in refusal("--max_steps=15e-1")
    assert refusal("--max_steps=1e19").startswith("--max_steps 10000000000000000000: out of range; give a number below")


def test_lists_of_other_commands_fold_too() -> None:
    sweep = parse_sweep(["--output_dir=x", "--methods=TL5,lora", "--single_layers=Paper", "--together=AUTO"]).settings
    assert (sweep.methods, sweep.single_layers, sweep.together) == (("tl5", "lora"), "paper", "auto")
    assert parse_settings(["--adapter=a", "--output=b", "--dtype=BFloat16"], MergeSettings).dtype == "bf16"
    plan = parse_plan(["--model=llama2-7b", "--gpu=H100-80GB", "--formats=4bit,NONE"]).settings
    assert (plan.gpu, plan.formats) == ("h100", ("nf4", "none"))


@pytest.mark.parametrize(
    ("flag", "answer"),
    [
        ("--method=qlora", " (here it is lora with --base nf4)"),
        ("--method=DoRA", " (DoRA is not offered)"),
        ("--method=tl7", " (did you mean tl6?)"),
        ("--base=bf16", " (here it is --dtype, without --base)"),
        ("--dtype=fp16", " (fp16 is not offered)"),
        ("--schedule=linaer", " (did you mean linear?)"),
    ],
)
def test_a_value_that_is_none_of_ours_gets_a_hint(flag: str, answer: str) -> None:
    assert refusal(flag).startswith(flag.replace("=", " ") + ": input should be ") and refusal(flag).endswith(answer)


def test_the_table_of_values_names_what_exists() -> None:
    for names in (OTHER_METHODS, OTHER_FORMATS, OTHER_DTYPES, OTHER_SCHEDULES, OTHER_GPUS):
        assert set().union(*map(_settings_in, names.values())) <= set(Settings.model_fields)
        assert all(name == name.replace("_", "-").lower() for name in names)
