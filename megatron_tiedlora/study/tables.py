"""Makes the paper's Table 2 and Table 3 from studies of one task each: as CSV records, Markdown and LaTeX.

Scores are means over the seeds with the 95 % intervals of `estimates`, and so are the differences to LoRA: to LoRA's
cell in the paper's sections, and to LoRA at the same rank in the section of all ranks. Table 3 has the differences of
LoRA on one layer to the tied method, and of the tied method to the best layer.

P% is a method's number of trained parameters in per cent of LoRA's number at LoRA's best rank. The average decline of a
method is 100 (mean of LoRA's scores - mean of the method's scores) / mean of LoRA's scores. Means are over the tasks,
and LoRA is at its best rank. Only this definition matches the paper's values for tl6 at LoRA's best rank. For
GPT-2B-001 the paper states 1.95 %, and the scores in its Table 2 give 1.956 %. For LLaMA-2 7B it states 1.36 %, and the
scores give 1.300 %. The mean of the declines of all tasks would be 5.07 and 1.63 %. For a single task, the decline is
in per cent of LoRA's score.

A `Table` has the cells of the Markdown and the LaTeX file, which are made from the records of the CSV file. The CSV
files have unrounded numbers and one line per table cell. The first columns are the same as in the package's CSV
files with the paper's scores. A study is shown with the paper's scores for the same model, task and metric.
"""

import csv
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from itertools import product
from typing import Any

from megatron_tiedlora.base import messages, presets, shapes
from megatron_tiedlora.base.methods import METHOD_NAMES, find_method
from megatron_tiedlora.base.output_folder import last_name
from megatron_tiedlora.model.families import shape_from_hf
from megatron_tiedlora.study.estimates import Estimate, averaged, difference
from megatron_tiedlora.study.record import BASE_NAME, SINGLE_LAYER_TIED, BaseRecord, Point, Result, Study, rate_text

TableRow = Mapping[str, Any]  # a line of a CSV file by its columns; a missing value is unknown

# The paper's numbers --------------------------------------------------------------------------------------------------

LORA_RANK, BEST_RANK, EVERY_RANK = "rank_of_best_lora", "best_rank", "every_rank"
TABLE3_MODEL, TABLE3_RANK = "llama2-7b", 16
MODEL_TITLES = {"llama2-7b": "LLaMA-2 7B", "gpt-2b-001": "GPT-2B-001"}
EXACT_MATCH = ("squad", "gsm8k", "exact_match")  # our names for the paper's em; its other metrics keep their names


def paper_model(name: str, shape: shapes.ModelShape) -> str | None:
    """Return the paper's model that has this shape or, for GPT-2B-001, this name; None if no model matches."""
    for title in MODEL_TITLES:
        if shape == shape_from_hf(presets.PRESETS[title], source=title):
            return title
    return "gpt-2b-001" if last_name(name).lower() == "gpt-2b-001" else None


def table2_cell(base: BaseRecord, section: str, method: str) -> TableRow:
    """Return the paper's values for a method by column; {} if there are none. LoRA is only in the first section."""
    key = {"model": base.paper_model, "section": section, "method": method, **_task_and_metric(base)}
    for row in _rows("table2.csv"):
        if key.items() <= row.items():
            numbers = {"paper_score": float(row["score"]), "paper_rank": int(row["rank"])}
            return {**numbers, "paper_params_percent": float(row["params_percent_of_best_lora"])}
    return {}


def _task_and_metric(base: BaseRecord) -> dict[str, str]:
    return {"task": base.task, "metric": "em" if base.metric in EXACT_MATCH else base.metric}


@cache
def _rows(name: str) -> list[dict[str, str]]:
    text = resources.files("megatron_tiedlora.study").joinpath("data", name).read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))


