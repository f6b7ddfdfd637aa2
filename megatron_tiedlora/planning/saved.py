"""Arithmetic for the bytes that autograd saves for the backward pass, to the byte but for indices and tables."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_tiedlora.adapters.targets import Target
from megatron_tiedlora.base.shapes import DOWN, GATE_UP, OUTPUT, QKV, ModelShape
from megatron_tiedlora.planning.layout import Layout
from megatron_tiedlora.planning.stages import StagePlan, needs_gradient

FP32 = 4


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
    saved = float(factor_bytes(stage))
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


def factor_bytes(stage: StagePlan, *, given: bool = False) -> int:
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
