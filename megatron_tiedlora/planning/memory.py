"""Predict the bytes that a rank of each stage needs, by purpose.

The memory for activations is computed from traces: the bytes that blocks save for the micro-batches in flight, and the
peak of a pass. Two values are not traced. The first is the memory of DeepSpeed's engines for hidden states of a
pipeline or gathered weights of ZeRO-3. The second is the memory that CUDA and NCCL allocate outside PyTorch.
"""

import operator
from collections.abc import Sequence
from typing import NamedTuple

import torch

from megatron_tiedlora.adapters.tied_adapter import AdapterShard
from megatron_tiedlora.model import batch, cpu_attention
from megatron_tiedlora.model.attention import cache_dtype
from megatron_tiedlora.parallel.frozen_weight import padded
from megatron_tiedlora.parallel.kernels import COPIES_ON_CPU
from megatron_tiedlora.parallel.rows import NUMBERS_AT_ONCE
from megatron_tiedlora.planning.counting import ATTENTION, Moment
from megatron_tiedlora.planning.layout import Layout, StagePlan
from megatron_tiedlora.planning.machines import Machine
from megatron_tiedlora.planning.passes import FP32, factor_bytes, traces
from megatron_tiedlora.planning.trace import Sizes

# cuBLAS allocates 32 MiB on an H100 for each of the two threads that run forward and backward passes.
WORKSPACE_BYTES = 2 * 2.0**25
BUCKET_NUMBERS = 1_000_000  # reduce_bucket_size of the ds_configs/ files
MULTIPROCESSORS = 132  # on an H100; the deterministic backward pass of flash attention is split over them


class StageMemory(NamedTuple):
    """The bytes on each rank of a stage. PyTorch allocates all of them except `libraries` and `slack`.

    Attributes:
        activations: the tensors that autograd saves for the micro-batches in flight, and temporary tensors.
        engine: hidden states that DeepSpeed's pipeline holds, or weights that ZeRO-3 has gathered.
        buffers: memory for messages: gradient buckets, gathered factors, and the gradients of these factors.
        libraries: an estimate for CUDA and NCCL, or for an idle process on a CPU.
        slack: an estimate for memory that the allocator reserves but cannot use.
    """

    base: float = 0.0
    dequantised: float = 0.0
    adapter: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    activations: float = 0.0
    engine: float = 0.0
    buffers: float = 0.0
    libraries: float = 0.0
    slack: float = 0.0

    @property
    def total(self) -> float:
        """The sum of all fields."""
        return sum(self)

    @property
    def allocated(self) -> float:
        """The bytes that PyTorch allocates at the peak of a step."""
        return self.total - self.libraries - self.slack

    def plus(self, other: "StageMemory") -> "StageMemory":
        """Return the sum of two records, field by field."""
        return StageMemory(*map(operator.add, self, other))


def with_reserves(stage: StagePlan, memory: StageMemory, machine: Machine) -> StageMemory:
    """Return `memory` with a machine's estimates for `libraries` and `slack`."""
    libraries = machine["context"] + machine["communicator"] * num_communicators(stage)
    return memory._replace(libraries=libraries, slack=machine["slack"] * memory.allocated)


def held_memory(stage: StagePlan) -> StageMemory:
    """Return the part of a rank's memory that does not depend on micro-batches."""
    layout, trained = stage.layout, sum(stage.trained)
    of_weights = layout.dp_size if layout.zero_stage == 3 else 1
    stage_of_adapter = layout.zero_stage if layout.engine_steps else 0  # 0: the adapter is not sharded
    of_gradients, of_moments, of_adapter = (layout.dp_size if stage_of_adapter >= least else 1 for least in (2, 1, 3))
    # An engine that updates the adapter has a gradient bucket. Else, gradients are summed after activations are freed.
    bucket = min(trained, BUCKET_NUMBERS) if layout.dp_size > 1 and layout.engine_steps else 0
    shards = (part.local_size(name) for part in stage.parts for name in part.config.tensors if part.is_gathered(name))
    gathered = 2 * layout.tp_size * sum(shards) if layout.tp_size > 1 else 0  # factors and their gradients
    return StageMemory(
        base=stage.base_bytes / of_weights,
        dequantised=float(stage.dequantised_bytes),
        adapter=FP32 * sum(stage.held) / of_adapter,
        gradients=FP32 * trained / of_gradients,
        # The two moments of AdamW. An engine also has a copy of the parameters, which its optimizer updates.
        optimizer=(3 if layout.engine_steps else 2) * FP32 * trained / of_moments,
        engine=_gathered_bytes(stage),
        buffers=float(FP32 * (bucket + gathered)),
    )


