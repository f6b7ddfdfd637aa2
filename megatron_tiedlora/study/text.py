"""The tables as Markdown for readers, and as CSV with unrounded numbers and one cell per line.

table2.csv and table3.csv begin with the same columns as the package's files of the paper's numbers.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from megatron_tiedlora.base.errors import printable
from megatron_tiedlora.base.wording import markdown_lines
from megatron_tiedlora.study.grid import Point, rate_text
from megatron_tiedlora.study.paper import BEST_RANK, LORA_RANK, MODEL_TITLES
from megatron_tiedlora.study.scores import Result, Study, TestScore
from megatron_tiedlora.study.tables import BASE_ROW, Cell, Row, SingleRow, mean_base, table2, table3, tensors_text

SECTION_TITLES = {LORA_RANK: "All methods at LoRA's best rank", BEST_RANK: "Each method at its own best rank"}
METRIC_TITLES = {
    "exact_match": "EM",
    "gsm8k": "EM",
    "squad": "EM",
    "squad_f1": "F1",
    "rougeL": "RougeL",
    "bleu": "BLEU",
    "accuracy": "accuracy",
    "accuracy_loglikelihood": "accuracy",
}
NONE, INCOMPLETE = "-", "*"


def metric_title(study: Study) -> str:
    """The metric as tables name it."""
    return METRIC_TITLES.get(study.base.metric, study.base.metric)


def title(study: Study) -> str:
    """`task (metric)`."""
    return f"{study.base.task} ({metric_title(study)})"


def model_title(study: Study) -> str:
    """The base model's name as the user gave it, without its folder."""
    return study.base.model.rstrip("/").rsplit("/", 1)[-1]


def _text(lines: Iterable[str]) -> str:
    return "".join(f"{printable(line)}\n" for line in lines)


# Table 2 ----------------------------------------------------------------------------------------------------------


def table2_markdown(studies: Sequence[Study]) -> str:
    """Table 2 as Markdown."""
    rows, several = table2(studies), len(studies) > 1
    with_paper = [any(row.cells[i].paper is not None for row in rows) for i in range(len(studies))]
    header = ["method", "tensors"]
    for study, paper in zip(studies, with_paper, strict=True):
        header += [title(study), "95 % interval", "r", "P%", "decline %"] + (["paper", "r", "P%"] if paper else [])
    header += ["mean score", "average decline %"] if several else []
    lines = [f"# Table 2: {model_title(studies[0])} on {', '.join(title(study) for study in studies)}", ""]
    sections = [section for section in SECTION_TITLES if any(row.section == section for row in rows)]
    if not sections:
        lines += ["No method has a score yet.", ""]
    for section in sections:
        lines += [f"## {SECTION_TITLES[section]}", ""]
        body = [_base_row(studies, with_paper)] if any(study.base_score for study in studies) else []
        for row in (row for row in rows if row.section == section):
            cells = [row.method, tensors_text(row.method)]
            for cell, paper in zip(row.cells, with_paper, strict=True):
                cells += _cell_texts(cell) + (_paper_texts(cell) if paper else [])
            body.append(cells + ([_number(row.mean), _number(row.decline)] if several else []))
        lines += [*markdown_lines(header, body), ""]
    return _text([*lines, *_notes2(studies, rows, with_paper=any(with_paper))])


def _cell_texts(cell: Cell) -> list[str]:
    if cell.result is None or cell.score is None:
        return [NONE] * 5
    scores, rank = _score_texts(cell.score, cell.result), str(cell.result.point.rank)
    return [*scores, rank, _number(cell.params_percent, 1), _number(cell.decline)]


def _score_texts(score: TestScore | None, result: Result | None = None) -> tuple[str, str]:
    """A score, with a mark if its result is not complete, and its interval."""
    if score is None:
        return NONE, NONE
    mark = INCOMPLETE if result is not None and result.missing else ""
    return _number(score.value) + mark, f"{score.low:.2f} to {score.high:.2f}"


def _paper_texts(cell: Cell) -> list[str]:
    paper = cell.paper
    return [NONE] * 3 if paper is None else [_number(paper.score), str(paper.rank), _number(paper.params_percent, 1)]


