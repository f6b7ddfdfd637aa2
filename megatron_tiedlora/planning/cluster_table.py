"""A plan as text: how many layouts there are, the fastest, the nearest that do not fit, and one term by term."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from megatron_tiedlora.base.wording import aligned_lines, bytes_in_words, count_text, time_text
from megatron_tiedlora.planning.machines import ATTENTION, NF4_WITHOUT_LIBRARY, Constant, attention_of
from megatron_tiedlora.planning.memory import StageMemory, micro_batches_in_flight, num_communicators
from megatron_tiedlora.planning.micro_batches import Batches
from megatron_tiedlora.planning.price import Priced, Pricer, capacity
from megatron_tiedlora.planning.search import Search, Storage
from megatron_tiedlora.planning.step_time import Term

_TIE = 1.005  # times the time of the fastest
_MISSED = 5  # lines about layouts that do not fit
_REASONS = 4  # lines about those that are refused
# What a user would change first, so that a layout fits; the last one changes the numbers.
_CHANGES = ("recompute", "micro_batch_size", "ds_config", "sequence_parallel", "base")
_SMALLEST = Storage("nf4")  # if a layout does not fit in it, then in no format
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


@dataclass(frozen=True)
class Plan:
    """Every layout of a cluster, priced.

    Attributes:
        rows: those that fit in a format to choose from, the fastest first; of equally fast ones the one with less
            memory. Layouts within `_TIE` of the fastest are equally fast, and the least changed base is first.
        elsewhere: those that fit in another format, in the same order.
        others: those that do not fit.
        steps: how many times the run has the tokens of the step that is planned.
    """

    search: Search
    rows: tuple[Priced, ...]
    elsewhere: tuple[Priced, ...]
    others: tuple[Priced, ...]
    steps: float

    @classmethod
    def of(cls, search: Search, priced: Iterable[Priced], *, steps: float) -> Plan:
        """Sort what was priced."""
        found = list(priced)
        fitting = sorted((one for one in found if one.fits), key=lambda one: (one.step.total, one.needed))
        rows = [one for one in fitting if one.candidate.storage in search.ranked]
        ties = sum(one.step.total <= _TIE * rows[0].step.total for one in rows)
        rows[:ties] = sorted(rows[:ties], key=lambda one: one.candidate.storage.num_changes)  # it is stable
        elsewhere = [one for one in fitting if one.candidate.storage not in search.ranked]
        return cls(search, tuple(rows), tuple(elsewhere), tuple(one for one in found if not one.fits), steps)

    @property
    def all_rows(self) -> tuple[Priced, ...]:
        """Every layout."""
        return (*self.rows, *self.elsewhere, *self.others)

    def best_of_each(self) -> list[Priced]:
        """The fastest of each tensor x pipeline x data and storage."""
        found: dict[tuple[object, ...], Priced] = {}
        for row in self.rows:
            found.setdefault(group_of(row), row)
        return list(found.values())

    def hours(self, row: Priced) -> float:
        """The hours of the run."""
        return self.steps * row.step.total / 3600


def group_of(row: Priced) -> tuple[object, ...]:
    """What rows of a table share that differ in micro-batch, recompute, sequences and ZeRO only."""
    layout = row.candidate.layout
    return layout.tp_size, layout.pp_size, layout.dp_size, row.candidate.storage


def counts_line(plan: Plan) -> str:
    """How many layouts were enumerated, and what became of them."""
    dropped = sum(one.memory is None for one in plan.others)
    fitting = len(plan.rows) + len(plan.elsewhere)
    return (
        f"{plan.search.enumerated:,} layouts enumerated: {plan.search.refused.total():,} rejected, {dropped:,}"
        f" dropped as their weights alone do not fit, {fitting + len(plan.others) - dropped:,} priced; {fitting:,} fit"
    )


def refused_lines(plan: Plan) -> list[str]:
    """Why a run rejects layouts, the most frequent reason first."""
    counts = plan.search.refused.most_common()
    lines = [f"  {number:,} x {reason}" for reason, number in counts[:_REASONS]]
    left = sum(number for _, number in counts[_REASONS:])
    return [*lines, *([f"  {left:,} x {count_text(len(counts) - _REASONS, 'more reason')}"] if left else [])]


def table_lines(rows: Sequence[Priced], plan: Plan) -> list[str]:
    """The table."""
    header = ["layout", "GB", "tokens/s", "MFU", "matmuls", "attention", "elementwise", "tensor", "gathers"]
    lines = [[*header, "bubble", "sums", "hours", "rank hours"]]
    for row in rows:
        total, spent, hours = row.step.total, row.step, plan.hours(row)
        elementwise = spent.elementwise + spent.dequantised + spent.launches
        shares = [spent.matmuls, spent.attention, elementwise, spent.tensor, spent.gathers]
        shares += [spent.bubble + spent.pipeline, spent.sums + spent.outside]
        lines.append(
            [
                row.name,
                f"{row.needed / 1e9:.1f}",
                f"{row.tokens_per_second:,.{0 if row.tokens_per_second >= 100 else 1}f}",
                f"{row.mfu:.1%}",
                *(f"{share / total:.1%}" for share in shares),
                hours_text(hours),
                hours_text(hours * row.cluster.world_size),
            ]
        )
    return aligned_lines(lines, indent="  ")


def hours_text(value: float) -> str:
    """Hours with as many digits as say something."""
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def missed_lines(plan: Plan) -> list[str]:
    """Default layouts that do not fit, one for each tensor x pipeline x data and storage, the nearest first."""
    settings, plain = plan.search.run.settings, dict[tuple[object, ...], Priced]()

    def unlike(row: Priced) -> tuple[bool, bool, float]:
        return not row.candidate.is_default, row.candidate.engine_file != settings.ds_config, row.needed

    for row in (*plan.rows, *plan.others):
        group = group_of(row)
        if row.candidate.storage not in plan.search.ranked:
            continue
        if group not in plain or unlike(row) < unlike(plain[group]):
            plain[group] = row
    missed = sorted((row for row in plain.values() if not row.fits), key=lambda row: row.needed)
    return [missing_line(row, plan) for row in missed[:_MISSED]]


def missing_line(row: Priced, plan: Plan) -> str:
    """What a layout that does not fit lacks, and which change makes it fit."""
    room = capacity(row.cluster) / 1e9
    if row.memory is None:
        return f"{row.name}: {row.needed / 1e9:.1f} of {room:.1f} GB for the weights alone; {_what_fits(row, plan)}"
    parts = {name: size for name, size in row.memory._asdict().items() if name != "slack"}
    largest = sorted(parts.items(), key=lambda part: -part[1])[:2]
    words = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in largest)
    return f"{row.name}: {row.needed / 1e9:.1f} of {room:.1f} GB, {words}; {_what_fits(row, plan)}"


def _what_fits(row: Priced, plan: Plan) -> str:
    """The smallest change of a layout that fits, in flags: of one setting if that is enough, last of the storage."""
    *sizes, storage = group_of(row)
    groups = [group_of(row), *([(*sizes, _SMALLEST)] if storage == Storage() else [])]
    best: tuple[tuple[int, int, int, float], str] | None = None
    for other in (*plan.rows, *plan.elsewhere):
        if group_of(other) not in groups:
            continue
        mine, theirs = row.candidate.flags, other.candidate.flags
        changed = [name for name in _CHANGES if mine.get(name) != theirs.get(name)]
        order = sum(1 << _CHANGES.index(name) for name in changed)
        rank = (groups.index(group_of(other)), len(changed), order, other.step.total)
        if best is None or rank < best[0]:
            best = rank, " ".join(f"--{name} {str(theirs[name]).lower()}" for name in changed)
    return "nothing fits with these parallel sizes" if best is None else f"{best[1]} fits"


# One layout, term by term ---------------------------------------------------------------------------------------------


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


# Hints ----------------------------------------------------------------------------------------------------------------


_LARGE = 0.15  # of a step, for something that is worth a hint
_FASTER = 1.05  # how much faster another layout must be to be named
_GAIN = 0.01  # by how much another storage format must be faster
# What the storage of the base changes is a matter of the loss, not of speed; see docs/quantised.md.
_CHANGES_NUMBERS = "changes the base that is trained on (docs/quantised.md has what that does to the loss)"


def hint_lines(plan: Plan) -> list[str]:
    """Hints on the fastest layout and on those that a user may have had in mind."""
    if not plan.rows:
        return _formats(plan)
    best, shown = plan.rows[0], plan.best_of_each()
    found = [*_storage(best, plan), *_formats(plan), *_tensor(shown), *_bubble(best), *_gathers(shown)]
    return [*found, *_recompute(best, plan), *_attention(best), *_nf4(best)]


def _storage(best: Priced, plan: Plan) -> list[str]:
    if best.candidate.storage == Storage() or plan.search.run.source.stored is not None:
        return []
    plain = next((row for row in plan.rows if row.candidate.storage == Storage()), None)
    words = f"{best.name}: {best.candidate.storage.name} {_CHANGES_NUMBERS}"
    if plain is None:
        is_compared = any(row.candidate.storage == Storage() for row in plan.others)
        return [f"{words}; in 16 bits nothing fits" if is_compared else words]
    return [f"{words}; the fastest in {plain.dtype} is {plain.name}, at {1 / _ratio(best, plain):.0%} of its speed"]


def _formats(plan: Plan) -> list[str]:
    """What the fastest layout of each format that was not asked for would gain."""
    fastest: dict[str, Priced] = {}
    for row in plan.elsewhere:
        fastest.setdefault(row.candidate.storage.name, row)
    lines = []
    for name, row in fastest.items():
        gain = _ratio(row, plan.rows[0]) - 1 if plan.rows else None
        if gain is None or gain >= _GAIN:
            words = "would fit" if gain is None else f"would gain {gain:.0%}"
            words = f"{name} {words} ({row.name}, {_rate(row)})"
            lines.append(f"{words}, but {_CHANGES_NUMBERS}; --formats {name} takes it")
    return lines


def _attention(best: Priced) -> list[str]:
    """The kernel that is planned with, and what the fastest one on such a card would give."""
    machine, kernel = best.cluster.machine, attention_of(best.cluster.machine)
    if kernel is None or best.dtype != "bf16":
        return []
    assert machine.capability is not None, "it has a kernel of a card"
    words = f"attention is planned by {kernel}, which a run takes where no other is installed"
    known = ATTENTION[machine.capability]
    name = max(known, key=lambda name: known[name].value)
    faster = _with(best, "attention.bf16", known[name])
    if _ratio(faster, best) >= 1 + _GAIN:
        words += f"; with {name} (docs/gpu.md) {best.name} would do {_rate(faster)}"
    return [words]


def _nf4(best: Priced) -> list[str]:
    machine = best.cluster.machine
    if best.candidate.storage.base != "nf4" or not machine.on_gpu or machine["dequantise.nf4"]:
        return []
    weights = machine["bandwidth"] * machine["elementwise"] / NF4_WITHOUT_LIBRARY
    slower = _with(best, "dequantise.nf4", Constant(weights, "of eager kernels"))
    return [f"nf4 is planned with bitsandbytes' kernel; without it {best.name} would do {_rate(slower)}"]


def _with(row: Priced, name: str, constant: Constant) -> Priced:
    """The same layout on a machine with another constant."""
    machine = row.cluster.machine.changed({name: constant})
    return Pricer(replace(row.cluster, machine=machine)).price_in_full(row.candidate)


def _rate(row: Priced) -> str:
    return f"{row.tokens_per_second:,.0f} tokens/s"


def _ratio(faster: Priced, slower: Priced) -> float:
    return faster.tokens_per_second / slower.tokens_per_second


def _tensor(shown: Sequence[Priced]) -> list[str]:
    """The layout with most tensor parallelism, if its messages take much of the step."""
    wide = max(shown, key=lambda row: (row.candidate.layout.tp_size, row.tokens_per_second))
    alike = [row for row in shown if row.candidate.storage == wide.candidate.storage]
    fastest = max(alike, key=lambda row: row.tokens_per_second)
    share = wide.step.tensor / wide.step.total
    if share < _LARGE or _ratio(fastest, wide) < _FASTER:
        return []
    layout = fastest.candidate.layout
    sizes = f"{layout.tp_size} x {layout.pp_size} x {layout.dp_size}"
    return [
        f"{wide.name}: tensor messages take {share:.0%}; {sizes} is {_ratio(fastest, wide):.1f} x as fast"
        f" ({fastest.name})"
    ]


def _bubble(best: Priced) -> list[str]:
    layout, share = best.candidate.layout, best.step.bubble / best.step.total
    if share < _LARGE:
        return []
    return [
        f"{best.name}: stages wait {share:.0%} of the time; a larger --global_batch_size gives more than"
        f" {count_text(layout.micro_batches, 'micro-batch')} per rank"
    ]


def _gathers(shown: Sequence[Priced]) -> list[str]:
    row = max(shown, key=lambda row: row.step.gathers / row.step.total)
    share = row.step.gathers / row.step.total
    if share < _LARGE:
        return []
    file = row.candidate.engine_file
    hides = row.candidate.layout.overlaps_gathers
    why = f"beyond what {file} hides behind computation" if hides else f"as nothing hides it in {file}"
    return [f"{row.name}: ZeRO-3 gathers weights for {share:.0%} of the time, {why}"]


def _recompute(best: Priced, plan: Plan) -> list[str]:
    layout = best.candidate.layout
    if layout.recompute == "none":
        return []
    others = [row for row in plan.rows if row.candidate.layout.recompute == "none"]
    if not others:
        return [f"{best.name}: every layout that fits recomputes; more cards or a smaller storage format would not"]
    speed = f"{1 / _ratio(best, others[0]):.0%}"
    return [f"{best.name} recomputes; {others[0].name} does not, at {speed} of its speed"] if speed != "100%" else []
