"""Describe a decoder-only model as plain data without torch: its sizes, the sharding of each linear, and the names of
its Hugging Face tensors.

All code that depends on a model's shape uses this description: weight names and slices, checks of a parallel
configuration, costs of stages, FLOPs, memory, communication, merging and export. `model/families` builds the
description from a `config.json`.
"""

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

ShardedDim = Literal["column", "row", "vocabulary"]
# The activation of a gate. "gelu" is the approximation by tanh, 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))).
Activation = Literal["silu", "gelu"]
# The names of a block's linears in adapters, in the order of computation. In files, the tensors of QKV have no prefix:
# A, B, u and v.
TARGET_NAMES = QKV, OUTPUT, GATE_UP, DOWN = "qkv", "o_proj", "gate_up", "down_proj"
_FIELDS = {QKV: "qkv", OUTPUT: "output", GATE_UP: "gate_up", DOWN: "down"}  # the fields of BlockShape
ATTENTION_TARGETS, MLP_TARGETS = (QKV,), (GATE_UP, DOWN)  # targets in attention and in the MLP


LinearSizes = tuple[int, tuple[int, ...], ShardedDim]  # in_size, blocks and sharded_dim of a linear


def linear_sizes(hidden_size: int, qkv_rows: tuple[int, int, int], intermediate_size: int) -> dict[str, LinearSizes]:
    """Return the sizes and the sharded dimension of each target, by name."""
    return {
        QKV: (hidden_size, qkv_rows, "column"),
        OUTPUT: (qkv_rows[0], (hidden_size,), "row"),
        GATE_UP: (hidden_size, (intermediate_size, intermediate_size), "column"),
        DOWN: (intermediate_size, (hidden_size,), "row"),
    }


@dataclass(frozen=True)
class LinearScaling:
    """RoPE scaling that divides all frequencies by `factor`."""

    factor: float


