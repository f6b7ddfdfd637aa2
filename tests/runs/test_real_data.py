"""GSM8K and SQuAD-format files as they are published, through the whole command, for 20 steps."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from folders import SHARED_DATA
from run_files import metrics, status
from run_helpers import run_ranks
from tiny_models import write_tiny_model

FILES = {
    "gsm8k": {"train_file": SHARED_DATA / "gsm8k/train.jsonl", "test_file": SHARED_DATA / "gsm8k/test.jsonl"},
    "squad": {"train_file": SHARED_DATA / "xquad/xquad.en.json"},
}


@pytest.mark.distributed
@pytest.mark.cpu_seconds(20, reason="20 steps on rows as they are published, up to 2,048 tokens long")
@pytest.mark.parametrize("task", FILES)
def test_twenty_steps(task: str, tmp_path: Path) -> None:
    files = FILES[task].copy()
    if not all(file.is_file() for file in files.values()):
        pytest.skip(f"{SHARED_DATA} is not there: it is kept beside the project, not in it")
    if "test_file" in files:  # decoding all 1,319 questions takes minutes; the first ones are the same fields
        short = tmp_path / "test.jsonl"
        short.write_text("".join(files["test_file"].read_text().splitlines(keepends=True)[:4]))
        files["test_file"] = short
    # Their own validation parts are 473 rows, and 59 long ones.
    files["validation_file"] = validation = tmp_path / f"validation{files['train_file'].suffix}"
    published = files["train_file"].read_text()
    if task == "gsm8k":
        validation.write_text("".join(published.splitlines(keepends=True)[:20]))
    else:
        first = json.loads(published)["data"][0]
        validation.write_text(json.dumps({"data": [{**first, "paragraphs": first["paragraphs"][:2]}]}))
    model = write_tiny_model(tmp_path / "model", num_layers=2, max_positions=2048)
    arguments = [f"--{name}={path}" for name, path in files.items()]
    arguments += [f"--task={task}", f"--model={model}", "--dtype=bf16", "--max_length=2048", "--output_dir=run"]
    arguments += ["--max_steps=20", "--warmup_steps=4", "--global_batch_size=4", "--micro_batch_size=4"]
    arguments += ["--learning_rate=1e-2", "--eval_interval=20"]
    run_ranks(arguments, folder=tmp_path).expect(0)
    run = tmp_path / "run"
    assert status(run) == {"state": "finished", "step": 20, "reason": "max_steps"}
    assert [row["step"] for row in metrics(run)] == list(range(1, 21))
    assert all(math.isfinite(row["loss"]) and row["supervised_tokens"] >= 8 for row in metrics(run))
    first, last = (row["loss"] for row in metrics(run, "validation"))
    assert last < first
    assert (run / "scores.json").is_file() == ("test_file" in files)
