"""The paper's Table 2 and Table 3 as values, from studies of one task each; text.py writes them.

P% is a method's trained parameters in per cent of LoRA's at LoRA's best rank. The average decline of a method against
LoRA is 100 (mean of LoRA's scores - mean of its scores) / mean of LoRA's scores over the tasks, with LoRA at its best
rank. Among the possible definitions only this one matches the paper's figures for tl6 at LoRA's best rank: 1.95 % with
GPT-2B-001 (the cells of its Table 2 give 1.956) and nearly 1.36 % with LLaMA-2 7B (they give 1.300). The mean of the
tasks' declines would be 5.07 and 1.63. For one task it is the decline in per cent of LoRA's score.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_tiedlora.base.methods import METHOD_NAMES, find_method
from megatron_tiedlora.study.grid import Point
from megatron_tiedlora.study.paper import BEST_RANK, LORA_RANK, TABLE3_RANK, PaperCell, table2_cell, table3_scores
from megatron_tiedlora.study.scores import Result, Study, TestScore

LORA = "lora"
BASE_ROW = "base"


@dataclass(frozen=True)
class Cell:
    """A method on a task: its result, P% and decline in per cent, and the paper's cell. Unknown values are None."""

    result: Result | None
    params_percent: float | None = None
    decline: float | None = None
    paper: PaperCell | None = None

    @property
    def score(self) -> TestScore | None:
        """The test score."""
        return None if self.result is None else self.result.score


@dataclass(frozen=True)
class Row:
    """A method's cells, one per task, with mean and average decline, which are None if a task has no score."""

    section: str
    method: str
    cells: tuple[Cell, ...]
    mean: float | None
    decline: float | None


def table2(studies: Sequence[Study]) -> list[Row]:
    """The rows of Table 2: all methods at LoRA's best rank, then each method but LoRA at its own best rank.

    The best rank has the best score on the test set, as in the paper. Of equal scores it is the smaller rank.
    """
    methods = [name for name in METHOD_NAMES if any(name == p.method for s in studies for p in s.grid.table)]
    rows = []
    for section in (LORA_RANK, BEST_RANK):
        for method in methods:
            if section == BEST_RANK and method == LORA and len(methods) > 1:
                continue
            cells = tuple(_cell(study, section, method) for study in studies)
            rows.append(Row(section, method, cells, *_averages(studies, cells)))
    return [row for row in rows if any(cell.result is not None for cell in row.cells)]


def _cell(study: Study, section: str, method: str) -> Cell:
    base, lora = study.base, best_result(study, LORA)
    paper = table2_cell(base.paper_model, section, method, base.task, base.metric)
    if section == LORA_RANK:
        result = None if lora is None else best_result(study, method, rank=lora.point.rank)
    else:
        result = best_result(study, method)
    if result is None or lora is None:
        return Cell(result, paper=paper)
    share = 100 * result.num_trained / lora.num_trained
    return Cell(result, share, decline([_value(lora)], [_value(result)]), paper)


def _value(result: Result) -> float:
    assert result.score is not None
    return result.score.value


def best_result(study: Study, method: str, *, rank: int | None = None) -> Result | None:
    """The method's result with the best test score, at `rank` or at any rank; None if there is no score."""
    found = [r for r in study.table_results if r.point.method == method and rank in (None, r.point.rank)]
    return max(found, key=lambda r: (_value(r), -r.point.rank)) if found else None


def decline(lora: Sequence[float], scores: Sequence[float]) -> float | None:
    """The average decline of `scores` against LoRA's on the same tasks, in per cent; None if LoRA's are all zero."""
    return 100 * (sum(lora) - sum(scores)) / sum(lora) if sum(lora) > 0 else None


def _averages(studies: Sequence[Study], cells: Sequence[Cell]) -> tuple[float | None, float | None]:
    if any(cell.result is None for cell in cells):
        return None, None
    scores = [_value(cell.result) for cell in cells if cell.result is not None]
    lora = [best_result(study, LORA) for study in studies]
    values = [_value(result) for result in lora if result is not None]
    return sum(scores) / len(scores), decline(values, scores) if len(values) == len(scores) else None


def mean_base(studies: Sequence[Study]) -> float | None:
    """The mean score of the base model over the tasks; None if one has none."""
    values = [study.base_score.value for study in studies if study.base_score is not None]
    return sum(values) / len(values) if len(values) == len(studies) else None


def tensors_text(method: str) -> str:
    """Which tensors a method trains, shares and freezes: `A tied; B tied, frozen; u, v`. Frozen u, v are omitted."""
    spec = find_method(method)

    def state(name: str) -> str:
        factor = spec.factor(name)
        shared = {"all": "tied", "one": "per layer"}.get(str(factor.shared_by), "tied in groups of layers")
        return shared + ("" if factor.trained else ", frozen")

    both = state("A") == state("B")
    parts = [f"A, B {state('A')}"] if both else [f"A {state('A')}", f"B {state('B')}"]
    scales = [name for name in ("u", "v") if spec.factor(name).trained]
    return "; ".join(parts + ([", ".join(scales)] if scales else []))


# Table 3 ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SingleRow:
    """A row of Table 3: LoRA on single layers in one study, and the tied method at the same rank.

    Attributes:
        results, paper: by column (`layer_8` or the tied method), the results and the paper's scores.
    """

    study: Study
    rank: int
    results: dict[str, Result]
    paper: dict[str, float]


def table3(studies: Sequence[Study]) -> list[SingleRow]:
    """The rows of Table 3, one per study that trained single layers."""
    rows = []
    for study in studies:
        base, rival = study.base, study.grid.rival
        if rival is not None:
            results = {column(point): study.result(point) for point in (*study.grid.single, rival)}
            paper = table3_scores(base.paper_model, base.task, base.metric) if rival.rank == TABLE3_RANK else {}
            published = {name: score for name, score in paper.items() if name in results}
            rows.append(SingleRow(study, rival.rank, results, published))
    return rows


def column(point: Point) -> str:
    """The column of a point in Table 3."""
    return point.method if point.layer is None else f"layer_{point.layer}"