class LargestMicroBatch(NamedTuple):
    """The largest micro-batch of a run: its tokens with padding, its documents, and its longest document in tokens.

    Attributes:
        adapters: all combinations of adapters that may share a micro-batch, as indices in the layout.
    """

    tokens: int
    documents: int
    longest: int
    adapters: tuple[tuple[int, ...], ...] = ((0,),)


def step_memory(stage: StagePlan, largest: LargestMicroBatch) -> StageMemory:
    """Return the part of a rank's memory that depends on micro-batches. Storage format and ZeRO do not affect it.

    Almost all tokens are assumed to belong to the adapter that needs the most memory. If several adapters share
    micro-batches, the combination of adapters that needs the most memory is used.
    """
    attention, activations = attention_memory(stage, largest), 0.0
    for adapters in largest.adapters:
        owned = stage.for_adapters(adapters)
        kept, moment = _pass_bytes(owned, _most_of_widest(owned, largest.tokens), attention)
        activations = max(activations, micro_batches_in_flight(stage) * kept + moment)
    workspaces = WORKSPACE_BYTES if stage.layout.on_gpu else 0.0
    return StageMemory(activations=activations + workspaces, engine=_pipeline_bytes(stage, tokens=largest.tokens))


def _most_of_widest(stage: StagePlan, tokens: int) -> Sizes:
    """Return the sizes of a micro-batch in which the adapter with the largest A x has almost all tokens."""
    configs = [part.config for part in stage.parts]
    widest = max(range(len(configs)), key=lambda number: configs[number].rank * len(configs[number].targets))
    halves = 2 if stage.layout.overlap and len(configs) == 1 else 1
    least = batch.PAD_MULTIPLE * stage.layout.sequence_parts * halves
    tokens = padded(tokens, least)
    most = max(tokens - least * (len(configs) - 1), least)
    sizes = tuple(most if number == widest else least for number in range(len(configs)))
    return Sizes(sizes, sizes, padded(tokens), halves=halves)


def _pass_bytes(stage: StagePlan, sizes: Sizes, attention: tuple[int, float]) -> tuple[float, float]:
    """Return the bytes that a micro-batch keeps between its passes, and the additional bytes at the peak of a pass."""

    saved, workspace = (value / sizes.halves for value in attention)  # one half is computed at a time
    workspace += sizes.halves * saved if stage.layout.recompute == "full" else 0

    def most(moments: Sequence[Moment]) -> float:
        return max((one.alive + _temporary_bytes(stage.layout, workspace, one) for one in moments), default=0.0)

    found = traces(stage, sizes)
    by_kind = (
        (*map(most, trace.moments), trace.kept + saved * trace.saves_attention, trace.gradients) for trace in found
    )
    blocks = {block: parts for some, parts in zip(stage.kinds.values(), by_kind, strict=True) for block in some}
    held, peak, gradients = float(factor_bytes(stage, [trace.kept_factors for trace in found])), 0.0, 0.0
    for block in stage.blocks:
        highest, _, keeps, _ = blocks[block]
        peak = max(peak, held + highest)
        held += keeps
    all_kept = held
    for block in reversed(stage.blocks):
        _, highest, keeps, of_factors = blocks[block]
        held -= keeps
        peak = max(peak, held + gradients + highest)
        gradients += of_factors
    return all_kept, peak - all_kept


