"""What a rank of a stage does in the passes of a micro-batch: sums of the traces of its layers.

What follows the last attention runs its backward pass inside the forward pass, and is counted there. Blocks that do the
same are traced once and multiplied. What DeepSpeed sends in the data-parallel group is counted apart, as it fills
buckets and fetches ahead: `engine_bytes` is an upper bound of its bytes there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple, Protocol

import torch

from megatron_tiedlora.adapters.tied_adapter import AdapterConfig
from megatron_tiedlora.base.shapes import ModelShape
from megatron_tiedlora.model.batch import PAD_MULTIPLE
from megatron_tiedlora.model.layer_specs import HEAD_ROWS
from megatron_tiedlora.parallel.frozen_weight import padded
from megatron_tiedlora.parallel.traffic import DATA, MODEL, PIPELINE, STAGE, TENSOR, TIED, WORLD, Traffic
from megatron_tiedlora.planning.counting import Moment
from megatron_tiedlora.planning.layout import Layout, MicroBatchShape, ShareShape
from megatron_tiedlora.planning.stages import BlockKind, StageOwners, StagePlan, plan_stages, trained_tensors
from megatron_tiedlora.planning.trace import AdapterReading, Kind, Sizes, Trace, Tracer
from megatron_tiedlora.runtime.stopping import StepVotes, StopVotes

FP32, FP64 = 4, 8  # bytes


@dataclass
class PassWork:
    """Counts of one pass, or of what a backward pass computes again, on a rank.

    Attributes:
        linears, head, low_rank, attention: FLOPs of the blocks' frozen matmuls, of the head's, of the adapter's, and of
            attention.
        queries: numbers of queries that attention reads; twice as many in a backward pass.
        moved: bytes of everything else.
        weights: numbers of the blocks' linears that matmuls read; a quantised base dequantises them.
        weights_back: the same of matmuls for gradients, which read them transposed.
        rounded, rounded_back: numbers of activations, and of gradients, that the blocks' linears multiply; FP8 matmuls
            round them first.
        head_weights: the same of the head's matmuls.
        blocks: passes through a block, which the host launches.
        sent: messages.
    """

    linears: float = 0.0
    head: float = 0.0
    low_rank: float = 0.0
    attention: float = 0.0
    queries: float = 0.0
    moved: float = 0.0
    weights: float = 0.0
    weights_back: float = 0.0
    rounded: float = 0.0
    rounded_back: float = 0.0
    head_weights: float = 0.0
    blocks: float = 0.0
    sent: Traffic = field(default_factory=Traffic)

    def add(self, counts: Mapping[Hashable, float], *, times: float = 1, attention: float = 0.0) -> None:
        """Add the counts of a trace, which have the names of the attributes.

        Args:
            attention: FLOPs of attention in one forward pass of a block, for all heads of the rank.
        """

        for name in vars(self).keys() & counts.keys():
            unit = attention if name == "attention" else 1
            setattr(self, name, getattr(self, name) + times * unit * counts[name])
        for key, number in counts.items():
            if isinstance(key, tuple):
                what, kind = key  # messages or bytes
                getattr(self.sent, what)[TENSOR, kind] += round(times * number)


class StageWork(NamedTuple):
    """A forward pass; a backward pass without what it computes again; and that."""

    forward: PassWork
    backward: PassWork
    again: PassWork


def stage_work(stage: StagePlan, batch: MicroBatchShape) -> StageWork:
    """The work of a rank of a stage for a micro-batch."""
    owners, shares = stage.owned_by(batch.adapters), batch.shares
    tokens, after = tuple(share.num_tokens for share in shares), tuple(share.num_after for share in shares)
    sizes = Sizes(tokens, after, padded(batch.num_supervised), HEAD_ROWS)
    found = _block_work(owners, sizes, batch.squared_lengths)
    forward, backward, _ = found
    if stage.is_first:
        forward.add(tracer_of(stage.shape, stage.layout).embedding(batch.num_tokens))
    reading = _reading(owners)
    forward.add(reading.forward)
    backward.add(reading.backward)
    # Hidden states forward, and their gradient backward (zeros if none is needed).
    layout = stage.layout
    hidden = batch.num_tokens * stage.shape.hidden_size * layout.dtype.itemsize // layout.sequence_parts
    forward.sent.add(PIPELINE, "send", hidden, count=not stage.is_last)
    backward.sent.add(PIPELINE, "send", hidden, count=not stage.is_first)
    return found


def _block_work(owners: StageOwners, sizes: Sizes, squared_lengths: int) -> StageWork:
    """The work of the blocks, and of the head if the stage has it."""
    stage = owners.stage
    attention = 2 * squared_lengths * stage.shape.heads.rows[0] / stage.layout.tp_size
    found = forward, backward, again = StageWork(PassWork(), PassWork(), PassWork())
    for kind in owners.kinds:
        whole, plain = _trace(stage, kind, sizes), _trace(stage, kind, sizes, recompute="none")
        forward.add(whole.forward, times=kind.number, attention=attention)
        backward.add(plain.backward, times=kind.number, attention=attention)
        more = {key: count - plain.backward.get(key, 0) for key, count in whole.backward.items()}
        again.add(more, times=kind.number, attention=attention)
        forward.blocks += kind.number
        backward.blocks += kind.number * kind.goes_back
        again.blocks += kind.number * round(more.get("attention", 0))
    return found


def step_traffic(stage: StagePlan, micro_batches: Sequence[MicroBatchShape]) -> Traffic:
    """The messages that a rank of the stage sends in one step, without DeepSpeed's in the data-parallel group.

    The adapters that own tokens in the micro-batches take the step.
    """
    taking = sorted({adapter for shape in micro_batches for adapter in shape.adapters})
    traffic = once_traffic(stage, taking)
    for shape, number in Counter(micro_batches).items():
        for work in stage_work(stage, shape):
            traffic.include(work.sent, times=number)
    return traffic


# What is saved ---------------------------------------------------------------------------------------------------


def saved_bytes(stage: StagePlan, shares: Sequence[ShareShape]) -> float:
    """The bytes that autograd saves of a micro-batch on a rank of `stage`, without parameters and indices."""
    owners = stage.owned_by([share.adapter for share in shares])
    tokens, after = (tuple(sizes) for sizes in list(zip(*shares, strict=True))[1:])
    sizes = Sizes(tokens, after, padded(sum(after)), HEAD_ROWS)
    traces = [_trace(stage, kind, sizes) for kind in owners.kinds]
    saved = sum(kind.number * trace.saved for kind, trace in zip(owners.kinds, traces, strict=True))
    return saved + _factor_bytes(owners, [trace.saved_factors for trace in traces])


def _factor_bytes(owners: StageOwners, by_kind: Sequence[Iterable[tuple[str, str]]]) -> int:
    """The bytes of copies of A and F = (alpha / r) diag(v) B diag(u), which layers may share.

    Args:
        by_kind: which of them blocks of each kind have.
    """
    factors, held = _reading(owners).factors, dict[int, int]()
    for kind, some in zip(owners.kinds, by_kind, strict=True):
        for block in kind.blocks:
            held.update(factors[block, *factor] for factor in some if (block, *factor) in factors)
    return sum(held.values())


def saved_per_token(shape: ModelShape, layout: Layout, adapter: int | None = None) -> float:
    """The bytes that a block in the middle of the model saves for a token on a rank, without factors.

    Args:
        adapter: the number of its adapter; None for the one that saves most.
    """
    tokens = PAD_MULTIPLE * layout.tp_size
    sizes = Sizes((tokens,), (tokens,), tokens, HEAD_ROWS)
    adapters = layout.adapters if adapter is None else layout.adapters[adapter : adapter + 1]
    kinds = {Kind((config.of_one_layer,), earlier=True) for config in adapters}
    tracer = tracer_of(shape, layout)
    return max(tracer.unit(kind, layout.recompute).at(sizes).saved for kind in kinds) / tokens


class Beside(NamedTuple):
    """The bytes that traces do not see: what a kernel needs at a moment, and what attention saves in a block."""

    temporary: Callable[[Moment], float]
    saved: float


class PassPeak(NamedTuple):
    """The bytes that are kept of a micro-batch between its passes, and what its passes need beyond that at most."""

    kept: float
    moment: float


def moments_of(owners: StageOwners, sizes: Sizes) -> Iterator[Moment]:
    """The moments of both passes of each kind of block."""
    for kind in owners.kinds:
        for moments in _trace(owners.stage, kind, sizes).moments:
            yield from moments


def peak_bytes(owners: StageOwners, sizes: Sizes, beside: Beside) -> PassPeak:
    """What autograd and temporary tensors need on a rank for a micro-batch."""
    stage = owners.stage
    traces = [_trace(stage, kind, sizes) for kind in owners.kinds]
    kinds = {block: number for number, kind in enumerate(owners.kinds) for block in kind.blocks}

    def most(moments: Sequence[Moment]) -> float:
        return max((moment.alive + beside.temporary(moment) for moment in moments), default=0.0)

    highest = [tuple(map(most, trace.moments)) for trace in traces]
    keeps = [trace.kept + beside.saved * trace.saves_attention for trace in traces]
    held, peak, gradients = float(_factor_bytes(owners, [trace.kept_factors for trace in traces])), 0.0, 0.0
    for block in stage.blocks:
        peak = max(peak, held + highest[kinds[block]][0])
        held += keeps[kinds[block]]
    all_kept = held
    for block in reversed(stage.blocks):
        number = kinds[block]
        held -= keeps[number]
        peak = max(peak, held + gradients + highest[number][1])
        gradients += traces[number].gradients
    return PassPeak(all_kept, peak - all_kept)


# The model's operations ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepFlops:
    """Operations by purpose. A multiplication with its addition counts as two."""

    matmuls: int
    attention: int
    adapter: int
    head: int

    @property
    def total(self) -> int:
        """The sum."""
        return self.matmuls + self.attention + self.adapter + self.head


def step_flops(
    shape: ModelShape,
    adapter: AdapterConfig,
    *,
    num_tokens: int,
    squared_lengths: int,
    num_supervised: int,
    num_after: int | None = None,
) -> StepFlops:
    """The operations of the whole model, forward and backward, without recompute.

    Args:
        squared_lengths: the sum of s^2 over sequences of s positions; causal attention needs half of that.
        num_supervised: the positions that the head computes logits for.
        num_after: the positions that are computed after the last attention; None for these.
    """
    sizes = Sizes((num_tokens,), (num_supervised if num_after is None else num_after,), num_supervised, HEAD_ROWS)
    passes = _block_work(_whole(shape, adapter).owned_by(), sizes, squared_lengths)
    sums = (sum(getattr(work, name) for work in passes) for name in ("linears", "attention", "low_rank", "head"))
    return StepFlops(*map(round, sums))


class SampleCounts(Protocol):
    """Totals of the samples of a step."""

    @property
    def num_tokens(self) -> int: ...
    @property
    def squared_lengths(self) -> int: ...
    @property
    def num_supervised(self) -> int: ...


def training_flops(shape: ModelShape, adapter: AdapterConfig, samples: SampleCounts) -> int:
    """The operations of training on samples. Padding does not count, so packing and layouts change nothing."""
    tokens, squared, supervised = samples.num_tokens, samples.squared_lengths, samples.num_supervised
    flops = step_flops(shape, adapter, num_tokens=tokens, squared_lengths=squared, num_supervised=supervised)
    return flops.total


@cache
def _whole(shape: ModelShape, adapter: AdapterConfig) -> StagePlan:
    return plan_stages(shape, Layout((adapter,), length=1))[0]


# Traces ----------------------------------------------------------------------------------------------------------


def tracer_of(shape: ModelShape, layout: Layout) -> Tracer:
    """The traces of a model under a layout."""
    return _tracer(shape, layout.dtype, layout.tp_size, layout.sequence_parallel, layout.on_gpu)


@cache
def _tracer(shape: ModelShape, dtype: torch.dtype, tp_size: int, sequence_parallel: bool, on_gpu: bool) -> Tracer:
    return Tracer(shape, dtype=dtype, tp_size=tp_size, sequence_parallel=sequence_parallel, on_gpu=on_gpu)


def _trace(
    stage: StagePlan, kind: BlockKind, sizes: Sizes, *, recompute: str | None = None
) -> Trace:
    recompute = stage.layout.recompute if recompute is None else recompute
    if kind.traced.ends and recompute == "selective":  # nothing after the last attention is recomputed
        recompute = "none"
    return tracer_of(stage.shape, stage.layout).unit(kind.traced, recompute).at(sizes)


def _reading(owners: StageOwners) -> AdapterReading:
    return tracer_of(owners.stage.shape, owners.stage.layout).reading(owners.parts)


# Messages once a step -------------------------------------------------------------------------------------------------


# If a step was long, the ranks of a single stage sum this after each micro-batch of the next step but the last.
STOP_VOTES_BYTES = FP64 * len(StopVotes._fields)


def once_traffic(stage: StagePlan, taking: Sequence[int] = (0,)) -> Traffic:
    """The messages that a rank of the stage sends once in a step, without DeepSpeed's in the data-parallel group.

    Args:
        taking: the numbers of the adapters that take the step.
    """
    layout, traffic = stage.layout, Traffic()
    for group, numbers in _summed(stage.owned_by(taking)).items():
        traffic.add(group, "all-reduce", FP32 * numbers)
    if layout.tp_size * layout.pp_size > 1:  # the sum of squares for each gradient norm
        traffic.add(MODEL, "all-reduce", len(taking) * _norm_bytes(layout))
    if layout.world_size > 1:  # also the loss of each adapter, and whether it misses a gradient
        traffic.add(WORLD, "all-reduce", FP64 * (len(StepVotes._fields) + 2 * len(taking)))
    return traffic


def _summed(owners: StageOwners) -> Counter[str]:
    """The numbers of gradients that we sum over ranks once per step, by group.

    u is the same on the ranks of a stage, a tied tensor on those of all stages, another one on data-parallel ranks. If
    DeepSpeed steps the adapter, it sums over data-parallel ranks, which is all that u needs without tensor parallelism,
    and a tied tensor without a pipeline. A tied u is summed over tensor-parallel ranks before.
    """
    layout, found = owners.stage.layout, Counter[str]()
    data = layout.dp_size > 1
    for part in owners.parts:
        for name in trained_tensors(part):
            is_u, tied = part.config.tensors[name][1] == "u", part.config.is_tied(name)
            if is_u and tied and layout.tp_size > 1 and (part.layers or not layout.engine_steps):
                found[_stage_group(layout) if layout.engine_steps else TENSOR] += part.local_size(name)
            if is_u and not tied:
                ours, group = layout.tp_size > 1, _stage_group(layout)
            elif tied:
                ours, group = layout.pp_size > 1, TIED if layout.pp_size > 1 else DATA
            else:
                ours, group = False, DATA
            if ours or (data and not layout.engine_steps):
                found[group] += part.local_size(name)
    return found


def engine_bytes(stage: StagePlan, *, num_micro_batches: int) -> int:
    """The most bytes that DeepSpeed sends in the data-parallel group in one step; see `engine_traffic`."""
    return engine_traffic(stage, num_micro_batches=num_micro_batches).of_group(DATA)[1]


def engine_traffic(stage: StagePlan, *, num_micro_batches: int) -> Traffic:
    """What DeepSpeed sends in the data-parallel group in one step, at most (0.19.8, with the ds_configs/ files).

    It sums gradients once a step, and from ZeRO-2 on after each micro-batch. It sums the norm and, in ZeRO-1 and 2,
    gathers the updated values. ZeRO-3 gathers each parameter at most once for each pass of each micro-batch, as it
    keeps some from one pass to the next. Bytes are right; of messages it has one for each of these, as buckets and
    fetches are DeepSpeed's choice.
    """
    zero_stage, dp_size, sent = stage.layout.zero_stage, stage.layout.dp_size, Traffic()
    if dp_size == 1 or (zero_stage < 3 and not stage.layout.engine_steps):
        return sent
    gradients = FP32 * sum(stage.trained)
    sent.add(DATA, "all-reduce", _norm_bytes(stage.layout))
    if zero_stage < 3:
        sent.add(DATA, "all-reduce", gradients, count=1 if zero_stage == 1 else num_micro_batches)
        sent.add(DATA, "all-gather", FP32 * padded(sum(stage.trained), 2 * dp_size))
        return sent

    def whole(sizes: Iterable[int]) -> int:
        return sum(padded(size, dp_size) for size in sizes)

    stored = stage.local_base.items()
    base = sum(number * padded(tensor.size, dp_size) * tensor.itemsize for tensor, number in stored)
    parameters = base + FP32 * whole(stage.held if stage.layout.engine_steps else stage.held[:1])
    sent.add(DATA, "all-gather", parameters, count=2 * num_micro_batches)
    sent.add(DATA, "reduce-scatter", FP32 * whole(stage.trained), count=num_micro_batches)
    return sent


def _norm_bytes(layout: Layout) -> int:
    return FP32 if layout.engine_steps and layout.zero_stage < 3 else FP64


def _stage_group(layout: Layout) -> str:
    """The name of the group of a stage's ranks; see `named_handles`."""
    if layout.tp_size == 1:
        return DATA
    if layout.dp_size == 1:
        return TENSOR
    return WORLD if layout.pp_size == 1 else STAGE
