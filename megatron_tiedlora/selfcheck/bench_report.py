"""Converts the JSON values of a benchmark report to text: a table of the compared implementations, and notes."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

from megatron_tiedlora.base.messages import aligned_lines, bytes_in_words, count_text, time_text
from megatron_tiedlora.planning.planned import Planned
from megatron_tiedlora.planning.report import layout_sections, messages_text, stage_table, traffic_table

Figures = Mapping[str, Any]


def report_lines(report: Figures, planned: Planned | None = None) -> list[str]:
    """Return the lines of a benchmark report, for any value of --what. `planned` is the step of --what layout."""
    if planned is not None:
        return _layout(report, planned)
    lines_of = {"axes": _scaling, "engines": _serving, "new_tokens": _decoding, "adapters": _adapters}
    return next((lines_of[key] for key in lines_of if key in report), _step)(report)


def _head(report: Figures, more: str) -> list[str]:
    """Return a line with the model, adapter, dtype, device and `more`, and a line with the software setup."""
    rank = f" r {report['rank']}" if "rank" in report else ""
    adapters = f"{report['adapters']} adapters, " if "adapters" in report else ""
    adapter = f"{adapters}{report['method']}{rank} of {', '.join(report['targets'])}"
    return [f"{report['model']}, {adapter}, {report['dtype']} on {report['device']}; {more}", _setup(report)]


def _setup(report: Figures) -> str:
    """Return a line with the threads, the allocator, the versions of torch and DeepSpeed or vLLM, and the load."""
    library = "vllm" if "engines" in report else "deepspeed"
    load = ", load {:.1f} to {:.1f}".format(*report["load"]) if "load" in report else ""
    return (
        f"threads a process: {report['threads']}, {report['allocator']}, torch {report['torch']}, {library}"
        f" {report['versions'].get(library, 'not installed')}{load}"
    )


def _matmul(report: Figures) -> str:
    return f"a bare matmul does {report['matmul_flops_per_second'] / 1e9:,.0f} GFLOP/s"


def _sides(name: str, report: Figures, sides: Iterable[tuple[str, Figures]]) -> list[str]:
    """Return the lines of a table with one row per implementation. `name` is the header of the first column."""
    cells = [(side, _cells({**report, **own})) for side, own in sides]
    return aligned_lines([(name, *cells[0][1]), *((side, *own.values()) for side, own in cells)])


def _cells(figures: Figures) -> dict[str, str]:
    """Return the table cells of one implementation by column header. Columns without values are omitted."""
    middle = median(figures["seconds"])
    cells = {"tokens": str(figures["tokens"])} if "value" in figures else {}
    cells |= {
        "seconds": f"{middle:.3f}",
        "least": f"{min(figures['seconds']):.3f}",
        "most": f"{max(figures['seconds']):.3f}",
        "tokens/s": f"{figures['tokens'] / middle:.1f}",
    }
    if "positions" in figures:
        flops, rate = figures["model_flops"], figures["matmul_flops_per_second"]
        cells["padding"] = f"{1 - figures['tokens'] / figures['positions']:.1%}"
        cells["of matmul"] = "" if flops is None else f"{flops / middle / rate:.1%}"
    if "saved" in figures:
        cells |= {"saved MB": _megabytes(figures["saved"]), "planned": _megabytes(figures.get("saved_formula"))}
    if "peak" in figures:
        cells["peak MB"] = _megabytes(figures["peak"])
    turns = figures.get("turns", [{}])
    for name in (name for name in turns[0] if name not in ("seconds", "tokens")):
        values = [turn[name] for turn in turns]
        cells[name.replace("_", " ")] = f"{median(values):,.{2 if isinstance(values[0], float) else 0}f}"
    return cells | ({"more, for 1 more": figures["more"]} if "value" in figures else {})


def _step(report: Figures) -> list[str]:
    """Return the lines of a --what step report. The ratios compare this package with each other implementation."""
    sides = report["sides"]
    ours, *others = sides
    lines = [
        *_head(report, _matmul(report)),
        f"{ours}: recompute {report['recompute']}; kernels {report['kernels']}",
        *_sides("", report, sides.items()),
        f"saved bytes are {sides[ours]['saved_ratio']:.3f} of the planned ones",
    ]
    for name, side in sides.items():
        lines += _gpu_lines(side, f"{name}: ")
    for name in others:
        one, other = (side["tokens"] / median(side["seconds"]) for side in (sides[ours], sides[name]))
        ratios = [_ratio(sides[ours][key], sides[name][key]) for key in ("saved", "peak")]
        lines.append(f"against {name}: speed {one / other:.2f}, saved bytes {ratios[0]}, peak {ratios[1]}")
    return lines


def _adapters(report: Figures) -> list[str]:
    """Return the lines of a report on adapters that are trained one after another and together."""
    return [
        *_head(report, f"recompute {report['recompute']}; kernels {report['kernels']}"),
        f"{report['rows']} x {report['length']} tokens an adapter and step; together in {report['micro_batches']}"
        f" micro-batch{'es' if report['micro_batches'] > 1 else ''}",
        *_sides("", report, report["sides"].items()),
        f"together against in turn {report['ratio']:.2f}, against one adapter with all tokens"
        f" {report['of_one_adapter']:.2f}",
    ]


def _scaling(report: Figures) -> list[str]:
    """Return the lines of a --what scaling report. The last column has the seconds that a unit more of a value adds."""
    lines = _head(report, f"kernels {report['kernels']}")
    for name, measured in report["axes"].items():
        slopes = [""]
        for before, own in itertools.pairwise(measured):
            more = median(own["seconds"]) - median(before["seconds"])
            slopes.append(f"{more / (own['value'] - before['value']):.4f}")
        sides = [(str(own["value"]), {**own, "more": slope}) for own, slope in zip(measured, slopes, strict=True)]
        lines += _sides(name, {}, sides)
    return lines


def _decoding(report: Figures) -> list[str]:
    """Return the lines of a report on greedy decoding with this package and with transformers."""
    ours, theirs = (median(taken) for taken in report["seconds"].values())
    tokens = report["batch_size"] * report["new_tokens"]
    return [
        f"{report['model']} in {report['dtype']} on {report['device']}: {count_text(report['batch_size'], 'prompt')} of"
        f" {report['prompt_tokens']} tokens together, {report['new_tokens']} new tokens each,"
        f" {report['equal_tokens']:.1%} of them equal",
        _setup(report),
        *_sides("", {"tokens": tokens}, [(name, {"seconds": own}) for name, own in report["seconds"].items()]),
        f"ratio of the medians {theirs / ours:.2f}",
    ]


def _serving(report: Figures) -> list[str]:
    """Return the lines of a --what serving report: the flags of each side, and the medians of each row's figures."""
    requests = "{served:,} adapters; {batch_size} requests at once: {length} + {new_tokens} tokens".format(**report)
    lines = [*_head(report, requests), *(f"{side}: {flags}" for side, flags in report["engines"].items())]
    for part in report["parts"]:
        for row in next(iter(part.values()))[0]:
            of_row = {side: [turn[row] for turn in turns] for side, turns in part.items()}
            sides = {side: {"seconds": [turn["seconds"] for turn in own], "turns": own} for side, own in of_row.items()}
            lines += ["", *_sides(row, {"tokens": of_row["native"][0]["tokens"]}, sides.items())]
    return lines


