"""Partition a model over ranks, and map each parameter to rows of Hugging Face tensors in a name table.

The partition defines the layers of each pipeline stage, and the sizes that tensor parallelism must divide. The name
table follows from a `ModelShape`. Loading, merging, exporting and comparing all use it.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from torch import Tensor

from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.base.shapes import LinearShape, ModelShape, NormShape, squared_length
from megatron_tiedlora.parallel.groups import Grid
from megatron_tiedlora.parallel.shard_spec import ShardSpec, bias_spec, weight_spec

Stages = tuple[range, ...]


def layer_costs(shape: ModelShape, *, length: int, first_adapted: int | None) -> tuple[float, ...]:
    """Return the multiplications per token of each layer of the flat list, for the forward and backward pass together.

    The forward pass of a block costs P + A. P is the number of elements in its matrices, and A = s h is the cost of
    causal attention over s tokens (h is the width of the queries), or less with a window; see `squared_length`. From
    the first adapted layer on, the backward pass of a block costs P + 2A. The head costs V d in each pass, as if every
    position were supervised. The embedding costs nothing.

    Args:
        first_adapted: the first adapted layer, 1-based; None if nothing is trained and no layer has a backward pass.
    """
    matmuls = shape.block.num_weights
    costs = [0.0]
    for index in range(1, shape.num_layers + 1):
        attention = squared_length(length, shape.kind_of(index).window) / length * shape.heads.rows[0]
        backward = matmuls + 2 * attention if first_adapted is not None and index >= first_adapted else 0.0
        costs.append(float(matmuls + attention + backward))
    return *costs, float((1 if first_adapted is None else 2) * shape.head.num_weights)


@cache
def partition(costs: tuple[float, ...], num_stages: int) -> Stages:
    """Partition layers 0 to len(costs) - 1 into `num_stages` ranges, each with at least one block.

    The partition minimises the largest cost of a stage. Among such partitions, it minimises the sum of squared costs.

    Raises:
        ValueError: there are fewer blocks than stages.
    """
    num_blocks = len(costs) - 2
    if num_stages > num_blocks:
        raise ValueError(f"{num_blocks} layers cannot be partitioned into {num_stages} stages")
    total = [0.0]
    for cost in costs:
        total.append(total[-1] + cost)
    # The first pass finds the least possible largest cost, the second the least sum of squares with this largest cost.
    least, _ = _best_cuts(total, num_stages, lambda before, cost: max(before, cost))
    _, cuts = _best_cuts(total, num_stages, lambda before, cost: before + cost * cost, largest=least)
    return tuple(range(start, stop) for start, stop in zip((0, *cuts), cuts, strict=False))


def _best_cuts(
    total: Sequence[float], num_stages: int, add: Callable[[float, float], float], *, largest: float = math.inf
) -> tuple[float, tuple[int, ...]]:
    """Return the lowest value of a partition, and the end of each stage. `add` adds a stage's cost to a value.

    Args:
        total: the total cost of the layers before each layer.
        largest: the largest cost that a stage may have.
    """
    num_layers = len(total) - 1
    # best[stop] is (value, cuts) of layers 0 to stop - 1 in the stages so far; a cut is after a block.
    best: dict[int, tuple[float, tuple[int, ...]]] = {0: (0.0, ())}
    for stage in range(num_stages):
        left = num_stages - stage - 1
        stops = [num_layers] if left == 0 else range(stage + 2, num_layers - left)
        following = {}
        for stop in stops:
            choices = []
            for start, (value, cuts) in best.items():
                cost = total[stop] - total[start]
                if stop - start >= (2 if start == 0 or stop == num_layers else 1) and cost <= largest:
                    choices.append((add(value, cost), (*cuts, stop)))
            if choices:
                following[stop] = min(choices)
        best = following
    return best[num_layers]


def check_layout(shape: ModelShape, grid: Grid, *, zero_stage: int = 0, ds_config: str = "") -> None:
    """Check that the grid can partition the model, and that the ZeRO stage of `ds_config` can be used with it.

    Raises:
        UserError: a value does not fit. The message has this value and the values that fit.
    """
    tp, pp = grid.tp_size, grid.pp_size
    # Tensor parallelism must divide the numbers of heads, and the sizes along which linears are sharded. A linear that
    # can be adapted also has its A, which is sharded along the linear's input.
    names = {shape.hidden_size: "hidden size", shape.intermediate_size: "feed-forward width"}
    sizes = [("attention heads", shape.heads.num), ("key-value heads", shape.heads.num_kv)]
    for linear in shape.block.linears:
        inputs = (linear.in_size,) if linear in shape.block.adaptable.values() else ()
        sizes += [(names.get(size, linear.name), size) for size in (*inputs, *weight_spec(linear).blocks)]
    for name, size in sizes:
        if size % tp:
            possible = [n for n in range(1, shape.heads.num_kv + 1) if all(s % n == 0 for _, s in sizes)]
            raise UserError(
                f"--tensor_parallel {tp} does not divide the model's size {size} ({name}). Possible values:"
                f" {', '.join(map(str, possible))}"
            )
    if (tp - 1) * -(-shape.vocab_size // tp) >= shape.vocab_size:
        raise UserError(
            f"--tensor_parallel {tp}: a rank would have no row of the vocabulary ({shape.vocab_size}). Use fewer ranks"
        )
    if pp > shape.num_layers:
        raise UserError(
            f"--pipeline_parallel {pp}: the model has {shape.num_layers} layers, and every stage needs one. Use at"
            f" most {shape.num_layers}"
        )
    if pp > 1 and zero_stage > 1:
        raise UserError(
            f"--ds_config {ds_config}: ZeRO-{zero_stage} cannot be used with --pipeline_parallel {pp}, because stages"
            " sum their gradients once per step, not per micro-batch. Use zero1.json"
        )


@dataclass(frozen=True)
class StoredPart:
    """Rows `start` to `start + size - 1` of the Hugging Face tensor `name`, which has the shape `shape`."""

    name: str
    shape: tuple[int, ...]
    start: int
    size: int


@dataclass(frozen=True)
class WeightRule:
    """The entry of the name table for one parameter of the base.

    Attributes:
        name: the name of the parameter, "layers.INDEX.REST".
        layer: the index of its layer in the flat list: 0 is the embedding, 1 to L are the blocks, L + 1 is the head.
        linear: the name of the linear whose matrix it is; None for a norm's weight or a bias.
        shape: the shape of the full tensor.
        spec: the sharding over tensor-parallel ranks.
        parts: the stored rows that form it, stacked along dimension 0. If `spec.blocks` are along this dimension, there
            is one entry per block.
        divides: whether the backward pass divides by it and `offset`, so that their sum must not contain zeros.
        offset: the number that is added to the weight of a norm, see `NormShape`.
    """

    name: str
    layer: int
    linear: str | None
    shape: tuple[int, ...]
    spec: ShardSpec
    parts: tuple[StoredPart, ...]
    divides: bool = False
    offset: float = 0.0

    @property
    def hf_names(self) -> tuple[str, ...]:
        """Return the names of the Hugging Face tensors that store the weight, one for each entry of `parts`."""
        return tuple(part.name for part in self.parts)

    def by_stored_tensor(self, rows: Tensor) -> dict[str, Tensor]:
        """Split rows (out_size, ...), stacked as in this weight, by the stored tensor to which they belong.

        Each result has the row order of its stored tensor, with zeros in the rows of other weights.
        """
        found: dict[str, Tensor] = {}
        for part, values in zip(self.parts, rows.split([part.size for part in self.parts]), strict=True):
            if part.size == part.shape[0]:
                found[part.name] = values
                continue
            whole = found.setdefault(part.name, rows.new_zeros(part.shape[0], *rows.shape[1:]))
            whole[part.start : part.start + part.size] = values
        return found


def weight_rules(shape: ModelShape) -> tuple[WeightRule, ...]:
    """Return the name table, in the order of the flat list of layers. Tied embeddings have one entry."""
    found = list(_linear(shape.embedding, layer=0, stored=""))
    for index in range(shape.num_layers):
        stored = shape.block.source.format(index=index) + "."
        for part in shape.block.parts:
            where: dict[str, Any] = {"layer": index + 1, "stored": stored}
            rules = _linear(part, **where) if isinstance(part, LinearShape) else _norm(part, **where)
            found += (replace(rule, divides=part in shape.heads.norms) for rule in rules)
    last = shape.num_layers + 1
    found += _norm(shape.final_norm, layer=last, stored="")
    if not shape.tied_embeddings:
        found += _linear(shape.head, layer=last, stored="")
    return tuple(found)


def stored_shapes(rules: Iterable[WeightRule]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the Hugging Face tensors that store the weights of `rules`, by name."""
    return {part.name: part.shape for rule in rules for part in rule.parts}