LORA, AVERAGE = "lora", "average"
SECTION_TITLES = {
    LORA_RANK: "All methods at LoRA's best rank",
    BEST_RANK: "Each method at its own best rank",
    EVERY_RANK: "Each method at every rank, compared with LoRA at the same rank",
}
METRIC_TITLES = {
    **dict.fromkeys(EXACT_MATCH, "EM"),
    **{"squad_f1": "F1", "rougeL": "RougeL", "bleu": "BLEU", "accuracy_loglikelihood": "accuracy"},
}
NONE, INCOMPLETE = "-", "*"
_SCORE = ("score", "low", "high", "samples", "seeds", "spread")
_DIFFERENCE = ("difference", "difference_low", "difference_high")
_OF_SEEDS = ("seeds", "spread", *_DIFFERENCE, "validation")
TABLE2_COLUMNS: Sequence[str] = (
    *("model", "section", "method", "task", "metric", "score", "rank", "params_percent_of_best_lora"),
    *("low", "high", "samples", "decline_percent", "learning_rate", "trained_parameters", "all_rates_finished"),
    *("paper_score", "paper_rank", "paper_params_percent", "stopped_rates", *_OF_SEEDS),
)
TABLE3_COLUMNS: Sequence[str] = (
    *("model", "task", "metric", "rank", "adapter", "score", "low", "high", "samples"),
    *("learning_rate", "trained_parameters", "all_rates_finished", "paper_score", "stopped_rates", *_OF_SEEDS),
)


def metric_title(study: Study) -> str:
    """Return the name of the study's metric for tables."""
    return METRIC_TITLES.get(study.base.metric, study.base.metric)


def title(study: Study) -> str:
    """Return the title of a study: `task (metric)`."""
    return f"{study.base.task} ({metric_title(study)})"


def _record(
    study: Study, score: Estimate | None, result: Result | None = None, less: Estimate | None = None, **more: Any
) -> TableRow:
    """Return a record. `less` is the difference of the score to another cell's score."""
    found = {"model": study.base.model, "task": study.base.task, "metric": study.base.metric, **more}
    if result is not None:
        found |= {
            "learning_rate": None if result.learning_rate is None else rate_text(result.learning_rate),
            "trained_parameters": result.num_trained,
            "all_rates_finished": str(not result.missing).lower(),
            "stopped_rates": " ".join(dict.fromkeys(rate_text(run.learning_rate) for run, _ in result.stopped)),
            "validation": result.validation,
        }
    return {**found, **_numbers(score, _SCORE), **_numbers(less, _DIFFERENCE)}


def _numbers(one: Estimate | None, names: Sequence[str]) -> TableRow:
    values = () if one is None else (one.value, one.low, one.high, one.num_samples, one.num_seeds, one.spread)
    return dict(zip(names, values, strict=False))


# Table 2 ----------------------------------------------------------------------------------------------------------


def table2(studies: Sequence[Study]) -> list[TableRow]:
    """Return the records of Table 2: all methods at LoRA's best rank, the other methods at their own best ranks, and
    all ranks if there are several.

    The best rank is the rank with the best test score, as in the paper. If scores are equal, it is the smallest rank. A
    method has a record for each task. If there are several tasks and all have a score, there is also an average record.
    """
    of_base = {"section": BASE_NAME, "method": BASE_NAME}
    found = [_record(study, study.base_score, None, None, **of_base) for study in studies if study.base_score]
    points = dict.fromkeys(point for study in studies for point in study.grid.table)
    methods = [name for name in METHOD_NAMES if any(name == point.method for point in points)]
    best = [best_result(study, LORA) for study in studies]
    for method in methods:
        own = [lora and best_result(s, method, rank=lora.point.rank) for s, lora in zip(studies, best, strict=True)]
        found += _table2_row(studies, own, best, best, section=LORA_RANK, method=method)
    for method in (name for name in methods if name != LORA or methods == [LORA]):
        own = [best_result(study, method) for study in studies]
        found += _table2_row(studies, own, best, best, section=BEST_RANK, method=method)
    ranks = sorted({point.rank for point in points})
    for method, rank in product(methods, ranks if len(ranks) > 1 else ()):
        own, same = ([best_result(study, name, rank=rank) for study in studies] for name in (method, LORA))
        found += _table2_row(studies, own, best, same, section=EVERY_RANK, method=method, rank=rank)
    return found


