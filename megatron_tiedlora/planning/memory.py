"""Bytes that a rank of each stage needs, by what they are for: arithmetic on shapes.

Activations are in_flight x tokens x blocks with a backward pass x bytes that a block saves for each token, less for the
last block, and what one of them holds for a moment. What DeepSpeed's engines keep beside is counted apart (hidden
states of a pipeline, gathered weights of ZeRO-3), and so is what a GPU's libraries take without PyTorch's knowledge.
"""

from __future__ import annotations

import math
from dataclasses import astuple, dataclass

import torch

from megatron_tiedlora.base.shapes import ModelShape
from megatron_tiedlora.model.attention import cache_dtype
from megatron_tiedlora.model.layer_specs import HEAD_ROWS
from megatron_tiedlora.parallel.kernels import NUMBERS_AT_ONCE
from megatron_tiedlora.parallel.layers import padded
from megatron_tiedlora.planning.layout import Layout
from megatron_tiedlora.planning.stages import StagePlan

FP32 = 4
# Estimates. NCCL's is by what users report: 0.3 to 0.7 GB on hosts with NVLink (NVIDIA/nccl issues 864 and 964).
CONTEXT_BYTES = 0.5e9
COMMUNICATOR_BYTES = 0.5e9
# cuBLAS's on an H100, for the thread that runs forward and the one that runs backward: 32 MiB each.
WORKSPACE_BYTES = 2 * 2.0**25
MULTIPROCESSORS = 132  # of an H100, by which flash attention's deterministic backward pass divides its work


@dataclass(frozen=True)
class StageMemory:
    """Bytes on each rank of a stage; `libraries` is what PyTorch does not allocate."""

    base: float
    adapter: float
    gradients: float
    optimizer: float
    activations: float
    engine: float
    libraries: float

    @property
    def total(self) -> float:
        """All together."""
        return sum(astuple(self))

    @property
    def allocated(self) -> float:
        """What PyTorch's allocator gives out at the peak of a step."""
        return self.total - self.libraries


def stage_memory(stage: StagePlan, *, tokens: int, documents: int = 1, longest: int | None = None) -> StageMemory:
    """What a rank of `stage` needs.

    Args:
        tokens: of its largest micro-batch, padding included.
        documents: in that micro-batch, and `longest`: tokens of the longest one (None: all).
    """
    layout, trained = stage.layout, sum(stage.trained)
    attention = attention_memory(
        stage.shape, layout, tokens=tokens, documents=documents, longest=longest or tokens
    )
    of_gradients, of_moments, of_weights = (
        layout.dp_size if layout.zero_stage >= least else 1 for least in (2, 1, 3)
    )
    return StageMemory(
        base=base_bytes(stage) / of_weights,
        adapter=FP32 * sum(stage.held) / of_weights,
        gradients=FP32 * trained / of_gradients,
        # Two moments; from ZeRO-1 on also a copy of the values that is stepped.
        optimizer=(2 if layout.zero_stage == 0 else 3) * FP32 * trained / of_moments,
        activations=_activation_bytes(stage, tokens=tokens, attention=attention),
        engine=_engine_bytes(stage, tokens=tokens),
        libraries=CONTEXT_BYTES + COMMUNICATOR_BYTES * num_communicators(stage) if layout.on_gpu else 0.0,
    )


def num_communicators(stage: StagePlan) -> int:
    """NCCL communicators of a rank: one for each group of more than one rank and each neighbour in the pipeline."""
    layout = stage.layout
    tensor, pipeline, data = (size > 1 for size in (layout.tp_size, layout.pp_size, layout.dp_size))
    groups = [tensor, data, tensor or pipeline, tensor and data]  # the model's; of u, over tensor x data
    if pipeline:  # the pipeline's, that for choices and the tied tensors'
        groups += [True] * 3 + [not stage.is_first, not stage.is_last]
    return sum(groups)


def base_bytes(stage: StagePlan) -> int:
    """Of the base weights that a rank of the stage holds, before ZeRO-3 cuts them over data-parallel ranks."""
    return sum(stage.local_base) * stage.layout.dtype.itemsize


