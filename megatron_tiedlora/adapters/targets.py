"""The targets of an adapter, as data: which linears of a block it changes, and how their weights are sharded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_tiedlora.base.shapes import DOWN, GATE_UP, OUTPUT, QKV, Cut, ModelShape


@dataclass(frozen=True)
class Target:
    """A linear with weight W (out, in) in every adapted layer: z = W x + (alpha / r) diag(v) B diag(u) A x.

    Attributes:
        name: its key in `BlockShape.adaptable`.
        blocks: output sizes of the fused parts, in order.
        cut: how W is sharded over tensor-parallel ranks: "column" by the rows of each block, "row" by its columns.
    """

    name: str
    in_size: int
    blocks: tuple[int, ...]
    cut: Cut

    @property
    def out_size(self) -> int:
        """The number of rows of W."""
        return sum(self.blocks)

    def local_sizes(self, tp_size: int) -> tuple[int, int]:
        """(in, out) of one rank's shard of W."""
        if self.cut == "row":
            return self.in_size // tp_size, self.out_size
        return self.in_size, self.out_size // tp_size

    @property
    def prefix(self) -> str:
        """The prefix of its tensors' names."""
        return "" if self.name == QKV else f"{self.name}."


def targets_of(shape: ModelShape, names: Sequence[str] = (QKV,)) -> tuple[Target, ...]:
    """The model's linears of these names, in the order of their computation."""
    adaptable = shape.block.adaptable.items()
    return tuple(Target(name, linear.in_size, linear.blocks, linear.cut) for name, linear in adaptable if name in names)


def sized_targets(
    names: Sequence[str], *, hidden_size: int, qkv_rows: tuple[int, int, int], intermediate_size: int = 0
) -> tuple[Target, ...]:
    """The same from the sizes that an adapter's file has, for reading it without its base.

    Args:
        intermediate_size: only `gate_up` and `down_proj` need it.
    """
    known = (
        qkv_target(hidden_size, qkv_rows),
        Target(OUTPUT, qkv_rows[0], (hidden_size,), "row"),
        Target(GATE_UP, hidden_size, (intermediate_size, intermediate_size), "column"),
        Target(DOWN, intermediate_size, (hidden_size,), "row"),
    )
    return tuple(target for target in known if target.name in names)


def qkv_target(hidden_size: int, qkv_rows: tuple[int, int, int]) -> Target:
    """The fused query, key and value projection alone."""
    return Target(QKV, hidden_size, qkv_rows, "column")
