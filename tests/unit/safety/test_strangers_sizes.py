"""Files that came from somebody else: sizes that lie, and what other libraries would do with them."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from folders import ROOT
from fuzzing import bounded
from native_files import with_adapter
from run_files import edit_json
from safetensors.torch import load_file, save_file
from tiny_models import write_tiny_model

from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.checkpoint.base_identity import sample_hash
from megatron_tiedlora.checkpoint.base_weights import BaseWeights
from megatron_tiedlora.checkpoint.sources import find_model
from megatron_tiedlora.checkpoint.tensor_files import read_header
from megatron_tiedlora.config.cli import parse_settings
from megatron_tiedlora.config.settings import Settings
from megatron_tiedlora.convert.export_peft import export_peft
from megatron_tiedlora.convert.verify import verify_export
from megatron_tiedlora.data.readers import read_rows
from megatron_tiedlora.data.task import Example
from megatron_tiedlora.evaluation.metrics import METRICS, Answer
from megatron_tiedlora.runtime.run_folder import read_metrics


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model"))


def test_a_header_of_many_tensors_is_read_once(model: Path, tmp_path: Path) -> None:
    """Some thousands of tensors that nobody needs, and more than any file has."""
    file = tmp_path / "model" / "model.safetensors"
    shutil.copytree(model, file.parent)
    empty = {f"x{index}": torch.zeros(0) for index in range(90_000)}
    save_file({**load_file(file), **empty}, file)
    shape = find_model(str(file.parent)).shape
    with bounded(20.0), BaseWeights(file.parent, shape) as weights:
        sample_hash(weights)
    more = {f"y{index}": torch.zeros(0) for index in range(10_001)}
    save_file({**load_file(file), **more}, file)
    with pytest.raises(UserError, match=r"a header of 100,\d+ tensors"):
        read_header(file)


def test_a_header_of_endless_numbers_is_one_line(tmp_path: Path) -> None:
    text = b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, %s]}}' % (b"9" * 4300)
    (tmp_path / "x").write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(UserError, match="not a whole safetensors file"):
        read_header(tmp_path / "x")


def test_metrics_of_a_huge_line(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    row = '{"step": 1, "split": "train", "loss": 1.0}\n'
    file.write_text(row)
    with file.open("r+b") as stream:
        stream.truncate(2**28)
    with bounded(5.0):
        assert read_metrics(file) == [json.loads(row)]


def test_a_json_file_of_many_small_objects(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    file.write_text("[" + "{}," * 8_000_000 + "{}]")
    with pytest.raises(UserError, match=r"write it as \.jsonl"):
        read_rows(file, limit=2)


@pytest.mark.timeout(120)
def test_verifying_hands_peft_no_pattern_that_is_not_read_here(model: Path, tmp_path: Path) -> None:
    source, native, _ = with_adapter(model, "tl6")
    export_peft(source, native, tmp_path / "peft")
    edit_json(tmp_path / "peft" / "adapter_config.json", target_modules="(.*)*(.*)*(.*)*!")
    with pytest.raises(UserError, match="Write a list of names"):
        verify_export(source, native, peft=tmp_path / "peft")


def test_a_matplotlibrc_of_the_current_folder_decides_nothing(tmp_path: Path) -> None:
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\n")
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "split": "train", "loss": 1.0}\n')
    code = "from megatron_tiedlora.runtime.run_folder import *; plot_losses(Path('metrics.jsonl'), Path('loss.png'))"
    environment = {**os.environ, "PATH": "/nowhere", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0 and (tmp_path / "loss.png").is_file(), done.stderr


@pytest.mark.parametrize("name", ["take_over", "base_differs"])
def test_a_file_decides_nothing_that_a_user_decides_at_a_start(tmp_path: Path, name: str) -> None:
    file = tmp_path / "evil.yaml"
    file.write_text(f"{name}: true\nresume: auto\n")
    with pytest.raises(UserError, match=f"{name} is not read from a file; give --{name} on the command line"):
        parse_settings([f"--config={file}"], Settings)


def rouge(prediction: str, *references: str) -> float:
    example = Example("p", " x", "r:1", references=references)
    return METRICS["rougeL"].sample(Answer(prediction, example, ()))


def test_rouge_l_is_the_library_s() -> None:
    """Bit for bit, on texts of few words, so that subsequences are long; and in time on long ones."""
    from rouge_score.rouge_scorer import RougeScorer

    draw, scorer = random.Random(5), RougeScorer(["rougeL"], use_stemmer=True)
    words = ["running", "runs", "a", "the", "cats", "cat", "...", "x1", "é", "Sunday"]
    for _ in range(2000):
        prediction, *references = (" ".join(draw.choices(words, k=draw.randint(1, 14))) for _ in range(3))
        expected = scorer.score_multi(references, prediction)["rougeL"].fmeasure
        assert rouge(prediction, *references) == 100.0 * expected, (prediction, references)
    long = " ".join(draw.choices("abcdefghij", k=200_000))
    started = time.process_time()
    assert 0 < rouge(" ".join(draw.choices("abcdefghij", k=500)), long) < 1
    assert time.process_time() - started < 5
