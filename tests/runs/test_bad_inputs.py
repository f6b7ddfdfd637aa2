"""Every wrong input ends with one clear line, and leaves nothing half-written; the real commands end with status 2.

Starts are refused in this process, by what a rank does before its first step (`run_helpers.begin`).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.run_files import edit_json, edit_tensors, files_of, truncate
from support.run_helpers import Base, begin, deepspeed_command, plain_command, run, start_command
from support.task_files import refusal
from support.tiny_models import write_tiny_model

Break = Callable[[Path], Any]
"""Breaks the copy of the base that it is given; may return changed settings."""


@pytest.fixture(autouse=True)
def _cache(own_cache: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens are kept where runs keep them, and no name is looked for on the hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def copy(base: Base, tmp_path: Path) -> Base:
    """A copy of the base that a test may break."""
    folder = tmp_path / "copy"
    shutil.copytree(base.model, folder / "model")
    files = [Path(shutil.copy(file, folder)) for file in (base.train, base.validation)]
    return Base(folder, folder / "model", *files)


def refused(copy: Base, *parts: str, **changes: Any) -> None:
    """One line with `parts`, and no trace of a run folder or of unfinished files."""
    folder = copy.folder / "runs" / "new"
    line = refusal(lambda: begin(copy.arguments(**{"output_dir": folder, **changes})))
    assert all(part in line for part in parts), line
    assert not folder.parent.exists() and not list(copy.folder.rglob(".writing*"))


# The model ----------------------------------------------------------------------------------------------------------


def _shard(folder: Path, damage: Break) -> None:
    """Cut the one weight file in two, with an index, and damage the second."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    parts = {"model-1.safetensors": names[:8], "model-2.safetensors": names[8:]}
    for file, inside in parts.items():
        save_file({name: tensors[name] for name in inside}, folder / file)
    index = {"weight_map": {name: file for file, inside in parts.items() for name in inside}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()
    damage(folder / "model-2.safetensors")


def _edit_norm(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    edit_tensors(folder / "model.safetensors", change)


NORM = "model.norm.weight"
MODELS: dict[str, tuple[Break, list[str]]] = {
    "no folder": (shutil.rmtree, ["--model", "no such folder"]),
    "no config": (lambda m: (m / "config.json").unlink(), ["config.json", "no such file"]),
    "broken config": (lambda m: (m / "config.json").write_text("{"), ["config.json", "not valid JSON"]),
    "family": (lambda m: edit_json(m / "config.json", model_type="bert"), ["config.json", "'bert'"]),
    "window": (lambda m: edit_json(m / "config.json", sliding_window=64), ["config.json", "sliding_window = 64"]),
    "activation": (lambda m: edit_json(m / "config.json", hidden_act="gelu"), ["config.json", "'gelu'"]),
    "no weights": (lambda m: (m / "model.safetensors").unlink(), ["model", "model.safetensors", "has neither"]),
    "truncated": (lambda m: truncate(m / "model.safetensors"), ["model.safetensors", "not a complete safetensors"]),
    "corrupt": (
        lambda m: (m / "model.safetensors").write_bytes(b"no weights"),
        ["model.safetensors", "not a complete"],
    ),
    "lost shard": (lambda m: _shard(m, Path.unlink), ["model-2.safetensors", "no such file"]),
    "truncated shard": (lambda m: _shard(m, truncate), ["model-2.safetensors", "not a complete safetensors file"]),
    "lost tensor": (lambda m: _edit_norm(m, lambda t: t.pop(NORM)), [f"{NORM} is missing"]),
    "shape": (lambda m: _edit_norm(m, lambda t: t.update({NORM: torch.ones(7)})), [f"{NORM} has shape (7,)", "(32,)"]),
    "no tokenizer": (lambda m: (m / "tokenizer.json").unlink(), ["model", "tokenizer", "--tokenizer"]),
    "broken tokenizer": (lambda m: (m / "tokenizer.json").write_text("{}"), ["model", "cannot be read as a tokenizer"]),
}


@pytest.mark.parametrize("kind", MODELS)
def test_model_files(copy: Base, kind: str) -> None:
    damage, parts = MODELS[kind]
    damage(copy.model)
    refused(copy, *parts)


def test_a_tokenizer_and_a_chat_template_that_are_made_to_harm(copy: Base) -> None:
    """Both load; the one panics in the library and the other never ends, when they meet the rows."""
    turns = [{"role": "user", "content": "a" * 60}, {"role": "assistant", "content": "b"}]
    copy.train.write_text(json.dumps({"messages": turns}) + "\n")
    file = copy.model / "tokenizer.json"
    content = json.loads(file.read_text())
    split = {"type": "Split", "pattern": {"Regex": "(a|aa)+c"}, "behavior": "Isolated", "invert": False}
    changed = {**content, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, content["pre_tokenizer"]]}}
    file.write_text(json.dumps(changed))
    refused(copy, str(copy.model), "cannot encode a text", "--tokenizer")
    file.write_text(json.dumps(content))
    loops = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    (copy.model / "chat_template.jinja").write_text(loops)
    refused(copy, "train.jsonl:1", f"chat template of {copy.model}", "more than 1 s")


