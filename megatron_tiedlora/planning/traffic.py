"""Arithmetic for the messages that a rank sends in one training step, from the shapes of its micro-batches.

`step_traffic` predicts, message by message, what parallel.traffic.TrafficCounter counts around a step on any rank of
any layout. The checks of a run's first steps send a little more. Of one adapter only DeepSpeed sends in the
data-parallel group, as it fills buckets and fetches ahead. `engine_bytes` is an upper bound of its bytes there.

Let h be the bytes of a micro-batch's hidden states (rows x length x d). Each adapted block sends 8 messages of h with
sequence parallelism (a gather and a reduce-scatter around attention and MLP, forward and backward), and 4 without. With
sequence parallelism two of the 8 also carry r columns of the adapter, padded to a multiple of 8, if QKV is adapted, and
two if gate and up are. After the last attention h counts supervised positions only. Several adapters send no more
messages: r is then the widest rank in the micro-batch, and what is gathered or summed of all of them is one message.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megatron_tiedlora.base.shapes import GATE_UP, OUTPUT, QKV
from megatron_tiedlora.model.layer_specs import HEAD_ROWS
from megatron_tiedlora.parallel.layers import padded
from megatron_tiedlora.parallel.traffic import DATA, MODEL, PIPELINE, STAGE, TENSOR, TIED, WORLD, Traffic
from megatron_tiedlora.planning.layout import Layout
from megatron_tiedlora.planning.micro_batches import MicroBatchShape
from megatron_tiedlora.planning.stages import BlockKind, StageOwners, StagePlan, gathered_numbers, trained_tensors
from megatron_tiedlora.runtime.stopping import StepVotes, StopVotes

FP32, FP64 = 4, 8  # bytes
# If a step was long, the ranks of a single stage sum this after each micro-batch of the next step but the last.
STOP_VOTES_BYTES = FP64 * len(StopVotes._fields)


class PassTraffic(NamedTuple):
    """The messages of a micro-batch: in its forward pass, in its backward pass, and for what that computes again."""

    forward: Traffic
    backward: Traffic
    again: Traffic


def step_traffic(stage: StagePlan, micro_batches: Sequence[MicroBatchShape]) -> Traffic:
    """The messages that a rank of the stage sends in one step; of one adapter, without the data-parallel group's.

    The adapters that own tokens in the micro-batches take the step.
    """
    taking = sorted({adapter for shape in micro_batches for adapter in shape.adapters})
    traffic = once_traffic(stage, taking)
    for shape, number in Counter(micro_batches).items():
        for sent in pass_traffic(stage, shape):
            traffic.include(sent, times=number)
    return traffic


def once_traffic(stage: StagePlan, taking: Sequence[int] = (0,)) -> Traffic:
    """Those of them that are sent once, after the micro-batches.

    Args:
        taking: the numbers of the adapters that take the step.
    """
    layout, traffic = stage.layout, Traffic()
    for group, numbers in _summed(stage.owned_by(taking)).items():
        traffic.add(group, "all-reduce", FP32 * numbers)
    if layout.tp_size * layout.pp_size > 1:  # the sum of squares for each gradient norm
        traffic.add(MODEL, "all-reduce", len(taking) * _norm_bytes(layout))
    if layout.world_size > 1:  # of a bank also the loss of each adapter, and whether it misses a gradient
        own = 2 * len(taking) if layout.is_bank else 0
        traffic.add(WORLD, "all-reduce", FP64 * (len(StepVotes._fields) + own))
    return traffic


def pass_traffic(stage: StagePlan, shape: MicroBatchShape) -> PassTraffic:
    """The messages that a rank of the stage sends for one micro-batch."""
    layout, found = stage.layout, PassTraffic(Traffic(), Traffic(), Traffic())
    owners = stage.owned_by(shape.adapters)
    if layout.tp_size > 1:
        _add_layers(found, owners, shape)
        # once for any number of layers, targets and adapters: factors that are gathered, and their gradients' sum
        if size := FP32 * layout.tp_size * sum(map(gathered_numbers, owners.parts)):
            found.forward.add(TENSOR, "all-gather", size)
            found.backward.add(TENSOR, "reduce-scatter", size)
    # Hidden states forward, and their gradient backward (zeros if none is needed).
    hidden = _hidden_bytes(stage, shape.num_tokens) // layout.sequence_parts
    found.forward.add(PIPELINE, "send", hidden, count=not stage.is_last)
    found.backward.add(PIPELINE, "send", hidden, count=not stage.is_first)
    return found


def _summed(owners: StageOwners) -> Counter[str]:
    """The numbers of gradients that we sum over ranks once per step, by group.

    u is the same on the ranks of a stage, a tied tensor on those of all stages, another one on data-parallel ranks. Of
    one adapter DeepSpeed sums over data-parallel ranks, which is all that u needs without tensor parallelism, and a
    tied tensor without a pipeline.
    """
    layout, found = owners.stage.layout, Counter[str]()
    data = layout.dp_size > 1
    for part in owners.parts:
        for name in trained_tensors(part):
            _, letter = part.config.tensors[name]
            if letter == "u":
                ours, group = layout.tp_size > 1, _stage_group(layout)
            elif part.config.factor(name).tied:
                ours, group = layout.pp_size > 1, TIED if layout.pp_size > 1 else DATA
            else:
                ours, group = False, DATA
            if ours or (layout.is_bank and data):
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
    if dp_size == 1 or (stage.layout.is_bank and zero_stage < 3):
        return sent
    gradients = FP32 * sum(stage.trained)
    if zero_stage == 0:
        sent.add(DATA, "all-reduce", gradients)
        return sent
    sent.add(DATA, "all-reduce", _norm_bytes(stage.layout))
    if zero_stage < 3:
        sent.add(DATA, "all-reduce", gradients, count=1 if zero_stage == 1 else num_micro_batches)
        sent.add(DATA, "all-gather", FP32 * padded(sum(stage.trained), 2 * dp_size))
        return sent

    def whole(sizes: Iterable[int]) -> int:
        return sum(padded(size, dp_size) for size in sizes)

    stored = stage.local_base.items()
    base = sum(number * padded(tensor.size, dp_size) * tensor.itemsize for tensor, number in stored)
    parameters = base + FP32 * whole(stage.held[:1] if stage.layout.is_bank else stage.held)
    sent.add(DATA, "all-gather", parameters, count=2 * num_micro_batches)
    sent.add(DATA, "reduce-scatter", FP32 * whole(stage.trained), count=num_micro_batches)
    return sent


def _norm_bytes(layout: Layout) -> int:
    return FP32 if layout.zero_stage in (1, 2) else FP64


def _stage_group(layout: Layout) -> str:
    """The name of the group of a stage's ranks; see `named_handles`."""
    if layout.tp_size == 1:
        return DATA
    if layout.dp_size == 1:
        return TENSOR
    return WORLD if layout.pp_size == 1 else STAGE