Results = Sequence[Result | None]  # one for each study; None if there is no score


def _table2_row(
    studies: Sequence[Study], results: Results, best: Results, others: Results, **where: Any
) -> Iterator[TableRow]:
    """Yield the records of a method in one section. Yield nothing if no study has a score for it. `best` are LoRA's
    best results, and `others` the results of LoRA to which the differences are computed."""
    if not any(results):
        return
    section, method = where["section"], where["method"]
    changes: list[Estimate | None] = []
    for study, result, lora, other in zip(studies, results, best, others, strict=True):
        paper, more = table2_cell(study.base, section, method), dict[str, Any](where)
        if result is not None:
            more["rank"] = result.point.rank
            if lora is not None:
                more["params_percent_of_best_lora"] = 100 * result.num_trained / lora.num_trained
                more["decline_percent"] = decline([_value(lora)], [_value(result)])
        less = None if result is None or other in (None, result) else difference(result.scores, other.scores)
        changes.append(less)
        if result is not None or paper:
            yield _record(study, None if result is None else result.score, result, less, **more, **paper)
    if len(studies) > 1 and all(results):
        scores = [score for result in results if result is not None and (score := result.score) is not None]
        of_lora = [_value(lora) for lora in best if lora is not None]
        fall = decline(of_lora, [score.value for score in scores]) if len(of_lora) == len(scores) else None
        mean_change = averaged([one for one in changes if one is not None]) if all(changes) else None
        own = {"model": studies[0].base.model, **where, "task": AVERAGE, "decline_percent": fall}
        yield {**own, **_numbers(averaged(scores), _SCORE), **_numbers(mean_change, _DIFFERENCE)}


def _value(result: Result) -> float:
    assert result.score is not None
    return result.score.value


def best_result(study: Study, method: str, *, rank: int | None = None) -> Result | None:
    """Return the method's result with the best test score, at `rank` or at any rank; None if there is no score."""
    found = [r for r in study.table_results if r.point.method == method and rank in (None, r.point.rank)]
    return max(found, key=lambda r: (_value(r), -r.point.rank)) if found else None


def decline(lora: Sequence[float], scores: Sequence[float]) -> float | None:
    """Return the decline from LoRA's mean score to the mean of `scores`, in per cent; None if LoRA's mean is 0."""
    return 100 * (sum(lora) - sum(scores)) / sum(lora) if sum(lora) > 0 else None


def mean_base(studies: Sequence[Study]) -> float | None:
    """Return the mean score of the base model over the tasks; None if a task has no score."""
    values = [study.base_score.value for study in studies if study.base_score is not None]
    return sum(values) / len(values) if len(values) == len(studies) else None


def tensors_text(method: str) -> str:
    """Return which tensors a method ties and freezes, such as `A tied; B tied, frozen; u, v`. Omit frozen u and v."""
    spec = find_method(method)

    def state(name: str) -> str:
        factor = spec.factor(name)
        shared = {"all": "tied", "one": "per layer"}.get(str(factor.shared_by), "tied in groups of layers")
        return shared + ("" if factor.trained else ", frozen")

    both = state("A") == state("B")
    parts = [f"A, B {state('A')}"] if both else [f"A {state('A')}", f"B {state('B')}"]
    scales = [name for name in ("u", "v") if spec.factor(name).trained]
    return "; ".join(parts + ([", ".join(scales)] if scales else []))