def _layout(report: Figures, planned: Planned) -> list[str]:
    """Return the lines of a --what layout report: the step, then each section of the plan with measured values."""
    on_card = report["planned"] is not None  # None: the user gave no machine
    partition, memory, messages, *time = layout_sections(planned, on_card=on_card)
    stages = [[member for member in report["ranks"] if member["stage"] == stage.index] for stage in planned.stages]
    memory += _measured_memory(stages)
    if len(report["ranks"]) > 1:
        messages += _counted_messages(stages)
    for section in time:
        total, middle = planned.seconds.total, median(report["seconds"])
        section.append(f"  measured: {time_text(middle)}; the planned time is {total / middle:.3f} of it")
    return [
        *_head(report, _matmul(report)),
        f"recompute {report['layout']['recompute']}; kernels {report['kernels']}",
        f"{report['tokens']:,} tokens per step, {report['supervised']:,} with a label; micro-batches per rank:"
        f" {report['micro_batches']}; weights {report['weights']}",
        *_sides("", report, [("", {})]),
        *_gpu_lines(report, ""),
        *(line for section in (partition, memory, messages, *time) for line in ("", *section)),
    ]


def _gpu_lines(figures: Figures, name: str) -> list[str]:
    """Return lines with the MFU and the time of each kernel class. On a CPU, return no lines."""
    lines = []
    if figures.get("mfu") is not None:
        lines.append(f"{name}MFU {figures['mfu']:.1%}")
    if figures.get("kernel_seconds"):
        total = sum(figures["kernel_seconds"].values())
        shares = (f"{kind} {spent:.3f} ({spent / total:.0%})" for kind, spent in figures["kernel_seconds"].items())
        lines.append(f"{name}seconds in kernels: {', '.join(shares)}" if total else f"{name}no kernel was seen")
    return lines


def _measured_memory(stages: Sequence[Sequence[Figures]]) -> list[str]:
    rows = []
    for members in stages:
        saved, of_plan, *sizes = (
            max((member[key] for member in members if member[key] is not None), default=None)
            for key in ("saved", "saved_formula", "held", "peak", "planned_peak")
        )
        texts = ["" if size is None else bytes_in_words(size) for size in (saved, of_plan, *sizes)]
        rows.append([*texts[:2], _ratio(saved, of_plan), *texts[2:]])
    return [
        "  measured, of the rank with most; saved: by autograd in a step; held: before the first step",
        *stage_table(("saved", "planned", "ratio", "held", "peak", "planned peak"), rows),
    ]


def _counted_messages(stages: Sequence[Sequence[Figures]]) -> list[str]:
    """Return lines with the messages of the first rank of each stage, and with the ranks that differ from the plan."""
    counted = []
    for first, *_ in stages:
        texts = {group: messages_text(of["messages"], of["bytes"]) for group, of in first["traffic"].items()}
        differs = {group: f", {of['verdict']}" for group, of in first["traffic"].items() if not of["as_predicted"]}
        counted.append({group: text + differs.get(group, "") for group, text in texts.items()})
    others = [str(member["number"]) for members in stages for member in members if not member["as_predicted"]]
    verdict = "every message and byte of all ranks as predicted"
    if others:
        verdict = f"NOT as predicted: rank {', '.join(others)}; --json has each rank's figures"
    return ["  counted in a step", *traffic_table(counted), f"  {verdict}"]


def _megabytes(size: float | None) -> str:
    return "" if size is None else f"{size / 1e6:.1f}"


def _ratio(one: float | None, other: float | None) -> str:
    return "" if one is None or not other else f"{one / other:.3f}"
