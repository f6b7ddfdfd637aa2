"""64 rows each of GSM8K and of a SQuAD-format file as they are published, before and after a short training run."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from evaluation_runs import answering_model, evaluate, predictions, results, score_again
from folders import SHARED_DATA
from run_helpers import run_ranks
from tiny_models import write_tiny_model

XQUAD = SHARED_DATA / "xquad/xquad.en.json"
# Rows of training and of the test, and an answer that is right for a few of the first 64 test rows.
TASKS = {
    "gsm8k": (SHARED_DATA / "gsm8k/train.jsonl", SHARED_DATA / "gsm8k/test.jsonl", " #### 18", {"gsm8k": 3}),
    "squad": (XQUAD, XQUAD, " Manning", {"squad": 1, "squad_f1": 3}),
}
NUM_ROWS = 64


@pytest.mark.distributed
@pytest.mark.parametrize("task", TASKS)
def test_scores_of_base_and_trained_model(task: str, tmp_path: Path) -> None:
    train, test, answer, least = TASKS[task]
    if not (train.is_file() and test.is_file()):
        pytest.skip(f"{SHARED_DATA} is not there: it is kept beside the project, not in it")
    model = answering_model(write_tiny_model(tmp_path / "model", num_layers=2, max_positions=2048), answer)
    training = {"model": model, "task": task, "train_file": train, "output_dir": "run", "dtype": "fp32"}
    if task == "gsm8k":  # its own validation part is 473 rows
        training["validation_file"] = tmp_path / "validation.jsonl"
        (tmp_path / "validation.jsonl").write_text("".join(train.read_text().splitlines(keepends=True)[:8]))
    training |= {"max_steps": 5, "warmup_steps": 1, "global_batch_size": 4, "micro_batch_size": 4, "eval_interval": 5}
    training |= {"max_length": 2048, "learning_rate": 1e-2}
    run_ranks([f"--{name}={value}" for name, value in training.items()], folder=tmp_path).expect(0)

    common = {"task": task, "test_file": test, "limit": NUM_ROWS, "max_new_tokens": 16, "work": tmp_path}
    models = {"before": {"model": model}, "after": {"adapter": "run/adapter"}}
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
