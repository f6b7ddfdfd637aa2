"""Compute the work of a rank in the passes of a micro-batch, from the traces of the layers in its stage.

The layers after the last attention run their backward pass inside the forward pass, and are counted there. Equal blocks
are traced once, and their counts are multiplied. DeepSpeed's messages in the data-parallel group are counted
separately, because DeepSpeed uses buckets and prefetches. `engine_traffic` returns an upper bound for their bytes.
"""

from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from functools import cache, partial
from typing import NamedTuple

from megatron_tiedlora.adapters.tied_adapter import AdapterConfig
from megatron_tiedlora.base.shapes import ModelShape, squared_length
from megatron_tiedlora.model.batch import PAD_MULTIPLE
from megatron_tiedlora.model.layer_specs import HEAD_ROWS
from megatron_tiedlora.parallel.frozen_weight import padded
from megatron_tiedlora.parallel.groups import DATA, MODEL, PIPELINE, STAGE, TENSOR, TIED, WORLD, Traffic
from megatron_tiedlora.planning.layout import Layout, MicroBatchShape, StagePlan, plan_stages
from megatron_tiedlora.planning.trace import AdapterReading, Kind, Sizes, Trace, Tracer
from megatron_tiedlora.runtime.stopping import StepVotes, StopVotes

FP32, FP64 = 4, 8  # bytes


class PassWork(dict[Hashable, float]):
    """The counts of one pass on a rank, or of the recomputation in a backward pass. Missing keys have the value 0.

    linears, head, low_rank, attention: the FLOPs of the blocks' frozen matmuls, the head, the adapter, and attention.
    windowed: the part of `attention` in blocks whose window is shorter than the longest document.
    queries: the query elements that attention reads; twice as many in a backward pass.
    moved: the bytes that all other operations read and write.
    weights: the elements of the blocks' linears that matmuls read, and that a quantised base dequantises.
    weights_back: the elements of transposed weights that matmuls for gradients read.
    rounded, rounded_back: the elements of activations and of gradients that the blocks' linears multiply. FP8 matmuls
        round them first.
    head_weights: the elements of the head that its matmuls read.
    blocks: the number of block passes, whose kernels the host launches.
    (messages, group, kind), (bytes, group, kind): the messages; see `Traffic`.
    """

    def __missing__(self, key: Hashable) -> float:
        return 0.0

    def add(self, counts: Mapping[Hashable, float], *, times: float = 1) -> None:
        """Add `counts`, multiplied by `times`."""
        for key, number in counts.items():
            self[key] += times * number

    @property
    def sent(self) -> Traffic:
        """The messages that the rank sends in this pass."""
        found = Traffic()
        for key, number in self.items():
            if isinstance(key, tuple):
                what, *where = key
                getattr(found, what)[tuple(where)] = round(number)
        return found


class StageWork(NamedTuple):
    """The work of a forward pass, of a backward pass without recomputation, and of the recomputation."""

    forward: PassWork
    backward: PassWork
    again: PassWork


def stage_work(stage: StagePlan, batch: MicroBatchShape) -> StageWork:
    """Return the work of a rank of the stage for one micro-batch."""
    owned = stage.for_adapters(batch.adapters)
    found = forward, backward, _ = StageWork(PassWork(), PassWork(), PassWork())
    parts = batch.halves or (batch,)
    for part in parts:
        for work, more in zip(found, _block_work(owned, _sizes(part, len(parts)), batch.lengths), strict=True):
            work.add(more, times=1 / len(parts))  # counts are affine functions of the sizes
        if stage.is_first:
            forward.add(tracer_of(stage.shape, stage.layout).embedding(part.num_tokens))
    reading = _reading(owned)
    forward.add(reading.forward)
    backward.add(reading.backward)
    # The forward pass sends hidden states. The backward pass sends their gradient, or zeros if no gradient is needed.
    layout = stage.layout
    hidden = batch.num_tokens * stage.shape.hidden_size * layout.dtype.itemsize // layout.sequence_parts
    for work, sends in ((forward, not stage.is_last), (backward, not stage.is_first)):
        if sends:
            work.add({("messages", PIPELINE, "send"): 1, ("bytes", PIPELINE, "send"): hidden})
    return found


def _sizes(batch: MicroBatchShape, halves: int = 1) -> Sizes:
    """Return the sizes of a micro-batch, or of `halves` that are each as large as `batch`."""
    tokens, after = (tuple(halves * size for size in sizes) for sizes in (batch.tokens, batch.after))
    return Sizes(tokens, after, halves * padded(batch.num_supervised), HEAD_ROWS, halves)


