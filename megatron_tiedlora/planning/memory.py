"""Arithmetic for the bytes that a rank of each stage needs, by purpose.

Activations are in_flight x tokens x blocks with a backward pass x bytes that a block saves for a token (the last block
saves less), plus the temporary tensors of one block. Two more figures stand apart: what DeepSpeed's engines hold
(hidden states of a pipeline, gathered weights of ZeRO-3), and what a GPU's libraries allocate outside PyTorch.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass

import torch

from megatron_tiedlora.adapters.targets import Target
from megatron_tiedlora.base.shapes import DOWN, GATE_UP, OUTPUT, QKV, ModelShape
from megatron_tiedlora.model.attention import cache_dtype
from megatron_tiedlora.model.layer_specs import HEAD_ROWS
from megatron_tiedlora.parallel.kernels import NUMBERS_AT_ONCE
from megatron_tiedlora.parallel.layers import padded
from megatron_tiedlora.planning.layout import Layout
from megatron_tiedlora.planning.stages import StagePlan, needs_gradient

FP32 = 4
# Estimates. Users report 0.3 to 0.7 GB for NCCL on hosts with NVLink (NVIDIA/nccl issues 864 and 964).
CONTEXT_BYTES = 0.5e9
COMMUNICATOR_BYTES = 0.5e9
# cuBLAS allocates 32 MiB on an H100 for each of the two threads that run forward and backward passes.
WORKSPACE_BYTES = 2 * 2.0**25
MULTIPROCESSORS = 132  # of an H100; flash attention's deterministic backward pass divides its work by them


@dataclass(frozen=True)
class StageMemory:
    """The bytes on each rank of a stage. PyTorch allocates all of them but `libraries`."""

    base: float
    adapter: float
    gradients: float
    optimizer: float
    activations: float
    engine: float
    libraries: float

    @property
    def total(self) -> float:
        """The sum."""
        return sum(astuple(self))

    @property
    def allocated(self) -> float:
        """The bytes that PyTorch allocates at the peak of a step."""
        return self.total - self.libraries


def stage_memory(stage: StagePlan, *, tokens: int, documents: int = 1, longest: int | None = None) -> StageMemory:
    """The bytes that a rank of `stage` needs.

    Args:
        tokens: the tokens of its largest micro-batch, padding included.
        documents: the documents in that micro-batch.
        longest: the tokens of the longest document; None means all.
    """
    layout, trained = stage.layout, sum(stage.trained)
    attention = attention_memory(stage.shape, layout, tokens=tokens, documents=documents, longest=longest or tokens)
    of_gradients, of_moments, of_weights = (layout.dp_size if layout.zero_stage >= least else 1 for least in (2, 1, 3))
    return StageMemory(
        base=layout.base_bytes(sum(stage.local_base)) / of_weights,
        adapter=FP32 * sum(stage.held) / of_weights,
        gradients=FP32 * trained / of_gradients,
        # Two moments; from ZeRO-1 on also a copy of the values, which the optimizer updates.
        optimizer=(2 if layout.zero_stage == 0 else 3) * FP32 * trained / of_moments,
        activations=_activation_bytes(stage, tokens=tokens, attention=attention),
        engine=_engine_bytes(stage, tokens=tokens),
        libraries=CONTEXT_BYTES + COMMUNICATOR_BYTES * num_communicators(stage) if layout.on_gpu else 0.0,
    )


def num_communicators(stage: StagePlan) -> int:
    """A rank's NCCL communicators: one for each group of several ranks and for each neighbour in the pipeline."""
    layout = stage.layout
    tensor, pipeline, data = (size > 1 for size in (layout.tp_size, layout.pp_size, layout.dp_size))
    groups = [tensor, data, tensor or pipeline, tensor and data]  # the last two: the model's, and that of u
    if pipeline:  # the groups of the pipeline, of choices and of the tied tensors
        groups += [True] * 3 + [not stage.is_first, not stage.is_last]
    return sum(groups)