def _base_row(studies: Sequence[Study], with_paper: Sequence[bool]) -> list[str]:
    cells = [BASE_ROW, "no adapter"]
    for study, paper in zip(studies, with_paper, strict=True):
        cells += [*_score_texts(study.base_score), *[NONE] * (6 if paper else 3)]
    if len(studies) > 1:
        cells += [_number(mean_base(studies)), NONE]
    return cells


def _notes2(studies: Sequence[Study], rows: Sequence[Row], *, with_paper: bool) -> list[str]:
    sizes = ", ".join(f"{s.base_score.num_samples:,} of {s.base.task}" for s in studies if s.base_score is not None)
    notes = [
        f"- Scores are on the test set ({sizes} rows), in per cent." if sizes else "- Scores are in per cent.",
        "- The learning rate of each score is the better one on validation; ranks are compared on the test set, as in"
        " the paper.",
        "- P%: trained parameters in per cent of LoRA's at LoRA's best rank.",
        "- decline %: 100 (LoRA - method) / LoRA, LoRA at its best rank"
        + ("; the average decline is that of the mean scores." if len(studies) > 1 else "."),
    ]
    for study in studies:
        if not any(result.point.method == "lora" for result in study.table_results):
            notes.append(f"- {study.base.task}: LoRA has no score, so nothing can be compared with it.")
    if any(cell.result is not None and cell.result.missing for row in rows for cell in row.cells):
        notes.append(f"- {INCOMPLETE}: not all learning rates are finished.")
    for study in studies:
        ranks: dict[str, list[str]] = {}
        for point in study.grid.table:
            if study.result(point).score is None:
                ranks.setdefault(point.method, []).append(str(point.rank))
        if ranks:
            names = "; ".join(f"{method} at r {', '.join(missing)}" for method, missing in ranks.items())
            notes.append(f"- {study.base.task}: no score (yet) of {names}.")
    if with_paper:
        models = {MODEL_TITLES[s.base.paper_model] for s in studies if s.base.paper_model is not None}
        notes.append(f"- paper: the published numbers for {', '.join(sorted(models))}, told by shape or name.")
    stopped = [line for study in studies for line in _stopped_notes(study, study.grid.table)]
    return [*notes, *stopped, *_other_rows_notes(studies)]


def _stopped_notes(study: Study, points: Iterable[Point]) -> list[str]:
    """Notes on the learning rates of `points` that --halving stopped."""
    stopped = [found for point in points for found in study.result(point).stopped]
    note = f"- {study.base.task}: --halving stopped these runs before their last step; each counts with its best step"
    return [f"{note}.", *(f"  - {run.name}: {why}" for run, why in stopped)] if stopped else []


def _other_rows_notes(studies: Sequence[Study]) -> list[str]:
    """Notes for studies whose rows or prompts may differ from the paper's."""
    return [
        f"- {study.base.task}: the paper's numbers are for its own rows and prompts;"
        f" {', '.join(f'--{n}' for n in study.own_rows)} may make them differ here."
        for study in studies
        if study.own_rows and study.base.paper_model is not None
    ]


def table2_csv(studies: Sequence[Study]) -> str:
    """Table 2 as CSV, with one cell per line."""
    columns = [
        *("model", "section", "method", "task", "metric", "score", "rank", "params_percent_of_best_lora"),
        *("low", "high", "samples", "decline_percent", "learning_rate", "trained_parameters", "all_rates_finished"),
        *("paper_score", "paper_rank", "paper_params_percent", "stopped_rates"),
    ]
    lines = [
        {**_study_values(study), "section": BASE_ROW, "method": BASE_ROW, **_score_values(study.base_score)}
        for study in studies
        if study.base_score is not None
    ]
    for row in table2(studies):
        where = {"section": row.section, "method": row.method}
        for study, cell in zip(studies, row.cells, strict=True):
            if cell.result is not None or cell.paper is not None:
                lines.append({**_study_values(study), **where, **_cell_values(cell)})
        if len(studies) > 1 and row.mean is not None:
            mean = {"task": "average", "score": row.mean, "decline_percent": row.decline}
            lines.append({"model": studies[0].base.model, **where, **mean})
    return _csv(columns, lines)


