"""Makes the tables of a step from the figures that also go into the JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from megatron_tiedlora.base.wording import bytes_in_words, count_text
from megatron_tiedlora.benchmark.timing import SPEED_HEADER, setup_line, speed_columns
from megatron_tiedlora.parallel.traffic import DATA, GROUPS, WORLD, Traffic

_SHARES_HEADER = f"{SPEED_HEADER}{'padding':>9}{'of matmul':>11}"


def _setup_lines(report: Mapping[str, Any]) -> list[str]:
    adapter = f"{report['method']} r {report['rank']} of {', '.join(report['targets'])}"
    return [
        f"{report['model']}, {adapter}, {report['dtype']} on {report['device']}; a bare"
        f" matmul does {report['matmul_flops_per_second'] / 1e9:,.0f} GFLOP/s",
        setup_line(report),
    ]


def step_table(report: Mapping[str, Any]) -> list[str]:
    """The figures of one process as lines. Ratios compare our side with another one."""
    sides = report["sides"]
    ours, *others = sides
    lines = [
        *_setup_lines(report),
        f"{ours}: recompute {report['recompute']}; kernels {report['kernels']}",
        f"{'':<20}{_SHARES_HEADER}{'saved MB':>10}{'formula':>9}{'peak MB':>9}",
    ]
    for name, side in sides.items():
        formula = _megabytes(side.get("saved_formula"))
        lines.append(
            f"{name:<20}{_speed(side, report)}{_megabytes(side['saved']):>10}{formula:>9}{_megabytes(side['peak']):>9}"
        )
    lines.append(f"saved bytes are {sides[ours]['saved_ratio']:.3f} of the formula's")
    for name, side in sides.items():
        lines += _gpu_lines(side, f"{name}: ")
    for name in others:
        speed = _tokens_per_second(sides[ours]) / _tokens_per_second(sides[name])
        ratios = [_ratio(sides[ours][key], sides[name][key]) for key in ("saved", "peak")]
        lines.append(f"against {name}: speed {speed:.2f}, saved bytes {ratios[0]}, peak {ratios[1]}")
    return lines


def layout_table(report: Mapping[str, Any]) -> list[str]:
    """The figures of a layout as lines. The step comes first, then each stage's memory and messages."""
    layout = report["layout"]
    ranks, rows = count_text(layout["ranks"], "rank"), count_text(layout["rows"], "row")
    sequences = "sharded" if layout["sequence_parallel"] else "full"
    return [
        *_setup_lines(report),
        f"{ranks} = tensor {layout['tensor_parallel']} x pipeline {layout['pipeline_parallel']} x"
        f" data {layout['data_parallel']}, {sequences} sequences, ZeRO-{layout['zero_stage']},"
        f" recompute {layout['recompute']}; {report['kernels']}",
        f"{report['tokens']:,} tokens per step, {report['supervised']:,} with a label; micro-batches per rank:"
        f" {report['micro_batches']}, up to {rows} each; weights {report['weights']}",
        _SHARES_HEADER,
        _speed(report, report),
        *_gpu_lines(report, ""),
        *_planned(report),
        *_memory(report["ranks"]),
        *_messages(report),
    ]


def _speed(figures: Mapping[str, Any], report: Mapping[str, Any]) -> str:
    flops, rate = figures["model_flops"], report["matmul_flops_per_second"]
    share = "" if flops is None else f"{flops / median(figures['seconds']) / rate:.1%}"
    padding = 1 - figures["tokens"] / figures["positions"]
    return f"{speed_columns(figures['seconds'], figures['tokens'])}{padding:>9.1%}{share:>11}"


def _gpu_lines(figures: Mapping[str, Any], name: str) -> list[str]:
    """MFU and the time by class of kernels, if a GPU was measured."""
    lines = []
    if figures.get("mfu") is not None:
        lines.append(f"{name}MFU {figures['mfu']:.1%}")
    if figures.get("kernel_seconds"):
        total = sum(figures["kernel_seconds"].values())
        shares = (f"{kind} {spent:.3f} ({spent / total:.0%})" for kind, spent in figures["kernel_seconds"].items())
        lines.append(f"{name}seconds in kernels: {', '.join(shares)}" if total else f"{name}no kernel was seen")
    return lines