def cache_bytes(stage: StagePlan, *, sequences: int, tokens: int) -> int:
    """Keys and values of a decoded batch on a rank of the stage, `tokens` in each of the sequences.

    A pipeline has a part of the batch on each stage, so every rank holds the caches of the whole batch.
    """
    heads, layout = stage.shape.heads, stage.layout
    dtype = cache_dtype(layout.dtype, torch.device("cuda" if layout.on_gpu else "cpu"))
    per_token = 2 * len(stage.blocks) * heads.num_kv // layout.tp_size * heads.dim * dtype.itemsize
    return sequences * tokens * per_token


def micro_batches_in_flight(stage: StagePlan) -> int:
    """How many micro-batches 1F1B has begun and not ended on a stage."""
    return min(stage.layout.pp_size - stage.index, stage.layout.micro_batches)


@dataclass(frozen=True)
class TokenBytes:
    """Bytes of one token on a rank of a layout.

    Attributes:
        whole: hidden states, on a rank that has all of them.
        hidden: the same as they lie between layers, sharded along the sequence where sequences are cut.
        gathered: of a gradient between layers, whole again where sequences are cut.
        attended: attention's result.
        gate: gate and up.
        saved: what one adapted block saves for its backward pass.
        after_attention: of `saved`, what comes after attention: the second norm's, gate and up.
    """

    whole: float
    hidden: float
    gathered: float
    attended: float
    gate: float
    saved: float
    after_attention: float


def token_bytes(shape: ModelShape, layout: Layout) -> TokenBytes:
    """Of one token of the whole sequence, on a rank.

    On one rank that holds all a block saves 4 d + 2 k + 2 f + r numbers (inputs of two norms; q, k, v and attention's
    result; gate and up; and A x where a factor's gradient needs it), and in fp32 one for each norm and attention head.
    Without gate, up and the second norm's number where these are computed again; of a block that is, as a whole, while
    it is there.
    """
    heads, itemsize, parts, tp_size = shape.heads, layout.dtype.itemsize, layout.sequence_parts, layout.tp_size
    queries = heads.rows[0]
    selective = layout.recompute == "selective"
    whole = shape.hidden_size * itemsize
    gate = 2 * shape.intermediate_size / tp_size * itemsize
    inside = sum(heads.rows) + queries
    if layout.on_gpu and layout.dtype == torch.float32 and heads.num_kv < heads.num:
        inside += 2 * queries  # the memory-efficient kernel gets keys and values for every head
    low = layout.adapter.rank if any(layout.adapter.row.factor(name).trained for name in "Buv") else 0
    norms = (2 * whole + (1 if selective else 2) * FP32) / parts
    saved_gate = 0.0 if selective else gate
    return TokenBytes(
        whole=whole,
        hidden=whole / parts,
        gathered=whole if parts > 1 else 0.0,
        attended=queries * itemsize / tp_size,
        gate=gate,
        saved=norms + (inside / tp_size + low) * itemsize + saved_gate + heads.num / tp_size * FP32,
        after_attention=whole / parts if selective else (whole + FP32) / parts + gate,
    )


def saved_bytes(stage: StagePlan, *, tokens: int, after: int | None = None) -> float:
    """What autograd saves of a micro-batch on a rank of `stage`, beside parameters and what is as small as indices.

    Args:
        tokens: of the micro-batch, padding included.
        after: positions that what comes after the last attention computes; None: all. Of each the gradient is kept.
    """
    after = tokens if after is None else after
    of_token, recomputes = token_bytes(stage.shape, stage.layout), stage.layout.recompute == "full"
    blocks = len(stage.backward_blocks)
    saved = blocks * tokens * (of_token.hidden if recomputes else of_token.saved)
    saved += 0 if recomputes else _factor_bytes(stage)
    if stage.is_last and blocks:  # see SupervisedTail
        saved += after * of_token.hidden - (0.0 if recomputes else tokens * of_token.after_attention)
    return saved