def _hidden_bytes(stage: StagePlan, num_tokens: int) -> int:
    return num_tokens * stage.shape.hidden_size * stage.layout.dtype.itemsize


@dataclass(frozen=True)
class _Regions:
    """Adds the messages of tensor-parallel regions: a column-parallel linear enters one, a row-parallel one leaves it.

    The backward pass mirrors the forward pass: through the end of a region it gathers, through its start it reduces.

    Attributes:
        times: how many equal regions there are.
    """

    traffic: Traffic
    stage: StagePlan
    times: int = 1

    def gather(self, num_tokens: int, *, columns: int = 0) -> None:
        """Enter a region, or go back through its end. Every rank has all positions unless sequences are sharded.

        Args:
            columns: of the adapter, which are sent in the same message as the hidden states.
        """
        if self.stage.layout.sequence_parallel:
            self._add("all-gather", num_tokens, columns)

    def reduce(self, num_tokens: int, *, columns: int = 0) -> None:
        """Leave a region, or go back through its start. `columns` are only sent if sequences are sharded."""
        if self.stage.layout.sequence_parallel:
            self._add("reduce-scatter", num_tokens, columns)
        else:
            self._add("all-reduce", num_tokens)

    def go_back(self, num_tokens: int, columns: int, *, needs_x: bool) -> None:
        """Go back through the start of a region. If the hidden states need no gradient, only that of A x is sent."""
        if needs_x:
            self.reduce(num_tokens, columns=columns)
        elif columns and self.stage.layout.sequence_parallel:
            size = num_tokens * columns * self.stage.layout.dtype.itemsize
            self.traffic.add(TENSOR, "reduce-scatter", size, count=self.times)

    def _add(self, kind: str, num_tokens: int, columns: int = 0) -> None:
        beside = num_tokens * padded(columns) * self.stage.layout.dtype.itemsize
        self.traffic.add(TENSOR, kind, _hidden_bytes(self.stage, num_tokens) + beside, count=self.times)


