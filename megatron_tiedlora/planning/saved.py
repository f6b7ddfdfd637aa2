"""Arithmetic for the bytes that autograd saves for the backward pass, to the byte but for indices and tables."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from megatron_tiedlora.adapters.targets import Target
from megatron_tiedlora.adapters.tied_adapter import AdapterPart
from megatron_tiedlora.base.shapes import DOWN, GATE_UP, OUTPUT, QKV, TARGET_NAMES, ModelShape
from megatron_tiedlora.planning.layout import Layout
from megatron_tiedlora.planning.micro_batches import ShareShape
from megatron_tiedlora.planning.stages import StageOwners, StagePlan

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


def token_bytes(shape: ModelShape, layout: Layout, adapter: int = 0) -> TokenBytes:
    """The bytes of one token of the whole sequence on a rank of the layout.

    Without parallelism a block saves 4 d + 2 k + 2 f + r numbers (the inputs of two norms; q, k, v and the output of
    attention; gate and up; A x of each target if a factor's gradient needs it), and one fp32 number per norm, per head,
    and per head of queries and keys that has a norm. r is the rank of the token's own adapter.
    Selective recompute does not save gate, up and the second norm's number. With full recompute this is what a block
    saves while it is recomputed.

    Args:
        adapter: the number of the token's adapter in the layout; all its targets are adapted in the block.
    """
    block, heads, itemsize = shape.block, shape.heads, layout.dtype.itemsize
    parts, tp_size, own = layout.sequence_parts, layout.tp_size, layout.adapters[adapter]
    whole = shape.hidden_size * itemsize
    gate = block.gate_up.out_size / tp_size * itemsize
    inside = block.qkv.out_size + block.output.in_size
    if layout.on_gpu and layout.dtype == torch.float32 and heads.num_kv < heads.num:
        inside += 2 * block.output.in_size  # the memory-efficient kernel gets keys and values for every head
    # A x is one tensor of all adapters of a micro-batch, which is saved if F of one of them is trained.
    ax = own.rank * itemsize * any(config.method_spec.trains_f for config in layout.adapters)
    ax_after = ax * sum(target.name != QKV for target in own.targets)  # of linears behind attention
    norm = (whole + FP32) / parts
    after_attention = ax_after + (whole / parts if layout.recompute == "selective" else norm + gate)
    of_heads = heads.num + (heads.num + heads.num_kv if heads.norms else 0)
    heads_bytes = (inside * itemsize + of_heads * FP32) / tp_size
    in_attention = ax * len(own.targets) - ax_after + norm + heads_bytes
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


def saved_bytes(stage: StagePlan, shares: Sequence[ShareShape]) -> float:
    """The bytes that autograd saves of a micro-batch on a rank of `stage`, without parameters and indices."""
    owners = stage.owned_by([share.adapter for share in shares])
    of_token, recomputes = token_bytes(stage.shape, stage.layout), stage.layout.recompute == "full"
    tokens, after = (sum(sizes) for sizes in list(zip(*shares, strict=True))[1:])
    saved = float(factor_bytes(owners))
    for kind in (kind for kind in owners.kinds if kind.goes_back):
        block, ends = kind.example, kind.ends_here
        if recomputes:
            saved += kind.number * tokens * of_token.hidden * (not ends or owners.needs(block)[OUTPUT])
        else:
            in_attention, in_mlp = _block_bytes(owners, block, of_token)
            saved += kind.number * tokens * (in_attention + in_mlp * (not ends))
            names, sizes = (QKV,) if ends else TARGET_NAMES, [share.num_tokens for share in shares]
            saved += kind.number * sum(_ax_bytes(owners, block, name, sizes) for name in names)
        if ends:
            saved += after * _tail_bytes(owners) + _early_bytes(owners)
            saved += _ax_bytes(owners, block, OUTPUT, [share.num_after for share in shares])
    return saved


def _ax_bytes(owners: StageOwners, block: int, name: str, tokens: Sequence[int]) -> int:
    """A x of a linear, from the tokens of each adapter: each has its own rank. Saved if F of one of them is trained."""
    if not owners.trains_f(block, name):
        return 0
    pairs = zip(owners.parts, tokens, strict=True)
    numbers = sum(part.config.rank * count for part, count in pairs if part.adapts(block, name))
    return numbers * owners.stage.layout.dtype.itemsize


def _block_bytes(owners: StageOwners, block: int, of_token: TokenBytes) -> tuple[float, float]:
    """What a block saves for a token without full recompute, beside A x: up to its output projection, in its MLP.

    In the first adapted layer nothing is saved of what comes before the first adapted linear.
    """
    stage = owners.stage
    layout, needs = stage.layout, owners.needs(block)
    number = FP32 / layout.sequence_parts
    in_attention: float = 0.0
    if needs[QKV] or owners.trains_a(block, QKV):
        in_attention += of_token.hidden + number
    if needs[OUTPUT]:
        in_attention += of_token.heads
    elif owners.trains_a(block, OUTPUT) and not stage.ends_in(block):
        in_attention += of_token.attended  # its input is attention's result, which attention saves if it needs one
    in_mlp: float = 0.0
    reads_norm = needs[GATE_UP] or owners.trains_a(block, GATE_UP)
    if reads_norm or (layout.recompute == "selective" and owners.reads_mlp_input(block)):
        in_mlp += of_token.hidden
    if layout.recompute == "none":
        in_mlp += number * reads_norm + of_token.gate * owners.reads_mlp_input(block)
    return in_attention, in_mlp


def _tail_bytes(owners: StageOwners) -> float:
    """What is saved for a position behind the last attention, beside A x; see `SupervisedTail`."""
    block, of_token = owners.stage.blocks[-1], token_bytes(owners.stage.shape, owners.stage.layout)
    of_input = of_token.hidden * owners.needs(block)[GATE_UP]  # the gradient of the MLP's input
    return of_input + of_token.attended * owners.trains_a(block, OUTPUT)  # x, of which attention saves other rows


def _early_bytes(owners: StageOwners) -> int:
    """The gradients of the factors of the last block's MLP, whose backward pass runs inside its forward pass."""
    block, numbers = owners.stage.blocks[-1], 0
    for name in (GATE_UP, DOWN):
        trains_a, trains_f = owners.trains_a(block, name), owners.trains_f(block, name)
        for part in owners.adapting(block, name):
            columns, rows = target_of(part, name).local_sizes(part.tp_size)
            numbers += part.config.rank * (columns * trains_a + rows * trains_f)
    return FP32 * numbers


def target_of(part: AdapterPart, name: str) -> Target:
    """The target of this name."""
    return next(target for target in part.config.targets if target.name == name)


def factor_bytes(owners: StageOwners, *, given: bool = False) -> int:
    """The bytes of A and F = (alpha / r) diag(v) B diag(u) in the base's dtype, which layers of a stage share.

    Those of several adapters of a linear are copied end to end.

    Args:
        given: count also those that are only arguments of what is recomputed or runs its backward pass at once.
    """
    stage = owners.stage
    memories = {
        (id(part), target.name): _factor_memories(part, target, stage.layout)
        for part in owners.parts
        for target in part.config.targets
    }
    found: dict[tuple[Hashable, ...], int] = {}  # by what is in one memory
    for name in TARGET_NAMES:
        layers = [layer for layer in stage.blocks if owners.adapts(layer, name)]
        if not given:
            layers = [layer for layer in layers if _saves_factors(stage, layer, name)]
        for layer in layers:
            factors = zip(*(memories[id(part), name] for part in owners.adapting(layer, name)), strict=True)
            for letter, several in zip("AF", factors, strict=True):
                if len(several) > 1:
                    keys = ((factor.owner, 0 if factor.tied else layer) for factor in several)
                    found[name, letter, *keys] = sum(factor.numbers for factor in several)
                elif several[0].is_copy:
                    found[name, letter, several[0].owner] = several[0].in_memory
    return sum(found.values()) * stage.layout.dtype.itemsize


class _FactorMemory(NamedTuple):
    """One of the factors of a linear.

    Attributes:
        owner: its adapter.
        numbers: of one layer; `in_memory` are those of all layers of the stage.
        tied: whether all layers have the same.
        is_copy: whether it is a copy of the parameter.
    """

    owner: int
    numbers: int
    in_memory: int
    tied: bool
    is_copy: bool


def _factor_memories(part: AdapterPart, target: Target, layout: Layout) -> tuple[_FactorMemory, _FactorMemory]:
    """A and F."""
    config, (columns, rows) = part.config, target.local_sizes(part.tp_size)
    scaled = any(part.exists(target.prefix + factor) for factor in "uv")
    a_is_copy, b_is_copy = (
        layout.dtype.itemsize != FP32 or part.is_gathered(target.prefix + factor) for factor in "AB"
    )
    f_is_tied, f_is_copy = config.method_spec.B.tied and not scaled, b_is_copy or scaled or config.scale != 1.0

    def memory(width: int, *, tied: bool, is_copy: bool) -> _FactorMemory:
        numbers = width * config.rank
        return _FactorMemory(id(part), numbers, numbers * (1 if tied else len(part.layers)), tied, is_copy)

    # If F is no copy, it is B itself.
    return (
        memory(columns, tied=config.method_spec.A.tied, is_copy=a_is_copy),
        memory(rows, tied=f_is_tied, is_copy=f_is_copy),
    )


def _saves_factors(stage: StagePlan, block: int, name: str) -> bool:
    """Whether a block saves a linear's factors for a later backward pass, without recompute."""
    if stage.layout.recompute == "full":
        return stage.ends_in(block) and name == OUTPUT
    return name not in (GATE_UP, DOWN) or not stage.ends_in(block)
