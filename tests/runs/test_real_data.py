"""GSM8K and SQuAD-format files as they are published: steps of training, and the scores of 64 rows."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from support.evaluation_runs import answering_model, evaluate, predictions, results, score_again
from support.folders import SHARED_DATA
from support.native_files import with_adapter, write_native
from support.run_files import metrics, status
from support.run_helpers import run_ranks
from support.tiny_models import write_tiny_model

pytestmark = pytest.mark.distributed
FILES = {
    "gsm8k": {"train_file": SHARED_DATA / "gsm8k/train.jsonl", "test_file": SHARED_DATA / "gsm8k/test.jsonl"},
    "squad": {"train_file": SHARED_DATA / "xquad/xquad.en.json"},
}


def skip_without(*files: Path) -> None:
    if not all(file.is_file() for file in files):
        pytest.skip(f"{SHARED_DATA} is not there: it is kept beside the project, not in it")


@pytest.mark.parametrize("task", FILES)
def test_steps_on_rows_as_they_are_published(task: str, tmp_path: Path) -> None:
    files = FILES[task].copy()
    skip_without(*files.values())
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
    arguments += ["--max_steps=8", "--warmup_steps=2", "--global_batch_size=4", "--micro_batch_size=4"]
    arguments += ["--learning_rate=1e-2", "--eval_interval=8", "--max_new_tokens=64"]
    run_ranks(arguments, folder=tmp_path).expect(0)
    run = tmp_path / "run"
    assert status(run) == {"state": "finished", "step": 8, "reason": "max_steps"}
    assert [row["step"] for row in metrics(run)] == list(range(1, 9))
    assert all(math.isfinite(row["loss"]) and row["supervised_tokens"] >= 8 for row in metrics(run))
    first, last = (row["loss"] for row in metrics(run, "validation"))
    assert last < first
    assert (run / "scores.json").is_file() == ("test_file" in files)


# The test rows, and an answer that is right for a few of the first 64.
TASKS = {
    "gsm8k": (SHARED_DATA / "gsm8k/test.jsonl", " #### 18", {"gsm8k": 3}),
    "squad": (SHARED_DATA / "xquad/xquad.en.json", " Manning", {"squad": 1, "squad_f1": 3}),
}
NUM_ROWS = 64


@pytest.mark.parametrize("task", TASKS)
def test_scores_of_a_base_and_an_adapter(task: str, tmp_path: Path) -> None:
    test, answer, least = TASKS[task]
    skip_without(test)
    model = answering_model(write_tiny_model(tmp_path / "model", num_layers=2, max_positions=2048), answer)
    write_native(tmp_path / "adapter", model, with_adapter(model, "tl6")[2])
    common = {"task": task, "test_file": test, "limit": NUM_ROWS, "max_new_tokens": 16, "work": tmp_path}
    models = {"alone": {"model": model}, "adapted": {"adapter": tmp_path / "adapter"}}
    for name, chosen in models.items():
        folder = tmp_path / name
        evaluate(folder, **common, **chosen)
        rows, found = predictions(folder), results(folder)
        assert len(rows) == found["n"] == NUM_ROWS
        again = [score_again(task, row) for row in rows]
        assert list(found["scores"]) == list(again[0])
        assert found["metric"] == next(iter(again[0])) and found["score"] == found["scores"][found["metric"]]["score"]
        for metric, score in found["scores"].items():
            per_row = [scores[metric] for scores in again]
            stored = [row["score" if metric == found["metric"] else metric] for row in rows]
            assert stored == pytest.approx(per_row, abs=1e-12)
            assert score["score"] == pytest.approx(math.fsum(per_row) / NUM_ROWS, abs=1e-12)
            assert sum(value > 0 for value in per_row) >= least[metric], "the test sees no score that is not zero"
            low, high = score["confidence_interval"]
            assert 0 <= low <= score["score"] <= high <= 100 and low < high
