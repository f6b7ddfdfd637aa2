"""Makes the paper's Table 2 and Table 3 from studies of one task each, as CSV records and as Markdown.

It also draws figures 2 and 3. They show scores by rank with 95 % intervals, and the paper's scores as hollow marks.

P% is a method's number of trained parameters in per cent of LoRA's number at LoRA's best rank. The average decline of a
method is 100 (mean of LoRA's scores - mean of the method's scores) / mean of LoRA's scores. Means are over the tasks,
and LoRA is at its best rank. Only this definition matches the paper's values for tl6 at LoRA's best rank. For
GPT-2B-001 the paper states 1.95 %, and the scores in its Table 2 give 1.956 %. For LLaMA-2 7B it states 1.36 %, and the
scores give 1.300 %. The mean of the declines of all tasks would be 5.07 and 1.63 %. For a single task, the decline is
in per cent of LoRA's score.

The CSV files have unrounded numbers and one line per table cell. The first columns are the same as in the package's CSV
files with the paper's scores. A study is shown with the paper's scores for the same model, task and metric.
"""

import csv
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import cache, partial
from importlib import resources
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

from megatron_tiedlora.base import files, messages, presets, shapes
from megatron_tiedlora.base.methods import METHOD_NAMES, find_method
from megatron_tiedlora.evaluation.results import Score
from megatron_tiedlora.model.families import shape_from_hf
from megatron_tiedlora.runtime.run_folder import plain_figures, save_figure
from megatron_tiedlora.study.record import BASE_NAME, BaseRecord, Point, Result, Study, rate_text

TableRow = Mapping[str, Any]  # a line of a CSV file by its columns; a missing value is unknown

# The paper's numbers --------------------------------------------------------------------------------------------------

LORA_RANK, BEST_RANK = "rank_of_best_lora", "best_rank"
TABLE3_MODEL, TABLE3_RANK = "llama2-7b", 16
MODEL_TITLES = {"llama2-7b": "LLaMA-2 7B", "gpt-2b-001": "GPT-2B-001"}
EXACT_MATCH = ("squad", "gsm8k", "exact_match")  # our names for the paper's em; its other metrics keep their names


def paper_model(name: str, shape: shapes.ModelShape) -> str | None:
    """Return the paper's model that has this shape or, for GPT-2B-001, this name; None if no model matches."""
    for title in MODEL_TITLES:
        if shape == shape_from_hf(presets.PRESETS[title], source=title):
            return title
    return "gpt-2b-001" if name.rstrip("/").rpartition("/")[2].lower() == "gpt-2b-001" else None


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
SECTION_TITLES = {LORA_RANK: "All methods at LoRA's best rank", BEST_RANK: "Each method at its own best rank"}
METRIC_TITLES = {
    **dict.fromkeys(EXACT_MATCH, "EM"),
    **{"squad_f1": "F1", "rougeL": "RougeL", "bleu": "BLEU", "accuracy_loglikelihood": "accuracy"},
}
NONE, INCOMPLETE = "-", "*"
TABLE2_COLUMNS = (
    *("model", "section", "method", "task", "metric", "score", "rank", "params_percent_of_best_lora"),
    *("low", "high", "samples", "decline_percent", "learning_rate", "trained_parameters", "all_rates_finished"),
    *("paper_score", "paper_rank", "paper_params_percent", "stopped_rates"),
)
TABLE3_COLUMNS = (
    *("model", "task", "metric", "rank", "adapter", "score", "low", "high", "samples"),
    *("learning_rate", "trained_parameters", "all_rates_finished", "paper_score", "stopped_rates"),
)


def metric_title(study: Study) -> str:
    """Return the name of the study's metric for tables."""
    return METRIC_TITLES.get(study.base.metric, study.base.metric)


def title(study: Study) -> str:
    """Return the title of a study: `task (metric)`."""
    return f"{study.base.task} ({metric_title(study)})"


def model_title(study: Study) -> str:
    """Return the last part of the base model's name."""
    return study.base.model.rstrip("/").rsplit("/", 1)[-1]


