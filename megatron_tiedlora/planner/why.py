"""The arithmetic of one layout, term by term: what its fullest rank holds, and what its step takes."""

from __future__ import annotations

from collections.abc import Iterable

from megatron_tiedlora.base.wording import bytes_in_words, count_text, time_text
from megatron_tiedlora.planner.price import Priced, Pricer, capacity
from megatron_tiedlora.planner.table import Plan, missing_line
from megatron_tiedlora.planning.links import Term
from megatron_tiedlora.planning.memory import StageMemory, micro_batches_in_flight, num_communicators
from megatron_tiedlora.planning.work import Batches

_HELD = {
    "base": "base weights",
    "dequantised": "one weight dequantised or transposed",
    "adapter": "adapter",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "activations": "activations",
    "engine": "DeepSpeed's engine",
    "buffers": "buffers of messages",
    "libraries": "reserve: libraries",
    "slack": "reserve: the allocator",
}


def why_lines(row: Priced, pricer: Pricer, plan: Plan) -> list[str]:
    """Everything about a layout. A row that does not fit is priced as if it did."""
    full = row if row.fits else pricer.price_in_full(row.candidate)
    layout, step = row.candidate.layout, row.candidate.step
    batches, most = step.batches, f"{layout.rows} x {layout.length:,} tokens"
    if layout.named:
        most = f"{step.largest.tokens:,} tokens of {count_text(max(map(len, step.largest.owners)), 'adapter')}"
    lines = [
        f"{row.name}: tensor {layout.tp_size} x pipeline {layout.pp_size} x data {layout.dp_size},"
        f" {count_text(len(batches), 'micro-batch')} of up to {most}"
        f" per rank and step, recompute {layout.recompute}"
    ]
    lines += _memory(full, pricer)
    if not row.fits:
        lines.append(f"  {missing_line(row, plan)}")
    return [*lines, *_time(full, pricer, batches)]


def _memory(row: Priced, pricer: Pricer) -> list[str]:
    assert row.memory is not None, "it was priced in full"
    stage = pricer.stage(row.candidate, row.stage)
    machine, sizes = row.cluster.machine, row.memory
    notes = {
        "activations": f"{count_text(micro_batches_in_flight(stage), 'micro-batch')} in flight",
        "libraries": f"{bytes_in_words(machine['context'])} + {num_communicators(stage)} communicators x"
        f" {bytes_in_words(machine['communicator'])}",
        "slack": f"{machine['slack']:.0%} of the {bytes_in_words(sizes.allocated)} that PyTorch allocates",
    }
    lines = [f"memory of the fullest rank, on stage {row.stage}"]
    for name in StageMemory._fields:
        if size := getattr(sizes, name):
            note = f"   ({notes[name]})" if name in notes else ""
            lines.append(f"  {bytes_in_words(size):>12}  {_HELD[name]}{note}")
    return [*lines, f"  {bytes_in_words(sizes.total):>12}  of {bytes_in_words(capacity(row.cluster))}"]


def _time(row: Priced, pricer: Pricer, batches: Batches) -> list[str]:
    candidate, spent = row.candidate, row.step
    parts = pricer.parts(candidate)
    stage, _ = parts.busiest()
    batch = max(batches.kinds, key=lambda one: one.shape.num_tokens)
    forward, backward = pricer.stage_terms(candidate, stage, batch)
    number, stages = count_text(len(batches), "micro-batch"), count_text(len(parts.stages), "stage")
    lines = [f"time of a step, on stage {stage}, which works longest"]
    lines += [f"  forward pass of a micro-batch of {batch.shape.num_tokens:,} tokens", *_terms(forward)]
    lines += ["  its backward pass", *_terms(backward)]
    busy = spent.total - spent.bubble - spent.sums - spent.outside
    lines.append(f"  {time_text(busy):>10}  both passes of {number}")
    lines.append(f"  {time_text(spent.bubble):>10}  waiting: the schedule of {stages} and {number}, simulated")
    lines += ["  once a step", *_terms(pricer.sum_terms(candidate, stage))]
    lines.append(f"  {time_text(spent.outside):>10}  loader, agreements, optimizer")
    ranks = count_text(candidate.layout.world_size, "rank")
    lines.append(f"  {time_text(spent.total):>10}  a step: {row.work.tokens:,} tokens on {ranks} are")
    lines[-1] += f" {row.tokens_per_second:,.0f} tokens/s of each; MFU {row.mfu:.1%}"
    return lines


def _terms(terms: Iterable[Term]) -> list[str]:
    return [f"    {time_text(term.seconds):>10}  {term.label}{_arithmetic(term)}" for term in terms if term.seconds]


def _arithmetic(term: Term) -> str:
    if not term.rate:
        return ""
    fixed = f" + {time_text(term.fixed)}" if term.fixed else ""
    return f": {_amount(term.amount, term.unit)} / {_amount(term.rate, term.unit)}/s{fixed}"


def _amount(value: float, unit: str) -> str:
    for prefix, scale in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= scale:
            return f"{value / scale:,.2f} {prefix}{unit}"
    return f"{value:,.0f} {unit}"