def _cell_values(cell: Cell) -> dict[str, Any]:
    values: dict[str, Any] = {}
    if cell.result is not None and cell.score is not None:
        values = {**_result_values(cell.result), "rank": cell.result.point.rank, "decline_percent": cell.decline}
        values["params_percent_of_best_lora"] = cell.params_percent
    if (paper := cell.paper) is not None:
        values |= {"paper_score": paper.score, "paper_rank": paper.rank, "paper_params_percent": paper.params_percent}
    return values


# Table 3 ----------------------------------------------------------------------------------------------------------


def table3_markdown(studies: Sequence[Study]) -> str:
    """Table 3 as Markdown: a row per task, with the paper's row below it if there is one."""
    rows = table3(studies)
    lines = [f"# Table 3: {model_title(studies[0])}, LoRA on one layer and a tied pair on all", ""]
    columns = _columns(rows)
    body = []
    for row in rows:
        scores = (_single_text(row.results[name]) if name in row.results else "" for name in columns)
        body.append([title(row.study), *scores])
        if row.paper:
            published = (_number(row.paper.get(name)) if name in row.results else "" for name in columns)
            body.append(["the paper", *published])
    header = ["task", *(name.replace("_", " ") for name in columns)]
    notes = []
    for row in rows:
        counts = sorted({result.num_trained for result in row.results.values()})
        notes.append(
            f"- {row.study.base.task}: rank {row.rank}, {' or '.join(f'{count:,}' for count in counts)} trained"
            " parameters each; scores in per cent with the 95 % interval."
        )
    if any(result.missing for row in rows for result in row.results.values()):
        notes.append(f"- {INCOMPLETE}: not all learning rates are finished.")
    for row in rows:
        notes += _stopped_notes(row.study, [result.point for result in row.results.values()])
    notes += _other_rows_notes([row.study for row in rows])
    return _text([*lines, *markdown_lines(header, body), "", *notes])


def _columns(rows: Sequence[SingleRow]) -> list[str]:
    names = {name for row in rows for name in row.results}
    layers = sorted((name for name in names if name.startswith("layer_")), key=lambda name: int(name[6:]))
    return layers + sorted(names.difference(layers))


def _single_text(result: Result) -> str:
    return NONE if result.score is None else "{} ({})".format(*_score_texts(result.score, result))


def table3_csv(studies: Sequence[Study]) -> str:
    """Table 3 as CSV, with one cell per line."""
    columns = ["model", "task", "metric", "rank", "adapter", "score", "low", "high", "samples"]
    columns += ["learning_rate", "trained_parameters", "all_rates_finished", "paper_score", "stopped_rates"]
    lines = []
    for row in table3(studies):
        for name, result in row.results.items():
            own = {"rank": row.rank, "adapter": name, "paper_score": row.paper.get(name)}
            lines.append({**_study_values(row.study), **own, **_result_values(result)})
    return _csv(columns, lines)


# Both -------------------------------------------------------------------------------------------------------------


def _number(value: float | None, digits: int = 2) -> str:
    return NONE if value is None else f"{round(value, digits) + 0.0:.{digits}f}"  # no -0.00


def _csv(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """The rows with these columns; what a row does not have is empty."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def _study_values(study: Study) -> dict[str, Any]:
    return {"model": study.base.model, "task": study.base.task, "metric": study.base.metric}


def _score_values(score: TestScore | None) -> dict[str, Any]:
    if score is None:
        return {}
    return {"score": score.value, "low": score.low, "high": score.high, "samples": score.num_samples}


def _result_values(result: Result) -> dict[str, Any]:
    return {
        **_score_values(result.score),
        "learning_rate": None if result.run is None else rate_text(result.run.learning_rate),
        "trained_parameters": result.num_trained,
        "all_rates_finished": str(not result.missing).lower(),
        "stopped_rates": " ".join(rate_text(run.learning_rate) for run, _ in result.stopped),
    }