def test_vocabulary_larger_than_the_embedding(copy: Base) -> None:
    small = write_tiny_model(copy.folder / "small", vocab_size=250, tokenizer=False)
    refused(copy, "model", "needs 259 ids", "250 rows", "--tokenizer", model=small, tokenizer=copy.model)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"tokenizer": "/nowhere"}, ["/nowhere", "--tokenizer"]),
        ({"model": "nobody/nothing"}, ["--model nobody/nothing", "no such folder", "Hub"]),
        ({"model": "llama2-7b"}, ["--model llama2-7b", "--dry_run"]),
        ({"layers": "2,4"}, ["--layers 4", "1 to 3"]),
        ({"max_length": 257}, ["--max_length 257", "256 positions"]),
        ({"method": "tl9"}, ["--method tl9", "'tl6'"]),
        ({"rank": 0}, ["--rank 0"]),
        ({"global_batch_size": 5}, ["--global_batch_size 5", "--micro_batch_size 2", "data parallel 1", "4 or 6"]),
        ({"global_batchsize": 5}, ["--global_batchsize", "did you mean --global_batch_size?"]),
        ({"ds_config": "zero4.json"}, ["--ds_config zero4.json", "did you mean zero"]),
        ({"resume": "/nowhere"}, ["--resume /nowhere", "no such checkpoint folder"]),
        ({"train_file": "/nowhere.jsonl"}, ["/nowhere.jsonl", "no such file"]),
        ({"train_file": "nobody/nothing"}, ["nobody/nothing", "hub"]),
        ({"prompt_template": "{question}"}, ["--prompt_template", "'question'"]),
        ({"eval_metric": "bleu"}, ["--eval_metric bleu", "custom", "loss or exact_match"]),
        ({"test_file": "{rows}", "max_new_tokens": 256}, ["--max_new_tokens 256", "at most 256 tokens"]),
        ({"report_to": "aim"}, ["--report_to aim: the package aim is not installed; pip install aim"]),
    ],
    ids=lambda value: " ".join(f"{name} {text}" for name, text in value.items()) if isinstance(value, dict) else "",
)
def test_settings_that_do_not_fit(copy: Base, changes: dict[str, Any], parts: list[str]) -> None:
    changes = {name: copy.train if value == "{rows}" else value for name, value in changes.items()}
    refused(copy, *parts, **changes)


@pytest.mark.parametrize(
    ("flag", "text", "parts"),
    [
        ("ds_config", '{"zero_optimization": {"stage": 2}, "bf16": {"enabled": true}}', ["'bf16'", "--dtype"]),
        ("ds_config", '{"zero_optimizaton": {"stage": 2}}', ["did you mean zero_optimization?"]),
        ("ds_config", '{"train_batch_size": 7}', ["train_batch_size is 7", "make it 4"]),
        ("config", "learning_rte: 1\n", ["did you mean learning_rate?"]),
    ],
)
def test_files_of_settings(copy: Base, flag: str, text: str, parts: list[str]) -> None:
    file = copy.folder / "mine"
    file.write_text(text)
    refused(copy, str(file), *parts, **{flag: file})


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
    refused(copy, *parts)


def test_empty_data(copy: Base) -> None:
    copy.train.write_text("\n\n")
    refused(copy, "train.jsonl", "has no rows")
    copy.train.write_text('{"prompt": "a", "completion": "b"}\n')
    refused(copy, "train.jsonl: with only one sample", "--validation_file", validation_file=None)