def _factor_bytes(stage: StagePlan) -> int:
    """Of A and F = (alpha / r) diag(v) B diag(u) in the base's dtype, which a micro-batch's layers share."""
    part, adapter, itemsize = stage.part, stage.layout.adapter, stage.layout.dtype.itemsize
    if not part.layers:
        return 0
    row, is_copy, num_layers = adapter.row, itemsize != FP32, len(part.layers)
    scaled = any(part.exists(name) for name in "uv")
    f_numbers = math.prod(part.local_shape("B")[-2:]) * (num_layers if scaled or not row.B.tied else 1)
    a_numbers = math.prod(adapter.shape("A")[-2:]) * (1 if row.A.tied else num_layers)
    held = f_numbers if is_copy or scaled or adapter.scale != 1.0 else 0  # else F is B itself
    held += a_numbers if is_copy or (row.A.trained and part.tp_size > 1) else 0  # else A is the parameter
    return held * itemsize


@dataclass(frozen=True)
class AttentionMemory:
    """What attention's kernel on a GPU needs beside its arguments and result.

    Attributes:
        saved: of a block from its forward to its backward pass, beside one fp32 number a token and head.
        backward: at the worst moment of its backward pass: gradients of its arguments and result, and workspace.
    """

    saved: int
    backward: float


