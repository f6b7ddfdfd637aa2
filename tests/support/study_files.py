"""Writes the folders of studies, as launch/train.py and launch/evaluate.py leave them, without training anything."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from megatron_tiedlora.adapters.tied_adapter import Target, make_adapter_config
from megatron_tiedlora.config.job_settings import parse_sweep
from megatron_tiedlora.study.record import Point, make_grid

SHAPES: Mapping[str, tuple[int, int]] = {"llama2-7b": (32, 4096), "gpt-2b-001": (24, 2048)}  # layers L, hidden size d
SCORED = {"squad": "squad", "gsm8k": "gsm8k", "hellaswag": "accuracy", "dialogsum": "rougeL", "iwslt2017": "bleu"}


def no_start(*_: Any) -> Any:
    """In the place of `begin_job` where a sweep starts nothing."""
    raise AssertionError("nothing is to be started")


def write_study(
    folder: Path, *, task: str = "squad", model: str = "llama2-7b", known: bool = True, **settings: Any
) -> Path:
    """A study without runs. `known`: its base is the paper's `model`, by which name its shape goes."""
    folder.mkdir(parents=True)
    content = {
        "methods": ["lora", "tl6"],
        "ranks": [2, 8],
        "learning_rates": [1e-4],
        "model": model,
        "task": task,
        **settings,
    }
    (folder / "sweep.yaml").write_text(yaml.safe_dump(content))
    layers, hidden = SHAPES[model]
    command = parse_sweep([f"--config={folder / 'sweep.yaml'}", f"--output_dir={folder}"])
    target = Target("qkv", hidden, (hidden,) * 3, "column")

    def num_trained(point: Point) -> int:
        adapted = tuple(range(1, layers + 1)) if point.layer is None else (point.layer,)
        config = make_adapter_config(point.method, rank=point.rank, layers=adapted, targets=(target,), seed=0)
        return sum(config.num_trained().values())

    base = {
        "model": f"models/{model}",
        "base_hash": "0" * 64,
        "num_layers": layers,
        "trained": {point.name: num_trained(point) for point in make_grid(command.settings, layers).points},
        "paper_model": model if known else None,
        "task": task,
        "metric": SCORED[task],
        "file_sha256": {},
    }
    (folder / "base.json").write_text(json.dumps(base))
    return folder


def write_run(
    folder: Path, name: str, *, state: str | None = "finished", best: float | None = 1.0, reason: str = "max_steps"
) -> Path:
    """The run folder of run `name`; `state` None is one that was killed."""
    run = folder / "runs" / name
    last = run / "checkpoints" / "step_10"
    last.mkdir(parents=True)
    (run / "run.yaml").write_text("seed: 1\n")
    (run / "checkpoints" / "latest").write_text("step_10\n")
    (last / "trainer_state.json").write_text(json.dumps({"step": 10, "best_metric": best}))
    if state is not None:
        (run / "run_status.json").write_text(json.dumps({"state": state, "step": 10, "reason": reason}))
    return run


def write_score(
    folder: Path, name: str, score: float, *, interval: Sequence[float] | None = None, samples: int = 500
) -> Path:
    """The score of the adapter of run `name`, or of `base`; its interval is 1 per cent to each side if not given."""
    scores = folder / "scores" / name
    scores.mkdir(parents=True)
    low, high = interval or (score - 1, score + 1)
    content = {"score": score, "n": samples, "confidence_interval": [low, high], "metric": "anything"}
    (scores / "results.json").write_text(json.dumps(content))
    return scores


def write_scored(folder: Path, name: str, score: float, **keywords: Any) -> None:
    """A finished run and its score."""
    write_run(folder, name)
    write_score(folder, name, score, **keywords)