def test_no_supervised_token() -> None:
    import numpy as np

    from megatron_tiedlora.data.token_dataset import TokenDataset, check_supervised

    tokens = np.arange(6, dtype=np.int32)
    nothing = TokenDataset.after_prompts(tokens, np.array([0, 3, 6]), np.array([3, 3], np.int32))
    line = refusal(lambda: check_supervised(nothing, "train.jsonl:1"))
    assert "train.jsonl:1: no supervised token in 2 samples" in line


@pytest.mark.distributed
def test_long_prompts_are_cut_counted_and_told(copy: Base) -> None:
    for _ in range(3):
        _add(copy.train, json.dumps({"prompt": LONG, "completion": "yes"}))
    ended = run(copy, copy.folder / "run", max_steps=2)
    assert "27 train, 6 validation samples; 3 prompts truncated to 96 tokens" in ended.outputs[0]


# The output folder and resuming ---------------------------------------------------------------------------------------


def refused_in(base: Base, folder: Path, *parts: str, ranks: int | None = 0, **changes: Any) -> None:
    """A start in an existing folder that is refused, in this process or by ranks (None: without a launcher), and leaves
    every file as it was."""
    before = files_of(folder)
    if ranks != 0:
        line = run(base, folder, ranks=ranks, expect=2, **changes).error_line()
    else:
        line = refusal(lambda: begin(base.arguments(**{"output_dir": folder, **changes})))
    assert all(part in line for part in parts), line
    assert files_of(folder) == before


@pytest.mark.distributed
def test_output_folder_of_another_run(base: Base, stopped: Path, tmp_path: Path) -> None:
    refused_in(base, stopped, f"--output_dir {stopped}", "earlier launch", "--resume auto")
    refused_in(base, stopped, "the run of an earlier launch", ranks=2)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("...")
    for resume in ("none", "auto"):
        refused_in(base, tmp_path / "mine", "mine holds other files", resume=resume)
    (tmp_path / "file").write_text("")
    line = refusal(lambda: begin(base.arguments(output_dir=tmp_path / "file" / "run")))
    assert "file is a file" in line