def _record(study: Study, score: Score | None, result: Result | None = None, **more: Any) -> TableRow:
    found = {"model": study.base.model, "task": study.base.task, "metric": study.base.metric, **more}
    if result is not None:
        found |= {
            "learning_rate": None if result.run is None else rate_text(result.run.learning_rate),
            "trained_parameters": result.num_trained,
            "all_rates_finished": str(not result.missing).lower(),
            "stopped_rates": " ".join(rate_text(run.learning_rate) for run, _ in result.stopped),
        }
    if score is not None:
        found |= {"score": score.value, "low": score.low, "high": score.high, "samples": score.num_samples}
    return found


# Table 2 ----------------------------------------------------------------------------------------------------------


def table2(studies: Sequence[Study]) -> list[TableRow]:
    """Return the records of Table 2: all methods at LoRA's best rank, then the other methods at their own best ranks.

    The best rank is the rank with the best test score, as in the paper. If scores are equal, it is the smallest rank. A
    method has a record for each task. If there are several tasks and all have a score, there is also an average record.
    """
    of_base = {"section": BASE_NAME, "method": BASE_NAME}
    found = [_record(study, study.base_score, None, **of_base) for study in studies if study.base_score is not None]
    methods = [name for name in METHOD_NAMES if any(name == p.method for s in studies for p in s.grid.table)]
    for section in SECTION_TITLES:
        for method in methods:
            if section == LORA_RANK or method != LORA or methods == [LORA]:
                found += _table2_row(studies, section, method)
    return found


def _table2_row(studies: Sequence[Study], section: str, method: str) -> Iterator[TableRow]:
    """Yield the records of a method in one section. Yield nothing if no study has a score for it."""
    best_lora, where = [best_result(study, LORA) for study in studies], {"section": section, "method": method}
    results = [best_result(study, method) for study in studies]
    if section == LORA_RANK:
        pairs = zip(studies, best_lora, strict=True)
        results = [lora and best_result(study, method, rank=lora.point.rank) for study, lora in pairs]
    if not any(results):
        return
    for study, result, lora in zip(studies, results, best_lora, strict=True):
        paper, more = table2_cell(study.base, section, method), dict[str, Any](where)
        if result is not None:
            more["rank"] = result.point.rank
            if lora is not None:
                more["params_percent_of_best_lora"] = 100 * result.num_trained / lora.num_trained
                more["decline_percent"] = decline([_value(lora)], [_value(result)])
        if result is not None or paper:
            yield _record(study, None if result is None else result.score, result, **more, **paper)
    if len(studies) > 1 and all(results):
        scores, of_lora = ([_value(one) for one in some if one is not None] for some in (results, best_lora))
        fall = decline(of_lora, scores) if len(of_lora) == len(scores) else None
        mean = {"score": sum(scores) / len(scores), "decline_percent": fall}
        yield {"model": studies[0].base.model, **where, "task": AVERAGE, **mean}


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


def table2_markdown(studies: Sequence[Study]) -> str:
    """Return Table 2 as Markdown."""
    records, several = table2(studies), len(studies) > 1
    of_paper = {record["task"] for record in records if "paper_score" in record}
    header = ["method", "tensors"]
    for study in studies:
        header += [title(study), "95 % interval", "r", "P%", "decline %"]
        header += ["paper", "r", "P%"] if study.base.task in of_paper else []
    header += ["mean score", "average decline %"] if several else []
    lines = [f"# Table 2: {model_title(studies[0])} on {', '.join(title(study) for study in studies)}", ""]
    sections = [name for name in SECTION_TITLES if any(record["section"] == name for record in records)]
    for section in sections:
        lines += [f"## {SECTION_TITLES[section]}", ""]
        methods = [BASE_NAME] if any(study.base_score for study in studies) else []
        methods += [record["method"] for record in records if record["section"] == section]
        body = []
        for method in dict.fromkeys(methods):
            cells = [method, "no adapter" if method == BASE_NAME else tensors_text(method)]
            by_task = {r["task"]: r for r in records if r["method"] == method and r["section"] in (section, BASE_NAME)}
            for study in studies:
                cells += _cells(by_task.get(study.base.task, {}), with_paper=study.base.task in of_paper)
            mean = {"score": mean_base(studies)} if method == BASE_NAME else by_task.get(AVERAGE, {})
            body.append(cells + ([_number(mean.get(name)) for name in ("score", "decline_percent")] if several else []))
        lines += [*messages.markdown_lines(header, body), ""]
    return _text([*lines, *([] if sections else ["No method has a score yet.", ""]), *_notes2(studies, records)])


