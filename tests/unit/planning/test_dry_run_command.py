"""--dry_run by its command: the status where a card is named, and what it needs of data. tests/runs/test_dry_run.py has
the numbers."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml
from support.folders import ROOT
from support.run_helpers import write_rows
from support.tiny_models import write_tiny_model, write_tiny_tokenizer

from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.base.presets import PRESETS
from megatron_tiedlora.commands.front import call

SEVENTY = ("--dry_run", "--model=llama2-70b", "--world_size=16", "--tensor_parallel=2", "--pipeline_parallel=2")
SMALLER = ("--ds_config=zero1.json", "--micro_batch_size=1")


def written(folder: Path, **files: str) -> list[str]:
    """Files of these texts, by their names with .yaml."""
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return [str(folder / f"{name}.yaml") for name in files]


@pytest.mark.parametrize(
    ("flags", "status"),
    [
        (("--gpu=h100", "--ds_config=zero1.json"), 1),
        (("--gpu=h200", "--ds_config=zero1.json"), 0),
        (("--gpu=h100", *SMALLER), 0),
        (("--plan_for=gpu", "--ds_config=zero1.json"), 0),
        (("--gpu=h100", "--ds_config=zero0.json", "--adapters=two.yaml"), 1),
        (("--gpu=h200", "--ds_config=zero0.json", "--adapters=two.yaml"), 0),
    ],
    ids=["too small", "large enough", "a row at a time", "no card named", "adapters, too small", "adapters"],
)
def test_the_status_is_that_of_the_named_card(
    flags: tuple[str, ...],
    status: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """1 if the layout does not fit; the report is whole in any case."""
    monkeypatch.chdir(tmp_path)
    written(tmp_path, two="- name: a\n- name: b\n  rank: 16\n")
    assert call("train", [*SEVENTY, *flags]) == status
    text = capsys.readouterr().out
    said = re.findall("IT DOES NOT FIT|: it fits", text)
    assert said == ([] if "--plan_for=gpu" in flags else ["IT DOES NOT FIT" if status else ": it fits"])
    sections = ["layout: 16 ranks", "bytes per rank", "messages and bytes", "\nbatches\n", "\ndata\n"]
    assert [section for section in sections if section not in text] == []


def dry_runs() -> list[list[str]]:
    """The words of all dry runs of the README and of docs/ that name a card."""
    found = []
    for file in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for line in re.sub(r" *\\\n *", " ", file.read_text()).splitlines():
            if line.startswith("    ") and "--dry_run" in line and "--gpu " in line:
                words = shlex.split(line, comments=True)
                found.append(words[next(i for i, word in enumerate(words) if word.startswith("--")) :])
    return found


def test_the_dry_runs_of_the_documents_fit(capsys: pytest.CaptureFixture[str]) -> None:
    """With a preset in the place of a folder, and without its data."""
    commands = dry_runs()
    assert len(commands) >= 2 and any("llama2-70b" in words for words in commands)
    for words in commands:
        if "--train_file" in words:
            at = words.index("--train_file")
            del words[at : at + 2]
        model = words.index("--model") + 1
        words[model] = Path(words[model]).name
        assert words[model] in PRESETS, words
        assert call("train", words) == 0, words
        assert ": it fits" in capsys.readouterr().out


# Data ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny model that was trained for 512 positions."""
    model = write_tiny_model(tmp_path / "tiny", vocab_size=320, max_positions=512)
    write_tiny_tokenizer(model, vocab_size=320)
    return model


def test_a_dry_run_of_a_folder_needs_no_data(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its rows are full, as those of a preset are; with data they are counted, and a run still needs some."""
    none, some = "- name: a\n", "- name: b\n  train_file: rows.jsonl\n"
    two, mixed = written(tmp_path, two=f"{none}- name: b\n", mixed=none + some)
    for flags in ([], ["--task=custom"], [f"--adapters={two}"]):
        assert call("train", [f"--model={folder}", "--dry_run", "--gpu=h100", *flags]) == 0
        text = capsys.readouterr().out
        assert "data\n  (none is read, so every row has 512 tokens; give --train_file or --task to count them)" in text
        assert "samples of 512 tokens, all supervised" in text
    assert call("train", ["--model=llama2-7b", "--dry_run", "--gpu=h100"]) == 0
    assert "(none is read, so every row has 4,096 tokens; give a model folder to count them)" in capsys.readouterr().out
    write_rows(tmp_path / "rows.jsonl", 24)
    assert call("train", [f"--model={folder}", "--dry_run", f"--train_file={tmp_path / 'rows.jsonl'}"]) == 0
    assert "none is read" not in capsys.readouterr().out
    with pytest.raises(UserError, match=r"^--task is required: with --model other than demo, give --task or"):
        call("train", [f"--model={folder}"])
    with pytest.raises(UserError, match=r"^--task custom needs --train_file"):
        call("train", [f"--model={folder}", "--task=custom"])
    with pytest.raises(UserError, match=r"^a: --task custom needs --train_file"):
        call("train", [f"--model={folder}", "--dry_run", f"--adapters={mixed}"])


def test_a_plan_of_a_folder_needs_no_data(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nor a --max_length that the model has: left out, it is the model's."""
    (two,) = written(tmp_path, two="- name: a\n- name: b\n")
    for flags in ([], [f"--adapters={two}"]):
        assert call("plan", [f"--model={folder}", "--gpus_per_node=1", "--global_batch_size=8", *flags]) == 0
        text = capsys.readouterr().out
        assert "samples of 512 tokens each\n" in text and "left out, so assumed: --gpu h100, --max_length 512" in text
        assert "no data is read: every sample has the full length. To train, the command below needs one\n" in text
        assert "\nstart t1p1d1-" in text and " --max_length 512 " in text
    assert call("plan", [f"--model={folder}", "--gpus_per_node=1", f"--yaml={tmp_path / 'plan.yaml'}"]) == 0
    assert yaml.safe_load((tmp_path / "plan.yaml").read_text())["max_length"] == 512
    capsys.readouterr()
    assert call("plan", [f"--model={folder}", "--gpus_per_node=1", "--max_length=256"]) == 0
    assert "samples of 256 tokens each\n" in capsys.readouterr().out
    with pytest.raises(UserError, match=rf"^--max_length 4096: {folder} was trained for 512 positions"):
        call("plan", [f"--model={folder}", "--gpus_per_node=1", "--max_length=4096"])