@pytest.mark.distributed
def test_a_failed_start_leaves_an_empty_folder_empty(copy: Base, folder: Path) -> None:
    """Weights are read after the folder was chosen; the same folder can be given again."""
    truncate(copy.model / "model.safetensors")
    folder.mkdir()
    refused_in(copy, folder, "not a complete safetensors file", ranks=2)
    assert not any(folder.iterdir())


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"learning_rate": 1e-3}, ["--learning_rate 0.02", "now it is 0.001"]),
        ({"method": "tl5"}, ["--method tl6", "tl5"]),
        ({"rank": 4}, ["--rank 3", "4"]),
        ({"layers": "1,3"}, ["--layers 1,2,3", "1,3"]),
        ({"max_steps": 20}, ["--max_steps 10", "20", "only --schedule constant", "--init_from"]),
        ({"global_batch_size": 8}, ["--global_batch_size 4", "8"]),
        ({"seed": 6}, ["--seed 5", "6"]),
        ({"dtype": "bf16"}, ["--dtype fp32", "bf16"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_resume_with_contradicting_settings(
    base: Base, stopped: Path, changes: dict[str, Any], parts: list[str]
) -> None:
    refused_in(base, stopped, "step_3", *parts, "resume with the same value", resume="auto", **changes)


@pytest.mark.distributed
def test_resume_on_another_base(copy: Base, stopped: Path) -> None:
    """The same shape and settings, but other weights: found as the model is built."""
    _edit_norm(copy.model, lambda t: t[NORM].mul_(1.5))
    refused_in(copy, stopped, "step_3", "weights differ", "--model", ranks=None, resume="auto")


def test_resume_on_other_data(copy: Base, stopped: Path) -> None:
    """Moved files are fine, changed ones are not."""
    _add(copy.train, '{"prompt": "a", "completion": "b"}')
    refused_in(copy, stopped, "step_3", "data that differs", "--train_file", resume="auto")


CHECKPOINTS: dict[str, tuple[Break, list[str]]] = {
    "state": (lambda c: truncate(c / "trainer_state.safetensors"), ["trainer_state.safetensors", "not a complete"]),
    "no state": (lambda c: (c / "trainer_state.safetensors").unlink(), ["trainer_state.safetensors", "not a complete"]),
    "adapter": (lambda c: truncate(c / "adapter_model.safetensors"), ["adapter_model.safetensors", "not a complete"]),
    "broken progress": (lambda c: (c / "trainer_state.json").write_text("{"), ["trainer_state.json", "not valid JSON"]),
    "no progress": (lambda c: (c / "trainer_state.json").unlink(), ["trainer_state.json", "no such file"]),
    "empty progress": (lambda c: (c / "trainer_state.json").write_text("{}"), ["trainer_state.json", "is missing"]),
    "lost moment": (
        lambda c: edit_tensors(c / "trainer_state.safetensors", lambda t: t.pop("exp_avg.adapter.u")),
        ["trainer_state.safetensors", "exp_avg.adapter.u is missing"],
    ),
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_broken_checkpoint(base: Base, stopped: Path, folder: Path, kind: str) -> None:
    """Refused where it was asked for; where all are broken; test_way_back.py has what `--resume auto` makes of one."""
    shutil.copytree(stopped, folder)
    damage, parts = CHECKPOINTS[kind]
    damage(folder / "checkpoints" / "step_3")
    refused_in(base, folder, *parts, resume=folder / "checkpoints" / "step_3")
    (folder / "checkpoints" / "step_2" / "adapter_config.json").unlink()
    refused_in(base, folder, "no checkpoint is intact", *parts, "step_2", resume="auto")


def test_resume_path_that_is_no_checkpoint_of_this_run(base: Base, stopped: Path, tmp_path: Path) -> None:
    refused_in(base, stopped, "a checkpoint of a run", resume=stopped / "adapter", output_dir=tmp_path / "new")
    assert not (tmp_path / "new").exists()
    other = Path(shutil.copytree(stopped, tmp_path / "other"))
    refused_in(base, other, "contains a different run", "--output_dir", resume=stopped / "checkpoints" / "step_3")


# The real command -----------------------------------------------------------------------------------------------------


@pytest.mark.distributed
def test_plain_command(copy: Base, tmp_path: Path) -> None:
    """Before anything slow is imported, and after."""
    ended = start_command(plain_command(["--ranks=8"]), folder=tmp_path / "flag").wait().expect(2)
    assert ended.errors[0] == "error: unknown argument --ranks (did you mean --rank?); see --help\n"
    _add(copy.train, "{")
    arguments = copy.arguments(output_dir=tmp_path / "run")
    ended = start_command(plain_command(arguments), folder=tmp_path / "row", cache=copy.cache).wait().expect(2)
    assert "train.jsonl:25: broken JSON" in ended.error_line()
    assert not (tmp_path / "run").exists()


@pytest.mark.distributed
def test_a_rank_that_is_refused_leaves_no_folder(copy: Base) -> None:
    """By a tensor that is not there, for which the folder was taken already."""
    _edit_norm(copy.model, lambda t: t.pop(NORM))
    folder = copy.folder / "runs" / "new"
    assert f"{NORM} is missing" in run(copy, folder, expect=2).error_line()
    assert not folder.exists() and not list(copy.folder.rglob(".writing*"))


@pytest.mark.distributed
def test_a_rank_that_cannot_resume_changes_nothing(base: Base, stopped: Path, folder: Path) -> None:
    shutil.copytree(stopped, folder)
    last = folder / "checkpoints" / "step_3"
    truncate(last / "adapter_model.safetensors")
    refused_in(base, folder, "not a complete", ranks=None, resume=last)


@pytest.mark.distributed
def test_the_reason_is_the_last_line_though_deepspeed_then_stops_rank_0(base: Base, tmp_path: Path) -> None:
    """One line for both ranks, and no run folder."""
    command = deepspeed_command(base.arguments(layers="9"), ranks=2, prelude="late_rank_0")
    ended = start_command(command, folder=tmp_path, cache=base.cache).wait()
    assert ended.statuses == [2] and "--layers 9: " in ended.error_line()
    assert "stopped by" not in ended.outputs[0] + ended.errors[0]
    assert not (tmp_path / "runs").exists()