def _temporary_bytes(layout: Layout, attention: float, moment: Moment) -> float:
    """Return the temporary bytes of the kernel in `moment`. For attention, return the argument `attention`."""
    kernel = moment.kernel
    if kernel is None:
        return 0.0
    if kernel is ATTENTION:
        return attention
    if not layout.compiled and layout.on_gpu and moment.numbers > NUMBERS_AT_ONCE:
        return NUMBERS_AT_ONCE * (kernel.temporary + 2 * kernel.results)  # `run_in_parts` holds two results
    if not layout.compiled:
        return kernel.temporary * moment.numbers
    return 0.0 if layout.on_gpu else COPIES_ON_CPU.get(kernel.name, 0) * moment.numbers * layout.dtype.itemsize


def group_bytes(part: AdapterShard) -> int:
    """Return the bytes that one of several adapters needs on a rank: its tensors, gradients and optimizer moments."""
    trained, frozen = (sum(map(part.local_size, part.names(trained=trained))) for trained in (True, False))
    return FP32 * (4 * trained + frozen)


def num_communicators(stage: StagePlan) -> int:
    """Return the number of NCCL communicators of a rank: one per process group and per neighbouring pipeline stage."""
    layout = stage.layout
    tensor, pipeline, data = (size > 1 for size in (layout.tp_size, layout.pp_size, layout.dp_size))
    groups = [tensor, data, tensor or pipeline, tensor and data]  # the last two: the ranks of a model; of a stage
    if pipeline:  # the groups of the pipeline, of generated tokens, and of tied tensors
        groups += [True] * 3 + [not stage.is_first, not stage.is_last]
    return sum(groups)


def cache_bytes(stage: StagePlan, *, sequences: int, tokens: int) -> int:
    """Return the bytes of the key-value cache on a rank while it generates sequences of up to `tokens` tokens.

    The stages of a pipeline work on different sequences of the batch, so every rank caches the entire batch.
    """
    heads, layout = stage.shape.heads, stage.layout
    dtype = cache_dtype(layout.dtype, torch.device("cuda" if layout.on_gpu else "cpu"))
    per_token = 2 * len(stage.blocks) * heads.num_kv // layout.tp_size * heads.dim * dtype.itemsize
    return sequences * tokens * per_token


def micro_batches_in_flight(stage: StagePlan) -> int:
    """Return the maximum number of micro-batches that the 1F1B schedule has in flight on a stage."""
    return min(stage.layout.pp_size - stage.index, stage.layout.micro_batches)


