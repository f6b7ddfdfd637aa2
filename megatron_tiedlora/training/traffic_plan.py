"""What a rank will send in one training step, as arithmetic on the shapes of its micro-batches.

Answers what parallel.traffic.TrafficCounter counts around a step, for any rank of any plan, without starting one. It is
the traffic of a step after the first ones, whose checks send a little more. Messages are ours and DeepSpeed's (0.19.8);
where a number depends on how DeepSpeed fills its buckets or fetches ahead, `estimated_groups` names the group.

With h the bytes of a micro-batch's hidden states (rows x length x d), each adapted block sends 8 messages of h with
sequence parallelism (a gather and a reduce-scatter around attention and MLP, forward and backward) or 4 without. Under
sequence parallelism two of the 8 also carry r columns of the adapter, filled up to a multiple of 8. After the last
attention h is of supervised positions only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_tiedlora.data.encode import TokenDataset
from megatron_tiedlora.data.loader import plan_global_batch
from megatron_tiedlora.data.packing import Rows
from megatron_tiedlora.model.layer_specs import HEAD_ROWS
from megatron_tiedlora.model.supervised import padded_positions
from megatron_tiedlora.parallel.layers import padded
from megatron_tiedlora.parallel.traffic import DATA, MODEL, PIPELINE, STAGE, TENSOR, TIED, WORLD, Traffic
from megatron_tiedlora.training.plan import RunPlan
from megatron_tiedlora.training.stage_plan import StagePlan, plan_stages
from megatron_tiedlora.training.step import StepVotes

FP32, FP64 = 4, 8  # bytes

# What StopWatch.agree sums after each micro-batch but the last of a step that follows a long one, with one stage.
STOP_REPORT_BYTES = 3 * FP64
ZERO_0_BUCKET = 500_000_000  # numbers (MEMORY_OPT_ALLREDUCE_SIZE)

# Settings of the ZeRO section whose messages are known, with the values that are.
_KNOWN_ZERO: dict[str, tuple[Any, ...]] = {
    "contiguous_gradients": (True,),
    "overlap_comm": (False,),
    "use_multi_rank_bucket_allreduce": (True,),
    "round_robin_gradients": (False,),
    "parameter_alignment": (False,),
    "compute_grad_norm": (True,),
}
# Those that send nothing, or whose values are read here.
_HARMLESS_ZERO = frozenset(
    {
        "stage",
        "reduce_bucket_size",
        "reduce_scatter",
        "allgather_bucket_size",  # not used where a flat gather exists
        "load_from_fp32_weights",
        "ignore_unused_parameters",
        "stage3_prefetch_bucket_size",
        "stage3_param_persistence_threshold",
        "stage3_max_live_parameters",
        "stage3_max_reuse_distance",
    }
)


@dataclass(frozen=True)
class MicroBatchShape:
    """What of a micro-batch its messages depend on.

    Attributes:
        num_after: positions that what comes after the last attention computes; see `Supervised`.
    """

    num_rows: int
    length: int
    num_supervised: int
    num_after: int

    @property
    def num_tokens(self) -> int:
        """Positions, padding included."""
        return self.num_rows * self.length


def assumed_shapes(plan: RunPlan) -> tuple[MicroBatchShape, ...]:
    """A rank's micro-batches where there is no data: all samples have `max_length` tokens, all of them supervised.

    A sample's first token has no position that could predict it.
    """
    row = np.full(1, plan.settings.max_length), np.ones(1, dtype=np.int64)
    return (_shape(plan, [row] * plan.batches.micro_batch_size),) * plan.batches.accumulation_steps


def planned_shapes(plan: RunPlan, dataset: TokenDataset, *, consumed_samples: int = 0) -> tuple[MicroBatchShape, ...]:
    """The micro-batches of the plan's rank in the step that follows `consumed_samples`."""
    batch = plan_global_batch(dataset, plan.batch_shape, seed=plan.settings.seed, consumed_samples=consumed_samples)
    mine = batch.on_rank(plan.grid.dp_rank, dp_size=plan.grid.dp_size)
    return tuple(micro_batch_shape(plan, dataset, rows) for rows in mine)


def micro_batch_shape(plan: RunPlan, dataset: TokenDataset, rows: Rows) -> MicroBatchShape:
    """The shape of a micro-batch of these rows of samples."""
    return _shape(plan, [(dataset.lengths_of(row), np.maximum(dataset.prompt_lengths[row], 1)) for row in rows])


