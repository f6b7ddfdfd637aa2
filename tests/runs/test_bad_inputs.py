"""Every wrong input ends with status 2 and one clear line, and leaves nothing half-written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from run_files import edit_json, edit_tensors, files_of, truncate
from run_helpers import (
    Base,
    deepspeed_command,
    plain_command,
    run,
    run_ranks,
    start_command,
    write_base,
)
from run_preludes import kill_at_step
from safetensors.torch import load_file, save_file
from tiny_models import write_tiny_model

pytestmark = pytest.mark.distributed
LOOP = "megatron_tiedlora.training.loop"

Break = Callable[[Path], Any]
"""Breaks the copy of the base that it is given; may return changed settings."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def copy(base: Base, tmp_path: Path) -> Base:
    """A copy of the base that a test may break."""
    folder = Path(shutil.copytree(base.folder, tmp_path / "copy"))
    return Base(folder, folder / "model", folder / "train.jsonl", folder / "validation.jsonl")


def refused(
    copy: Base, parts: list[str], *, ranks: int | None = None, arguments: list[str] | None = None, **changes: Any
) -> None:
    """Run the command: status 2, one line with `parts`, and no trace of a run folder or of unfinished files."""
    folder = copy.folder / "runs" / "new"
    if arguments is None:
        arguments = copy.arguments(**{"output_dir": folder, **changes})
    work = copy.folder / "work"
    ended = run_ranks(arguments, folder=work, cache=copy.cache, ranks=ranks).expect(2)
    line = ended.error_line()
    for part in parts:
        assert part in line, line
    assert not folder.parent.exists() and not (work / "runs").exists()
    assert not list(copy.folder.rglob(".writing*"))


# The model ----------------------------------------------------------------------------------------------------------


