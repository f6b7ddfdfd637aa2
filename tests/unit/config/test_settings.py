"""Settings of runs and evaluations from flags and YAML, and batch arithmetic: what is accepted and resolved, and what
is rejected."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from support.run_helpers import TRAIN
from support.task_files import refusal, write

from megatron_tiedlora.base.shapes import TARGET_NAMES
from megatron_tiedlora.commands.front import call
from megatron_tiedlora.config.adapter_settings import EvaluateSettings
from megatron_tiedlora.config.batch import filled, plan_batches, resolve_max_new_tokens
from megatron_tiedlora.config.cli import build_parser, parse_settings, read_adapters
from megatron_tiedlora.config.settings import PAPER_DEFAULTS, TASK_DEFAULTS, TASK_NAMES, Settings, make_settings
from megatron_tiedlora.data.tasks import get_task

# Scripts of users rely on these names.
INTERFACE = {
    "run": "config ds_config output_dir seed split_seed resume dry_run world_size plan_for deterministic"
    " timeout_minutes keep_checkpoints take_over base_differs report_to profile adapters share_micro_batches halving"
    " gpu",
    "model": "model tokenizer dtype base products keep_transposed max_length",
    "adapter": "init_from method rank alpha layers targets init_std_a init_std_b dropout"
    " rslora",
    "parallel": "tensor_parallel pipeline_parallel sequence_parallel overlap replica_check_steps",
    "data": "task train_file validation_file test_file prompt_template max_new_tokens eval_batch_size columns train_on"
    " chat_template add_bos special_tokens_in_text",
    "speed": "packing compile adapter_in_matmul recompute",
    "optimisation": "global_batch_size micro_batch_size max_steps epochs learning_rate rate_factors weight_decay"
    " warmup_steps"
    " schedule beta1 beta2 gradient_clipping eval_interval eval_metric eval_samples patience save_interval"
    " save_interval_minutes",
}


def read(folder: Path, text: str, *argv: str) -> Settings:
    """The settings of a file with this text and of `argv`."""
    return parse_settings(["--config", write(folder / "run.yaml", text), *argv], Settings)


def test_flags_are_those_of_the_interface() -> None:
    groups = {group.title: group for group in build_parser(Settings)._action_groups}
    for name, flags in INTERFACE.items():
        found = {option for action in groups[name]._group_actions for option in action.option_strings}
        assert found == {f"--{flag}" for flag in flags.split()}, name
    assert set(Settings.groups) == set(INTERFACE)


def test_help_is_grouped() -> None:
    for kind in (Settings, EvaluateSettings):
        text = build_parser(kind).format_help()
        positions = [text.index(f"\n{group}:\n") for group in kind.groups]
        assert positions == sorted(positions)
        assert all(field.description for field in kind.model_fields.values())
    words = " ".join(build_parser(Settings).format_help().split())
    assert "[0.0001; demo 0.03]" in words and "o_proj, gate_up, down_proj [qkv]" in words


def test_defaults_by_task_are_of_known_tasks_and_settings() -> None:
    assert set(TASK_DEFAULTS) <= set(TASK_NAMES)
    for defaults in TASK_DEFAULTS.values():
        assert set(defaults) <= set(PAPER_DEFAULTS)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (
            [],
            {"model": "demo", "task": "demo", "method": "tl6", "rank": 8, "global_batch_size": 24, "alpha": 8,
             "packing": True, "layers": None, "targets": ("qkv",), "report_to": ("tensorboard",)},
        ),
        (
            ["--model=x", "--train_file=d.jsonl"],
            {"task": "custom", "rank": 8, "learning_rate": 1e-4, "warmup_steps": 50, "weight_decay": 0.01,
             "max_steps": 2000, "global_batch_size": 256, "eval_interval": 30, "patience": 10, "save_interval": 30,
             "packing": True, "micro_batch_size": None, "max_length": 4096},
        ),
    ],
    ids=["demo", "paper"],
)  # fmt: skip
def test_defaults(argv: list[str], expected: dict[str, object]) -> None:
    settings = parse_settings(argv, Settings)
    assert {name: getattr(settings, name) for name in expected} == expected


def test_command_line_wins_over_yaml(tmp_path: Path) -> None:
    text = "model: tiny\ntrain_file: a.jsonl\nrank: 4\nlearning_rate: 1e-3\nlayers: [1, 3]\ndry_run: true\n"
    settings = read(tmp_path, text, "--rank=2")
    assert (settings.rank, settings.learning_rate, settings.layers, settings.dry_run) == (2, 1e-3, (1, 3), True)
    assert settings.alpha == 2  # follows the rank that holds in the end


def test_epochs_and_steps_replace_each_other_where_one_is_in_a_file(tmp_path: Path) -> None:
    assert read(tmp_path, "epochs: 3\nwarmup_steps: 1\n").epochs == 3
    settings = read(tmp_path, "epochs: 3\nwarmup_steps: 1\n", "--max_steps=7")
    assert (settings.epochs, settings.max_steps) == (None, 7)
    assert read(tmp_path, "max_steps: 7\n", "--epochs=0.5").epochs == 0.5
    both = "max_steps: 7\nepochs: 2\n"
    assert "give one" in refusal(lambda: read(tmp_path, both))
    assert read(tmp_path, f"{both}versions: {{torch: '2'}}\n").epochs == 2  # a run.yaml: its steps were counted
    assert read(tmp_path, "rank: 4\ntokenizer: null\nranks: 2\nversions: {torch: '2'}\n").rank == 4


def test_only_what_was_given_counts_as_set() -> None:
    assert parse_settings(["--rank=2"], Settings).model_fields_set == {"rank"}


def test_launchers_local_rank_is_accepted_before_the_users_arguments() -> None:
    assert parse_settings(["--local_rank=1", "--rank", "3"], Settings).rank == 3
    assert parse_settings(["--local-rank=1", "--limit", "3", "--task=demo"], EvaluateSettings).limit == 3
    assert parse_settings(["--dry_run"], Settings).dry_run
    assert not parse_settings(["--dry_run", "false"], Settings).dry_run


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
        ("--targets=down_proj,qkv", ("qkv", "down_proj")),
        ("--targets= gate_up , gate_up ", ("gate_up",)),
        ("--targets=ALL", TARGET_NAMES),
        ("--targets=qkv,all", TARGET_NAMES),
        ("--report_to=WandB", ("wandb",)),
        ("--report_to=wandb, tensorboard,wandb", ("wandb", "tensorboard")),
        ("--report_to=none", ()),
        ("--task=DEMO", "demo"),
        ("--timeout_minutes=10080", 10080),
        ("--max_steps=1e3", 1000),
        ("--max_steps=1.5e2", 150),
        ("--layers=1E0,2", (1, 2)),
        ("--layers=1,4,8", (1, 4, 8)),
        ("--layers=8", (8,)),
        ("--layers=all", None),
    ],
)
def test_values_fold_case_and_know_what_others_call_them(flag: str, value: object) -> None:
    name = flag.removeprefix("--").partition("=")[0]
    settings = parse_settings([flag], Settings)
    assert getattr(settings, name) == value
    assert settings.max_length == TASK_DEFAULTS["demo"]["max_length"]


ANSWER_TO_LR, ANSWER_TO_OUTPUT = "--lr (here it is --learning_rate)", "--output_dir (here it is --output)"
WORDS = ["--lora_alpha", "8", "--rank=4", "--zzz=1"]
TWO_UNKNOWN = (WORDS, ["error: unknown arguments --lora_alpha (", "), --zzz; see --help\n"])
# Wrong words of commands, and what is said of them, which begins with "error: " and ends with a new line.
REJECTED: Mapping[str, Sequence[tuple[Sequence[str], Sequence[str]]]] = {
    "train": [
        (["--rnak=8"], ["--rnak", "did you mean --rank?"]),
        (["--learning-rate", "1"], ["--learning-rate", "did you mean --learning_rate?"]),
        (["--ran", "8"], ["--ran", "did you mean --rank?"]),
        (["--rank"], ["--rank", "expected one argument"]),
        (["--rank=0"], ["--rank 0", "greater than or equal to 1"]),
        (["--rank=-3"], ["--rank -3"]),
        (["--rank=two"], ["--rank two", "integer"]),
        (["--learning_rate=0"], ["--learning_rate 0"]),
        (["--learning_rate=nan"], ["--learning_rate nan"]),
        (["--learning_rate=inf"], ["--learning_rate inf"]),
        (["--learning_rate=1e25"], ["--learning_rate 1e+25: out of range; give a number below 2^53 (9e15)"]),
        (["--alpha=0"], ["--alpha 0"]),
        (["--layers=0,1"], ["--layers 0,1", "from 1 on"]),
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
        (["--hub_model_id=x"], ["(a run does not upload anything); see --help\n"]),
        (
            ["--lora_r=8", "--model=demo", "--lr", "1e-4", "--zzz", "3", "--lora_r=9"],
            [f"error: unknown arguments --lora_r (here it is --rank), {ANSWER_TO_LR}, --zzz; see --help\n"],
        ),
        (["extra", "words"], ["error: unknown arguments 'extra', 'words'; see --help\n"]),
        (["--dry_run", "extra"], ["error: --dry_run extra: give true or false, or nothing after --dry_run\n"]),
        (["--max_steps=15e-1"], ["--max_steps 15e-1: input should be a valid integer"]),
        (["--max_steps=1e19"], ["error: --max_steps 10000000000000000000: out of range; give a number below"]),
        (["--timeout_minutes=1e14"], ["error: --timeout_minutes 1e14: input should be less than or equal to 10080\n"]),
        (["--method=qlora"], ["error: --method qlora: input should be ", " (here it is lora with --base nf4)\n"]),
        (["--method=DoRA"], ["error: --method DoRA: input should be ", " (DoRA is not supported: it rescales"]),
        (["--method=tl7"], ["error: --method tl7: input should be ", " (did you mean tl6?)\n"]),
        (["--base=bf16"], ["error: --base bf16: input should be ", " (here it is --dtype, without --base)\n"]),
        (["--dtype=fp16"], ["error: --dtype fp16: input should be ", " (fp16 is not supported)\n"]),
        (["--schedule=linaer"], ["error: --schedule linaer: input should be ", " (did you mean linear?)\n"]),
    ],
    "evaluate": [
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
        (["--engine=vllm", "--temperature=0.0099"], ["not work with --temperature 0.0099; give 0, or 0.01 or more"]),
        (["--rank=8"], ["unknown argument --rank"]),
        (["--lr=1"], ["error: unknown argument --lr; see --help\n"]),
        (["--model_name_or_path=x"], ["(here it is --model)"]),
        (["--lora_path=x"], ["(here it is --adapter)"]),
        (["--batch=4"], ["(here it is --batch_size)"]),
        (["--timeout_minutes=1e14"], ["error: --timeout_minutes 1e14: input should be less than or equal to 10080\n"]),
    ],
    "sweep": [
        (["--output_dir=x", "--lr=1"], ["--lr (here it is --learning_rates)"]),
        (["--output_dir=x", "--lora_alpha=4"], ["--lora_alpha (here it is --alpha)"]),
        TWO_UNKNOWN,
    ],
    "run": [TWO_UNKNOWN],
    "plan": [TWO_UNKNOWN],
    "merge": [  # an unknown flag is named before a missing one
        (
            ["--lora", "x", "--output_dir", "y"],
            [f"error: unknown arguments --lora (here it is --adapter), {ANSWER_TO_OUTPUT}; see --help\n"],
        ),
        (["--adapter=x", "--output_dir=y"], [f"error: unknown argument {ANSWER_TO_OUTPUT}"]),
        (["--adapter", "a --b"], ["error: the following arguments are required: --output\n"]),
    ],
    "index": [
        (["none"], ["none: no such folder"]),
        ([".", "find"], ["no such file; write it with `tiedlora index"]),
        ([".", "--method", "tl6"], ["--method is for find and verify, not for build"]),
        ([".", "verify", "--json"], ["--json is for find, not for verify"]),
        ([".", "diff", "a"], ["diff: give the names or paths of two adapters"]),
        ([".", "find", "a"], ["find takes no name of an adapter; give a with --name"]),
        ([".", "remove"], ["ACTION remove: input should be 'build', 'find', 'verify', 'diff', 'alias', "]),
        ([".", "find", "--targets", "q"], ["--targets"]),
    ],
    "push": [
        (["run", "--repo=demo"], ["error: --repo demo: the owner is missing; give OWNER/NAME"]),
        (["run", "--repo=me/de mo"], ["error: --repo me/de mo: Repo id must"]),
        (["run", "--repo=me/demo", "--dry_run"], ["error: --dry_run writes the folder; give it with --output DIR"]),
        (["run", "--repo=me/demo", "--output=."], ["error: --output ."]),
        (["run", "--repo=me/demo", "--base_name=/acme/base"], ["error: --base_name /acme/base: Repo id must"]),
        (["run", "--hub_model_id=x"], ["--hub_model_id (here it is --repo)"]),
    ],
}


@pytest.mark.parametrize(
    ("command", "argv", "parts"),
    [(command, *row) for command, rows in REJECTED.items() for row in rows],
    ids=lambda value: value if isinstance(value, str) else "".join(value)[:40] if value[0][0] == "-" else "",
)
def test_rejected_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, argv: Sequence[str], parts: Sequence[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    said = f"error: {refusal(lambda: call(command, argv))}\n"
    assert all(part in said for part in parts), said


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
def test_rejected_yaml(tmp_path: Path, text: str, parts: list[str]) -> None:
    message = refusal(lambda: read(tmp_path, text))
    assert all(part in message for part in parts), message


# Batches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("world", "micro", "steps"), [(1, 4, 6), (2, 4, 3), (3, 4, 2), (8, 3, 1), (24, 1, 1)])
def test_micro_batch_is_the_largest_divisor_up_to_four(world: int, micro: int, steps: int) -> None:
    plan = plan_batches(parse_settings([], Settings).global_batch_size, None, world, max_rows=4)
    assert (plan.micro_batch_size, plan.accumulation_steps) == (micro, steps)


def test_batches_that_do_not_divide() -> None:
    message = refusal(lambda: plan_batches(256, 3, 8))
    parts = ("--global_batch_size 256", "--micro_batch_size 3", "data parallel 8", "240 or 264")
    assert all(part in message for part in parts), message
    assert "Use 8" in refusal(lambda: plan_batches(3, None, 8))


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


# An evaluation ------------------------------------------------------------------------------------------------------


def test_a_file_of_an_evaluation(tmp_path: Path) -> None:
    file = write(tmp_path / "evaluate.yaml", "adapters: runs/a,b\nadd_bos: true\nbase: NF4\nlimit: 5\n")
    words = [f"--config={file}", "--task=squad", "--limit=7", "--timeout_minutes=10080"]
    found = parse_settings(words, EvaluateSettings)
    assert (found.adapters, found.add_bos, found.base, found.limit) == (("runs/a,b",), "true", "nf4", 7)
    assert found.timeout_minutes == 10080
    write(tmp_path / "evaluate.yaml", "limti: 5\n")
    said = refusal(lambda: parse_settings([f"--config={file}"], EvaluateSettings))
    assert said == f"{file}: unknown setting 'limti' (did you mean limit?)"


@pytest.mark.parametrize(
    ("argv", "task"),
    [([], "demo"), (["--model=demo"], "demo"), (["--model=x", "--test_file=f"], "custom"), (["--task=squad"], "squad")],
)
def test_the_task_that_an_evaluation_means(argv: list[str], task: str) -> None:
    assert parse_settings(argv, EvaluateSettings).task == task


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
    message = refusal(lambda: resolve_max_new_tokens(value, 256, 500))
    assert message.startswith(f"--max_new_tokens {value} ") and "at most 256 tokens" in message


# The file of --adapters ---------------------------------------------------------------------------------------------

GIVEN = {"model": "some/model", "train_file": "all.jsonl", "learning_rate": 3e-4, "max_steps": 50}


def test_an_adapter_s_entry_is_the_command_line_with_its_own_settings(tmp_path: Path) -> None:
    entries = """
