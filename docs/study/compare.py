"""What the sweep's tables leave out: both metrics, validation losses, and differences to LoRA on the same questions.

    python docs/study/compare.py STUDY_FOLDER

Differences are of the two models' scores question by question, with a 95 % percentile bootstrap over the questions
(2,000 resamples, seed 0): narrower than what the two scores' own intervals suggest.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

COLUMNS = {"squad": "score", "squad_f1": "squad_f1"}  # of predictions.jsonl, by metric
REFERENCE = {"r4": "lora-r4-", "r16": "lora-r16-"}


def rows_of(score: Path) -> dict[str, np.ndarray]:
    """Per-question scores by metric."""
    rows = [json.loads(line) for line in (score / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
    return {metric: np.array([row[key] for row in rows]) for metric, key in COLUMNS.items()}


def best_loss(run: Path) -> float:
    """The lowest validation loss of a run."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return min(row["loss"] for row in rows if row["split"] == "validation")


def interval(differences: np.ndarray) -> tuple[float, float]:
    """A 95 % percentile bootstrap of the mean."""
    draw = np.random.default_rng(0).integers(0, len(differences), (2000, len(differences)))
    low, high = np.percentile(differences[draw].mean(axis=1), [2.5, 97.5])
    return float(low), float(high)


def main(folder: str) -> None:
    """Print a Markdown table, one row a scored model."""
    study = Path(folder)
    finished = sorted(path.parent for path in (study / "scores").glob("*/results.json"))
    scores = {path.name: rows_of(path) for path in finished}
    print("| run | validation loss | exact match | F1 | exact match less LoRA's | F1 less LoRA's |")
    print("|---|---|---|---|---|---|")
    for name, values in scores.items():
        loss = "" if name == "base" else f"{best_loss(study / 'runs' / name):.3f}"
        cells = [f"{values[metric].mean():.1f}" for metric in ("squad", "squad_f1")]
        rank = next((rank for rank in REFERENCE if f"-{rank}-" in name), None)
        other = next((key for key in scores if rank and key.startswith(REFERENCE[rank]) and "layer" not in key), None)
        for metric in ("squad", "squad_f1"):
            if other is None or other == name:
                cells.append("")
                continue
            differences = values[metric] - scores[other][metric]
            low, high = interval(differences)
            cells.append(f"{differences.mean():+.1f} ({low:+.1f} to {high:+.1f})")
        print(f"| {name} | {loss} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main(*sys.argv[1:])
