"""Figures 2 and 3: scores by rank, averaged over the tasks and for each task. Error bars are 95 % intervals.

If the paper published a score for the same model, task, method and rank, Figure 3 shows it as a hollow mark.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

from megatron_tiedlora.base.files import Guard, unguarded
from megatron_tiedlora.base.methods import METHOD_NAMES
from megatron_tiedlora.evaluation.results import Score
from megatron_tiedlora.runtime.run_folder import plain_figures, save_figure
from megatron_tiedlora.study.record import Study
from megatron_tiedlora.study.tables import mean_base, metric_title, model_title, table2_points, title

BEST_METHODS = ("lora", "vera", "tl5", "tl6")
# Colours that red-green colour-blind readers can distinguish, with different marks; by the order of the methods.
_COLOURS = ("#000000", "#999999", "#56B4E9", "#0072B2", "#F0C419", "#CC79A7", "#009E73", "#D55E00")
STYLES: Mapping[str, Sequence[str]] = {
    method: style for method, *style in zip(METHOD_NAMES, cycle(_COLOURS), cycle("osv^<>DP"), strict=False)
}
BASE_LABEL, PAPER_LABEL = "base model", "the paper"
NAMES = {name: {"lora": "LoRA", "vera": "VeRA"}.get(name, name.upper()) for name in METHOD_NAMES}


@dataclass(frozen=True)
class PlotPoint:
    """A score at a rank, with the lengths of its error bar below and above, in per cent."""

    rank: int
    value: float
    below: float
    above: float


def lines(studies: Sequence[Study]) -> dict[str, list[PlotPoint]]:
    """The mean over the studies, by method and rank, for the ranks at which all studies have a score.

    The test sets of the tasks are independent, so the squares of their error bars add up.
    """
    found: dict[str, list[PlotPoint]] = {}
    for method in METHOD_NAMES:
        by_task = [{r.point.rank: r.score for r in s.table_results if r.point.method == method} for s in studies]
        ranks = sorted(set.intersection(*map(set, by_task)))
        points = [_mean(rank, [score for scores in by_task if (score := scores[rank]) is not None]) for rank in ranks]
        if points:
            found[method] = points
    return found


def _mean(rank: int, scores: Sequence[Score]) -> PlotPoint:
    count = len(scores)
    below = math.sqrt(sum((score.value - score.low) ** 2 for score in scores)) / count
    above = math.sqrt(sum((score.high - score.value) ** 2 for score in scores)) / count
    return PlotPoint(rank, sum(score.value for score in scores) / count, below, above)


def draw_figure2(studies: Sequence[Study], target: Path, *, guard: Guard = unguarded) -> None:
    """Draw all methods, and the best ones with LoRA and VeRA. Raises UserError if it cannot be written."""
    data, base, model = lines(studies), mean_base(studies), model_title(studies[0])
    best = {name: points for name, points in data.items() if name in BEST_METHODS}
    label = f"mean score of {len(studies)} tasks" if len(studies) > 1 else metric_title(studies[0])
    panels = (("all methods", data), ("LoRA, VeRA, TL5, TL6", best))
    draw = partial(_draw, label=label, base=base, published={})
    _draw_panels([partial(draw, data=own, title=f"{model}: {name}") for name, own in panels], target, guard)


def draw_figure3(studies: Sequence[Study], target: Path, *, guard: Guard = unguarded) -> None:
    """Draw one panel per task. Raises UserError if it cannot be written."""
    panels = []
    for study in studies:
        data = lines([study])
        published = {name: table2_points(study.base, name) for name in data}
        heading = f"{model_title(study)}: {title(study)}"
        label, of_base = metric_title(study), mean_base([study])
        panels.append(partial(_draw, data=data, title=heading, label=label, base=of_base, published=published))
    _draw_panels(panels, target, guard)


def _draw_panels(panels: Sequence[Callable[[Any], None]], target: Path, guard: Guard) -> None:
    """Draw the panels in rows of three, with one legend for all below them, and save the figure."""
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
    axes: Any,
    *,
    data: Mapping[str, Sequence[PlotPoint]],
    title: str,
    label: str,
    base: float | None,
    published: Mapping[str, Mapping[int, float]],
) -> None:
    ranks = {point.rank for points in data.values() for point in points}
    for index, (method, points) in enumerate(data.items()):
        colour, mark = STYLES[method]
        # Marks at the same rank are shifted a little, so that their error bars do not overlap.
        shift = 2 ** (0.04 * (index - (len(data) - 1) / 2))
        axes.errorbar(
            [point.rank * shift for point in points],
            [point.value for point in points],
            yerr=[[point.below for point in points], [point.above for point in points]],
            label=NAMES[method],
            color=colour,
            marker=mark,
            markersize=5,
            linewidth=1.4,
            elinewidth=0.7,
            capsize=2,
        )
        theirs = published.get(method, {})
        if theirs:
            ranks |= theirs.keys()
            positions, scores = [rank * shift for rank in theirs], list(theirs.values())
            axes.plot(positions, scores, mark, color=colour, markerfacecolor="none", markersize=9)
            axes.plot([], [], "o", color="#444444", markerfacecolor="none", markersize=9, label=PAPER_LABEL)
    values = [point.value for points in data.values() for point in points]
    if base is not None and values:
        low, high = min(values), max(values)
        span = max(high - low, 1.0)
        shown = low - span < base < high + span
        if shown:
            axes.axhline(base, color="#666666", linestyle=":", linewidth=1.2, label=BASE_LABEL)
        else:  # the line would compress the curves
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
