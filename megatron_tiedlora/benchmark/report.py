"""Makes the text of every report from the figures that also go into the JSON: one table of sides, and what is below."""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

from megatron_tiedlora.base.messages import aligned_lines, bytes_in_words, count_text
from megatron_tiedlora.parallel.groups import DATA, GROUPS, WORLD, Traffic
from megatron_tiedlora.planning.report import shares_text

Figures = Mapping[str, Any]


def report_lines(report: Figures) -> list[str]:
    """The report of any --what as text."""
    lines_of = {"layout": _layout, "axes": _scaling, "new_tokens": _decoding, "adapters": _adapters}
    return next((lines_of[key] for key in lines_of if key in report), _step)(report)


def _head(report: Figures, more: str) -> list[str]:
    """Model, adapter, precision and device, with `more`; then the setup."""
    rank = f" r {report['rank']}" if "rank" in report else ""
    adapters = f"{report['adapters']} adapters, " if "adapters" in report else ""
    adapter = f"{adapters}{report['method']}{rank} of {', '.join(report['targets'])}"
    return [f"{report['model']}, {adapter}, {report['dtype']} on {report['device']}; {more}", _setup(report)]


def _setup(report: Figures) -> str:
    """Threads, allocator and versions."""
    return (
        f"threads a process: {report['threads']}, {report['allocator']}, torch {report['torch']}, deepspeed"
        f" {report['versions'].get('deepspeed', 'not installed')}"
    )


def _matmul(report: Figures) -> str:
    return f"a bare matmul does {report['matmul_flops_per_second'] / 1e9:,.0f} GFLOP/s"


def _sides(name: str, report: Figures, sides: Iterable[tuple[str, Figures]]) -> list[str]:
    """The table of the sides, each with its figures and those of the report; `name` is over their names."""
    cells = [(side, _cells({**report, **own})) for side, own in sides]
    return aligned_lines([(name, *cells[0][1]), *((side, *own.values()) for side, own in cells)])


def _cells(figures: Figures) -> dict[str, str]:
    """The cells of a side by their headers. Columns whose figures are not there are left out."""
    middle = median(figures["seconds"])
    cells = {"tokens": str(figures["tokens"])} if "value" in figures else {}
    cells |= {
        "seconds": f"{middle:.3f}",
        " least": f"{min(figures['seconds']):.3f}",
        "  most": f"{max(figures['seconds']):.3f}",
        "tokens/s": f"{figures['tokens'] / middle:.1f}",
    }
    if "positions" in figures:
        flops, rate = figures["model_flops"], figures["matmul_flops_per_second"]
        cells["padding"] = f"{1 - figures['tokens'] / figures['positions']:.1%}"
        cells["of matmul"] = "" if flops is None else f"{flops / middle / rate:.1%}"
    if "saved" in figures:
        cells |= {"saved MB": _megabytes(figures["saved"]), "formula": _megabytes(figures.get("saved_formula"))}
    if "peak" in figures:
        cells["peak MB"] = _megabytes(figures["peak"])
    return cells | ({"more, for 1 more": figures["more"]} if "value" in figures else {})


def _step(report: Figures) -> list[str]:
    """Of one process. Ratios compare our side with another one."""
    sides = report["sides"]
    ours, *others = sides
    lines = [
        *_head(report, _matmul(report)),
        f"{ours}: recompute {report['recompute']}; kernels {report['kernels']}",
        *_sides(f"{'':<20}", report, sides.items()),
        f"saved bytes are {sides[ours]['saved_ratio']:.3f} of the formula's",
    ]
    for name, side in sides.items():
        lines += _gpu_lines(side, f"{name}: ")
    for name in others:
        one, other = (side["tokens"] / median(side["seconds"]) for side in (sides[ours], sides[name]))
        ratios = [_ratio(sides[ours][key], sides[name][key]) for key in ("saved", "peak")]
        lines.append(f"against {name}: speed {one / other:.2f}, saved bytes {ratios[0]}, peak {ratios[1]}")
    return lines