def attention_memory(stage: StagePlan, largest: LargestMicroBatch) -> tuple[int, float]:
    """Return the bytes that attention needs for the largest micro-batch, without its inputs and its output.

    The first value counts the bytes that a block saves for its backward pass, in addition to one fp32 element per token
    per head. The second value counts the temporary bytes of the backward pass.

    On GPUs the values are for PyTorch 2.11: flash attention in 16 bits, and the memory-efficient kernel in fp32. The
    package flash_attn needs the same memory. On a CPU the values are for the tiles of `model/cpu_attention.py`, which
    GPUs use too if no kernel has the window or the cap of the scores.
    """
    shape, layout, (tokens, documents, longest, _) = stage.shape, stage.layout, largest
    itemsize, tp_size = layout.dtype.itemsize, layout.tp_size
    heads, query = shape.heads.num // tp_size, shape.heads.rows[0] // tp_size
    saved, workspace = 0, 0
    grouped = shape.heads.num_kv < shape.heads.num
    if layout.on_gpu and layout.dtype == torch.float32:
        square = documents * padded(longest, 32)  # the kernel pads rows to the longest document
        saved = FP32 * heads * max(square - tokens, 0)
        workspace = FP32 * query * max(square, tokens) + 2 * FP32 * query * tokens * grouped
    elif layout.on_gpu:
        # The fp32 gradient of the queries; documents are padded by up to 128 tokens. A deterministic kernel has several
        # copies, each for some of the keys. The gradients of keys and values exist for every query head.
        rows, copies = tokens + 128 * documents, 1
        if layout.deterministic:
            copies = -(-MULTIPROCESSORS // (documents * heads))
        workspace = FP32 * heads * rows * (copies * padded(shape.heads.dim, 32) + 1)
        workspace += 2 * query * tokens * itemsize * grouped
    windows, capped = {shape.kind_of(block).window or longest for block in stage.blocks}, shape.heads.cap is not None
    windowed = min(windows) < longest and layout.dtype == torch.float32  # the fp32 kernel has no windows
    if not layout.on_gpu or capped or windowed:
        # The scores of a tile, their exponentials, both gradients and temporary values; fp32 keys and two sums.
        queries = min(cpu_attention.tile_size(shape.heads.num, shape.heads.num_kv), longest)
        # If a GPU computes tiles only within windows, the largest of these decides.
        tiled = [window for window in windows if not layout.on_gpu or capped or window < longest]
        keys = min(max(tiled) + queries - 1, longest)
        tile = layout.rows * heads * queries * keys
        eager = not layout.compiled or layout.on_gpu
        tile *= FP32 + 2 * itemsize + FP32 * ((1 + capped) * (1 + eager) + eager)
        sums = tokens * shape.heads.rows[1] // tp_size * FP32 * (2 + (itemsize < FP32))
        workspace = max(workspace, tile + sums)
    return saved, float(workspace)


def eager_bytes(stage: StagePlan, tokens: int) -> float:
    """Return the maximum temporary bytes of an uncompiled kernel in the passes of `tokens` tokens of one adapter."""
    if stage.layout.compiled:
        return 0.0
    owned = stage.for_adapters((0,))
    passes = (moments for trace in traces(owned, _most_of_widest(owned, tokens)) for moments in trace.moments)
    return max((_temporary_bytes(stage.layout, 0.0, one) for moments in passes for one in moments), default=0.0)


def hidden_bytes(stage: StagePlan) -> float:
    """Return the bytes per token of the hidden states between two layers on a rank."""
    return stage.shape.hidden_size * stage.layout.dtype.itemsize / stage.layout.sequence_parts


def _attended_bytes(stage: StagePlan) -> float:
    """Return the bytes per token of the attention output on a rank."""
    return stage.shape.block.output.in_size * stage.layout.dtype.itemsize / stage.layout.tp_size


def engine_bytes_in_flight(stage: StagePlan, *, tokens: int) -> float:
    """Return the bytes that DeepSpeed's pipeline engine (0.19.8) holds for a micro-batch in flight.

    For a hidden size of d, it holds 2 d elements per token: the input, which the stage copies, and the output. The
    first stage receives no hidden states. Tensors that autograd saves are not counted here. So the last stage holds
    only its copy of the input and, with full recompute, a recomputed attention output. Token ids, position ids and
    labels are not counted (up to 24 bytes per token and 32 per label).
    """
    came_in = 0.0 if stage.is_first else hidden_bytes(stage)
    if not stage.is_last:
        return tokens * (came_in + hidden_bytes(stage))
    return tokens * (came_in + (_attended_bytes(stage) if stage.layout.recompute == "full" else 0.0))


def _gathered_bytes(stage: StagePlan) -> float:
    """Return the bytes of gathered weights. ZeRO-3 (0.19.8) stops gathering above `live_parameters` elements."""
    layout, block = stage.layout, stage.shape.block
    if layout.zero_stage < 3 or layout.dp_size == 1:
        return 0.0
    mlp = (block.gate_up.num_weights + block.down.num_weights) // layout.tp_size  # both are gathered together
    most = layout.live_parameters + max(mlp, *(tensor.size for tensor in stage.local_base))
    numbers = sum(number * tensor.size for tensor, number in stage.local_base.items())
    return min(most / numbers, 1.0) * stage.base_bytes


def _pipeline_bytes(stage: StagePlan, *, tokens: int) -> float:
    """Return all bytes that DeepSpeed's pipeline engine holds for the micro-batches of a stage.

    A stage also has a buffer for the gradients that it receives. The last stage receives no gradients, but holds the
    input of its head from the previous micro-batch.
    """
    layout = stage.layout
    if layout.pp_size == 1:
        return 0.0
    once = hidden_bytes(stage)
    if stage.is_last:
        once = once + _attended_bytes(stage) if layout.micro_batches > 1 else 0.0
    return micro_batches_in_flight(stage) * engine_bytes_in_flight(stage, tokens=tokens) + tokens * once