def _cells(record: TableRow, *, with_paper: bool) -> list[str]:
    """Return the table cells of a task: score, interval, rank, P% and decline, then the paper's score, rank and P%."""
    ranks = [str(record.get(name, NONE)) for name in ("rank", "paper_rank")]
    shares = [_number(record.get(name), 1) for name in ("params_percent_of_best_lora", "paper_params_percent")]
    cells = [*_score_texts(record), ranks[0], shares[0], _number(record.get("decline_percent"))]
    return cells + ([_number(record.get("paper_score")), ranks[1], shares[1]] if with_paper else [])


def _score_texts(record: TableRow) -> tuple[str, str]:
    """Return a score and its interval as text. A `*` means that not all learning rates are finished."""
    if "score" not in record:
        return NONE, NONE
    mark = INCOMPLETE if record.get("all_rates_finished") == "false" else ""
    return _number(record["score"]) + mark, f"{record['low']:.2f} to {record['high']:.2f}"


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
    notes += _incomplete_notes(records)
    for study in studies:
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
    return [*notes, *_study_notes([(study, study.grid.table) for study in studies])]


# Table 3 ----------------------------------------------------------------------------------------------------------


def table3(studies: Sequence[Study]) -> list[TableRow]:
    """Return the records of Table 3: LoRA on single layers, and the tied method at the same rank."""
    found = []
    for study in studies:
        rows = _rows("table3.csv") if study.base.paper_model == TABLE3_MODEL else []
        published = next((row for row in rows if _task_and_metric(study.base).items() <= row.items()), {})
        for point in study.grid.table3:
            column = point.method if point.layer is None else f"layer_{point.layer}"
            paper = float(published[column]) if point.rank == TABLE3_RANK and column in published else None
            result, own = study.results[point], {"rank": point.rank, "adapter": column, "paper_score": paper}
            found.append(_record(study, result.score, result, **own))
    return found


def table3_markdown(studies: Sequence[Study]) -> str:
    """Return Table 3 as Markdown, with a row per task. A row of the paper's scores follows if there are any."""
    records = table3(studies)
    layers = {record["adapter"] for record in records if record["adapter"].startswith("layer_")}
    columns = sorted(layers, key=lambda name: int(name[6:]))
    columns += sorted({record["adapter"] for record in records} - layers)
    body, notes, rows = [], [], [study for study in studies if study.grid.table3]
    for study in rows:
        own = {record["adapter"]: record for record in records if record["task"] == study.base.task}
        texts = {name: "{} ({})".format(*_score_texts(one)) if "score" in one else NONE for name, one in own.items()}
        body.append([title(study), *(texts.get(name, "") for name in columns)])
        if any(record["paper_score"] is not None for record in own.values()):
            published = (_number(own[name]["paper_score"]) if name in own else "" for name in columns)
            body.append(["the paper", *published])
        (rank, *_), counts = ([*{one[key] for one in own.values()}] for key in ("rank", "trained_parameters"))
        notes.append(
            f"- {study.base.task}: rank {rank}, {' or '.join(f'{count:,}' for count in sorted(counts))} trained"
            " parameters each; scores in per cent with the 95 % interval."
        )
    notes += [*_incomplete_notes(records), *_study_notes([(study, study.grid.table3) for study in rows])]
    lines = [f"# Table 3: {model_title(studies[0])}, LoRA on one layer and a tied pair on all", ""]
    header = ["task", *(name.replace("_", " ") for name in columns)]
    return _text([*lines, *messages.markdown_lines(header, body), "", *notes])