def coded_shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Return `stored_shapes` of the weights that quantised formats store as codes, the matrices of all blocks."""
    blocks = range(1, shape.num_layers + 1)
    return stored_shapes(rule for rule in weight_rules(shape) if rule.linear is not None and rule.layer in blocks)


def stage_weight_rules(shape: ModelShape, *, has_embedding: bool) -> tuple[WeightRule, ...]:
    """Return a stage's name table. A tied head on a stage without the embedding has its own copy of the embedding."""
    found = weight_rules(shape)
    if shape.tied_embeddings and not has_embedding:
        last = shape.num_layers + 1
        found += (replace(found[0], name=f"layers.{last}.weight", layer=last),)
    return found


def num_base_parameters(shape: ModelShape) -> int:
    """Return the number of parameters of the base model. A tied embedding counts once."""
    return sum(math.prod(weight.shape) for weight in weight_rules(shape))


def _norm(norm: NormShape, *, layer: int, stored: str) -> Iterator[WeightRule]:
    for kind, name in (("weight", norm.name), ("bias", norm.bias_name)):
        if name is not None:
            part = StoredPart(f"{stored}{norm.source}.{kind}", (norm.size,), 0, norm.size)
            spec = ShardSpec(0 if norm.sharded else None, (norm.size,))
            offset = norm.offset if kind == "weight" else 0.0
            yield WeightRule(f"layers.{layer}.{name}", layer, None, (norm.size,), spec, (part,), offset=offset)


def _linear(linear: LinearShape, *, layer: int, stored: str) -> Iterator[WeightRule]:
    prefix = ".".join(filter(None, (f"layers.{layer}", linear.name)))

    def parts(kind: str, *width: int) -> tuple[StoredPart, ...]:
        return tuple(
            StoredPart(f"{stored}{source.module}.{kind}", (source.of or size, *width), source.start, size)
            for source, size in zip(linear.sources, linear.blocks, strict=True)
        )

    shape = (linear.out_size, linear.in_size)
    stored_matrix = parts("weight", linear.in_size)
    yield WeightRule(f"{prefix}.weight", layer, linear.name, shape, weight_spec(linear), stored_matrix)
    if linear.bias:
        yield WeightRule(f"{prefix}.bias", layer, None, (linear.out_size,), bias_spec(linear), parts("bias"))