def cache_bytes(stage: StagePlan, *, sequences: int, tokens: int) -> int:
    """The bytes of keys and values on a rank of the stage while it decodes sequences of up to `tokens` tokens.

    Each stage of a pipeline works on another part of the batch, so every rank holds the caches of the whole batch.
    """
    heads, layout = stage.shape.heads, stage.layout
    dtype = cache_dtype(layout.dtype, torch.device("cuda" if layout.on_gpu else "cpu"))
    per_token = 2 * len(stage.blocks) * heads.num_kv // layout.tp_size * heads.dim * dtype.itemsize
    return sequences * tokens * per_token


def micro_batches_in_flight(stage: StagePlan) -> int:
    """The most micro-batches that 1F1B has started and not finished on a stage."""
    return min(stage.layout.pp_size - stage.index, stage.layout.micro_batches)


@dataclass(frozen=True)
class TokenBytes:
    """The bytes that a rank needs for one token.

    Attributes:
        whole: its hidden state, inside a layer.
        hidden: the same between layers, where it may be sharded along the sequence.
        gathered: the gradient of a hidden state that is gathered; 0 if sequences are not cut.
        attended: the output of attention.
        heads: queries, keys and values with the output of attention, and the numbers of heads and their norms.
        gate: gate and up.
        saved: all that one adapted block saves for its backward pass.
        after_attention: the part of `saved` that follows attention: the second norm's input, gate and up.
    """

    whole: float
    hidden: float
    gathered: float
    attended: float
    heads: float
    gate: float
    saved: float
    after_attention: float


def token_bytes(shape: ModelShape, layout: Layout) -> TokenBytes:
    """The bytes of one token of the whole sequence on a rank of the layout.

    Without parallelism a block saves 4 d + 2 k + 2 f + r numbers (the inputs of two norms; q, k, v and the output of
    attention; gate and up; A x of each target if a factor's gradient needs it), and one fp32 number per norm, per head,
    and per head of queries and keys that has a norm.
    Selective recompute does not save gate, up and the second norm's number. With full recompute this is what a block
    saves while it is recomputed.
    """
    block, heads, itemsize = shape.block, shape.heads, layout.dtype.itemsize
    parts, tp_size, adapter = layout.sequence_parts, layout.tp_size, layout.adapter
    whole = shape.hidden_size * itemsize
    gate = block.gate_up.out_size / tp_size * itemsize
    inside = block.qkv.out_size + block.output.in_size
    if layout.on_gpu and layout.dtype == torch.float32 and heads.num_kv < heads.num:
        inside += 2 * block.output.in_size  # the memory-efficient kernel gets keys and values for every head
    ax = adapter.rank * itemsize * adapter.method_spec.trains_f
    ax_after = ax * sum(target.follows_attention for target in adapter.targets)
    norm = (whole + FP32) / parts
    after_attention = ax_after + (whole / parts if layout.recompute == "selective" else norm + gate)
    of_heads = heads.num + (heads.num + heads.num_kv if heads.norms else 0)
    heads_bytes = (inside * itemsize + of_heads * FP32) / tp_size
    in_attention = ax * len(adapter.targets) - ax_after + norm + heads_bytes
    return TokenBytes(
        whole=whole,
        hidden=whole / parts,
        gathered=whole if parts > 1 else 0.0,
        attended=block.output.in_size * itemsize / tp_size,
        heads=heads_bytes,
        gate=gate,
        saved=in_attention + after_attention,
        after_attention=after_attention,
    )


def saved_bytes(stage: StagePlan, *, tokens: int, after: int | None = None) -> float:
    """The bytes that autograd saves of a micro-batch on a rank of `stage`, without parameters and indices.

    Args:
        tokens: the tokens of the micro-batch, padding included.
        after: the positions that are computed after the last attention; None means all. The gradient of each is saved.
    """
    after = tokens if after is None else after
    of_token, recomputes = token_bytes(stage.shape, stage.layout), stage.layout.recompute == "full"
    saved = float(_factor_bytes(stage))
    for block in stage.backward_blocks:
        if recomputes:
            in_attention, of_output, in_mlp = of_token.hidden * _saves_input(stage, block), 0.0, 0.0
        else:
            in_attention, of_output, in_mlp = _block_bytes(stage, block)
        if stage.ends_in(block):
            saved += tokens * in_attention + _tail_bytes(stage, after)
        else:
            saved += tokens * (in_attention + of_output + in_mlp)
    return saved