def _adapters(report: Figures) -> list[str]:
    """Of several adapters, in turn and together."""
    before, after = report["load"]
    first, setup = _head(report, f"recompute {report['recompute']}; kernels {report['kernels']}")
    return [
        first,
        f"{setup}, load {before:.1f} to {after:.1f}",
        f"{report['rows']} x {report['length']} tokens an adapter and step; together in {report['micro_batches']}"
        f" micro-batch{'es' if report['micro_batches'] > 1 else ''}",
        *_sides(f"{'':<26}", report, report["sides"].items()),
        f"together against in turn {report['ratio']:.2f}, against one adapter with all tokens"
        f" {report['of_one_adapter']:.2f}",
    ]


def _scaling(report: Figures) -> list[str]:
    """Of several values. The last column has the additional seconds per unit, compared with the value before."""
    lines = _head(report, f"kernels {report['kernels']}")
    for name, measured in report["axes"].items():
        slopes = [""]
        for before, own in itertools.pairwise(measured):
            more = median(own["seconds"]) - median(before["seconds"])
            slopes.append(f"{more / (own['value'] - before['value']):.4f}")
        sides = [(str(own["value"]), {**own, "more": slope}) for own, slope in zip(measured, slopes, strict=True)]
        lines += _sides(f"{name:<12}", {}, sides)
    return lines


def _decoding(report: Figures) -> list[str]:
    """Of decoding, here and in transformers."""
    ours, theirs = (median(taken) for taken in report["seconds"].values())
    tokens = report["batch_size"] * report["new_tokens"]
    return [
        f"{report['model']} in {report['dtype']} on {report['device']}: {count_text(report['batch_size'], 'prompt')} of"
        f" {report['prompt_tokens']} tokens together, {report['new_tokens']} new tokens each,"
        f" {report['equal_tokens']:.1%} of them equal",
        _setup(report),
        *_sides(f"{'':<20}", {"tokens": tokens}, [(name, {"seconds": own}) for name, own in report["seconds"].items()]),
        f"ratio of the medians {theirs / ours:.2f}",
    ]


def _layout(report: Figures) -> list[str]:
    """Of a layout. The step comes first, then each stage's memory and messages."""
    layout = report["layout"]
    ranks, rows = count_text(layout["ranks"], "rank"), count_text(layout["rows"], "row")
    sequences = "sharded" if layout["sequence_parallel"] else "full"
    return [
        *_head(report, _matmul(report)),
        f"{ranks} = tensor {layout['tensor_parallel']} x pipeline {layout['pipeline_parallel']} x"
        f" data {layout['data_parallel']}, {sequences} sequences, ZeRO-{layout['zero_stage']},"
        f" recompute {layout['recompute']}; {report['kernels']}",
        f"{report['tokens']:,} tokens per step, {report['supervised']:,} with a label; micro-batches per rank:"
        f" {report['micro_batches']}, up to {rows} each; weights {report['weights']}",
        *_sides("", report, [("", {})]),
        *_gpu_lines(report, ""),
        *_planned(report),
        *_memory(report["ranks"]),
        *_messages(report),
    ]


def _gpu_lines(figures: Figures, name: str) -> list[str]:
    """MFU and the time by class of kernels, if a GPU was measured."""
    lines = []
    if figures.get("mfu") is not None:
        lines.append(f"{name}MFU {figures['mfu']:.1%}")
    if figures.get("kernel_seconds"):
        total = sum(figures["kernel_seconds"].values())
        shares = (f"{kind} {spent:.3f} ({spent / total:.0%})" for kind, spent in figures["kernel_seconds"].items())
        lines.append(f"{name}seconds in kernels: {', '.join(shares)}" if total else f"{name}no kernel was seen")
    return lines


