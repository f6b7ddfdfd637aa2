"""The one description of a decoder-only model, as plain data without torch: its sizes, how each linear is sharded, and
the Hugging Face tensors that it is stored in.

Everything that depends on a model's shape is derived from it: weight names and slices, the check of a parallel
configuration, stage costs, FLOPs, memory and messages, merging and export. A family (`model/families/`) makes one from
a `config.json`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Cut = Literal["column", "row", "vocabulary"]


@dataclass(frozen=True)
class RopeShape:
    """Rotary position embedding: its base frequency and, for Llama 3, how low frequencies are stretched.

    Attributes:
        factor: None for no scaling; the fields after it are then not used.
    """

    theta: float = 10000.0
    factor: float | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


@dataclass(frozen=True)
class HeadShape:
    """The attention heads of a block.

    Attributes:
        num: query heads; each `num // num_kv` of them share a key and a value head.
        dim: numbers per head.
    """

    num: int
    num_kv: int
    dim: int
    rope: RopeShape

    @property
    def rows(self) -> tuple[int, int, int]:
        """Output sizes of the query, key and value projections."""
        return self.num * self.dim, self.num_kv * self.dim, self.num_kv * self.dim


@dataclass(frozen=True)
class NormShape:
    """An RMS norm over `size` numbers: y = w x / sqrt(mean(x^2) + eps).

    Attributes:
        name: of its weight, below its layer.
        source: the Hugging Face module that stores it, below its layer.
    """

    name: str
    size: int
    eps: float
    source: str


@dataclass(frozen=True)
class StoredRows:
    """Rows of a stored Hugging Face tensor.

    Attributes:
        module: the module that the tensor belongs to, below its layer ("self_attn.q_proj").
        start: the first of the rows.
        of: rows of the whole tensor; None: those that are meant are all.
    """

    module: str
    start: int = 0
    of: int | None = None


@dataclass(frozen=True)
class LinearShape:
    """y = W x + b with W of shape (out_size, in_size); an embedding is one that is read row by row.

    Attributes:
        name: of the layer here, below its entry of the flat list ("attention.qkv").
        blocks: output sizes of the parts that are fused, in order (query, key, value).
        cut: how W is sharded over tensor-parallel ranks: "column", each block's rows; "row", its columns;
            "vocabulary", rows, with zeros behind the last so that all ranks have as many.
        sources: where each block is stored.
        bias: whether b is there; it is sharded as the rows of W, and whole where those are.
    """

    name: str
    in_size: int
    blocks: tuple[int, ...]
    cut: Cut
    sources: tuple[StoredRows, ...]
    bias: bool = False

    @property
    def out_size(self) -> int:
        """Rows of W."""
        return sum(self.blocks)

    @property
    def num_weights(self) -> int:
        """Numbers in W."""
        return self.in_size * self.out_size


@dataclass(frozen=True)
class BlockShape:
    """x = x + output(attention(rotated qkv(norm x))), x = x + down(silu(gate) * up), gate and up = gate_up(norm x).

    Attributes:
        source: the Hugging Face module of a block, with {index} for its number from 0 on.
    """

    source: str
    heads: HeadShape
    attention_norm: NormShape
    qkv: LinearShape
    output: LinearShape
    mlp_norm: NormShape
    gate_up: LinearShape
    down: LinearShape

    def resized(self, heads: HeadShape, intermediate_size: int) -> BlockShape:
        """The same block with other heads and another width of its feed-forward part."""
        return replace(
            self,
            heads=heads,
            qkv=replace(self.qkv, blocks=heads.rows),
            output=replace(self.output, in_size=heads.rows[0]),
            gate_up=replace(self.gate_up, blocks=(intermediate_size, intermediate_size)),
            down=replace(self.down, in_size=intermediate_size),
        )

    @property
    def linears(self) -> tuple[LinearShape, ...]:
        """In the order in which they are computed."""
        return self.qkv, self.output, self.gate_up, self.down

    @property
    def adaptable(self) -> dict[str, LinearShape]:
        """The linears that an adapter can change, by the names that users and files have for them."""
        return {"qkv": self.qkv}

    @property
    def parts(self) -> tuple[NormShape | LinearShape, ...]:
        """Everything with weights, in the order in which it is computed."""
        return self.attention_norm, self.qkv, self.output, self.mlp_norm, self.gate_up, self.down

    @property
    def num_weights(self) -> int:
        """Numbers in the matrices of all linears: multiplications per token."""
        return sum(linear.num_weights for linear in self.linears)


@dataclass(frozen=True)
class ModelShape:
    """Embedding, `num_layers` equal blocks, final norm and head.

    Attributes:
        head: its own weight; with tied embeddings the embedding's, under the head's name.
    """

    num_layers: int
    max_positions: int
    embedding: LinearShape
    block: BlockShape
    final_norm: NormShape
    head: LinearShape
    tied_embeddings: bool

    @property
    def vocab_size(self) -> int:
        """Ids that the model knows."""
        return self.embedding.out_size

    @property
    def hidden_size(self) -> int:
        """Numbers per token between layers."""
        return self.embedding.in_size

    @property
    def heads(self) -> HeadShape:
        """The attention heads of a block."""
        return self.block.heads

    @property
    def intermediate_size(self) -> int:
        """Width of the feed-forward part."""
        return self.block.down.in_size

    def resized(self, *, vocab_size: int, intermediate_size: int, num_layers: int, heads: HeadShape) -> ModelShape:
        """The same kind of model in another size, with tied embeddings, for what needs a model and no weights."""
        return replace(
            self,
            num_layers=num_layers,
            embedding=replace(self.embedding, blocks=(vocab_size,)),
            block=self.block.resized(heads, intermediate_size),
            head=replace(self.head, blocks=(vocab_size,)),
            tied_embeddings=True,
        )
