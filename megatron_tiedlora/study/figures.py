"""Draws figures 2 and 3: scores by rank with their 95 % intervals, and the paper's scores as hollow marks."""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

from megatron_tiedlora.base import files, output_folder
from megatron_tiedlora.base.methods import METHOD_NAMES
from megatron_tiedlora.runtime.run_folder import new_figure
from megatron_tiedlora.study.estimates import Estimate, averaged
from megatron_tiedlora.study.record import Study
from megatron_tiedlora.study.tables import SECTION_TITLES, mean_base, metric_title, table2_cell, title

BEST_METHODS = ("lora", "vera", "tl5", "tl6")
# Colours that red-green colour-blind readers can distinguish, in the order of the methods. The marks differ too.
_COLOURS = ("#000000", "#999999", "#56B4E9", "#0072B2", "#F0C419", "#CC79A7", "#009E73", "#D55E00")
STYLES: Mapping[str, Sequence[str]] = {
    method: style for method, *style in zip(METHOD_NAMES, cycle(_COLOURS), cycle("osv^<>DP"), strict=False)
}
BASE_LABEL, PAPER_LABEL = "base model", "the paper"
NAMES = {name: {"lora": "LoRA", "vera": "VeRA"}.get(name, name.upper()) for name in METHOD_NAMES}


def lines(studies: Sequence[Study]) -> dict[str, dict[int, Estimate]]:
    """Return the mean score over the studies by method and rank, for the ranks at which all studies have a score."""
    found: dict[str, dict[int, Estimate]] = {}
    for method in METHOD_NAMES:
        by_task = [{r.point.rank: r.score for r in s.table_results if r.point.method == method} for s in studies]
        for rank in sorted(set.intersection(*map(set, by_task))):
            scores = [score for of_task in by_task if (score := of_task[rank]) is not None]
            found.setdefault(method, {})[rank] = averaged(scores)
    return found


def draw_figures(studies: Sequence[Study], folder: Path, *, guard: files.Guard = files.unguarded) -> list[Path]:
    """Draw figure 2 (a panel of all methods, a panel of the best) and figure 3 (a panel per task). Return the files.

    Raises UserError if a file cannot be written.
    """
    label = f"mean score of {len(studies)} tasks" if len(studies) > 1 else metric_title(studies[0])
    panels = {"figure2.png": list[Callable[[Any], None]](), "figure3.png": list[Callable[[Any], None]]()}
    for name, methods in (("all methods", METHOD_NAMES), ("LoRA, VeRA, TL5, TL6", BEST_METHODS)):
        heading = f"{output_folder.last_name(studies[0].base.model)}: {name}"
        panels["figure2.png"].append(partial(_draw, studies, title=heading, label=label, methods=methods))
    for study in studies:
        heading = f"{output_folder.last_name(study.base.model)}: {title(study)}"
        one = partial(_draw, [study], title=heading, label=metric_title(study), methods=METHOD_NAMES, published=True)
        panels["figure3.png"].append(one)
    for name, own in panels.items():
        _draw_panels(own, folder / name, guard)
    return [folder / name for name in panels]


def _draw_panels(panels: Sequence[Callable[[Any], None]], target: Path, guard: files.Guard) -> None:
    """Draw the panels in rows of three with a common legend below them, and save the figure."""
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    height, entries = 4.2 * rows + 0.5, dict[str, Any]()
    size = (5.2 * columns, height)
    with new_figure(target, rows, columns, guard=guard, figsize=size, dpi=130, squeeze=False) as (figure, grid):
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


def _draw(
    studies: Sequence[Study], axes: Any, *, title: str, label: str, methods: Collection[str], published: bool = False
) -> None:
    """Draw the mean scores of `methods` over the studies in one panel. If `published`, also draw the paper's scores."""
    data, base = {name: points for name, points in lines(studies).items() if name in methods}, mean_base(studies)
    ranks = {rank for points in data.values() for rank in points}
    for index, (method, points) in enumerate(data.items()):
        colour, mark = STYLES[method]
        # Marks at the same rank are shifted a little, so that their error bars do not overlap.
        shift = 2 ** (0.04 * (index - (len(data) - 1) / 2))
        positions, values = [rank * shift for rank in points], [one.value for one in points.values()]
        bars = list(zip(*((one.value - one.low, one.high - one.value) for one in points.values()), strict=True))
        look = {"color": colour, "marker": mark, "markersize": 5, "linewidth": 1.4, "elinewidth": 0.7, "capsize": 2}
        axes.errorbar(positions, values, yerr=bars, label=NAMES[method], **look)
        cells = [table2_cell(studies[0].base, section, method) for section in SECTION_TITLES] if published else []
        if theirs := dict(sorted((cell["paper_rank"], cell["paper_score"]) for cell in cells if cell)):
            ranks |= theirs.keys()
            positions = [rank * shift for rank in theirs]
            axes.plot(positions, list(theirs.values()), mark, color=colour, markerfacecolor="none", markersize=9)
            axes.plot([], [], "o", color="#444444", markerfacecolor="none", markersize=9, label=PAPER_LABEL)
    values = [one.value for points in data.values() for one in points.values()]
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
    axes.set(xlabel="rank r", ylabel=f"{label}, per cent")
    axes.grid(alpha=0.3)
    if not values:
        axes.text(0.5, 0.5, "no rank has all its scores yet", transform=axes.transAxes, ha="center")