def attention_memory(
    shape: ModelShape, layout: Layout, *, tokens: int, documents: int, longest: int
) -> AttentionMemory:
    """By how many documents there are in a micro-batch of `tokens`, and how long the longest is.

    Counted for PyTorch's own kernels (2.11): flash in 16 bits, and flash_attn's is alike; the memory-efficient one in
    fp32. A CPU goes by blocks of queries, whose scores are small.
    """
    itemsize, tp_size = layout.dtype.itemsize, layout.tp_size
    heads, query = shape.heads.num // tp_size, shape.heads.rows[0] // tp_size
    gradients = tokens * (sum(shape.heads.rows) // tp_size + query) * itemsize
    saved, workspace = 0, 0
    grouped = shape.heads.num_kv < shape.heads.num
    if layout.on_gpu and layout.dtype == torch.float32:
        square = documents * padded(longest, 32)  # it sees a batch of rows that are as long as the longest document
        saved = FP32 * heads * max(square - tokens, 0)
        workspace = FP32 * query * max(square, tokens) + 2 * FP32 * query * tokens * grouped
    elif layout.on_gpu:
        # An fp32 gradient of the queries, of documents that are padded by up to 128; each of `copies` of it gets a
        # part of the keys where sums must have one order; and gradients of keys and values for every query head.
        rows, copies = tokens + 128 * documents, 1
        if layout.deterministic:
            copies = -(-MULTIPROCESSORS // (documents * heads))
        workspace = FP32 * heads * rows * (copies * padded(shape.heads.dim, 32) + 1)
        workspace += 2 * query * tokens * itemsize * grouped
    return AttentionMemory(saved, float(gradients + workspace))


def _activation_bytes(stage: StagePlan, *, tokens: int, attention: AttentionMemory) -> float:
    """At the worst moment: the last block's MLP and the head, or the backward pass of a block before it."""
    if not stage.backward_blocks:
        return 0.0
    layout, of_token = stage.layout, token_bytes(stage.shape, stage.layout)
    recomputes = layout.recompute == "full"
    saved = saved_bytes(stage, tokens=tokens)
    # Under full recomputation, the factors are held as arguments of what is computed again.
    saved += _factor_bytes(stage) if recomputes else len(stage.backward_blocks) * attention.saved
    after_attention = tokens * of_token.after_attention  # free again as attention's backward pass begins
    in_attention = attention.backward
    if recomputes:
        in_attention += attention.saved + tokens * of_token.saved - after_attention
    again = {"none": 0.0, "selective": of_token.gate, "full": of_token.saved}[layout.recompute]
    in_mlp = tokens * again + _mlp_gradient_bytes(stage, tokens)
    moment = max(in_mlp, in_attention - (0.0 if recomputes else after_attention))
    if stage.is_last:
        # What the last block of the model has saved is given back before another's backward pass begins.
        last = tokens * (of_token.hidden if recomputes else of_token.saved - of_token.after_attention)
        moment = max(moment - last, _head_bytes(stage, tokens), in_attention)
    return micro_batches_in_flight(stage) * saved + moment + (WORKSPACE_BYTES if layout.on_gpu else 0.0)


def _mlp_gradient_bytes(stage: StagePlan, tokens: int) -> float:
    """Gradients of gate, up and their product, what the kernel holds beside them, and the gradient that came in."""
    of_token = token_bytes(stage.shape, stage.layout)
    return tokens * (1.5 * of_token.gate + of_token.gathered) + eager_bytes(stage.shape, stage.layout, tokens)


def eager_bytes(shape: ModelShape, layout: Layout, tokens: int) -> float:
    """The most that a kernel which is not compiled holds beside its arguments and its result.

    That is `gate_gradient`: for each pair of a gate and an up that it takes at once eight fp32 numbers, or five where
    nothing has to be made fp32.
    """
    numbers = 2 * tokens * shape.intermediate_size / layout.tp_size
    return _at_once(layout, numbers) / 2 * FP32 * (8 if layout.dtype.itemsize < FP32 else 5)


def _at_once(layout: Layout, numbers: float) -> float:
    """Of the numbers of a kernel's widest argument, those that it goes over at one time where it is not compiled."""
    if layout.compiled:
        return 0.0
    return min(numbers, NUMBERS_AT_ONCE) if layout.on_gpu else numbers


def _head_bytes(stage: StagePlan, tokens: int) -> float:
    """From the last attention to the loss and back at once: inputs of two norms, gate and up, then logits or gradients.

    The input of the last block's QKV is counted with what is saved.
    """
    shape, layout = stage.shape, stage.layout
    of_token = token_bytes(shape, layout)
    norms = 2 * tokens * (of_token.hidden + FP32 / layout.sequence_parts)
    logits = min(tokens, HEAD_ROWS) * shape.vocab_size / layout.tp_size
    at_loss = 3 * tokens * of_token.whole + logits * layout.dtype.itemsize + _at_once(layout, logits) * FP32
    attended = 0.0
    if layout.recompute == "full" and layout.pp_size == 1:  # else it is the engine's
        attended = tokens * of_token.attended
    return norms + tokens * of_token.gate + max(at_loss, _mlp_gradient_bytes(stage, tokens)) + attended


def engine_bytes_in_flight(stage: StagePlan, *, tokens: int) -> float:
    """What DeepSpeed's pipeline engine keeps of a micro-batch in flight beside what autograd does (0.19.8).

    Of 2 d numbers a token: what came in, of which the stage gets a copy, and what went out. The first stage has no
    hidden states coming in. What the last one gives its head is saved by autograd, but for attention's result where
    that is computed again. Tokens, positions and labels, up to 24 bytes a token and 32 a label, are left out.
    """
    of_token = token_bytes(stage.shape, stage.layout)
    came_in = 0.0 if stage.is_first else of_token.hidden
    if not stage.is_last:
        return tokens * (came_in + of_token.hidden)
    return tokens * (came_in + (of_token.attended if stage.layout.recompute == "full" else 0.0))


def engine_bytes_once(stage: StagePlan, *, tokens: int) -> float:
    """What the engine keeps however many micro-batches are in flight: the buffer that gradients arrive in.

    On the last stage, which gets none, what its head was given of the micro-batch before.
    """
    of_token = token_bytes(stage.shape, stage.layout)
    if not stage.is_last:
        return tokens * of_token.hidden
    return tokens * (of_token.hidden + of_token.attended) if stage.layout.micro_batches > 1 else 0.0


def gathered_bytes(stage: StagePlan) -> float:
    """Of the base weights that ZeRO-3 has gathered at one time: it stops once they are more than a setting (0.19.8)."""
    if stage.layout.zero_stage < 3 or stage.layout.dp_size == 1:
        return 0.0
    most = stage.layout.live_parameters + max(stage.local_base)
    return min(sum(stage.local_base), most) * float(stage.layout.dtype.itemsize)


def _engine_bytes(stage: StagePlan, *, tokens: int) -> float:
    if stage.layout.pp_size == 1:
        return gathered_bytes(stage)
    in_flight = micro_batches_in_flight(stage) * engine_bytes_in_flight(stage, tokens=tokens)
    return in_flight + engine_bytes_once(stage, tokens=tokens)