def _shard(folder: Path) -> None:
    """Cut the one weight file in two, with an index."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    parts = {"model-1.safetensors": names[:8], "model-2.safetensors": names[8:]}
    for file, inside in parts.items():
        save_file({name: tensors[name] for name in inside}, folder / file)
    index = {"weight_map": {name: file for file, inside in parts.items() for name in inside}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()


def _shard_and_lose(folder: Path) -> None:
    _shard(folder)
    (folder / "model-2.safetensors").unlink()


def _shard_and_truncate(folder: Path) -> None:
    _shard(folder)
    truncate(folder / "model-2.safetensors")


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (lambda m: shutil.rmtree(m), ["--model", "no such folder"]),
        (lambda m: (m / "config.json").unlink(), ["config.json", "no such file"]),
        (lambda m: (m / "config.json").write_text("{"), ["config.json", "not valid JSON"]),
        (lambda m: edit_json(m / "config.json", model_type="bert"), ["config.json", "'bert'"]),
        (lambda m: edit_json(m / "config.json", sliding_window=64), ["config.json", "sliding_window = 64"]),
        (lambda m: edit_json(m / "config.json", hidden_act="gelu"), ["config.json", "'gelu'"]),
        (lambda m: (m / "model.safetensors").unlink(), ["model", "model.safetensors", "has neither"]),
        (lambda m: truncate(m / "model.safetensors"), ["model.safetensors", "not a whole safetensors file"]),
        (lambda m: (m / "model.safetensors").write_bytes(b"no weights"), ["model.safetensors", "not a whole"]),
        (_shard_and_lose, ["model-2.safetensors", "no such file"]),
        (_shard_and_truncate, ["model-2.safetensors", "not a whole safetensors file"]),
        (
            lambda m: edit_tensors(m / "model.safetensors", lambda t: t.pop("model.norm.weight")),
            ["model.norm.weight is missing"],
        ),
        (
            lambda m: edit_tensors(m / "model.safetensors", lambda t: t.update({"model.norm.weight": torch.ones(7)})),
            ["model.norm.weight has shape (7,)", "(32,)"],
        ),
        (lambda m: (m / "tokenizer.json").unlink(), ["model", "tokenizer", "--tokenizer"]),
        (lambda m: (m / "tokenizer.json").write_text("{}"), ["model", "cannot be read as a tokenizer"]),
    ],
    ids=[
        "no folder",
        "no config",
        "broken config",
        "other family",
        "sliding window",
        "activation",
        "no weights",
        "truncated",
        "corrupt",
        "lost shard",
        "truncated shard",
        "lost tensor",
        "wrong shape",
        "no tokenizer",
        "broken tokenizer",
    ],
)
def test_model_files(copy: Base, damage: Break, parts: list[str]) -> None:
    damage(copy.model)
    refused(copy, parts)


def test_a_tokenizer_and_a_chat_template_that_are_made_to_harm(copy: Base) -> None:
    """Both load; the one panics in the library and the other never ends, when they meet the rows."""
    turns = [{"role": "user", "content": "a" * 60}, {"role": "assistant", "content": "b"}]
    copy.train.write_text(json.dumps({"messages": turns}) + "\n")
    file = copy.model / "tokenizer.json"
    content = json.loads(file.read_text())
    split = {"type": "Split", "pattern": {"Regex": "(a|aa)+c"}, "behavior": "Isolated", "invert": False}
    changed = {**content, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, content["pre_tokenizer"]]}}
    file.write_text(json.dumps(changed))
    refused(copy, [str(copy.model), "cannot encode a text", "--tokenizer"])
    file.write_text(json.dumps(content))
    loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    (copy.model / "chat_template.jinja").write_text(loops)
    refused(copy, ["train.jsonl:1", f"chat template of {copy.model}", "more than 1 s"])


def test_vocabulary_larger_than_the_embedding(copy: Base) -> None:
    small = write_tiny_model(copy.folder / "small", vocab_size=250, tokenizer=False)
    parts = ["model", "needs 259 ids", "250 rows", "--tokenizer"]
    refused(copy, parts, model=small, tokenizer=copy.model)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"tokenizer": "/nowhere"}, ["/nowhere", "--tokenizer"]),
        ({"model": "nobody/nothing"}, ["--model nobody/nothing", "no such folder", "hub"]),
        ({"model": "llama2-7b"}, ["--model llama2-7b", "--dry_run"]),
        ({"layers": "2,4"}, ["--layers 4", "1 to 3"]),
        ({"max_length": 257}, ["--max_length 257", "256 positions"]),
        ({"method": "tl9"}, ["--method tl9", "'tl6'"]),
        ({"rank": 0}, ["--rank 0"]),
        ({"rank": -1}, ["--rank -1"]),
        ({"global_batch_size": 5}, ["--global_batch_size 5", "--micro_batch_size 2", "data parallel 1", "4 or 6"]),
        ({"global_batchsize": 5}, ["--global_batchsize", "did you mean --global_batch_size?"]),
        ({"ds_config": "zero4.json"}, ["--ds_config zero4.json", "did you mean zero"]),
        ({"resume": "/nowhere"}, ["--resume /nowhere", "no such checkpoint folder"]),
        ({"train_file": "/nowhere.jsonl"}, ["/nowhere.jsonl", "no such file"]),
        ({"train_file": "nobody/nothing"}, ["nobody/nothing", "hub"]),
        ({"prompt_template": "{question}"}, ["--prompt_template", "'question'"]),
    ],
    ids=lambda value: "-".join(map(str, *value.items())).replace("/", "_") if isinstance(value, dict) else "",
)
def test_settings_that_do_not_fit(copy: Base, changes: dict[str, Any], parts: list[str]) -> None:
    refused(copy, parts, **changes)


def test_engine_json(copy: Base) -> None:
    file = copy.folder / "mine.json"
    file.write_text('{"zero_optimization": {"stage": 2}, "bf16": {"enabled": true}}')
    refused(copy, ["mine.json", "'bf16'", "--dtype"], ds_config=file)
    file.write_text('{"zero_optimizaton": {"stage": 2}}')
    refused(copy, ["mine.json", "did you mean zero_optimization?"], ds_config=file)
    file.write_text('{"train_batch_size": 7}')
    refused(copy, ["mine.json", "train_batch_size is 7", "make it 4"], ds_config=file)


def test_yaml(copy: Base) -> None:
    file = copy.folder / "mine.yaml"
    file.write_text("learning_rte: 1\n")
    refused(copy, ["mine.yaml", "did you mean learning_rate?"], config=file)


# Data ---------------------------------------------------------------------------------------------------------------


def _add(file: Path, line: str) -> None:
    with file.open("a") as stream:
        stream.write(line + "\n")


LONG = "q" * 300


@pytest.mark.parametrize(
    ("lines", "parts"),
    [
        (['{"prompt": "a", "completion": "b"'], ["train.jsonl:25", "broken JSON"]),
        (['["a", "b"]'], ["train.jsonl:25", "a list"]),
        (['{"prompt": "a", "answer": "b"}'], ["train.jsonl:25", "'answer'", '"completion"']),
        (['{"prompt": "a", "completion": ""}'], ["train.jsonl:25", "'completion'"]),
        (['{"prompt": "", "completion": "b"}'], ["train.jsonl:25", "'prompt'"]),
        (['{"prompt": "a", "completion": 7}'], ["train.jsonl:25", "'completion'"]),
        (["", f'{{"prompt": "a", "completion": "{LONG}"}}'], ["train.jsonl:26", "does not fit in max_length 96"]),
    ],
    ids=["broken", "list", "fields", "empty answer", "empty prompt", "number", "long answer"],
)
def test_rows(copy: Base, lines: list[str], parts: list[str]) -> None:
    for line in lines:
        _add(copy.train, line)
    refused(copy, parts)


def test_empty_data(copy: Base) -> None:
    copy.train.write_text("\n\n")
    refused(copy, ["train.jsonl", "holds no rows"])
    copy.train.write_text('{"prompt": "a", "completion": "b"}\n')
    refused(copy, ["train.jsonl: one sample", "--validation_file"], validation_file=None)


def test_no_supervised_token() -> None:
    import numpy as np

    from megatron_tiedlora.base.errors import UserError
    from megatron_tiedlora.data.token_dataset import TokenDataset, check_supervised

    tokens = np.arange(6, dtype=np.int32)
    nothing = TokenDataset.after_prompts(tokens, np.array([0, 3, 6]), np.array([3, 3], np.int32))
    with pytest.raises(UserError, match=r"train.jsonl:1: no supervised token in 2 samples"):
        check_supervised(nothing, "train.jsonl:1")


def test_long_prompts_are_cut_counted_and_told(copy: Base) -> None:
    for _ in range(3):
        _add(copy.train, json.dumps({"prompt": LONG, "completion": "yes"}))
    folder = copy.folder / "run"
    ended = run(copy, folder, max_steps=2)
    assert "27 train, 6 validation samples; 3 prompts truncated to 96 tokens" in ended.outputs[0]


# The output folder and resuming ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a run that was stopped at step 3; its best checkpoint is step 2."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    run(base, folder, prelude=partial(kill_at_step, 3), expect=143)
    return folder


def refused_in(base: Base, folder: Path, parts: list[str], **changes: Any) -> None:
    """A start in an existing run folder that is refused and leaves every file as it was."""
    before = files_of(folder)
    line = run(base, folder, expect=2, **changes).error_line()
    for part in parts:
        assert part in line, line
    assert files_of(folder) == before


def test_output_folder_of_another_run(base: Base, stopped: Path, tmp_path: Path) -> None:
    refused_in(base, stopped, [f"--output_dir {stopped}", "earlier start", "--resume auto"])
    refused_in(base, stopped, ["the run of an earlier start"], ranks=2)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("...")
    refused_in(base, tmp_path / "mine", ["mine holds other files"])
    (tmp_path / "file").write_text("")
    line = run(base, tmp_path / "work", output_dir=tmp_path / "file" / "run", expect=2).error_line()
    assert "file is a file" in line


def test_a_failed_start_leaves_an_empty_folder_empty(copy: Base) -> None:
    """Weights are read after the folder was chosen; the same folder can be given again."""
    truncate(copy.model / "model.safetensors")
    folder = copy.folder / "mine"
    folder.mkdir()
    refused_in(copy, folder, ["not a whole safetensors file"], ranks=2)
    assert not any(folder.iterdir())


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"learning_rate": 1e-3}, ["--learning_rate 0.02", "now it is 0.001"]),
        ({"method": "tl5"}, ["--method tl6", "tl5"]),
        ({"rank": 4}, ["--rank 3", "4"]),
        ({"layers": "1,3"}, ["--layers 1,2,3", "1,3"]),
        ({"max_steps": 20}, ["--max_steps 10", "20"]),
        ({"global_batch_size": 8}, ["--global_batch_size 4", "8"]),
        ({"seed": 6}, ["--seed 5", "6"]),
        ({"dtype": "bf16"}, ["--dtype fp32", "bf16"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_resume_with_contradicting_settings(
    base: Base, stopped: Path, changes: dict[str, Any], parts: list[str]
) -> None:
    refused_in(base, stopped, ["step_3", *parts, "resume with the same value"], resume="auto", **changes)


def test_resume_on_another_base(copy: Base, stopped: Path) -> None:
    """The same shape and settings, but other weights."""
    edit_tensors(copy.model / "model.safetensors", lambda t: t["model.norm.weight"].mul_(1.5))
    refused_in(copy, stopped, ["step_3", "weights differ", "--model"], resume="auto")


def test_resume_on_other_data(copy: Base, stopped: Path) -> None:
    """Moved files are fine, changed ones are not."""
    _add(copy.train, '{"prompt": "a", "completion": "b"}')
    refused_in(copy, stopped, ["step_3", "other data", "--train_file"], resume="auto")


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (lambda c: truncate(c / "step_3" / "trainer_state.safetensors"), ["trainer_state.safetensors", "not a whole"]),
        (lambda c: truncate(c / "step_3" / "adapter_model.safetensors"), ["adapter_model.safetensors", "not a whole"]),
        (lambda c: (c / "step_3" / "trainer_state.json").write_text("{"), ["trainer_state.json", "not valid JSON"]),
        (lambda c: (c / "step_3" / "trainer_state.json").unlink(), ["trainer_state.json", "no such file"]),
        (lambda c: (c / "step_3" / "trainer_state.json").write_text("{}"), ["trainer_state.json", "is missing"]),
        (
            lambda c: edit_tensors(c / "step_3" / "trainer_state.safetensors", lambda t: t.pop("exp_avg.adapter.u")),
            ["trainer_state.safetensors", "exp_avg.adapter.u is missing"],
        ),
    ],
    ids=["state", "adapter", "broken progress", "no progress", "empty progress", "lost moment"],
)
def test_broken_checkpoint(base: Base, stopped: Path, tmp_path: Path, damage: Break, parts: list[str]) -> None:
    """Refused where it was asked for; where all are broken; test_way_back.py has what `--resume auto` makes of one."""
    folder = Path(shutil.copytree(stopped, tmp_path / "run"))
    damage(folder / "checkpoints")
    refused_in(base, folder, parts, resume=folder / "checkpoints" / "step_3")
    (folder / "checkpoints" / "step_2" / "adapter_config.json").unlink()
    refused_in(base, folder, ["no checkpoint is intact", *parts, "step_2"], resume="auto")


def test_resume_path_that_is_no_checkpoint_of_this_run(base: Base, stopped: Path, tmp_path: Path) -> None:
    refused_in(base, stopped, ["a checkpoint of a run"], resume=stopped / "adapter", output_dir=tmp_path / "new")
    assert not (tmp_path / "new").exists()
    other = Path(shutil.copytree(stopped, tmp_path / "other"))
    refused_in(base, other, ["holds another run", "--output_dir"], resume=stopped / "checkpoints" / "step_3")


# The real command -----------------------------------------------------------------------------------------------------


def test_plain_command(copy: Base, tmp_path: Path) -> None:
    """Before anything slow is imported, and after."""
    ended = start_command(plain_command(["--ranks=8"]), folder=tmp_path / "flag").wait().expect(2)
    assert ended.errors[0] == "error: unknown argument --ranks (did you mean --rank?); see --help\n"
    _add(copy.train, "{")
    arguments = copy.arguments(output_dir=tmp_path / "run")
    ended = start_command(plain_command(arguments), folder=tmp_path / "row", cache=copy.cache).wait().expect(2)
    assert "train.jsonl:25: broken JSON" in ended.error_line()
    assert not (tmp_path / "run").exists()


def test_deepspeed_prints_one_line_for_all_ranks(copy: Base, tmp_path: Path) -> None:
    _add(copy.train, "{")
    arguments = copy.arguments(output_dir=tmp_path / "run")
    ended = start_command(deepspeed_command(arguments, ranks=2), folder=tmp_path / "work", cache=copy.cache).wait()
    assert ended.statuses == [2]
    assert "train.jsonl:25: broken JSON" in ended.error_line()
    assert not (tmp_path / "run").exists()


def test_the_reason_is_the_last_line_though_deepspeed_then_stops_rank_0(base: Base, tmp_path: Path) -> None:
    command = deepspeed_command(base.arguments(layers="9"), ranks=2, prelude="late_rank_0")
    ended = start_command(command, folder=tmp_path, cache=base.cache).wait()
    assert ended.statuses == [2] and "--layers 9: " in ended.error_line()
    assert "stopped by" not in ended.outputs[0] + ended.errors[0]