def table2_layout(studies: Sequence[Study]) -> "Table":
    """Return Table 2 for readers."""
    records, several = table2(studies), len(studies) > 1
    of_paper = {record["task"] for record in records if "paper_score" in record}
    header = ["method", "tensors"]
    for study in studies:
        header += [title(study), "95 % interval", "r", "P%", "decline %", "- LoRA (95 % interval)"]
        header += ["paper", "r", "P%"] if study.base.task in of_paper else []
    header += ["mean score", "average decline %", "- LoRA (95 % interval)"] if several else []
    sections = list[tuple[str, list[list[str]]]]()
    for section, heading in SECTION_TITLES.items():
        rows = dict.fromkeys(_row_of(record) for record in records if record["section"] == section)
        with_base = [(BASE_NAME, None)] if rows and any(study.base_score for study in studies) else []
        sections += [(heading, [])] if rows else []
        for row in (*with_base, *rows):
            cells = [row[0], "no adapter" if row[0] == BASE_NAME else tensors_text(row[0])]
            own = (r for r in records if _row_of(r) == row and r["section"] in (section, BASE_NAME))
            by_task = {record["task"]: record for record in own}
            for study in studies:
                cells += _cells(by_task.get(study.base.task, {}), with_paper=study.base.task in of_paper)
            mean = {"score": mean_base(studies)} if row[0] == BASE_NAME else by_task.get(AVERAGE, {})
            of_mean = [*(_number(mean.get(name)) for name in ("score", "decline_percent")), _difference_text(mean)]
            sections[-1][1].append(cells + (of_mean if several else []))
    heading = f"Table 2: {last_name(studies[0].base.model)} on {', '.join(title(study) for study in studies)}"
    missing = [] if sections else ["No method has a score yet.", ""]
    return Table(heading, header, sections, (*missing, *_notes2(studies, records)), 2)


def _row_of(record: TableRow) -> tuple[str, int | None]:
    """Return the row of a record in its section: the method, and the rank in the section of all ranks."""
    return record["method"], record["rank"] if record["section"] == EVERY_RANK else None


def _cells(record: TableRow, *, with_paper: bool) -> list[str]:
    """Return the table cells of a task: score, interval, rank, P%, decline and difference, then the paper's score, rank
    and P%."""
    ranks = [str(record.get(name, NONE)) for name in ("rank", "paper_rank")]
    shares = [_number(record.get(name), 1) for name in ("params_percent_of_best_lora", "paper_params_percent")]
    decline_percent, paper_score = (_number(record.get(name)) for name in ("decline_percent", "paper_score"))
    cells = [*_score_texts(record), ranks[0], shares[0], decline_percent, _difference_text(record)]
    return cells + ([paper_score, ranks[1], shares[1]] if with_paper else [])


def _score_texts(record: TableRow) -> tuple[str, str]:
    """Return a score with its spread, and its interval. A `*` means that not all rates and seeds are finished."""
    if "score" not in record:
        return NONE, NONE
    mark = INCOMPLETE if record.get("all_rates_finished") == "false" else ""
    spread = "" if record["spread"] is None else f" ± {record['spread']:.2f}"
    return _number(record["score"]) + spread + mark, f"{record['low']:.2f} to {record['high']:.2f}"


def _difference_text(record: TableRow) -> str:
    numbers = [_number(record.get(name)) for name in _DIFFERENCE]
    return "{} ({} to {})".format(*numbers) if "difference" in record else NONE


def _notes2(studies: Sequence[Study], records: Sequence[TableRow]) -> list[str]:
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
        if not any(result.point.method == LORA for result in study.table_results):
            notes.append(f"- {study.base.task}: LoRA has no score, so nothing can be compared with it.")
        ranks: dict[str, list[str]] = {}
        for point in study.grid.table:
            if study.results[point].score is None:
                ranks.setdefault(point.method, []).append(str(point.rank))
        if ranks:
            names = "; ".join(f"{method} at r {', '.join(missing)}" for method, missing in ranks.items())
            notes.append(f"- {study.base.task}: no score (yet) of {names}.")
    if any("paper_score" in record for record in records):
        models = {MODEL_TITLES[s.base.paper_model] for s in studies if s.base.paper_model is not None}
        notes.append(f"- paper: the published numbers for {', '.join(sorted(models))}, identified by shape or name.")
    return [*notes, *_study_notes([(study, study.grid.table) for study in studies], "LoRA", records)]