def _block_work(stage: StagePlan, sizes: Sizes, lengths: Sequence[int]) -> StageWork:
    """Return the work of the stage's blocks, and of the head if the stage has it."""
    found = forward, backward, again = StageWork(PassWork(), PassWork(), PassWork())
    units = Counter[tuple[int, int | None]]()  # a trace counts attention in units of a block's forward pass
    both = zip(traces(stage, sizes), traces(stage, sizes, "none"), strict=True)
    for (kind, blocks), (whole, plain) in zip(stage.kinds.items(), both, strict=True):
        number = len(blocks)
        more = {key: count - plain.backward.get(key, 0) for key, count in whole.backward.items()}
        for index, counts in enumerate((whole.forward, plain.backward, more)):
            found[index].add(counts, times=number)
            units[index, kind.window] += number * round(counts.get("attention", 0))
        number *= sizes.halves  # whose kernels the host launches
        forward["blocks"] += number
        # A block below the first adapted layer has no backward pass.
        backward["blocks"] += number * (kind.earlier or any(kind.adapters))
        again["blocks"] += number * round(more.get("attention", 0)) / sizes.halves
    for work in found:
        work["attention"] = 0.0
    for window in {kind.window for kind in stage.kinds}:
        squared = sum(squared_length(length, window) for length in lengths)
        flops = 2 * squared * stage.shape.heads.rows[0] / (sizes.halves * stage.layout.tp_size)
        for index, work in enumerate(found):
            work["attention"] += units[index, window] * flops
            if window is not None and window < max(lengths, default=0):
                work["windowed"] += units[index, window] * flops
    return found


def step_traffic(stage: StagePlan, micro_batches: Sequence[MicroBatchShape]) -> Traffic:
    """Return the messages of a rank in one step, without DeepSpeed's messages in the data-parallel group."""
    traffic = once_traffic(stage, micro_batches)
    for shape, number in Counter(micro_batches).items():
        for work in stage_work(stage, shape):
            traffic.include(work.sent, times=number)
    return traffic


# What is saved ---------------------------------------------------------------------------------------------------


def saved_bytes(stage: StagePlan, batch: MicroBatchShape) -> float:
    """Return the bytes that autograd saves for a micro-batch on a rank, without parameters and indices."""
    owned = stage.for_adapters(batch.adapters)
    found = traces(owned, _sizes(batch))
    saved = sum(len(blocks) * trace.saved for blocks, trace in zip(owned.kinds.values(), found, strict=True))
    return saved + factor_bytes(owned, [trace.saved_factors for trace in found])


def factor_bytes(stage: StagePlan, by_kind: Sequence[Iterable[tuple[str, str]]]) -> int:
    """Return the bytes of the copies of A and F = (alpha / r) diag(v) B diag(u), which layers may share.

    Args:
        by_kind: for each kind of block, its copies of A and F, as pairs of a target and a letter.
    """
    factors, held = _reading(stage).factors, dict[int, int]()
    for blocks, some in zip(stage.kinds.values(), by_kind, strict=True):
        for block in blocks:
            held.update(factors[block, *factor] for factor in some if (block, *factor) in factors)
    return sum(held.values())


def saved_per_token(shape: ModelShape, layout: Layout) -> float:
    """Return the bytes that a block in the middle of the model saves on a rank for each further token.

    If there are several adapters, the largest value is returned.
    """
    tokens = PAD_MULTIPLE * layout.tp_size
    few, more = (Sizes((number,), (number,), number) for number in (tokens, 2 * tokens))
    kinds, tracer = {Kind((own.of_one_layer,), earlier=True) for own in layout.adapters}, tracer_of(shape, layout)
    at = partial(tracer.at, recompute=layout.recompute)
    return max(at(kind, more).saved - at(kind, few).saved for kind in kinds) / tokens


# The model's operations ------------------------------------------------------------------------------------------


def step_flops(
    shape: ModelShape,
    adapter: AdapterConfig,
    lengths: Sequence[int],
    num_supervised: int,
    *,
    num_after: int | None = None,
) -> Counter[str]:
    """Return the FLOPs of the complete model by purpose, for forward and backward passes without recomputation.

    The keys are names of `PassWork`. A multiply-add counts as two FLOPs. The padding of samples does not count, so
    packing and layouts do not change the result.

    Args:
        lengths: the number of positions of each sequence.
        num_supervised: the number of positions for which the head computes logits.
        num_after: the number of positions that are computed after the last attention; None means `num_supervised`.
    """
    sizes = Sizes((sum(lengths),), (num_supervised if num_after is None else num_after,), num_supervised)
    (whole,) = plan_stages(shape, Layout((adapter,), length=1))
    passes = _block_work(whole, sizes, lengths)
    names = ("linears", "attention", "low_rank", "head")
    return Counter({name: round(sum(work[name] for work in passes)) for name in names})


# Traces ----------------------------------------------------------------------------------------------------------


_tracer = cache(Tracer)


