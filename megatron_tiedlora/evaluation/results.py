"""Computes the scores of an evaluation: the value of each metric, with a 95 % bootstrap interval over the samples. Also
writes the first log lines, predictions.jsonl (one line per sample), results.json and the table of scores.

Resample i of n answers is row i of `numpy.random.default_rng(seed).integers(n, size=(resamples, n))`. It does not
depend on the answers. So all metrics and models that are scored on one test set use the same resamples.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_tiedlora.adapters.adapter_groups import ONLY
from megatron_tiedlora.base.files import Real, Size, Text, write_json, write_text
from megatron_tiedlora.base.installation import installed_versions
from megatron_tiedlora.base.messages import UserError, aligned_lines, count_text, csv_text
from megatron_tiedlora.base.output_folder import NewOutput
from megatron_tiedlora.checkpoint.load_model import describe_dtype
from megatron_tiedlora.data.task import Example
from megatron_tiedlora.evaluation.answering import ScoredSet
from megatron_tiedlora.evaluation.metrics import Answer, Metric, find_metric
from megatron_tiedlora.evaluation.plan import TABLE_FILE, EvaluationPlan, EvaluationPlans

_PERCENTILES = (2.5, 97.5)
# The number of random numbers that are drawn at a time. It bounds the memory.
_DRAWN_AT_ONCE = 2_000_000
PREDICTIONS_FILE = "predictions.jsonl"
RESULTS_FILE = "results.json"
DEFAULT_PARENT = "evaluations"
_LIBRARIES = ("torch", "deepspeed", "transformers", "vllm", "rouge-score", "sacrebleu")
_PLACES = {"own": "per rank", "vllm": "in vLLM"}  # of the prompts that are answered together


@dataclass(frozen=True)
class Score:
    """The value of a metric over `num_samples` answers.

    Attributes:
        value: the value in per cent.
        low, high: the ends of the 95 % percentile bootstrap interval, in per cent.
        signature: the rule, library and version of the metric.
    """

    metric: Text
    value: Real
    low: Real
    high: Real
    num_samples: Size
    signature: Text

    def plain(self) -> dict[str, Any]:
        """Return the score as a dictionary for JSON files."""
        values = {"score": self.value, "n": self.num_samples, "confidence_interval": [self.low, self.high]}
        return {**values, "signature": self.signature}


def score_answers(
    metric_names: Sequence[str], answers: Sequence[Answer], *, decoding: str = "", seed: int = 0, resamples: int = 1000
) -> dict[str, Score]:
    """Return the scores by metric, in the order of `metric_names`. The interval depends on the order of the answers.
    The signature of a metric that reads the generated text ends with `decoding`, unless that is ''. Raises UserError if
    there are no answers, if a metric is unknown, or if it cannot score an example."""
    if not answers:
        raise UserError("there are no answers to score, because the split is empty; give rows")
    scores = {}
    for metric in map(find_metric, metric_names):
        ((value, resampled),) = bootstrap(metric, [sample_table(metric, answers)], seed=seed, resamples=resamples)
        low, high = interval(resampled)
        rule = metric.signature if isinstance(metric.signature, str) else metric.signature(answers)
        rule += f"; {decoding}" if decoding and not metric.needs_choice_scores else ""
        scores[metric.name] = Score(metric.name, value, low, high, len(answers), rule)
    return scores


def interval(values: Any) -> tuple[float, float]:
    """Return the ends of the central 95 % of values of any shape."""
    low, high = np.percentile(values, _PERCENTILES).tolist()
    return low, high


def student(freedom: int) -> float:
    """Return Student's t of a two-sided 95 % interval; for more than 10 degrees of freedom, the value of 10."""
    return (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)[min(freedom, 10) - 1]


def sample_table(metric: Metric, answers: Sequence[Answer]) -> Any:
    """Return what a metric counts of each answer, (answers, k) float64: its score, or the counts of `metric.corpus`."""
    of_one = (lambda answer: (metric.sample(answer),)) if metric.corpus is None else metric.corpus[0]
    return np.array([of_one(answer) for answer in answers], dtype=np.float64)  # counts are exact up to 2 ** 53


def bootstrap(
    metric: Metric, tables: Sequence[Any], *, seed: int = 0, resamples: int = 1000
) -> list[tuple[float, Any]]:
    """Return the value of a metric for each of several tables of the same samples, each (samples, k), and its values
    for the resamples, (resamples,)."""
    num = len(tables[0])
    drawn = np.concatenate(list(_resampled_sums(np.hstack(tables), seed=seed, resamples=resamples)))
    pairs = zip(tables, np.split(drawn, len(tables), axis=1), strict=True)
    if metric.corpus is None:
        return [(math.fsum(table[:, 0]) / num, sums[:, 0] / num) for table, sums in pairs]
    rows = [np.vstack([table.sum(0), sums]).astype(np.int64).tolist() for table, sums in pairs]
    values = [list(map(metric.corpus[1], of_table)) for of_table in rows]
    return [(first, np.array(others)) for first, *others in values]


