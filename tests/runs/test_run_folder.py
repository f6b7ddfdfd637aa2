"""The run folder: what is in it, what its files say, and which folder a run takes."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from support.run_files import assert_same_run, checkpoint_names, files_of, losses, metrics, run_settings, status
from support.run_helpers import Base, Ended, run, run_ranks, write_rows
from support.run_preludes import scripted_validation, whole_run

from megatron_tiedlora.config.cli import parse_settings
from megatron_tiedlora.config.settings import Settings, make_settings
from megatron_tiedlora.data.tokenizer import load_tokenizer
from megatron_tiedlora.runtime.run_folder import choose_run_folder, read_metrics
from megatron_tiedlora.training.build import learning_rate_factor

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def finished(base: Base, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ended]:
    """A finished run with a test part, and what it printed."""
    folder = tmp_path_factory.mktemp("finished") / "a run"
    test = write_rows(base.folder / "test.jsonl", 3, seed=3)
    return folder, run(base, folder, test_file=test, prelude=whole_run)


def test_files(finished: tuple[Path, Ended]) -> None:
    folder, _ = finished
    assert {item.name for item in folder.iterdir()} == {
        "run.yaml",
        "metrics.jsonl",
        "tensorboard",
        "loss.png",
        "checkpoints",
        "adapter",
        "run_status.json",
        "scores.json",
        "peft",
        "logs",
    }
    assert status(folder) == {"state": "finished", "step": 10, "reason": "max_steps"}
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert {item.name for item in (folder / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert not list(folder.rglob(".writing*"))


def test_metrics(base: Base, finished: tuple[Path, Ended]) -> None:
    """The named keys, floats as they are, and numbers that follow from data and schedule."""
    folder, _ = finished
    train, validation = metrics(folder), metrics(folder, "validation")
    assert [row["step"] for row in train] == list(range(1, 11))
    assert [row["step"] for row in validation] == [0, 2, 4, 6, 8, 10]
    names = {"step", "split", "loss", "learning_rate", "grad_norm", "supervised_tokens"}
    names |= {"tokens_per_second", "supervised_tokens_per_second", "mfu", "padding", "peak_memory_bytes"}
    assert all(set(row) == names for row in train)
    assert all(set(row) == {"step", "split", "loss"} for row in validation)
    assert all(len(repr(row["loss"])) > 12 for row in train), "rounded"
    for row in train:
        factor = learning_rate_factor(make_settings({"warmup_steps": 2, "max_steps": 10}), row["step"] - 1)
        assert row["learning_rate"] == 2e-2 * factor
        assert row["grad_norm"] > 0 and row["tokens_per_second"] > 0
    # 24 samples in batches of 4: six steps see each answer (with its EOS) once.
    tokenizer = load_tokenizer(base.model)
    rows = [json.loads(line) for line in base.train.read_text().splitlines()]
    answers = [" " + row["completion"] for row in rows]  # joined to the prompt by a space
    expected = sum(len(tokenizer.encode(answer, add_special_tokens=False)) + 1 for answer in answers)
    assert sum(row["supervised_tokens"] for row in train[:6]) == expected


def test_tensorboard_has_the_same_numbers(finished: tuple[Path, Ended]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, _ = finished
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    expected = {f"train/{name}" for name in metrics(folder)[0] if name not in ("step", "split")} | {"validation/loss"}
    assert {"train/loss", "train/mfu", "train/peak_memory_bytes"} <= expected == set(events.Tags()["scalars"])
    for split in ("train", "validation"):
        found = [(event.step, event.value) for event in events.Scalars(f"{split}/loss")]
        assert [step for step, _ in found] == [step for step, _ in losses(folder, split)]
        assert [loss for _, loss in found] == pytest.approx([loss for _, loss in losses(folder, split)], rel=1e-6)


def test_scores_and_the_summary(finished: tuple[Path, Ended]) -> None:
    folder, ended = finished
    scores = json.loads((folder / "scores.json").read_text())
    assert set(scores) == {"before", "after"}
    for moment in scores.values():
        assert set(moment) == {"exact_match"}
        entry = moment["exact_match"]
        assert entry["n"] == 3 and 0 <= entry["confidence_interval"][0] <= entry["score"] <= 100 and entry["signature"]
    before, after = losses(folder, "validation")[0][1], min(loss for _, loss in losses(folder, "validation"))
    (line,) = [line for line in ended.outputs[0].splitlines() if line.startswith("validation loss")]
    assert f"{before:.4f}" in line and f"{after:.4f}" in line
    commands = [line for line in ended.outputs[0].splitlines() if line.startswith("  tiedlora ")]
    merge, verify, serve = (shlex.split(command) for command in commands)  # as a shell reads them
    adapter = ["--adapter", str(folder / "adapter")]
    assert merge[1:] == ["merge", *adapter, "--output", str(folder / "merged")]
    assert verify[1:] == ["verify", *adapter, "--peft", str(folder / "peft")]
    assert serve[1:] == ["serve", "--model", serve[3], "--adapters", str(folder)]
    assert "step/s" in ended.errors[0] and "tokens/s" in ended.errors[0]


def test_run_yaml_resolves_every_setting(base: Base, finished: tuple[Path, Ended]) -> None:
    """And is plain YAML, without Python tags, so that other tools read it."""
    folder, _ = finished
    content = run_settings(folder)
    assert "!!" not in (folder / "run.yaml").read_text()
    assert set(content) == {*Settings.model_fields, "ranks", "versions", "hub_names", "data_sha256_by_source"}
    assert {"megatron_tiedlora", "python", "torch", "deepspeed", "transformers"} <= set(content["versions"])
    expected = {"seed": 5, "layers": [1, 2, 3], "micro_batch_size": 2, "alpha": 3.0, "save_interval": 2, "ranks": 1}
    assert {name: content[name] for name in expected} == expected
    assert content["init_std_a"] > 0 and content["init_std_b"] is not None
    assert content["output_dir"] == str(folder) and content["model"] == str(base.model)


def test_run_yaml_can_be_given_back(base: Base, finished: tuple[Path, Ended], tmp_path: Path) -> None:
    """The same run again, from its run.yaml alone but for the folder."""
    folder, _ = finished
    again = tmp_path / "again"
    arguments = [f"--config={folder / 'run.yaml'}", f"--output_dir={again}"]
    run_ranks(arguments, folder=tmp_path / "work", cache=base.cache).expect(0)
    assert_same_run(again, folder)
    settings = [parse_settings(["--config", str(path / "run.yaml")], Settings) for path in (folder, again)]
    assert settings[0].model_copy(update={"output_dir": None}) == settings[1].model_copy(update={"output_dir": None})


def test_best_and_last_are_kept(base: Base, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    run(base, folder, max_steps=6, save_interval=1, keep_checkpoints=1, prelude=_best_at_two)
    assert checkpoint_names(folder) == {"step_2", "step_6"}
    assert (folder / "checkpoints" / "latest").read_text() == "step_6\n"
    best = files_of(folder / "checkpoints" / "step_2")
    assert all(best[name] == content for name, content in files_of(folder / "adapter").items())
    for file in ("trainer_state.safetensors", "trainer_state.json", "adapter_model.safetensors"):
        assert file in best
    progress = json.loads(best["trainer_state.json"])
    assert (progress["step"], progress["consumed_samples"], progress["best_step"]) == (2, 8, 2)


def _best_at_two() -> None:
    scripted_validation({2: 1.0, 4: 2.0, 6: 3.0})


def test_save_interval_and_minutes(base: Base, tmp_path: Path) -> None:
    run(base, tmp_path / "steps", max_steps=5, eval_interval=100, save_interval=3, prelude=_no_end)
    assert checkpoint_names(tmp_path / "steps") == {"step_3", "step_5"}
    run(base, tmp_path / "minutes", max_steps=3, eval_interval=100, save_interval_minutes=1e-9, prelude=_no_end)
    assert checkpoint_names(tmp_path / "minutes") == {"step_1", "step_2", "step_3"}


def _no_end() -> None:
    """Keep what would be removed, to see that each step was saved."""
    import megatron_tiedlora.checkpoint.resume as resume

    resume.discard = _stays  # type: ignore[assignment]


def _stays(path: Path, **_: Any) -> None:
    assert path.is_dir()


def test_default_folders(base: Base, tmp_path: Path) -> None:
    """runs/MODEL-TASK-METHOD-rRANK, then -2 and -3; `--resume auto` goes on in the last one."""

    def start(**changes: Any) -> Ended:
        arguments = base.arguments(**{"output_dir": None, "max_steps": 2, **changes})
        return run_ranks(arguments, folder=tmp_path, cache=base.cache).expect(0)

    for _ in range(2):
        start()
    names = ["model-custom-tl6-r3", "model-custom-tl6-r3-2"]
    assert sorted(item.name for item in (tmp_path / "runs").iterdir()) == names
    ended = start(resume="auto")
    assert f"run folder  runs/{names[1]}, resumed from step 2" in ended.outputs[0]
    assert sorted(item.name for item in (tmp_path / "runs").iterdir()) == names


def test_choose_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def chosen(resume: str = "none") -> str:
        return str(choose_run_folder(make_settings({"model": "x", "task": "gsm8k", "resume": resume})).path)

    first = "runs/x-gsm8k-tl6-r8"
    assert (chosen(), chosen("auto")) == (first, first)
    for number, following in (("", "-2"), ("-2", "-3"), ("-3", "-4")):
        made = tmp_path / f"{first}{number}"
        made.mkdir(parents=True)
        assert chosen() == first + following and chosen("auto") == str(made.relative_to(tmp_path))
    # A checkpoint's own run, wherever it lies.
    (tmp_path / "far" / "checkpoints" / "step_4").mkdir(parents=True)
    (tmp_path / "far" / "run.yaml").write_text("rank: 1\n")
    assert chosen("far/checkpoints/step_4") == "far"
    # Choosing makes nothing, and an empty folder may be given.
    (tmp_path / "empty").mkdir()
    assert choose_run_folder(make_settings({"output_dir": "empty"})).path == Path("empty")
    assert not (tmp_path / f"{first}-4").exists()


def test_read_metrics_leaves_out_a_line_cut_short(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    assert read_metrics(file) == []
    rows = [{"step": step, "split": "train", "loss": 0.5} for step in (1, 2)]
    whole = "".join(json.dumps(row) + "\n" for row in rows)
    file.write_text(whole + '{"ste')
    assert read_metrics(file) == rows
    # Nor does any other line count that is no row.
    for line in ('{"step": 3}', "[]", "[" * 5000, '{"step": true, "split": "train", "loss": 1}', "9" * 5000,
                 '{"step": 3, "split": "train", "loss": NaN}', '{"step": 3, "split": [], "loss": 1}'):  # fmt: skip
        file.write_text(f"{line}\n{whole}")
        assert read_metrics(file) == rows, line