# Both -------------------------------------------------------------------------------------------------------------


def _incomplete_notes(records: Iterable[TableRow]) -> list[str]:
    missing = any(record.get("all_rates_finished") == "false" for record in records)
    return [f"- {INCOMPLETE}: not all learning rates are finished."] if missing else []


def _study_notes(points: Sequence[tuple[Study, Sequence[Point]]]) -> list[str]:
    """Return notes on runs that --halving stopped, and on data and prompts that may differ from the paper's."""
    notes = []
    for study, own in points:
        stopped = [f"  - {run.name}: {why}" for point in own for run, why in study.results[point].stopped]
        line = f"- {study.base.task}: --halving stopped these runs before their last step; each result is from the best"
        notes += [f"{line} step.", *stopped] if stopped else []
    return notes + [
        f"- {study.base.task}: the paper's numbers are for its own rows and prompts;"
        f" {', '.join(f'--{n}' for n in study.own_rows)} may make them differ here."
        for study, _ in points
        if study.own_rows and study.base.paper_model is not None
    ]


def _text(lines: Iterable[str]) -> str:
    return "".join(f"{messages.printable(line)}\n" for line in lines)


def _number(value: float | None, digits: int = 2) -> str:
    return NONE if value is None else f"{round(value, digits) + 0.0:.{digits}f}"  # no -0.00


# Figures --------------------------------------------------------------------------------------------------------------


BEST_METHODS = ("lora", "vera", "tl5", "tl6")
# Colours that red-green colour-blind readers can distinguish, in the order of the methods. The marks differ too.
_COLOURS = ("#000000", "#999999", "#56B4E9", "#0072B2", "#F0C419", "#CC79A7", "#009E73", "#D55E00")
STYLES: Mapping[str, Sequence[str]] = {
    method: style for method, *style in zip(METHOD_NAMES, cycle(_COLOURS), cycle("osv^<>DP"), strict=False)
}
BASE_LABEL, PAPER_LABEL = "base model", "the paper"
NAMES = {name: {"lora": "LoRA", "vera": "VeRA"}.get(name, name.upper()) for name in METHOD_NAMES}


class PlotPoint(NamedTuple):
    """A score at a rank, and how far the error bar reaches below and above the score, in per cent."""

    rank: int
    value: float
    below: float
    above: float


def lines(studies: Sequence[Study]) -> dict[str, list[PlotPoint]]:
    """Return the mean score over the studies by method and rank, for the ranks at which all studies have a score.

    The test sets of the tasks are independent, so the squares of their error bars are added.
    """
    found: dict[str, list[PlotPoint]] = {}
    for method in METHOD_NAMES:
        by_task = [{r.point.rank: r.score for r in s.table_results if r.point.method == method} for s in studies]
        for rank in sorted(set.intersection(*map(set, by_task))):
            scores = [score for of_task in by_task if (score := of_task[rank]) is not None]
            below = math.sqrt(sum((score.value - score.low) ** 2 for score in scores)) / len(scores)
            above = math.sqrt(sum((score.high - score.value) ** 2 for score in scores)) / len(scores)
            mean = sum(score.value for score in scores) / len(scores)
            found.setdefault(method, []).append(PlotPoint(rank, mean, below, above))
    return found


def draw_figures(studies: Sequence[Study], folder: Path, *, guard: files.Guard = files.unguarded) -> list[Path]:
    """Draw figure 2 (a panel of all methods, a panel of the best) and figure 3 (a panel per task). Return the files.

    Raises UserError if a file cannot be written.
    """
    label = f"mean score of {len(studies)} tasks" if len(studies) > 1 else metric_title(studies[0])
    panels = {"figure2.png": list[Callable[[Any], None]](), "figure3.png": list[Callable[[Any], None]]()}
    for name, methods in (("all methods", METHOD_NAMES), ("LoRA, VeRA, TL5, TL6", BEST_METHODS)):
        heading = f"{model_title(studies[0])}: {name}"
        panels["figure2.png"].append(partial(_draw, studies, title=heading, label=label, methods=methods))
    for study in studies:
        heading = f"{model_title(study)}: {title(study)}"
        panels["figure3.png"].append(partial(_draw, [study], title=heading, label=metric_title(study), published=True))
    for name, own in panels.items():
        _draw_panels(own, folder / name, guard)
    return [folder / name for name in panels]


