"""The numbers that the paper published (its Tables 2 and 3), and which studies are comparable with them."""

from __future__ import annotations

import csv
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources

from megatron_tiedlora.base.shapes import ModelShape
from megatron_tiedlora.config.presets import PRESETS
from megatron_tiedlora.model.families import shape_from_hf

LORA_RANK, BEST_RANK = "rank_of_best_lora", "best_rank"
TABLE3_MODEL, TABLE3_RANK = "llama2-7b", 16
MODEL_TITLES = {"llama2-7b": "LLaMA-2 7B", "gpt-2b-001": "GPT-2B-001"}
# The paper's name of a metric -> our metrics that measure the same.
METRICS = {
    "em": frozenset({"squad", "gsm8k", "exact_match"}),
    "rougeL": frozenset({"rougeL"}),
    "accuracy": frozenset({"accuracy"}),
    "bleu": frozenset({"bleu"}),
}


@dataclass(frozen=True)
class PaperCell:
    """A cell of Table 2: score in per cent, rank, and parameters in per cent of LoRA's at LoRA's best rank."""

    score: float
    rank: int
    params_percent: float


def paper_model(name: str, shape: ModelShape) -> str | None:
    """The paper's model that a base is, if any: by its shape, or GPT-2B-001 by its name without folders."""
    for title in MODEL_TITLES:
        if shape == shape_from_hf(PRESETS[title], source=title):
            return title
    return "gpt-2b-001" if name.rstrip("/").rpartition("/")[2].lower() == "gpt-2b-001" else None


def table2_cell(model: str | None, section: str, method: str, task: str, metric: str) -> PaperCell | None:
    """The paper's cell for a method, or None if it has none. LoRA is in the first section only."""
    found = _table2().get((model or "", section, method, task))
    return found[1] if found is not None and metric in METRICS[found[0]] else None


def table2_points(model: str | None, method: str, task: str, metric: str) -> dict[int, float]:
    """All scores of a method on a task in the paper's Table 2, by rank."""
    cells = (table2_cell(model, section, method, task, metric) for section in (LORA_RANK, BEST_RANK))
    return dict(sorted((cell.rank, cell.score) for cell in cells if cell is not None))


def table3_scores(model: str | None, task: str, metric: str) -> dict[str, float]:
    """The paper's row of Table 3, by column (`layer_8`, `tl5`); {} if it has none."""
    found = _table3().get(task) if model == TABLE3_MODEL else None
    return found[1] if found is not None and metric in METRICS[found[0]] else {}


@functools.cache
def _table2() -> Mapping[tuple[str, str, str, str], tuple[str, PaperCell]]:
    return {
        (row["model"], row["section"], row["method"], row["task"]): (
            row["metric"],
            PaperCell(float(row["score"]), int(row["rank"]), float(row["params_percent_of_best_lora"])),
        )
        for row in _rows("table2.csv")
    }


@functools.cache
def _table3() -> Mapping[str, tuple[str, dict[str, float]]]:
    return {
        row["task"]: (row["metric"], {k: float(v) for k, v in row.items() if k not in ("task", "metric")})
        for row in _rows("table3.csv")
    }


def _rows(name: str) -> list[dict[str, str]]:
    text = resources.files("megatron_tiedlora.study").joinpath("data", name).read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))