def _saves_input(stage: StagePlan, block: int) -> bool:
    """Whether full recompute saves a block's input: all have a gradient but what precedes the first adapted linear."""
    return not stage.ends_in(block) or needs_gradient(stage.layout.adapter, block)[OUTPUT]


def _block_bytes(stage: StagePlan, block: int) -> tuple[float, float, float]:
    """What a block saves for a token without full recompute: up to attention, for its output projection, in its MLP.

    In the first adapted layer nothing is saved of what comes before the first adapted linear.
    """
    shape, layout, method = stage.shape, stage.layout, stage.layout.adapter.method_spec
    of_token, needs = token_bytes(shape, layout), needs_gradient(layout.adapter, block)
    ax = layout.adapter.rank * layout.dtype.itemsize * method.trains_f
    number = FP32 / layout.sequence_parts
    in_attention: float = ax * stage.adapts(block, QKV)
    if needs[QKV] or (stage.adapts(block, QKV) and method.A.trained):
        in_attention += of_token.hidden + number
    if needs[OUTPUT]:
        in_attention += of_token.heads
    of_output = 0.0
    if stage.adapts(block, OUTPUT):  # its input is attention's result, which attention saves
        of_output = ax + (of_token.attended if method.A.trained and not needs[OUTPUT] else 0.0)
    in_mlp: float = ax * (stage.adapts(block, GATE_UP) + stage.adapts(block, DOWN))
    reads_norm = needs[GATE_UP] or (stage.adapts(block, GATE_UP) and method.A.trained)
    if reads_norm or (layout.recompute == "selective" and stage.reads_mlp_input(block)):
        in_mlp += of_token.hidden
    if layout.recompute == "none":
        in_mlp += number * reads_norm + of_token.gate * stage.reads_mlp_input(block)
    return in_attention, of_output, in_mlp


def _tail_bytes(stage: StagePlan, after: int) -> float:
    """What the last block and the head save of `after` positions behind the last attention; see `SupervisedTail`."""
    layout, block, adapter = stage.layout, stage.blocks[-1], stage.layout.adapter
    of_token, method = token_bytes(stage.shape, layout), adapter.method_spec
    saved = after * of_token.hidden * needs_gradient(adapter, block)[GATE_UP]  # the gradient of the MLP's input
    if stage.adapts(block, OUTPUT):  # A x, and x, of which attention saves other rows
        saved += after * adapter.rank * layout.dtype.itemsize * method.trains_f
        saved += after * of_token.attended * method.A.trained
    for target in adapter.targets if stage.part.layers and block in stage.part.layers else ():
        if target.name in (GATE_UP, DOWN):  # the gradients of its factors
            columns, rows = target.local_sizes(stage.part.tp_size)
            saved += FP32 * adapter.rank * (columns * method.A.trained + rows * method.trains_f)
    return saved


def _factor_bytes(stage: StagePlan, *, given: bool = False) -> int:
    """The bytes of A and F = (alpha / r) diag(v) B diag(u) in the base's dtype, which all layers of a stage share.

    Args:
        given: count also those that are only arguments of what is recomputed or runs its backward pass at once.
    """
    part, adapter, itemsize = stage.part, stage.layout.adapter, stage.layout.dtype.itemsize
    if not part.layers:
        return 0
    method, num_layers, held = adapter.method_spec, len(part.layers), 0
    for target in adapter.targets:
        if not given and not _saves_factors(stage, target):
            continue
        columns, rows = target.local_sizes(part.tp_size)
        scaled = any(part.exists(target.prefix + name) for name in "uv")
        a_is_copy, b_is_copy = (itemsize != FP32 or part.is_gathered(target.prefix + name) for name in "AB")
        if a_is_copy:  # else it is the parameter
            held += columns * adapter.rank * (1 if method.A.tied else num_layers)
        if b_is_copy or scaled or adapter.scale != 1.0:  # else F is B itself
            held += rows * adapter.rank * (num_layers if scaled or not method.B.tied else 1)
    return held * itemsize