- name: small
  rank: 2
  layers: 1,4
- name: Large.2
  rank: 64
  targets: all
  train_file: other.jsonl
  epochs: 2
  learning_rate: 1.0e-4
"""
    file = write(tmp_path / "adapters.yaml", entries)
    found = read_adapters(file, make_settings(GIVEN))
    assert list(found) == ["small", "Large.2"]
    assert found["small"] == make_settings({**GIVEN, "rank": 2, "layers": (1, 4)})
    own = {"rank": 64, "targets": "all", "train_file": "other.jsonl", "epochs": 2, "learning_rate": 1e-4}
    without = {name: value for name, value in GIVEN.items() if name != "max_steps"}
    assert found["Large.2"] == make_settings({**without, **own}), "its epochs take the place of --max_steps"
    assert found["Large.2"].model_fields_set == {*without, *own}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- name: a\n  dtype: fp32\n", "entry 1 (a): dtype cannot differ between the adapters of a run; give it on"),
        ("- name: a\n  micro_batch_size: 2\n", "entry 1 (a): micro_batch_size cannot differ"),
        ("- name: a\n- name: b\n  rnk: 2\n", "entry 2 (b): unknown setting 'rnk'"),
        ("- name: a\n- name: A\n", "entry 2: another entry already has the name 'A'"),
        ("- rank: 2\n", "entry 1: has no name; give a name of letters"),
        ("- name: ../a\n", "entry 1: cannot be called '../a'"),
        ("- name: 3\n", "entry 1: cannot be called 3"),
        ("- a\n", "entry 1: expected 'name: value' lines, found a str"),
        ("name: a\n", "expected a list, whose entries begin with '- ', found a dict"),
        ("", "has no entries; write one entry for each adapter"),
        ("- name: a\n  rank: 0\n", "a: --rank 0: "),
        ("- name: a\n  epochs: 1\n  max_steps: 5\n", "a: --epochs 1 and --max_steps 5 both set the length of training"),
        ("- name: a\n- name: b\n  task: demo\n", "max_length would be 4096 for a and 512 for b"),
    ],
)
def test_adapters_that_are_rejected(tmp_path: Path, text: str, message: str) -> None:
    file = write(tmp_path / "adapters.yaml", text)
    said = refusal(lambda: read_adapters(file, make_settings(GIVEN)))
    assert said.startswith(f"{file}: ") and message in said
    missing = str(tmp_path / "none.yaml")
    assert refusal(lambda: read_adapters(missing, make_settings(GIVEN))).startswith(f"--adapters {missing}: no such")


def test_parts_that_go_together_are_read_as_they_are_asked_for() -> None:
    """Of a run's validation samples, say, no more than one group is held."""
    read: list[int] = []
    groups = filled((read.append(size) or size, size, 10) for size in (4, 6, 3, 20, 1))  # type: ignore[func-returns-value]
    assert next(groups) == [4, 6] and read == [4, 6, 3]
    assert list(groups) == [[3], [20], [1]]