def _shape(plan: RunPlan, rows: Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]]) -> MicroBatchShape:
    """Of rows of samples, each (their lengths, their first supervised tokens), end to end.

    A sample's tokens from its first supervised one on are supervised, each by the position before it.
    """
    longest = max(int(lengths.sum()) for lengths, _ in rows)
    length, num_parts = padded(max(longest, 1), plan.pad_multiple), plan.sequence_parts
    edges = np.arange(num_parts + 1) * (len(rows) * length // num_parts)
    before = np.zeros(num_parts + 1, dtype=np.int64)  # supervised positions before each edge
    for number, (lengths, starts) in enumerate(rows):
        begins = number * length + np.cumsum(lengths) - lengths
        before += np.clip(edges[:, None], begins + starts - 1, begins + lengths - 1).sum(axis=1)
    most = padded_positions(int(np.diff(before).max()))
    num_supervised = sum(int((lengths - starts).sum()) for lengths, starts in rows)
    return MicroBatchShape(len(rows), length, num_supervised, num_parts * most)


def step_traffic(plan: RunPlan, shapes: Sequence[MicroBatchShape]) -> Traffic:
    """Messages and bytes that the plan's rank sends in one step on micro-batches of these shapes, by group and kind."""
    return stage_traffic(plan, plan_stages(plan)[plan.grid.pp_rank], shapes)


def stage_traffic(plan: RunPlan, stage: StagePlan, shapes: Sequence[MicroBatchShape]) -> Traffic:
    """The same for a rank of any stage of the plan's layout."""
    traffic = Traffic()
    for shape in shapes:
        if plan.grid.tp_size > 1:
            _add_layers(traffic, plan, stage, shape)
            _add_adapter(traffic, stage)
        _add_pipeline(traffic, plan, stage, shape)
    if plan.grid.pp_size > 1 and stage.trained_tied:
        traffic.add(TIED, "all-reduce", FP32 * stage.trained_tied)
    if plan.grid.tp_size > 1 and stage.part.layers and stage.part.config.row.u.trained:
        traffic.add(_stage_group(plan), "all-reduce", FP32 * stage.local_size("u"))
    if plan.grid.dp_size > 1:
        _add_data(traffic, plan, stage, num_micro_batches=len(shapes))
    if plan.grid.tp_size * plan.grid.pp_size > 1:  # the sum of squares for the norm
        traffic.add(MODEL, "all-reduce", _norm_bytes(plan.engine.zero_stage))
    if plan.grid.world_size > 1:
        traffic.add(WORLD, "all-reduce", FP64 * len(fields(StepVotes)))
    return traffic


def _stage_group(plan: RunPlan) -> str:
    """What the ranks of a stage count as: see `named_handles`."""
    if plan.grid.dp_size == 1:
        return TENSOR
    return WORLD if plan.grid.pp_size == 1 else STAGE


def _hidden_bytes(plan: RunPlan, num_tokens: int) -> int:
    return num_tokens * plan.source.shape.hidden_size * plan.dtype.itemsize


def _add_layers(traffic: Traffic, plan: RunPlan, stage: StagePlan, shape: MicroBatchShape) -> None:
    """Tensor-parallel messages of a micro-batch in embedding, blocks and head.

    Recomputing a block stops once all that its backward pass needs is there again, so its last exit is not repeated;
    recomputing gate and up enters the MLP's region again. What comes after the last attention is not recomputed.
    """
    sent = _Regions(traffic, plan)
    if stage.is_first:
        sent.leave(shape.num_tokens)  # the embedding, which is frozen
    for block in stage.blocks:
        ends_here = stage.is_last and block == stage.blocks[-1]
        after = shape.num_after if ends_here else shape.num_tokens
        beside = plan.adapter.rank if block in stage.part.layers else 0
        backward = block in stage.backward_blocks
        again = backward and plan.settings.recompute == "full"
        for number in range(2 if again else 1):
            sent.enter(shape.num_tokens, beside=beside)
            if number == 0 or not ends_here:
                sent.leave(after)
                sent.enter(after)
        sent.leave(after)
        if backward and plan.settings.recompute == "selective" and not ends_here:
            sent.enter(after)
        if backward:
            sent.back_through_leave(after, count=2)
            sent.back_through_enter(after)
            travels = beside if plan.adapter.row.A.trained else 0
            if block > stage.first_adapted:
                sent.back_through_enter(shape.num_tokens, beside=travels)
            elif travels and plan.sequence_parallel:  # nothing below needs a gradient, but A does
                size = shape.num_tokens * travels * plan.dtype.itemsize
                traffic.add(TENSOR, "reduce-scatter", size)
    if stage.is_last:
        sent.enter(shape.num_after)
        sent.back_through_enter(shape.num_after)
        # two fp32 numbers a row of logits and rank, for each chunk of the head
        logits = padded(shape.num_supervised)
        for start in range(0, logits, HEAD_ROWS):
            rows = min(HEAD_ROWS, logits - start)
            traffic.add(TENSOR, "all-gather", plan.grid.tp_size * 2 * rows * FP32)


@dataclass(frozen=True)
class _Regions:
    """What entering and leaving a tensor-parallel region sends, by the number of positions."""

    traffic: Traffic
    plan: RunPlan

    def _add(self, kind: str, num_tokens: int, count: int = 1, beside: int = 0) -> None:
        size = _hidden_bytes(self.plan, num_tokens)
        size += num_tokens * padded(beside) * self.plan.dtype.itemsize
        self.traffic.add(TENSOR, kind, size, count=count)

    def enter(self, num_tokens: int, *, beside: int = 0) -> None:
        if self.plan.sequence_parallel:
            self._add("all-gather", num_tokens, beside=beside)

    def leave(self, num_tokens: int) -> None:
        self._add("reduce-scatter" if self.plan.sequence_parallel else "all-reduce", num_tokens)

    def back_through_leave(self, num_tokens: int, *, count: int) -> None:
        if self.plan.sequence_parallel:
            self._add("all-gather", num_tokens, count)

    def back_through_enter(self, num_tokens: int, *, beside: int = 0) -> None:
        if self.plan.sequence_parallel:
            self._add("reduce-scatter", num_tokens, beside=beside)
        else:
            self._add("all-reduce", num_tokens)


def _add_adapter(traffic: Traffic, stage: StagePlan) -> None:
    """Once per micro-batch and stage, however many layers: A gathered, its gradient summed."""
    if stage.part.layers and stage.part.config.row.A.trained:
        size = FP32 * stage.local_size("A") * stage.part.tp_size
        traffic.add(TENSOR, "all-gather", size)
        traffic.add(TENSOR, "reduce-scatter", size)


def _add_pipeline(traffic: Traffic, plan: RunPlan, stage: StagePlan, shape: MicroBatchShape) -> None:
    """Forward, hidden states; backward, their gradient (zeros where none is needed)."""
    hidden = _hidden_bytes(plan, shape.num_tokens) // plan.sequence_parts
    traffic.add(PIPELINE, "send", hidden, count=(not stage.is_last) + (not stage.is_first))


def _norm_bytes(zero_stage: int) -> int:
    return FP32 if zero_stage in (1, 2) else FP64


def _add_data(traffic: Traffic, plan: RunPlan, stage: StagePlan, *, num_micro_batches: int) -> None:
    """Data-parallel messages: DeepSpeed's sums of gradients, its gathers of what ranks hold in parts, its norm."""
    zero_stage, dp_size = plan.engine.zero_stage, plan.grid.dp_size
    if zero_stage == 0:
        _add_all(traffic, "all-reduce", zero_0_messages(stage.trained))
        return
    if zero_stage == 3:
        _add_zero_3(traffic, plan, stage, num_micro_batches=num_micro_batches)
    else:
        # Gradients are summed once a step; where they are partitioned, after each micro-batch, and as hooks give them.
        sums, sizes = (1, stage.trained) if zero_stage == 1 else (num_micro_batches, stage.trained[::-1])
        zero = plan.engine.values["zero_optimization"]
        messages = zero_messages(
            sizes,
            bucket_size=_bucket_size(plan),
            partition_size=padded(sum(stage.trained), 2 * dp_size) // dp_size,
            starts=_starts(stage.trained) if zero_stage == 1 else _starts(stage.trained)[::-1],
            by_partition=bool(zero.get("reduce_scatter", True)),
        )
        _add_all(traffic, "all-reduce", messages * sums)
        traffic.add(DATA, "all-gather", FP32 * padded(sum(stage.trained), 2 * dp_size))
    traffic.add(DATA, "all-reduce", _norm_bytes(zero_stage))


def _add_all(traffic: Traffic, kind: str, sizes: Sequence[int]) -> None:
    for size in sizes:
        traffic.add(DATA, kind, FP32 * size)


def _starts(sizes: Sequence[int]) -> tuple[int, ...]:
    return tuple(sum(sizes[:index]) for index in range(len(sizes)))


def _bucket_size(plan: RunPlan) -> int:
    return int(plan.engine.values["zero_optimization"].get("reduce_bucket_size", 500_000_000))


def zero_0_messages(sizes: Sequence[int], bucket_size: int = ZERO_0_BUCKET) -> list[int]:
    """Numbers in each sum of ZeRO-0: a message goes out once it holds more than the bucket."""
    messages, filled = [], 0
    for size in sizes:
        filled += size
        if filled > bucket_size:
            messages.append(filled)
            filled = 0
    return messages + [filled] * (filled > 0)


def zero_messages(
    sizes: Sequence[int], *, bucket_size: int, partition_size: int, starts: Sequence[int], by_partition: bool
) -> list[int]:
    """Numbers in each sum of ZeRO-1 and 2.

    A bucket goes out before it would overflow. A tensor larger than a bucket goes alone, and with `reduce_scatter` in
    pieces: it is cut where the partitions of the ranks are, and a message goes out once it holds more than a bucket.

    Args:
        sizes: of the gradients, in the order in which they come.
        starts: of each, in the flat group that is partitioned.
    """
    messages: list[int] = []
    filled = 0
    for size, start in zip(sizes, starts, strict=True):
        if filled + size > bucket_size:
            messages += [filled] * (filled > 0)
            filled = 0
        if size <= bucket_size:
            filled += size
        elif by_partition:
            cuts = [*range((start // partition_size + 1) * partition_size, start + size, partition_size)]
            pieces = [stop - begin for begin, stop in zip([start, *cuts], [*cuts, start + size], strict=True)]
            messages += zero_0_messages(pieces, bucket_size)
        else:
            messages.append(size)
    return messages + [filled] * (filled > 0)


def _add_zero_3(traffic: Traffic, plan: RunPlan, stage: StagePlan, *, num_micro_batches: int) -> None:
    """Small parameters are gathered once a step, large ones for each pass of each micro-batch, one by one at most."""
    dp_size = plan.grid.dp_size
    base = [(size, plan.dtype.itemsize) for size in stage.local_base]
    for size, width in base + [(size, FP32) for size in stage.held]:
        count = 1 if size <= _persistence_threshold(plan) else 2 * num_micro_batches
        traffic.add(DATA, "all-gather", width * padded(size, dp_size), count=count)
    gradients = FP32 * sum(padded(size, dp_size) for size in stage.trained)
    traffic.add(DATA, "reduce-scatter", gradients, count=num_micro_batches)


def _persistence_threshold(plan: RunPlan) -> int:
    return int(plan.engine.values["zero_optimization"].get("stage3_param_persistence_threshold", 100_000))


def estimated_groups(plan: RunPlan, stage: StagePlan) -> frozenset[str]:
    """Groups whose numbers are not exact: the data-parallel one, where DeepSpeed's fetching or buckets decide.

    Under ZeRO-3 large parameters are fetched together and some are kept from one pass to the next, so the figure is at
    most that many. From ZeRO-2 on hooks decide in which order gradients fill more than one bucket. A JSON with settings
    that are not modelled here gives an estimate too.
    """
    zero_stage, zero = plan.engine.zero_stage, plan.engine.values["zero_optimization"]
    if plan.grid.dp_size == 1 or zero_stage == 0:
        return frozenset()
    known = all(_is_known(name, value, zero_stage) for name, value in zero.items())
    overflows = zero_stage >= 2 and sum(stage.trained) > _bucket_size(plan)
    fetches = zero_stage == 3 and max(stage.local_base + stage.held) > _persistence_threshold(plan)
    return frozenset() if known and not overflows and not fetches else frozenset({DATA})


def _is_known(name: str, value: Any, zero_stage: int) -> bool:
    if name == "offload_optimizer":
        return zero_stage < 3
    return name in _HARMLESS_ZERO or value in _KNOWN_ZERO.get(name, ())