# Table 3 ----------------------------------------------------------------------------------------------------------


def table3(studies: Sequence[Study]) -> list[TableRow]:
    """Return the records of Table 3: LoRA on single layers, and the tied method at the same rank."""
    found = []
    for study in studies:
        rows = _rows("table3.csv") if study.base.paper_model == TABLE3_MODEL else []
        published = next((row for row in rows if _task_and_metric(study.base).items() <= row.items()), {})
        results = [study.results[point] for point in study.grid.table3]
        layers = [result for result in results if result.point.layer is not None and result.score is not None]
        tied = next((result for result in results if result.point.layer is None), None)
        for point in study.grid.table3:
            column = point.method if point.layer is None else f"layer_{point.layer}"
            paper = float(published[column]) if point.rank == TABLE3_RANK and column in published else None
            result, own = study.results[point], {"rank": point.rank, "adapter": column, "paper_score": paper}
            other = tied if point.layer is not None else max(layers, key=_value, default=None)
            less = None if other is None else difference(result.scores, other.scores)
            found.append(_record(study, result.score, result, less, **own))
    return found


def table3_layout(studies: Sequence[Study]) -> "Table":
    """Return Table 3 for readers, with a row of scores and a row of differences per task. A row of the paper's scores
    follows if there are any."""
    records = table3(studies)
    layers = {record["adapter"] for record in records if record["adapter"].startswith("layer_")}
    columns = sorted(layers, key=lambda name: int(name[6:]))
    columns += sorted({record["adapter"] for record in records} - layers)
    body, notes, rows = [], [], [study for study in studies if study.grid.table3]
    for study in rows:
        own = {record["adapter"]: record for record in records if record["task"] == study.base.task}
        texts = {name: "{} ({})".format(*_score_texts(one)) if "score" in one else NONE for name, one in own.items()}
        body.append([title(study), *(texts.get(name, "") for name in columns)])
        if any("difference" in record for record in own.values()):
            changes = (_difference_text(own[name]) if name in own else "" for name in columns)
            body.append([f"{title(study)}, difference", *changes])
        if any(record["paper_score"] is not None for record in own.values()):
            published = (_number(own[name]["paper_score"]) if name in own else "" for name in columns)
            body.append(["the paper", *published])
        (rank, *_), counts = ([*{one[key] for one in own.values()}] for key in ("rank", "trained_parameters"))
        each = f"rank {rank}, {' or '.join(f'{count:,}' for count in sorted(counts))} trained parameters each"
        notes.append(f"- {study.base.task}: {each}; scores in per cent with the 95 % interval.")
    names = f"{SINGLE_LAYER_TIED} (of {SINGLE_LAYER_TIED}: to the layer with the best score)"
    notes += _study_notes([(study, study.grid.table3) for study in rows], names, records)
    heading = f"Table 3: {last_name(studies[0].base.model)}, LoRA on one layer and a tied pair on all"
    return Table(heading, ["task", *(name.replace("_", " ") for name in columns)], [("", body)], notes)


# Both -------------------------------------------------------------------------------------------------------------