@dataclass(frozen=True)
class Llama3Scaling:
    """RoPE scaling that divides low frequencies by `factor` and keeps high frequencies (see `model.attention`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True)
class YarnScaling:
    """RoPE scaling like Llama 3's, but with a linear ramp over frequency indices (https://arxiv.org/abs/2309.00071).

    Attributes:
        beta_fast, beta_slow: numbers of rotations over the original positions at which the ramp begins and ends.
        truncate: whether the ends of the ramp are rounded to integer indices.
        amplitude: the factor by which cos and sin are multiplied.
    """

    factor: float
    original_max_positions: int
    beta_fast: float
    beta_slow: float
    truncate: bool
    amplitude: float


@dataclass(frozen=True)
class LongRopeScaling:
    """RoPE scaling that divides each frequency by its own factor (https://arxiv.org/abs/2402.13753).

    Attributes:
        factors: the model's factors for sequences that are not longer than the original positions.
        amplitude: the factor by which cos and sin are multiplied.
    """

    factors: tuple[float, ...]
    amplitude: float


RopeScaling = LinearScaling | Llama3Scaling | YarnScaling | LongRopeScaling


@dataclass(frozen=True)
class RopeShape:
    """The base `theta`, the rotated fraction `share` of a head, and the scaling of a rotary position embedding.

    Attributes:
        interleaved: whether neighbouring elements of a head are rotated together, and not the elements of its halves.
    """

    theta: float = 10000.0
    share: float = 1.0
    scaling: RopeScaling | None = None
    interleaved: bool = False


class AttentionKind(NamedTuple):
    """The properties of attention in which the blocks of a model can differ.

    Attributes:
        rope: the rotary embedding; None if queries and keys are not rotated.
        window: the number of tokens that a token attends to: itself and the tokens before it. None: all of them.
    """

    rope: RopeShape | None
    window: int | None = None


def squared_length(length: int, window: int | None = None) -> int:
    """Return twice the number of pairs of a token and a token that it attends to, in a sequence of `length` tokens.

    For s tokens the value is s^2, and with a window of w < s tokens s^2 - (s - w)^2. The pair of a token with itself
    counts as a half, as is usual for FLOPs of causal attention, so the exact number of pairs is min(s, w) / 2 larger.
    """
    return length**2 - max(0, length - (window or length)) ** 2


@dataclass(frozen=True)
class NormShape:
    """A norm over `size` elements. RMS norm computes y = (offset + w) x / sqrt(mean(x^2) + eps).

    Attributes:
        name: name of the norm's weight within the layer.
        size: number of elements that are normalised together, which is also the size of the weight.
        source: name of the Hugging Face module of the norm, within the layer.
        bias_name: name of the bias of a LayerNorm, which subtracts the mean of x first and adds the bias last; None for
            RMS norm.
        sharded: whether the norm applies to the sharded output of a column-parallel linear. Its weight is then sharded
            in the same way.
        offset: a number that is added to the weight w. The sum is computed and used in at least fp32.
    """

    name: str
    size: int
    eps: float
    source: str
    bias_name: str | None = None
    sharded: bool = False
    offset: float = 0.0


@dataclass(frozen=True)
class HeadShape:
    """The attention heads of a block.

    Attributes:
        num: number of query heads. `num // num_kv` query heads share one key head and one value head.
        dim: number of elements per head.
        query_norm, key_norm: norms of queries and keys before the rotation. A norm is computed over each head, or over
            all heads together if it is sharded.
        multiplier: the factor of the scores; None for 1 / sqrt(dim).
        cap: scores s are replaced by cap tanh(s / cap) before the softmax; None if they are not.
    """

    num: int
    num_kv: int
    dim: int
    rope: RopeShape
    query_norm: NormShape | None = None
    key_norm: NormShape | None = None
    multiplier: float | None = None
    cap: float | None = None

    @property
    def scale(self) -> float:
        """Return the factor of the scores."""
        return self.dim**-0.5 if self.multiplier is None else self.multiplier

    @property
    def rows(self) -> tuple[int, int, int]:
        """Return the output sizes of the query, key and value projections."""
        return self.num * self.dim, self.num_kv * self.dim, self.num_kv * self.dim

    @property
    def rotary_dim(self) -> int:
        """Return the number of elements of a head that are rotated. They are the first elements."""
        return int(self.dim * self.rope.share)

    def local(self, tp_size: int) -> "HeadShape":
        """Return the heads on one rank if there are `tp_size` tensor-parallel ranks."""
        return self._of_sizes(self.num // tp_size, self.num_kv // tp_size, self.dim, self.rope)

    def resized(self, *, num: int, num_kv: int, dim: int) -> "HeadShape":
        """Return the same kind of heads with a different number and size, for code that does not use real weights.

        If only some elements of a head are rotated, half of the new head is rotated.
        """
        rope = replace(self.rope, share=1.0 if self.rope.share == 1 else 0.5)
        size = int(dim * rope.share) // 2
        if isinstance(rope.scaling, LongRopeScaling):
            rope = replace(rope, scaling=replace(rope.scaling, factors=(1.0,) * size))
        return self._of_sizes(num, num_kv, dim, rope)

    def _of_sizes(self, num: int, num_kv: int, dim: int, rope: RopeShape) -> "HeadShape":
        counts = ((self.query_norm, num), (self.key_norm, num_kv))
        query, key = (norm and replace(norm, size=dim * (count if norm.sharded else 1)) for norm, count in counts)
        return replace(self, num=num, num_kv=num_kv, dim=dim, rope=rope, query_norm=query, key_norm=key)

    @property
    def norms(self) -> tuple[NormShape, ...]:
        """Return the norms of queries and keys that exist."""
        return tuple(norm for norm in (self.query_norm, self.key_norm) if norm is not None)


@dataclass(frozen=True)
class StoredRows:
    """A range of rows of a stored Hugging Face tensor.

    Attributes:
        module: the module that the tensor belongs to, within the layer ("self_attn.q_proj").
        start: index of the first row.
        of: number of rows of the stored tensor; None if the range has all rows.
    """

    module: str
    start: int = 0
    of: int | None = None


@dataclass(frozen=True)
class NamedLinear:
    """The name, the sizes and the sharded dimension of a linear with weight W (out_size, in_size).

    Attributes:
        blocks: output sizes of the fused matrices, in order (query, key, value).
        sharded_dim: how W is sharded over tensor-parallel ranks. "column": the rows of each block; "row": its columns;
            "vocabulary": the rows, padded with zeros so that all ranks have equally many.
    """

    name: str
    in_size: int
    blocks: tuple[int, ...]
    sharded_dim: ShardedDim

    @property
    def out_size(self) -> int:
        """Return the number of rows of W."""
        return sum(self.blocks)


@dataclass(frozen=True)
class LinearShape(NamedLinear):
    """A linear y = W x + b with W of shape (out_size, in_size), or an embedding that looks up the rows of W.

    Attributes:
        name: name of the module within its layer ("attention.qkv"). The embedding and the head also are layers.
        sources: the stored rows of each block.
        bias: whether b exists; b is sharded like the rows of W.
    """

    sources: tuple[StoredRows, ...]
    bias: bool = False

    @property
    def num_weights(self) -> int:
        """Return the number of elements of W."""
        return self.in_size * self.out_size


@dataclass(frozen=True)
class BlockShape:
    """A block: x = x + m norm output(attention(rotated qkv(norm x))), then x = x + m norm down(act(gate) * up), with
    gate and up = gate_up(norm x). Each of the four norms may be None.

    Attributes:
        source: name of the Hugging Face module of a block, with {index} for the block's 0-based index.
        attention_norm, mlp_norm: norms of the inputs of attention and MLP.
        output_norm, down_norm: norms of the outputs of attention and MLP, before the residual addition.
        activation: the function `act` of the gate.
        multiplier: the factor `m` of the outputs of attention and MLP.
        module: name of the block's module in transformers' model, if it differs from `source` (see `module_name`).
    """

    source: str
    heads: HeadShape
    attention_norm: NormShape | None
    qkv: LinearShape
    output: LinearShape
    output_norm: NormShape | None
    mlp_norm: NormShape | None
    gate_up: LinearShape
    down: LinearShape
    down_norm: NormShape | None
    activation: Activation = "silu"
    multiplier: float = 1.0
    module: str = ""

    def module_name(self, layer: int) -> str:
        """Return the name that a block (1-based) has in transformers' model, where PEFT finds its linears.

        Tensors of text models inside multimodal models can have a different prefix in files than in the model.
        """
        return (self.module or self.source).format(index=layer - 1)

    @property
    def is_tower(self) -> bool:
        """Return whether the model is the text tower of a multimodal model."""
        return not self.module_name(1).startswith("model.layers.")

    def resized(self, heads: HeadShape, intermediate_size: int) -> "BlockShape":
        """Return a copy of this block with different heads and a different MLP width."""
        sizes = linear_sizes(self.qkv.in_size, heads.rows, intermediate_size)
        linears: dict[str, Any] = {
            _FIELDS[name]: LinearShape(linear.name, *sizes[name], linear.sources, linear.bias)
            for name, linear in self.adaptable.items()
        }
        return replace(self, heads=heads, **linears)

    @property
    def linears(self) -> tuple[LinearShape, ...]:
        """Return the linears in the order of computation."""
        return tuple(self.adaptable.values())

    @property
    def adaptable(self) -> dict[str, LinearShape]:
        """Return the linears by target name, such as `qkv`."""
        return {name: getattr(self, field) for name, field in _FIELDS.items()}

    @property
    def parts(self) -> tuple[NormShape | LinearShape, ...]:
        """Return the norms and linears in the order of computation."""
        attention = self.attention_norm, self.qkv, *self.heads.norms, self.output, self.output_norm
        mlp = self.mlp_norm, self.gate_up, self.down, self.down_norm
        return tuple(part for part in (*attention, *mlp) if part is not None)

    @property
    def num_weights(self) -> int:
        """Return the number of elements of all weight matrices, which is the number of multiplications per token."""
        return sum(linear.num_weights for linear in self.linears)


@dataclass(frozen=True)
class LengthLimit:
    """The maximum sequence length. For longer sequences the model uses a computation that is not implemented here.

    Attributes:
        tokens: the maximum number of tokens.
        reason: the reason for the limit, as the end of a sentence that begins with the model's name.
    """

    tokens: int
    reason: str


@dataclass(frozen=True)
class ModelShape:
    """A model with an embedding, `num_layers` equal blocks, a final norm and a head.

    Attributes:
        limit: the maximum sequence length, at most `max_positions`.
        head: the head's linear. With tied embeddings, it is the embedding's weight under the head's name.
        kinds: the kind of attention of each block. It is empty if all blocks use `heads.rope` and no window.
        embedding_multiplier: the factor of the embeddings. `rounds_embedding`: whether the factor is rounded to the
            dtype of the weights first.
        logit_divisor: the number by which logits are divided.
        logit_cap: logits z are replaced by cap tanh(z / cap); None if they are not.
    """

    num_layers: int
    max_positions: int
    limit: LengthLimit
    embedding: LinearShape
    block: BlockShape
    final_norm: NormShape
    head: LinearShape
    tied_embeddings: bool
    kinds: tuple[AttentionKind, ...] = ()
    embedding_multiplier: float = 1.0
    rounds_embedding: bool = False
    logit_divisor: float = 1.0
    logit_cap: float | None = None

    def kind_of(self, block: int) -> AttentionKind:
        """Return the kind of attention of a block (1-based)."""
        return self.kinds[block - 1] if self.kinds else AttentionKind(self.heads.rope)

    @property
    def window(self) -> int | None:
        """Return the smallest window of attention, or None if no block has one."""
        return min((kind.window for kind in self.kinds if kind.window is not None), default=None)

    @property
    def vocab_size(self) -> int:
        """Return the number of token ids in the vocabulary."""
        return self.embedding.out_size

    @property
    def hidden_size(self) -> int:
        """Return the number of elements per token between layers."""
        return self.embedding.in_size

    @property
    def heads(self) -> HeadShape:
        """Return the attention heads of a block."""
        return self.block.heads

    @property
    def intermediate_size(self) -> int:
        """Return the width of the MLP."""
        return self.block.down.in_size

    def resized(self, *, vocab_size: int, intermediate_size: int, num_layers: int, heads: HeadShape) -> "ModelShape":
        """Return the same kind of model with different sizes, for code that does not use real weights.

        The result has tied embeddings, and each block uses the rotary embedding of `heads` without a window.
        """
        return replace(
            self,
            num_layers=num_layers,
            embedding=replace(self.embedding, blocks=(vocab_size,)),
            block=self.block.resized(heads, intermediate_size),
            head=replace(self.head, blocks=(vocab_size,)),
            tied_embeddings=True,
            kinds=(),
        )


# Storage formats of a quantised base ----------------------------------------------------------------------------------
#
# The table lists the bits per weight and the weights per scale. Only the weights of the blocks' linears are quantised.
# The embedding, the head, norms, biases and the adapter are not quantised.


FP8_CAPABILITY = (8, 9)  # the lowest compute capability of a GPU with fp8 matmuls


@dataclass(frozen=True)
class BaseFormat:
    """A storage format of quantised weights.

    Attributes:
        bits: number of bits per quantised weight.
        block: number of consecutive weights of a row that share a scale; None if all weights of a row share one. The
            last block of a row may be shorter. Blocks are counted in the full tensor, even if it is sharded.
    """

    name: str
    bits: int
    block: int | None

    def row_bytes(self, width: int) -> int:
        """Return the number of bytes of a quantised row of `width` weights. Each row begins at a new byte."""
        return -(-width * self.bits // 8)

    def row_scales(self, width: int, *, shards_rows: bool = False) -> int:
        """Return the number of scales that are stored for a row of `width` weights, or for a rank's shard of a row."""
        return 1 if self.block is None else -(-width // self.stored_block(width, shards_rows=shards_rows))

    def stored_block(self, width: int, *, shards_rows: bool = False) -> int:
        """Return the number of weights that share a stored scale, in a row of `width` weights or a shard of a row.

        A rank's shard of a row may begin inside a block. So a shard stores scales for smaller blocks, whose size
        divides both the block and the shard. All shards then have the same format.
        """
        if self.block is None:
            return width
        return math.gcd(self.block, width) if shards_rows else self.block


BASE_FORMATS: dict[str, BaseFormat] = {
    row.name: row
    for row in (
        BaseFormat("int8", bits=8, block=None),
        BaseFormat("fp8", bits=8, block=None),  # e4m3: 4 bits of exponent, 3 of mantissa
        BaseFormat("nf4", bits=4, block=64),  # QLoRA's 16 levels
    )
}
BASE_NAMES = tuple(BASE_FORMATS)
UNQUANTISED = "none"  # the value of a flag that turns quantisation off; the default is the format of training


def precision_in_words(dtype: str, base_format: str | None, products: str | None = None) -> str:
    """Return text with a model's dtype and, if its linears are quantised, their storage format and --products."""
    if base_format is None:
        return dtype
    return f"{dtype} with the linears in {base_format}" + ("" if products is None else f", multiplied in {products}")
