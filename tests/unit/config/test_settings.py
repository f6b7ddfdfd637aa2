"""Settings from flags and YAML, batch arithmetic, and the DeepSpeed JSON: what is accepted, resolved and refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from run_helpers import TRAIN  # also names the accelerator before DeepSpeed is imported

from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.base.shapes import TARGET_NAMES
from megatron_tiedlora.config.batch import BatchPlan, plan_batches
from megatron_tiedlora.config.cli import build_parser, parse_settings
from megatron_tiedlora.config.evaluate_settings import EvaluateSettings
from megatron_tiedlora.config.settings import Settings
from megatron_tiedlora.config.train_fields import PAPER_DEFAULTS, TASK_DEFAULTS, TASK_NAMES
from megatron_tiedlora.engine.engine_json import REJECTED_SECTIONS, SHIPPED_CONFIGS, load_engine_config

# interface.md, "Settings of launch/train.py": scripts rely on these names.
INTERFACE = {
    "run": "config ds_config output_dir seed resume dry_run world_size plan_for deterministic timeout_minutes"
    " keep_checkpoints take_over base_differs report_to profile adapters share_micro_batches halving gpu",
    "model": "model tokenizer dtype base products keep_transposed max_length",
    "adapter": "init_from method rank alpha layers targets init_std_a init_std_b dropout",
    "parallel": "tensor_parallel pipeline_parallel sequence_parallel replica_check_steps",
    "data": "task train_file validation_file test_file prompt_template max_new_tokens eval_batch_size columns train_on"
    " chat_template add_bos special_tokens_in_text",
    "speed": "packing compile recompute",
    "optimisation": "global_batch_size micro_batch_size max_steps epochs learning_rate weight_decay warmup_steps"
    " schedule beta1 beta2 gradient_clipping eval_interval eval_metric eval_samples patience save_interval"
    " save_interval_minutes",
}


def refusal(*argv: str) -> str:
    """The one line with which `argv` is refused."""
    with pytest.raises(UserError) as caught:
        parse_settings(argv, Settings)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_flags_are_those_of_the_interface() -> None:
    groups = {group.title: group for group in build_parser(Settings)._action_groups}
    for name, flags in INTERFACE.items():
        found = {option for action in groups[name]._group_actions for option in action.option_strings}
        assert found == {f"--{flag}" for flag in flags.split()}, name
    assert set(Settings.groups) == set(INTERFACE)


def test_help_is_grouped_and_short_enough_to_read() -> None:
    text = build_parser(Settings).format_help()
    positions = [text.index(f"\n{group}:\n") for group in Settings.groups]
    assert positions == sorted(positions)
    for field in Settings.model_fields.values():
        assert field.description
    assert "[0.0001; demo 0.03]" in " ".join(text.split())


def test_defaults_by_task_are_of_known_tasks_and_settings() -> None:
    assert set(TASK_DEFAULTS) <= set(TASK_NAMES)
    for defaults in TASK_DEFAULTS.values():
        assert set(defaults) <= set(PAPER_DEFAULTS)


def test_demo_defaults() -> None:
    settings = parse_settings([], Settings)
    assert (settings.model, settings.task, settings.method, settings.rank) == ("demo", "demo", "tl6", 8)
    assert settings.global_batch_size == 24
    for ranks in (1, 2, 3, 8):
        assert plan_batches(24, settings.micro_batch_size, ranks, max_rows=4).accumulation_steps >= 1
    assert settings.alpha == 8 and settings.packing


def test_paper_defaults_outside_the_demo() -> None:
    settings = parse_settings(["--model=x", "--train_file=d.jsonl"], Settings)
    assert settings.task == "custom"
    found = (
        settings.rank,
        settings.learning_rate,
        settings.warmup_steps,
        settings.weight_decay,
        settings.max_steps,
        settings.global_batch_size,
        settings.eval_interval,
        settings.patience,
        settings.save_interval,
    )
    assert found == (8, 1e-4, 50, 0.01, 2000, 256, 30, 10, 30)
    assert (settings.packing, settings.micro_batch_size, settings.max_length) == (True, None, 4096)


def test_command_line_wins_over_yaml(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: tiny\ntrain_file: a.jsonl\nrank: 4\nlearning_rate: 1e-3\nlayers: [1, 3]\ndry_run: true\n")
    settings = parse_settings(["--config", str(file), "--rank=2"], Settings)
    assert (settings.rank, settings.learning_rate, settings.layers, settings.dry_run) == (2, 1e-3, (1, 3), True)
    assert settings.alpha == 2  # follows the rank that holds in the end


def test_epochs_and_steps_replace_each_other_where_one_is_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("epochs: 3\nwarmup_steps: 1\n")
    assert parse_settings(["--config", str(file)], Settings).epochs == 3
    settings = parse_settings(["--config", str(file), "--max_steps=7"], Settings)
    assert (settings.epochs, settings.max_steps) == (None, 7)
    file.write_text("max_steps: 7\n")
    assert parse_settings(["--config", str(file), "--epochs=0.5"], Settings).epochs == 0.5
    file.write_text("max_steps: 7\nepochs: 2\n")
    assert "give one" in refusal("--config", str(file))
    file.write_text("max_steps: 7\nepochs: 2\nversions: {torch: '2'}\n")  # a run.yaml: its steps were counted
    assert parse_settings(["--config", str(file)], Settings).epochs == 2


def test_only_what_was_given_counts_as_set() -> None:
    assert parse_settings(["--rank=2"], Settings).model_fields_set == {"rank"}


def test_report_to() -> None:
    assert parse_settings([], Settings).report_to == ("tensorboard",)
    assert parse_settings(["--report_to=none"], Settings).report_to == ()
    assert parse_settings(["--report_to", "wandb, tensorboard,wandb"], Settings).report_to == ("wandb", "tensorboard")


def test_what_run_yaml_records_beside_settings_is_passed_over(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("rank: 4\ntokenizer: null\nranks: 2\nversions: {torch: '2'}\n")
    assert parse_settings(["--config", str(file)], Settings).rank == 4


@pytest.mark.parametrize(
    ("value", "targets"),
    [
        ("down_proj,qkv", ("qkv", "down_proj")),
        ("ALL", TARGET_NAMES),
        (" gate_up , gate_up ", ("gate_up",)),
        ("qkv,all", TARGET_NAMES),
    ],
)
def test_targets(value: str, targets: tuple[str, ...]) -> None:
    assert parse_settings(["--targets", value], Settings).targets == targets
    assert parse_settings([], Settings).targets == ("qkv",)
    assert "o_proj, gate_up, down_proj [qkv]" in " ".join(build_parser(Settings).format_help().split())


@pytest.mark.parametrize(
    ("argv", "layers"),
    [(["--layers=8"], (8,)), (["--layers", "1,4,8"], (1, 4, 8)), (["--layers=all"], None), ([], None)],
)
def test_layers(argv: list[str], layers: tuple[int, ...] | None) -> None:
    assert parse_settings(argv, Settings).layers == layers


def test_launchers_local_rank_is_accepted_before_the_users_arguments() -> None:
    assert parse_settings(["--local_rank=1", "--rank", "3"], Settings).rank == 3
    assert parse_settings(["--dry_run"], Settings).dry_run
    assert not parse_settings(["--dry_run", "false"], Settings).dry_run


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--rnak=8"], ["--rnak", "did you mean --rank?"]),
        (["--learning-rate", "1"], ["--learning-rate", "did you mean --learning_rate?"]),
        (["--ran", "8"], ["--ran", "did you mean --rank?"]),
        (["stray"], ["stray"]),
        (["--rank"], ["--rank", "expected one argument"]),
        (["--rank=0"], ["--rank 0", "greater than or equal to 1"]),
        (["--rank=-3"], ["--rank -3"]),
        (["--rank=two"], ["--rank two", "integer"]),
        (["--method=tl7"], ["--method tl7", "'lora'", "'tl6'"]),
        (["--dtype=fp16"], ["--dtype fp16", "'bf16'"]),
        (["--learning_rate=0"], ["--learning_rate 0"]),
        (["--learning_rate=nan"], ["--learning_rate nan"]),
        (["--learning_rate=inf"], ["--learning_rate inf"]),
        (["--learning_rate=1e25"], ["--learning_rate 1e+25: out of range; give a number below 2^53 (9e15)"]),
        (["--alpha=0"], ["--alpha 0"]),
        (["--layers=0,1"], ["--layers 0,1", "count from 1"]),
        (["--targets=qkv,oproj"], ["--targets", "'oproj' is unknown (did you mean o_proj?)", "or all"]),
        (["--targets="], ["--targets is empty", "o_proj"]),
        (["--targets=q_proj"], ["'q_proj' is unknown (part of qkv)"]),
        (["--layers=2,2"], ["--layers 2,2"]),
        (["--layers=3,1"], ["--layers 3,1", "ascending"]),
        (["--layers=a"], ["--layers"]),
        (["--warmup_steps=90", "--max_steps=80"], ["--warmup_steps 90", "--max_steps 80"]),
        (["--epochs=3", "--max_steps=80"], ["--epochs 3 and --max_steps 80", "give one"]),
        (["--epochs=0"], ["--epochs 0"]),
        (["--schedule=cos"], ["--schedule cos", "'cosine'"]),
        (["--beta2=1"], ["--beta2 1"]),
        (["--report_to=wanbd"], ["'wanbd' is unknown (did you mean wandb?)", "or none"]),
        (["--profile=3"], ["--profile 3: give FIRST:LAST"]),
        (["--profile=5:3"], ["--profile 5:3"]),
        (["--profile=30:31", "--max_steps=20"], ["--profile 30:31", "--max_steps 20"]),
        (["--global_batch_size=0"], ["--global_batch_size 0"]),
        (["--max_steps=-1"], ["--max_steps -1"]),
        (["--patience=0"], ["--patience 0"]),
        (["--task=imdb"], ["--task imdb", "'gsm8k'"]),
        (["--task=custom"], ["--task custom", "--train_file"]),
        (["--model=somewhere"], ["--task", "--train_file"]),
        (["--world_size=4"], ["--world_size", "--dry_run"]),
        (["--dry_run=perhaps"], ["--dry_run perhaps"]),
        (["--config=missing.yaml"], ["missing.yaml", "no such file"]),
    ],
    ids=lambda value: "".join(value)[:40] if isinstance(value, list) and value[0].startswith("--") else "",
)
def test_refused_flags(argv: list[str], parts: list[str]) -> None:
    message = refusal(*argv)
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("learning_rte: 1", ["unknown setting 'learning_rte'", "did you mean learning_rate?"]),
        ("rank: 0", ["--rank 0"]),
        ("profile: 3:5", ["--profile", "in quotes"]),
        ("rank: [", ["run.yaml:", "not valid YAML"]),
        ("- a\n- b", ["run.yaml", "found a list"]),
        ("1: 2", ["unknown setting 1"]),
        ("seed: \x00", ["run.yaml", "not valid YAML"]),
    ],
)
def test_refused_yaml(tmp_path: Path, text: str, parts: list[str]) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text)
    message = refusal("--config", str(file))
    for part in parts:
        assert part in message


# Batches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("world", "micro", "steps"), [(1, 4, 6), (2, 4, 3), (3, 4, 2), (8, 3, 1), (24, 1, 1)])
def test_micro_batch_is_the_largest_divisor_up_to_four(world: int, micro: int, steps: int) -> None:
    plan = plan_batches(24, None, world, max_rows=4)
    assert (plan.micro_batch_size, plan.accumulation_steps) == (micro, steps)


def test_batches_that_do_not_divide() -> None:
    with pytest.raises(UserError) as caught:
        plan_batches(256, 3, 8)
    message = str(caught.value)
    for part in ("--global_batch_size 256", "--micro_batch_size 3", "data parallel 8", "240 or 264"):
        assert part in message
    with pytest.raises(UserError, match="Use 8"):
        plan_batches(3, None, 8)


# The DeepSpeed JSON -----------------------------------------------------------------------------------------------

BATCHES = BatchPlan(global_batch_size=8, micro_batch_size=2, data_parallel=2)


def load_json(tmp_path: Path, content: Any) -> Any:
    file = tmp_path / "engine.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return load_engine_config(str(file), batches=BATCHES, gradient_clipping=0.5)


def test_a_wait_for_a_rank_is_no_longer_than_clocks_hold() -> None:
    for kind in (Settings, EvaluateSettings):
        assert parse_settings(["--timeout_minutes", "10080"], kind).timeout_minutes == 10080
        with pytest.raises(UserError, match="--timeout_minutes 1e14: input should be less than or equal to 10080"):
            parse_settings(["--timeout_minutes", "1e14"], kind)


def test_shipped_configs() -> None:
    stages = {}
    for file in sorted(SHIPPED_CONFIGS.glob("*.json")):
        config = load_engine_config(file.name, batches=BATCHES, gradient_clipping=0.5)
        stages[file.name] = config.zero_stage
        found = [config.values[name] for name in ("train_batch_size", "train_micro_batch_size_per_gpu")]
        assert [*found, config.values["gradient_accumulation_steps"]] == [8, 2, 2]
        assert config.values["gradient_clipping"] == 0.5
        assert "auto" not in json.dumps(config.values)
        assert config.values["timers"] == {"throughput": {"enabled": False}}
    assert stages == {f"zero{stage}.json": stage for stage in range(4)} | {"zero2_offload.json": 2}


def test_auto_is_accepted_everywhere(tmp_path: Path) -> None:
    zero = {"stage": "auto", "reduce_bucket_size": "auto"}
    config = load_json(tmp_path, {"steps_per_print": "auto", "gradient_clipping": "auto", "zero_optimization": zero})
    assert config.zero_stage == 0
    assert config.values["zero_optimization"] == {} and "steps_per_print" not in config.values


def test_the_engines_timer_is_off_unless_asked_for(tmp_path: Path) -> None:
    assert load_json(tmp_path, {}).values["timers"] == {"throughput": {"enabled": False}}
    assert load_json(tmp_path, {"timers": {"other": 1}}).values["timers"]["throughput"] == {"enabled": False}
    asked = {"throughput": {"enabled": True, "synchronized": False}}
    assert load_json(tmp_path, {"timers": asked}).values["timers"] == asked


def test_equal_batch_sizes_are_accepted(tmp_path: Path) -> None:
    content = {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 2}
    assert load_json(tmp_path, {**content, "gradient_clipping": 0.5}).zero_stage == 0


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ({"zero_optimisation": {}}, ["'zero_optimisation'", "did you mean zero_optimization?"]),
        ({"zero_optimization": {"stag": 2}}, ["zero_optimization.stag", "did you mean stage?"]),
        ({"zero_optimization": {"stage": 7}}, ["zero_optimization.stage"]),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"devise": "cpu"}}}, ["offload_optimizer.devise"]),
        ({"steps_per_print": "ten"}, ["steps_per_print = 'ten'", "a valid integer"]),
        ({"wall_clock_breakdown": 1}, ["wall_clock_breakdown = 1", "a valid boolean"]),
        ({"flops_profiler": [True]}, ["flops_profiler = [True]", "a valid dictionary"]),
        ({"zero_optimization": {"stage": True}}, ["zero_optimization.stage = True", "valid integer"]),
        ({"zero_optimization": 2}, ["zero_optimization must be an object"]),
        ({"zero_optimization": {"stage": 2, "allgather_bucket_size": 0}}, ["allgather_bucket_size = 0", "than 0"]),
        ({"zero_optimization": {"stage": 2, "reduce_bucket_size": 0}}, ["reduce_bucket_size", " 0"]),
        ({"zero_optimization": {"stage": 1, "compute_grad_norm": False}}, ["compute_grad_norm is false", "remove it"]),
        ({"train_batch_size": 16}, ["train_batch_size is 16", "make it 8", "--global_batch_size"]),
        ({"train_micro_batch_size_per_gpu": 4}, ["is 4", "make it 2", "--micro_batch_size"]),
        ({"gradient_accumulation_steps": 1}, ["is 1", "make it 2", "--micro_batch_size"]),
        ({"gradient_clipping": 1.0}, ["is 1.0", "make it 0.5", "--gradient_clipping"]),
        ("{", ["not valid JSON"]),
        ("[]", ["expected a JSON object"]),
    ],
)
def test_refused_json(tmp_path: Path, content: Any, parts: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        load_json(tmp_path, content)
    message = str(caught.value)
    assert "\n" not in message
    for part in ["engine.json", *parts]:
        assert part in message


@pytest.mark.parametrize("section", ["bf16", "fp16", "amp", "torch_autocast", "optimizer", "scheduler"])
def test_refused_sections_name_the_flag(tmp_path: Path, section: str) -> None:
    with pytest.raises(UserError) as caught:
        load_json(tmp_path, {section: {"enabled": True}})
    assert f"section {section!r}" in str(caught.value) and REJECTED_SECTIONS[section] in str(caught.value)
    assert "--" in REJECTED_SECTIONS[section]


def test_missing_json_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"zero_2.json: no such file .* \(did you mean zero2.json\?\)"):
        load_engine_config("zero_2.json", batches=BATCHES, gradient_clipping=1.0)


def test_json_in_the_current_folder_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "zero2.json").write_text('{"zero_optimization": {"stage": 1}}')
    monkeypatch.chdir(tmp_path)
    assert load_engine_config("zero2.json", batches=BATCHES, gradient_clipping=1.0).zero_stage == 1


def test_a_command_whose_reader_has_ended_ends_without_a_word() -> None:
    """As in `launch/train.py --dry_run ... | head`."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, TRAIN, "--dry_run", "--model=llama2-7b", "--world_size=2"]
    try:
        done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    finally:
        os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")