def _study_notes(points: Sequence[tuple[Study, Sequence[Point]]], other: str, records: Sequence[TableRow]) -> list[str]:
    """Return notes on intervals, missing runs, runs that --halving stopped, and data and prompts that may differ from
    the paper's. The differences in the table are to `other`."""
    several = max((record["seeds"] for record in records if record.get("seeds")), default=1) > 1
    notes = [
        "- Intervals are over test rows (resampled) and seeds (Student's t). ±: standard deviation over the seeds."
        if several
        else "- Intervals are over the test rows. With one seed they do not show how much another seed would change."
    ]
    if any("difference" in record for record in records):
        notes.append(f"- Differences are to {other}, paired by test row" + (" and seed." if several else "."))
    if any(record.get("all_rates_finished") == "false" for record in records):
        notes.append(f"- {INCOMPLETE}: not all learning rates{' and seeds' if several else ''} are finished.")
    for study, own in points:
        failed = [f"{run.name} ({why})" for point in own for run, why in study.results[point].missing if why]
        notes += [f"- {study.base.task}: no result of {'; '.join(failed)}."] if failed else []
        stopped = [f"  - {run.name}: {why}" for point in own for run, why in study.results[point].stopped]
        line = f"- {study.base.task}: --halving stopped these runs before their last step; each result is from the best"
        notes += [f"{line} step.", *stopped] if stopped else []
    return notes + [
        f"- {study.base.task}: the paper's numbers are for its own rows and prompts;"
        f" {', '.join(f'--{n}' for n in study.own_rows)} may make them differ here."
        for study, _ in points
        if study.own_rows and study.base.paper_model is not None
    ]


_SPECIAL = {**{char: f"\\{char}" for char in "&%$#_{}"}, "\\": r"\textbackslash{}", "±": r"$\pm$"}
_LATEX = str.maketrans({**_SPECIAL, "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"})


@dataclass(frozen=True)
class Table:
    """The cells of a table for readers, and the texts around them.

    Attributes:
        sections: the heading, which may be empty, and the rows of each section.
        notes: lines of a Markdown list.
        num_texts: the number of columns, from the left, that contain words.
    """

    title: str
    header: Sequence[str]
    sections: Sequence[tuple[str, Sequence[Sequence[str]]]]
    notes: Sequence[str]
    num_texts: int = 1

    def markdown(self) -> str:
        """Return the table as Markdown."""
        lines = [f"# {self.title}", ""]
        for heading, rows in self.sections:
            cells = (self.header, ["---"] * len(self.header), *rows)
            lines += [*([f"## {heading}", ""] if heading else []), *(f"| {' | '.join(line)} |" for line in cells), ""]
        return "".join(f"{messages.printable(line)}\n" for line in (*lines, *self.notes))

    def latex(self) -> str:
        r"""Return the table for LaTeX with \usepackage{booktabs}; its cells are those of the Markdown."""
        columns = "l" * self.num_texts + "r" * (len(self.header) - self.num_texts)
        lines = [r"\begin{table}", rf"\caption{{{latex_text(self.title)}}}", rf"\begin{{tabular}}{{{columns}}}"]
        lines += [r"\toprule", _latex_row(self.header)]
        for heading, rows in self.sections:
            above = [rf"\multicolumn{{{len(columns)}}}{{l}}{{\emph{{{latex_text(heading)}}}}} \\", r"\midrule"]
            lines += [r"\midrule", *(above if heading else []), *map(_latex_row, rows)]
        notes = (rf"{latex_text(line.strip().removeprefix('- '))}\par" for line in self.notes if line)
        lines += [r"\bottomrule", r"\end{tabular}", r"\par\footnotesize", *notes, r"\end{table}"]
        return "".join(f"{line}\n" for line in lines)


def latex_text(text: str) -> str:
    """Return plain text for LaTeX: special characters escaped, a minus before a number in math mode."""
    escaped = messages.printable(text).translate(_LATEX).replace("--", "-{}-")
    return re.sub(r"(?<![\w}-])-(?=\d)", "$-$", escaped)


def _latex_row(cells: Sequence[str]) -> str:
    return " & ".join(map(latex_text, cells)) + r" \\"


def _number(value: float | None, digits: int = 2) -> str:
    return NONE if value is None else f"{round(value, digits) + 0.0:.{digits}f}"  # no -0.00