def _planned(report: Figures) -> list[str]:
    """The step as it was planned, if it was."""
    planned = report["planned"]
    if planned is None:
        return []
    total = sum(planned["seconds"].values())
    ratio, shares = total / median(report["seconds"]), shares_text(planned["seconds"])
    return [f"planned for {planned['machine']}: {total:,.3f} s, {ratio:.3f} of the median; {shares}"]


def _memory(ranks: Sequence[Figures]) -> list[str]:
    note = " of the rank with most; held: before the first step"
    rows = [("stage  ", "saved MB", "formula", "ratio", " held MB", " peak MB", " planned", note)]
    for stage, members in _by_stage(ranks).items():
        saved, formula, held, peak, planned = (
            max((member[key] for member in members if member[key] is not None), default=None)
            for key in ("saved", "saved_formula", "held", "peak", "planned_peak")
        )
        sizes = (_megabytes(held), _megabytes(peak), _megabytes(planned), "")
        rows.append((str(stage), _megabytes(saved), _megabytes(formula), _ratio(saved, formula), *sizes))
    return aligned_lines(rows)


def _messages(report: Figures) -> list[str]:
    """The messages of one rank of each stage, and the ranks that send something else than was predicted."""
    if len(report["ranks"]) == 1:
        return ["messages: none, one rank sends nothing"]
    rows = [("stage", "messages to  ", f"{'counted in a step':>22}", f"{'as --dry_run predicts':>24}", "")]
    for stage, (member, *_) in _by_stage(report["ranks"]).items():
        for group, found in member["traffic"].items():
            counted = f"{found['messages']:,} / {bytes_in_words(found['bytes'])}"
            predicted = bytes_in_words(found["predicted_bytes"])
            messages = found["predicted_messages"]
            predicted = f"at most {predicted}" if messages is None else f"{messages:,} / {predicted}"
            name = "all ranks" if group == WORLD else group
            rows.append((str(stage), name, counted, predicted, f" {found['verdict']}"))
    others = [str(member["number"]) for member in report["ranks"] if not member["as_predicted"]]
    verdict = "every message and byte of all ranks as predicted"
    if others:
        verdict = f"NOT as predicted: rank {', '.join(others)}; --json has each rank's figures"
    return [*aligned_lines(rows, align="<<>><"), verdict]


def compare_traffic(counted: Traffic, predicted: Traffic, data_bytes: int) -> dict[str, dict[str, Any]]:
    """Both figures of each group that has a message, and a verdict. They are equal only if all kinds of messages are.

    Args:
        counted, predicted: the messages of one rank in one step.
        data_bytes: the most bytes that DeepSpeed may send in the data-parallel group, in any number of messages; 0: it
            sends nothing.
    """
    compared = {}
    for group in GROUPS:
        (messages, size), (expected, expected_size) = counted.of_group(group), predicted.of_group(group)
        if not messages and not expected:
            continue
        kinds = {key for part in (counted, predicted) for key in part.messages if key[0] == group}
        equal = all(
            counted.messages[key] == predicted.messages[key] and counted.bytes[key] == predicted.bytes[key]
            for key in kinds
        )
        difference = f"{messages - expected:+,} messages, {size - expected_size:+,} B"
        by_engine = group == DATA and data_bytes > 0
        if by_engine:
            expected_size, equal, difference = data_bytes, size <= data_bytes, f"{size - data_bytes:+,} B"
        compared[group] = {
            "messages": messages,
            "bytes": size,
            "predicted_messages": None if by_engine else expected,
            "predicted_bytes": expected_size,
            "as_predicted": equal,
            "verdict": "as predicted" if equal else f"differs: {difference}",
        }
    return compared


def _by_stage(ranks: Sequence[Figures]) -> dict[int, list[Figures]]:
    stages: dict[int, list[Figures]] = {}
    for member in ranks:
        stages.setdefault(member["stage"], []).append(member)
    return stages


def _megabytes(size: float | None) -> str:
    return "" if size is None else f"{size / 1e6:.1f}"


def _ratio(one: float | None, other: float | None) -> str:
    return "" if one is None or not other else f"{one / other:.3f}"