def _add_layers(found: PassTraffic, owners: StageOwners, shape: MicroBatchShape) -> None:
    """Add the tensor-parallel messages of a micro-batch in embedding, blocks and head.

    What follows the last attention runs its backward pass in the forward pass.
    """
    stage = owners.stage
    if stage.is_first:
        _Regions(found.forward, stage).reduce(shape.num_tokens)  # the embedding, which is frozen
    for kind in owners.kinds:
        _add_forward(_Regions(found.forward, stage, kind.number), owners, kind, shape)
        if kind.goes_back:
            _add_backward(found, owners, kind, shape)
            _add_again(_Regions(found.again, stage, kind.number), owners, kind, shape)
    if stage.is_last:
        region = _Regions(found.forward, stage)
        region.gather(shape.num_after)
        region.reduce(shape.num_after)  # its gradient
        # two fp32 numbers a row of logits and rank, for each chunk of the head
        logits = padded(shape.num_supervised)
        for start in range(0, logits, HEAD_ROWS):
            rows = min(HEAD_ROWS, logits - start)
            found.forward.add(TENSOR, "all-gather", stage.layout.tp_size * 2 * rows * FP32)


def _after(kind: BlockKind, shape: MicroBatchShape) -> int:
    return shape.num_after if kind.ends_here else shape.num_tokens


def _add_forward(region: _Regions, owners: StageOwners, kind: BlockKind, shape: MicroBatchShape) -> None:
    after = _after(kind, shape)
    region.gather(shape.num_tokens, columns=owners.ax_columns(kind.example, QKV))
    region.reduce(after)
    region.gather(after, columns=owners.ax_columns(kind.example, GATE_UP))
    region.reduce(after)


def _add_backward(found: PassTraffic, owners: StageOwners, kind: BlockKind, shape: MicroBatchShape) -> None:
    """Back through the end of the MLP, then its start, then the end of attention, then its start."""
    block, after = kind.example, _after(kind, shape)
    needs = owners.needs(block)
    of_qkv, of_gate_up = (
        owners.ax_columns(block, name) * owners.trains_a(block, name) for name in (QKV, GATE_UP)
    )
    mlp = _Regions(found.forward if kind.ends_here else found.backward, owners.stage, kind.number)
    mlp.gather(after)
    mlp.go_back(after, of_gate_up, needs_x=needs[GATE_UP])
    attention = _Regions(found.backward, owners.stage, kind.number)
    if needs[GATE_UP]:
        attention.gather(after)
    attention.go_back(shape.num_tokens, of_qkv, needs_x=needs[QKV])


def _add_again(region: _Regions, owners: StageOwners, kind: BlockKind, shape: MicroBatchShape) -> None:
    """What recompute sends.

    Recomputing a block stops as soon as its backward pass has all it needs, so the last exit is not repeated.
    Recomputing gate and up enters the MLP's region again. Nothing after the last attention is recomputed.
    """
    recompute, block, after = owners.stage.layout.recompute, kind.example, _after(kind, shape)
    of_qkv, of_gate_up = (owners.ax_columns(block, name) for name in (QKV, GATE_UP))
    if recompute == "full" and (not kind.ends_here or owners.needs(block)[OUTPUT]):
        region.gather(shape.num_tokens, columns=of_qkv)
        if not kind.ends_here:
            region.reduce(after)
            region.gather(after, columns=of_gate_up)
    elif recompute == "selective" and not kind.ends_here and owners.reads_mlp_input(block):
        known = owners.trains_f(block, GATE_UP)  # A x is saved if F is trained
        region.gather(after, columns=0 if known else of_gate_up)