def tracer_of(shape: ModelShape, layout: Layout) -> Tracer:
    """Return the tracer of a model in this layout. Layouts with equal settings share one tracer."""
    of_group = {"tp_size": layout.tp_size, "sequence_parallel": layout.sequence_parallel}
    return _tracer(shape, dtype=layout.dtype, on_gpu=layout.on_gpu, rounds=layout.rounds, **of_group)


def traces(stage: StagePlan, sizes: Sizes, recompute: str | None = None) -> list[Trace]:
    """Return the trace of each kind of block in the stage. The default of `recompute` is the layout's setting."""
    tracer, recompute = tracer_of(stage.shape, stage.layout), recompute or stage.layout.recompute
    return [tracer.at(kind, sizes, recompute=recompute) for kind in stage.kinds]


def _reading(stage: StagePlan) -> AdapterReading:
    return tracer_of(stage.shape, stage.layout).reading(stage.parts)


# Messages once a step -------------------------------------------------------------------------------------------------


# After a long step, ranks sum this many bytes between micro-batches to agree whether to stop. Pipelines do not do this.
STOP_VOTES_BYTES = FP64 * len(StopVotes._fields)


def once_traffic(stage: StagePlan, micro_batches: Iterable[MicroBatchShape]) -> Traffic:
    """Return the messages that a rank sends once per step, without DeepSpeed's messages in the data-parallel group.

    An untied u is replicated on the tensor- and data-parallel ranks of its stage. A tied tensor is replicated on the
    pipeline- and data-parallel ranks, and any other tensor on the data-parallel ranks. If DeepSpeed updates the
    adapter, it sums gradients over data-parallel ranks. This sum is enough for u without tensor parallelism, and for a
    tied tensor without a pipeline. A tied u is first summed over tensor-parallel ranks.

    Only adapters with tokens in the micro-batches are updated.
    """
    layout, traffic, summed = stage.layout, Traffic(), Counter[str]()  # summed: gradient elements by group
    data, taking = layout.dp_size > 1, sorted({adapter for shape in micro_batches for adapter in shape.adapters})
    ranks_of_stage = STAGE if layout.pp_size > 1 else WORLD
    if min(layout.tp_size, layout.dp_size) == 1:  # groups with the same ranks share one name; see `named_handles`
        ranks_of_stage = DATA if layout.tp_size == 1 else TENSOR
    for part in stage.for_adapters(taking).parts:
        for name in part.names(trained=True):
            is_u, tied = part.config.tensors[name][1] == "u", part.config.is_tied(name)
            if is_u and tied and layout.tp_size > 1 and (part.layers or not layout.engine_steps):
                summed[ranks_of_stage if layout.engine_steps else TENSOR] += part.local_size(name)
            if is_u and not tied:
                ours, group = layout.tp_size > 1, ranks_of_stage
            elif tied:
                ours, group = layout.pp_size > 1, TIED if layout.pp_size > 1 else DATA
            else:
                ours, group = False, DATA
            if ours or (data and not layout.engine_steps):
                summed[group] += part.local_size(name)
    for group, numbers in summed.items():
        traffic.add(group, "all-reduce", FP32 * numbers)
    if layout.tp_size * layout.pp_size > 1:  # the sum of squares for the gradient norm of each adapter
        traffic.add(MODEL, "all-reduce", len(taking) * _norm_bytes(layout), count=stage.num_norms)
    if layout.world_size > 1:  # per adapter, also its loss and the number of ranks that miss a gradient
        traffic.add(WORLD, "all-reduce", FP64 * (len(StepVotes._fields) + 2 * len(taking)))
    return traffic


def engine_traffic(stage: StagePlan, *, num_micro_batches: int) -> Traffic:
    """Return an upper bound for DeepSpeed's data-parallel messages in one step (version 0.19.8, ds_configs/ files).

    DeepSpeed sums gradients once per step, but after each micro-batch in ZeRO-2 and ZeRO-3. It also sums the gradient
    norm. ZeRO-1 and ZeRO-2 gather the updated parameters. ZeRO-3 gathers each parameter at most once per pass of a
    micro-batch, because some parameters stay gathered until the next pass. Only the byte counts are upper bounds. Each
    of these operations counts as one message, although DeepSpeed uses buckets and prefetches.
    """
    zero_stage, dp_size, sent = stage.layout.zero_stage, stage.layout.dp_size, Traffic()
    if dp_size == 1 or (zero_stage < 3 and not stage.layout.engine_steps):
        return sent
    gradients = FP32 * sum(stage.trained)
    sent.add(DATA, "all-reduce", _norm_bytes(stage.layout), count=stage.num_norms)
    if zero_stage < 3:
        sent.add(DATA, "all-reduce", gradients, count=1 if zero_stage == 1 else num_micro_batches)
        gathered = sum(padded(size, 2 * dp_size) for size in stage.parameter_groups.values())
        sent.add(DATA, "all-gather", FP32 * gathered)
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
