"""Arithmetic for the bytes that a pass moves beside its frozen matmuls and attention.

These are norms, gate, rotation, residuals, loss and the skinny matmuls of the adapter, which are bound by memory. Each
is counted as one kernel that reads its inputs and writes its results once, as when it is compiled. With d hidden, o the
width of QKV and g that of gate and up on a rank, a frozen block moves 10 d + 2 o + 1.5 g numbers per token forward and
12 d + 2 o + 2.5 g back. A test counts the operations of the real model.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_tiedlora.base.shapes import DOWN, GATE_UP, OUTPUT, QKV
from megatron_tiedlora.planning.micro_batches import MicroBatchShape
from megatron_tiedlora.planning.stages import StageOwners


@dataclass(frozen=True)
class MovedBytes:
    """The bytes that a block or the head moves: in its forward pass, in its backward pass, and to recompute it."""

    forward: float = 0.0
    backward: float = 0.0
    again: float = 0.0

    def plus(self, other: MovedBytes) -> MovedBytes:
        """Each of them with that of another."""
        return MovedBytes(
            self.forward + other.forward, self.backward + other.backward, self.again + other.again
        )


@dataclass(frozen=True)
class _Widths:
    """Numbers per token on a rank: hidden states in and between layers, QKV, attention's output, gate and up."""

    whole: float
    between: float
    qkv: float
    attended: float
    gate_up: float


def _widths(owners: StageOwners) -> _Widths:
    shape, layout = owners.stage.shape, owners.stage.layout
    block, tp_size = shape.block, layout.tp_size
    return _Widths(
        whole=shape.hidden_size,
        between=shape.hidden_size / layout.sequence_parts,
        qkv=block.qkv.out_size / tp_size,
        attended=block.output.in_size / tp_size,
        gate_up=block.gate_up.out_size / tp_size,
    )


def block_bytes(
    owners: StageOwners, block: int, *, tokens: int, after: int, own: StageOwners | None = None
) -> MovedBytes:
    """What a block moves for tokens of a micro-batch.

    Args:
        owners: the adapters of the micro-batch, which decide what has a gradient.
        tokens: all of them, padding included, or those of one of the adapters.
        after: those of them that are computed after the attention.
        own: the adapter whose tokens they are, if the micro-batch has several.
    """
    width, needs, layout, own = _widths(owners), owners.needs(block), owners.stage.layout, own or owners
    attention = tokens * (_norm(width) + _entry(own, block, QKV, width) + 2 * width.qkv)
    output = after * (_exit(own, block, OUTPUT, width.attended, width) + 3 * width.between)
    mlp = after * (_norm(width) + _entry(own, block, GATE_UP, width) + 1.5 * width.gate_up)
    down = after * (_exit(own, block, DOWN, width.gate_up / 2, width) + 3 * width.between)
    forward = attention + output + mlp + down
    backward = again = 0.0
    if block in owners.backward_blocks:
        ends_here = owners.stage.ends_in(block)
        if owners.reads_mlp_input(block):
            backward += after * _exit_back(own, block, DOWN, width.gate_up / 2, width, needs_x=needs[DOWN])
            backward += after * 1.5 * width.gate_up * owners.trains_a(block, DOWN)
            backward += after * 2.5 * width.gate_up * (needs[GATE_UP] or owners.adapts(block, GATE_UP))
        backward += after * _norm(width) * owners.trains_a(block, GATE_UP)  # the norm again, for the gradient of A
        backward += after * _entry_back(own, block, GATE_UP, width.gate_up, width, needs_x=needs[GATE_UP])
        backward += after * _exit_back(own, block, OUTPUT, width.attended, width, needs_x=needs[OUTPUT])
        if needs[OUTPUT]:
            backward += tokens * 2 * width.qkv
        backward += tokens * _norm(width) * owners.trains_a(block, QKV)
        backward += tokens * _entry_back(own, block, QKV, width.qkv, width, needs_x=needs[QKV])
        if layout.recompute == "full" and (not ends_here or needs[OUTPUT]):
            again = attention if ends_here else forward - 3 * after * width.between
        elif layout.recompute == "selective" and not ends_here and owners.reads_mlp_input(block):
            again = after * (_norm(width) + 2 * own.adapts(block, GATE_UP) * width.gate_up)
    itemsize = layout.dtype.itemsize
    return MovedBytes(forward * itemsize, backward * itemsize, again * itemsize)


def head_bytes(owners: StageOwners, shape: MicroBatchShape) -> MovedBytes:
    """What final norm, head and loss move; their backward pass runs at once. The logits are written by a matmul."""
    stage, width = owners.stage, _widths(owners)
    vocabulary = stage.shape.vocab_size / stage.layout.tp_size
    norms = shape.num_after * (_norm(width) + 3 * width.between + 4 * width.whole)
    loss = shape.num_supervised * (3 * vocabulary + 6 * width.whole)
    return MovedBytes(forward=(norms + loss) * stage.layout.dtype.itemsize)


def embedding_bytes(owners: StageOwners, *, tokens: int) -> MovedBytes:
    """What the embedding moves: rows of its table."""
    return MovedBytes(forward=2.0 * tokens * owners.stage.shape.hidden_size * owners.stage.layout.dtype.itemsize)


def _norm(width: _Widths) -> float:
    return 2 * width.between


def _entry(owners: StageOwners, block: int, name: str, width: _Widths) -> float:
    """The update of a column-parallel linear: A x is read beside the norm's result, and F A x is added to z."""
    if not owners.adapts(block, name):
        return 0.0
    out = width.qkv if name == QKV else width.gate_up
    joined = 2 * width.between if owners.stage.layout.sequence_parallel else 0.0  # [x | A x] for the message
    return width.between + 2 * out + joined


def _entry_back(owners: StageOwners, block: int, name: str, out: float, width: _Widths, *, needs_x: bool) -> float:
    """The gradients of a column-parallel linear's input and factors, with its norm and the residual's sum."""
    parallel = owners.stage.layout.sequence_parallel
    moved = 6 * width.between if needs_x else 0.0  # the norm's gradient, and the sum with the residual's
    if not owners.adapts(block, name):
        return moved
    moved += out * owners.trains_f(block, name)
    trains_a = owners.trains_a(block, name)
    if needs_x or trains_a:
        moved += out
    if trains_a:
        moved += width.between  # the gradient of A
    if needs_x:
        share = width.between if parallel and trains_a else width.whole
        moved += 2 * share + (2 * width.whole if parallel and trains_a else 0.0)
    return moved


def _exit(owners: StageOwners, block: int, name: str, in_width: float, width: _Widths) -> float:
    """The update of a row-parallel linear: A x is read, and F A x is added to z."""
    return in_width + 2 * width.whole if owners.adapts(block, name) else 0.0


def _exit_back(
    owners: StageOwners, block: int, name: str, in_width: float, width: _Widths, *, needs_x: bool
) -> float:
    """The gradients of a row-parallel linear's factors, and their share in that of its input."""
    if not owners.adapts(block, name):
        return 0.0
    trains_a = owners.trains_a(block, name)
    moved = width.whole * owners.trains_f(block, name) + width.whole * (needs_x or trains_a)
    return moved + in_width * trains_a + 2 * in_width * needs_x