def _resampled_sums(table: Any, *, seed: int, resamples: int) -> Iterator[Any]:
    """Yield the sum of the rows of `table`, (num, k), for each resample, in chunks (resamples of the chunk, k)."""
    num = len(table)
    draw = np.random.default_rng(seed)
    at_once = max(1, _DRAWN_AT_ONCE // num)
    for start in range(0, resamples, at_once):
        rows = min(at_once, resamples - start)
        indices = draw.integers(num, size=(rows, num)) + np.arange(rows)[:, None] * num
        times = np.bincount(indices.ravel(), minlength=rows * num).reshape(rows, num)
        yield times.astype(np.float64) @ table


def headline(plans: EvaluationPlans, scored_sets: Mapping[str, ScoredSet], attention: object) -> list[str]:
    """Return lines about the evaluation to print before its progress bar, with one line for each adapter of --adapters.
    `attention` names the kernels that compute the attention of prompts."""
    name, plan = next(iter(plans.items()))
    settings, grid, scored = plan.settings, plan.grid, scored_sets[name]
    dtype = describe_dtype(settings.dtype, plan.dtype_name)
    adapter = ""
    if ONLY not in plans:
        adapter = f" with {count_text(len(plans), 'adapter')}"
    elif plan.adapter is not None:
        targets = ", ".join(target.name for target in plan.adapter.config.targets)
        adapter = f" with {plan.adapter_name} on {targets}, from {settings.adapter}"
    quantised = "" if plan.base_format is None else f" (the linears of its blocks in {plan.base_format})"
    merged = ", merged" if settings.merge_adapter else ""
    cut = f", {scored.num_truncated} of them without their middle or early turns to fit" if scored.num_truncated else ""
    shared = [note for note in plan.notes if all(note in other.notes for other in plans.values())]
    at_once = f"{count_text(settings.batch_size, 'prompt')} at once {_PLACES[settings.engine]}"
    rows = [
        ("model", f"{plan.source.name} in {dtype}{quantised}{adapter}{merged}"),
        ("data", f"task {plan.task.name}, {count_text(len(scored.examples), f'{settings.split} row')}{cut}"),
        ("layout", f"tensor {grid.tp_size} x pipeline {grid.pp_size} x data {grid.dp_size}"),
        ("decoding", f"{plan.sampling}, at most {plan.max_new_tokens} tokens, {at_once}"),
        ("attention", str(attention)),
        *([("chats", f"by {scored.chat_note}")] if scored.chat_note else []),
        *(("note", note) for note in shared),
    ]
    for name, own in () if ONLY in plans else plans.items():
        rows.append(("adapter", f"{name}: {own.adapter_name}, from {own.settings.adapter}"))
        rows += [("note", f"{name}: {note}") for note in own.notes if note not in shared]
    return aligned_lines(rows, align="<")


def prediction_row(answer: Answer, metrics: Sequence[str]) -> dict[str, Any]:
    """Return a row of predictions.jsonl: the texts, the `score` by the task's first metric, and the other metrics."""
    first, *others = metrics
    example = answer.example
    row: dict[str, Any] = {
        "prompt": example.prompt,
        "prediction": answer.prediction,
        "references": list(answer.references),
        "score": find_metric(first).sample(answer),
        **{name: find_metric(name).sample(answer) for name in others},
    }
    if example.choices:
        row.update(choices=list(example.choices), choice_scores=list(answer.choice_scores))
    return row


def read_samples(folder: Path, metric: Metric) -> tuple[Any, str] | None:
    """Return the table of `sample_table` from predictions.jsonl, and a hash of the rows; None if there is no such file.
    `metric` is the task's first metric. Raises UserError if the file is broken."""
    file = folder / PREDICTIONS_FILE
    if not file.is_file():
        return None
    try:
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n")[:-1]]
        examples = [Example(row["prompt"], "", str(file), tuple(row["references"])) for row in rows]
        answers = [Answer(row["prediction"], example) for row, example in zip(rows, examples, strict=True)]
        own = metric.corpus is None  # then the score of a row is all that the metric needs of it
        table = np.array([[row["score"]] for row in rows], dtype=float) if own else sample_table(metric, answers)
        if rows and np.isfinite(table).all():
            texts = json.dumps([(example.prompt, example.references) for example in examples])
            return table, hashlib.sha256(texts.encode()).hexdigest()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass
    raise UserError(f"{file}: not the predictions of tiedlora evaluate; remove the folder and start again")


def _json_line(row: Mapping[str, Any]) -> str:
    """Return the row as JSON with readable non-ASCII text. Characters that may count as line ends are escaped."""
    text = json.dumps(row, ensure_ascii=False)
    for separator in ("\x85", "\u2028", "\u2029"):
        text = text.replace(separator, f"\\u{ord(separator):04x}")
    return text + "\n"


def results_content(plan: EvaluationPlan, scores: Mapping[str, Score], folder: Path) -> dict[str, Any]:
    """Return the content of results.json: all scores, the model, the adapter, the layout, all settings and versions."""
    settings, grid, first = plan.settings, plan.grid, plan.task.metrics[0]
    adapter = None
    if plan.adapter is not None:
        adapter = {
            **plan.adapter.config.facts,
            "merged": settings.merge_adapter,
            **({"base_format": trained} if (trained := plan.adapter.base_identity.base_format) else {}),
            **({"base_differs": True} if settings.base_differs else {}),
        }
    layout = {"tensor_parallel": grid.tp_size, "pipeline_parallel": grid.pp_size, "data_parallel": grid.dp_size}
    described = {name: score.plain() for name, score in scores.items()}
    return {
        "task": plan.task.name,
        "split": settings.split,
        "metric": first,
        **described[first],
        "scores": described,
        "model_kind": plan.kind,
        "adapter": adapter,
        "layout": layout,
        "settings": plan.resolved_settings(folder),
        "ranks": grid.world_size,
        "versions": installed_versions(*_LIBRARIES),
    }


EvaluationResult = tuple[EvaluationPlan, Sequence[Answer], Mapping[str, Score]]


def write_results(evaluations: Mapping[str, EvaluationResult], output: NewOutput) -> None:
    """Write the files atomically, so that the folder appears complete or not at all. With several adapters, each has a
    folder with its name, and there is a table of all scores. A single evaluation has the name ONLY. Raises UserError if
    another process has taken over the output folder, or if it cannot be written."""
    with output.written() as temporary:
        for name, (plan, answers, scores) in evaluations.items():
            folder = temporary / name
            folder.mkdir(exist_ok=True)
            rows = [prediction_row(answer, plan.task.metrics) for answer in answers]
            write_text(folder / PREDICTIONS_FILE, "".join(_json_line(row) for row in rows))
            write_json(folder / RESULTS_FILE, results_content(plan, scores, output.path / name))
        if ONLY not in evaluations:
            write_text(temporary / TABLE_FILE, _table(evaluations))


def _table(evaluations: Mapping[str, EvaluationResult]) -> str:
    """Return the scores of all adapters as CSV, with one row per adapter."""
    rows: list[dict[str, Any]] = []
    for name, (plan, answers, scores) in evaluations.items():
        rows.append({"name": name, "adapter": plan.settings.adapter, "kind": plan.adapter_name, "n": len(answers)})
        for metric, score in scores.items():
            rows[-1] |= {metric: score.value, f"{metric}_low": score.low, f"{metric}_high": score.high}
    return csv_text(list(rows[0]), rows)


def score_table(evaluations: Mapping[str, EvaluationResult], folder: Path) -> list[str]:
    """Return the lines to print at the end: the scores with intervals, and the paths of the files.

    A single evaluation has a row for each metric, with its signature. Several evaluations have a row for each adapter.
    """
    plan, answers, first = next(iter(evaluations.values()))
    rows = f"{plan.task.name}, {count_text(len(answers), f'{plan.settings.split} row')}, scores in per cent"
    if ONLY in evaluations:
        header = ("metric", "score", "95 % interval", "signature")
        cells = [(n, f"{s.value:.2f}", f"{s.low:.2f} to {s.high:.2f}", s.signature) for n, s in first.items()]
        lines = aligned_lines([header, *cells], align="<><", indent="  ")
        return [rows, *lines, f"files     {folder / PREDICTIONS_FILE}", f"          {folder / RESULTS_FILE}"]
    table: list[list[str]] = [["adapter", *(f"{name} (95 % interval)" for name in first)]]
    for name, (_, _, scores) in evaluations.items():
        table.append([name, *(f"{s.value:.2f} ({s.low:.2f} to {s.high:.2f})" for s in scores.values())])
    lines = aligned_lines(table, indent="  ")
    files = [f"files     {folder / TABLE_FILE}", f"          {folder}/NAME/{RESULTS_FILE}, {PREDICTIONS_FILE}"]
    return [rows, *lines, *files]