def _planned(report: Mapping[str, Any]) -> list[str]:
    """The step as it was planned, if it was."""
    planned = report["planned"]
    if planned is None:
        return []
    spent = planned["seconds"]
    total = sum(spent.values())
    shares = ", ".join(f"{name} {seconds / total:.1%}" for name, seconds in spent.items() if seconds)
    ratio = total / median(report["seconds"])
    return [f"planned for {planned['machine']}: {total:,.3f} s, {ratio:.3f} of the median; {shares}"]


def _memory(ranks: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [
        f"{'stage':<7}{'saved MB':>10}{'formula':>9}{'ratio':>7}{'held MB':>10}{'peak MB':>10}{'planned':>10}"
        "   of the rank with most; held: before the first step"
    ]
    for stage, members in _by_stage(ranks).items():
        saved, formula, held, peak, planned = (
            max((member[key] for member in members if member[key] is not None), default=None)
            for key in ("saved", "saved_formula", "held", "peak", "planned_peak")
        )
        lines.append(
            f"{stage:<7}{_megabytes(saved):>10}{_megabytes(formula):>9}{_ratio(saved, formula):>7}"
            f"{_megabytes(held):>10}{_megabytes(peak):>10}{_megabytes(planned):>10}"
        )
    return lines


def _messages(report: Mapping[str, Any]) -> list[str]:
    """The messages of one rank of each stage, and the ranks that send something else than was predicted."""
    if len(report["ranks"]) == 1:
        return ["messages: none, one rank sends nothing"]
    lines = [f"{'stage':<7}{'messages to':<13}{'counted in a step':>24}{'as --dry_run predicts':>26}"]
    for stage, (member, *_) in _by_stage(report["ranks"]).items():
        for group, found in member["traffic"].items():
            counted = f"{found['messages']:,} / {bytes_in_words(found['bytes'])}"
            predicted = bytes_in_words(found["predicted_bytes"])
            messages = found["predicted_messages"]
            predicted = f"at most {predicted}" if messages is None else f"{messages:,} / {predicted}"
            name = "all ranks" if group == WORLD else group
            lines.append(f"{stage:<7}{name:<13}{counted:>24}{predicted:>26}   {found['verdict']}")
    others = [str(member["number"]) for member in report["ranks"] if not member["as_predicted"]]
    lines.append(
        "every message and byte of all ranks as predicted"
        if not others
        else f"NOT as predicted: rank {', '.join(others)}; --json has each rank's figures"
    )
    return lines


def compare_traffic(counted: Traffic, predicted: Traffic, data_bytes: int) -> dict[str, dict[str, Any]]:
    """Both figures of each group that has a message, and a verdict. They are equal only if all kinds of messages are.

    Args:
        counted, predicted: the messages of one rank in one step.
        data_bytes: the most bytes that DeepSpeed may send in the data-parallel group, in any number of messages.
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
        if group == DATA:
            expected_size, equal, difference = data_bytes, size <= data_bytes, f"{size - data_bytes:+,} B"
        compared[group] = {
            "messages": messages,
            "bytes": size,
            "predicted_messages": None if group == DATA else expected,
            "predicted_bytes": expected_size,
            "as_predicted": equal,
            "verdict": "as predicted" if equal else f"differs: {difference}",
        }
    return compared


def _tokens_per_second(side: Mapping[str, Any]) -> float:
    """The tokens per second at the median, without padding."""
    return float(side["tokens"] / median(side["seconds"]))


def _by_stage(ranks: Sequence[Mapping[str, Any]]) -> dict[int, list[Mapping[str, Any]]]:
    stages: dict[int, list[Mapping[str, Any]]] = {}
    for member in ranks:
        stages.setdefault(member["stage"], []).append(member)
    return stages


def _megabytes(size: float | None) -> str:
    return "" if size is None else f"{size / 1e6:.1f}"


def _ratio(one: float | None, other: float | None) -> str:
    return "" if one is None or not other else f"{one / other:.3f}"