def _draw_panels(panels: Sequence[Callable[[Any], None]], target: Path, guard: files.Guard) -> None:
    """Draw the panels in rows of three with a common legend below them, and save the figure."""
    from matplotlib import pyplot

    plain_figures()
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    height, entries = 4.2 * rows + 0.5, dict[str, Any]()
    figure, grid = pyplot.subplots(rows, columns, figsize=(5.2 * columns, height), dpi=130, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for panel, axes in zip(panels, grid.flat, strict=False):
        panel(axes)
        handles, labels = axes.get_legend_handles_labels()
        entries.update(zip(labels, handles, strict=True))
    names = sorted(entries, key=[*NAMES.values(), BASE_LABEL, PAPER_LABEL].index)
    figure.tight_layout(rect=(0, 0.55 / height, 1, 1))
    if names:
        columns = -(-len(names) // (2 if len(panels) == 1 else 1))
        figure.legend([entries[name] for name in names], names, loc="lower center", ncols=columns, fontsize=8)
    save_figure(figure, target, guard=guard)


def _draw(
    studies: Sequence[Study],
    axes: Any,
    *,
    title: str,
    label: str,
    methods: Collection[str] = METHOD_NAMES,
    published: bool = False,
) -> None:
    """Draw the mean scores of `methods` over the studies in one panel. If `published`, also draw the paper's scores."""
    data, base = {name: points for name, points in lines(studies).items() if name in methods}, mean_base(studies)
    ranks = {point.rank for points in data.values() for point in points}
    for index, (method, points) in enumerate(data.items()):
        colour, mark = STYLES[method]
        # Marks at the same rank are shifted a little, so that their error bars do not overlap.
        shift = 2 ** (0.04 * (index - (len(data) - 1) / 2))
        at, scores, below, above = zip(*points, strict=True)
        axes.errorbar(
            [rank * shift for rank in at],
            scores,
            yerr=[below, above],
            label=NAMES[method],
            color=colour,
            marker=mark,
            markersize=5,
            linewidth=1.4,
            elinewidth=0.7,
            capsize=2,
        )
        cells = [table2_cell(studies[0].base, section, method) for section in SECTION_TITLES] if published else []
        if theirs := dict(sorted((cell["paper_rank"], cell["paper_score"]) for cell in cells if cell)):
            ranks |= theirs.keys()
            positions = [rank * shift for rank in theirs]
            axes.plot(positions, list(theirs.values()), mark, color=colour, markerfacecolor="none", markersize=9)
            axes.plot([], [], "o", color="#444444", markerfacecolor="none", markersize=9, label=PAPER_LABEL)
    values = [point.value for points in data.values() for point in points]
    if base is not None and values:
        low, high = min(values), max(values)
        span = max(high - low, 1.0)
        shown = low - span < base < high + span
        if shown:
            axes.axhline(base, color="#666666", linestyle=":", linewidth=1.2, label=BASE_LABEL)
        else:  # a line at the base model's score would compress the curves
            axes.plot([], [], color="#666666", linestyle=":", linewidth=1.2, label=BASE_LABEL)
        title += f"\nbase model {base:.2f}" + ("" if shown else ", outside of the plot")
    axes.set_title(title, fontsize=10)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(ranks), [str(rank) for rank in sorted(ranks)])
    axes.minorticks_off()
    axes.set_xlabel("rank r")
    axes.set_ylabel(f"{label}, per cent")
    axes.grid(alpha=0.3)
    if not values:
        axes.text(0.5, 0.5, "no rank has all its scores yet", transform=axes.transAxes, ha="center")