def _saves_factors(stage: StagePlan, target: Target) -> bool:
    """Whether one of a stage's blocks saves a target's factors for a later backward pass, without recompute."""
    ends = stage.part.layers[-1] if stage.ends_in(stage.part.layers[-1]) else None
    if stage.layout.recompute == "full":
        return ends is not None and target.name == OUTPUT
    return target.name not in (GATE_UP, DOWN) or stage.part.layers != (ends,)


@dataclass(frozen=True)
class AttentionMemory:
    """The bytes that attention's kernel on a GPU needs beside its inputs and output.

    Attributes:
        saved: what a block saves for its backward pass, beside one fp32 number for each token and head.
        backward: the peak of its backward pass: the gradients of its inputs and output, and a workspace.
    """

    saved: int
    backward: float


def attention_memory(
    shape: ModelShape, layout: Layout, *, tokens: int, documents: int, longest: int
) -> AttentionMemory:
    """The memory of attention for a micro-batch of `tokens` in so many documents, the longest of `longest` tokens.

    The figures are those of PyTorch's own kernels (2.11): flash in 16 bits (flash_attn needs as much), and the
    memory-efficient kernel in fp32. A CPU computes tiles of queries, whose scores are small.
    """
    itemsize, tp_size = layout.dtype.itemsize, layout.tp_size
    heads, query = shape.heads.num // tp_size, shape.heads.rows[0] // tp_size
    gradients = tokens * (sum(shape.heads.rows) // tp_size + query) * itemsize
    saved, workspace = 0, 0
    grouped = shape.heads.num_kv < shape.heads.num
    if layout.on_gpu and layout.dtype == torch.float32:
        square = documents * padded(longest, 32)  # the kernel gets rows as long as the longest document
        saved = FP32 * heads * max(square - tokens, 0)
        workspace = FP32 * query * max(square, tokens) + 2 * FP32 * query * tokens * grouped
    elif layout.on_gpu:
        # The fp32 gradient of the queries, with documents padded by up to 128. If sums must have a fixed order, each of
        # several copies gets some of the keys. The gradients of keys and values exist for every query head.
        rows, copies = tokens + 128 * documents, 1
        if layout.deterministic:
            copies = -(-MULTIPROCESSORS // (documents * heads))
        workspace = FP32 * heads * rows * (copies * padded(shape.heads.dim, 32) + 1)
        workspace += 2 * query * tokens * itemsize * grouped
    return AttentionMemory(saved, float(gradients + workspace))


def _activation_bytes(stage: StagePlan, *, tokens: int, attention: AttentionMemory) -> float:
    """The peak: the last block's MLP and the head, or the backward pass of an earlier block."""
    if not stage.backward_blocks:
        return 0.0
    layout, of_token = stage.layout, token_bytes(stage.shape, stage.layout)
    recomputes = layout.recompute == "full"
    saved = saved_bytes(stage, tokens=tokens)
    if recomputes:  # all factors are inputs of what is recomputed
        saved += _factor_bytes(stage, given=True) - _factor_bytes(stage)
    else:
        saved += len(stage.backward_blocks) * attention.saved
    after_attention = tokens * of_token.after_attention  # freed before the backward pass of attention
    in_attention = attention.backward
    if recomputes:
        in_attention += attention.saved + tokens * of_token.saved - after_attention
    again = {"none": 0.0, "selective": of_token.gate, "full": of_token.saved}[layout.recompute]
    in_mlp = tokens * again + _mlp_gradient_bytes(stage, tokens)
    moment = max(in_mlp, in_attention - (0.0 if recomputes else after_attention))
    if stage.is_last:
        # The last block of the model frees what it has saved before the backward pass of another begins.
        last = tokens * (of_token.hidden if recomputes else of_token.saved - of_token.after_attention)
        moment = max(moment - last, _head_bytes(stage, tokens), in_attention)
    return micro_batches_in_flight(stage) * saved + moment + (WORKSPACE_BYTES if layout.on_gpu else 0.0)


def _mlp_gradient_bytes(stage: StagePlan, tokens: int) -> float:
    """The gradients of gate, up and their product, the kernel's temporary tensors, and the gathered gradient."""
    of_token = token_bytes(stage.shape, stage.layout)
    return tokens * (1.5 * of_token.gate + of_token.gathered) + eager_bytes(stage.shape, stage.layout, tokens)


def eager_bytes(shape: ModelShape, layout: Layout, tokens: int) -> float:
    """The most temporary bytes that a kernel needs if it is not compiled.

    That kernel is `gate_gradient`. It needs eight fp32 numbers for each pair of gate and up that it processes at once,
    or five if these are fp32 already.
    """
    numbers = tokens * shape.block.gate_up.out_size / layout.tp_size
    return _at_once(layout, numbers) / 2 * FP32 * (8 if layout.dtype.itemsize < FP32 else 5)


def _at_once(layout: Layout, numbers: float) -> float:
    """How many of the `numbers` of its widest input a kernel processes at once if it is not compiled, else 0."""
    if layout.compiled:
        return 0.0
    return min(numbers, NUMBERS_AT_ONCE) if layout.on_gpu else numbers


def _head_bytes(stage: StagePlan, tokens: int) -> float:
    """The peak after the last attention: the inputs of two norms, gate and up, then logits or gradients.

    `saved_bytes` counts the input of the last block's QKV.
    """
    shape, layout = stage.shape, stage.layout
    of_token = token_bytes(shape, layout)
    norms = 2 * tokens * (of_token.hidden + FP32 / layout.sequence_parts)
    logits = min(tokens, HEAD_ROWS) * shape.vocab_size / layout.tp_size
    at_loss = 3 * tokens * of_token.whole + logits * layout.dtype.itemsize + _at_once(layout, logits) * FP32
    attended = 0.0
    if layout.recompute == "full" and layout.pp_size == 1:  # else the engine holds it
        attended = tokens * of_token.attended
    return norms + tokens * of_token.gate + max(at_loss, _mlp_gradient_bytes(stage, tokens)) + attended


def engine_bytes_in_flight(stage: StagePlan, *, tokens: int) -> float:
    """The bytes that DeepSpeed's pipeline engine holds for a micro-batch in flight, beside autograd's (0.19.8).

    These are 2 d numbers a token: the input, which the stage copies, and the output. The first stage has no hidden
    states as input. Autograd saves the output of the last stage, but not attention's output if that is recomputed.
    Tokens, positions and labels are not counted (up to 24 bytes a token and 32 a label).
    """
    of_token = token_bytes(stage.shape, stage.layout)
    came_in = 0.0 if stage.is_first else of_token.hidden
    if not stage.is_last:
        return tokens * (came_in + of_token.hidden)
    return tokens * (came_in + (of_token.attended if stage.layout.recompute == "full" else 0.0))


def _engine_bytes(stage: StagePlan, *, tokens: int) -> float:
    """All bytes that DeepSpeed holds: weights that ZeRO-3 has gathered, or those of a pipeline.

    ZeRO-3 stops gathering above `live_parameters` (0.19.8). A pipeline's stage also has a buffer for received
    gradients. The last stage receives none, but holds the input of its head from the previous micro-batch.
    """
    layout, of_token = stage.layout, token_bytes(stage.shape, stage.layout)
    if layout.pp_size == 1:
        block = stage.shape.block  # the linears of an MLP are gathered together
        mlp = (block.gate_up.num_weights + block.down.num_weights) // layout.tp_size
        most = layout.live_parameters + max(mlp, *stage.local_base)
        gathers = layout.zero_stage == 3 and layout.dp_size > 1
        return float(layout.base_bytes(min(sum(stage.local_base), most))) if gathers else 0.0
    once = of_token.hidden
    if stage.is_last:
        once = of_token.hidden + of_token.attended if layout.micro_batches > 1 else 0.0
    return micro_batches_in_flight(stage) * engine_bytes_in_flight(stage, tokens=tokens) + tokens * once
