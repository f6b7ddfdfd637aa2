"""Hints on the fastest layout of a cluster, and on those that a user may have had in mind."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_tiedlora.base.wording import count_text
from megatron_tiedlora.planning.machines import ATTENTION, NF4_WITHOUT_LIBRARY, Constant, attention_of
from megatron_tiedlora.planning.planned import Planned
from megatron_tiedlora.planning.search import Candidate, ClusterPlan, Storage

_LARGE = 0.15  # of a step, for something that is worth a hint
_FASTER = 1.05  # how much faster another layout must be to be named
_GAIN = 0.01  # by how much another storage format must be faster
# What the storage of the base changes is a matter of the loss, not of speed; see docs/quantised.md.
_CHANGES_NUMBERS = "changes the base that is trained on (docs/quantised.md has what that does to the loss)"


def hint_lines(plan: ClusterPlan) -> list[str]:
    """Hints on the fastest layout and on those that a user may have had in mind."""
    if not plan.rows:
        return _formats(plan)
    best, shown = plan.rows[0], plan.best_of_each()
    found = [*_storage(best, plan), *_formats(plan), *_tensor(shown), *_bubble(best), *_gathers(shown)]
    return [*found, *_recompute(best, plan), *_attention(best), *_nf4(best)]


def _storage(best: Candidate, plan: ClusterPlan) -> list[str]:
    if best.storage == Storage() or plan.run.source.stored is not None:
        return []
    plain = next((row for row in plan.rows if row.storage == Storage()), None)
    words = f"{best.name}: {best.storage.name} {_CHANGES_NUMBERS}"
    if plain is None:
        is_compared = any(row.storage == Storage() for row in plan.others)
        return [f"{words}; in 16 bits nothing fits" if is_compared else words]
    return [f"{words}; the fastest in {plain.dtype} is {plain.name}, at {1 / _ratio(best, plain):.0%} of its speed"]


def _formats(plan: ClusterPlan) -> list[str]:
    """What the fastest layout of each format that was not asked for would gain."""
    fastest: dict[str, Candidate] = {}
    for row in plan.elsewhere:
        fastest.setdefault(row.storage.name, row)
    lines = []
    for name, row in fastest.items():
        gain = _ratio(row, plan.rows[0]) - 1 if plan.rows else None
        if gain is None or gain >= _GAIN:
            words = "would fit" if gain is None else f"would gain {gain:.0%}"
            words = f"{name} {words} ({row.name}, {_rate(row)})"
            lines.append(f"{words}, but {_CHANGES_NUMBERS}; --formats {name} takes it")
    return lines


def _attention(best: Candidate) -> list[str]:
    """The kernel that is planned with, and what the fastest one on such a card would give."""
    machine, kernel = best.machine, attention_of(best.machine)
    if kernel is None or best.dtype != "bf16":
        return []
    assert machine.capability is not None, "it has a kernel of a card"
    words = f"attention is planned by {kernel}, which a run takes where no other is installed"
    known = ATTENTION[machine.capability]
    name = max(known, key=lambda name: known[name].value)
    faster = best.changed({"attention.bf16": known[name]})
    if _ratio(faster, best) >= 1 + _GAIN:
        words += f"; with {name} (docs/gpu.md) {best.name} would do {_rate(faster)}"
    return [words]


def _nf4(best: Candidate) -> list[str]:
    machine = best.machine
    if best.storage.base != "nf4" or not machine.on_gpu or machine["dequantise.nf4"]:
        return []
    weights = machine["bandwidth"] * machine["elementwise"] / NF4_WITHOUT_LIBRARY
    slower = best.changed({"dequantise.nf4": Constant(weights, "of eager kernels")})
    return [f"nf4 is planned with bitsandbytes' kernel; without it {best.name} would do {_rate(slower)}"]


def _rate(row: Planned) -> str:
    return f"{row.tokens_per_second:,.0f} tokens/s"


def _ratio(faster: Planned, slower: Planned) -> float:
    return faster.tokens_per_second / slower.tokens_per_second


def _tensor(shown: Sequence[Candidate]) -> list[str]:
    """The layout with most tensor parallelism, if its messages take much of the step."""
    wide = max(shown, key=lambda row: (row.layout.tp_size, row.tokens_per_second))
    alike = [row for row in shown if row.storage == wide.storage]
    fastest = max(alike, key=lambda row: row.tokens_per_second)
    share = wide.seconds.tensor / wide.seconds.total
    if share < _LARGE or _ratio(fastest, wide) < _FASTER:
        return []
    layout = fastest.layout
    sizes = f"{layout.tp_size} x {layout.pp_size} x {layout.dp_size}"
    return [
        f"{wide.name}: tensor messages take {share:.0%}; {sizes} is {_ratio(fastest, wide):.1f} x as fast"
        f" ({fastest.name})"
    ]


def _bubble(best: Candidate) -> list[str]:
    layout, share = best.layout, best.seconds.bubble / best.seconds.total
    if share < _LARGE:
        return []
    return [
        f"{best.name}: stages wait {share:.0%} of the time; a larger --global_batch_size gives more than"
        f" {count_text(layout.micro_batches, 'micro-batch')} per rank"
    ]


def _gathers(shown: Sequence[Candidate]) -> list[str]:
    row = max(shown, key=lambda row: row.seconds.gathers / row.seconds.total)
    share = row.seconds.gathers / row.seconds.total
    if share < _LARGE:
        return []
    file = row.engine_file
    hides = row.layout.overlaps_gathers
    why = f"beyond what {file} hides behind computation" if hides else f"as nothing hides it in {file}"
    return [f"{row.name}: ZeRO-3 gathers weights for {share:.0%} of the time, {why}"]


def _recompute(best: Candidate, plan: ClusterPlan) -> list[str]:
    layout = best.layout
    if layout.recompute == "none":
        return []
    others = [row for row in plan.rows if row.layout.recompute == "none"]
    if not others:
        return [f"{best.name}: every layout that fits recomputes; more cards or a smaller storage format would not"]
    speed = f"{1 / _ratio(best, others[0]):.0%}"
    return [f"{best.name} recomputes; {others[0].name} does not, at {speed} of its speed"] if speed != "100%" else []
