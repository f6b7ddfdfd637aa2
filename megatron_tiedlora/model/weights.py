"""The name table: every parameter of a base model, and the rows of Hugging Face tensors that it is made of.

It is derived from a `ModelShape`. Loading, merging, exporting and comparing all read it.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from megatron_tiedlora.base.shapes import LinearShape, ModelShape, NormShape
from megatron_tiedlora.parallel.shard_spec import ShardSpec, bias_spec, weight_spec


@dataclass(frozen=True)
class StoredPart:
    """Rows `start` to `start + size - 1` of the Hugging Face tensor `name`, whose shape is `shape`."""

    name: str
    shape: tuple[int, ...]
    start: int
    size: int


@dataclass(frozen=True)
class WeightRule:
    """One parameter of the base.

    Attributes:
        name: of the parameter, "layers.INDEX.REST".
        layer: its entry of the flat list: 0 the embedding, 1 to L the blocks, L + 1 the head.
        linear: the name of the linear whose matrix it is; None for a norm's weight or a bias.
        shape: of the full tensor.
        spec: how it is sharded over tensor-parallel ranks.
        parts: stacked along dimension 0, one for each of `spec.blocks` if these run along it.
        divides: whether the backward pass divides by it, so that it must have no zero.
    """

    name: str
    layer: int
    linear: str | None
    shape: tuple[int, ...]
    spec: ShardSpec
    parts: tuple[StoredPart, ...]
    divides: bool = False

    @property
    def hf_names(self) -> tuple[str, ...]:
        """The names of the Hugging Face tensors that store it, one for each part."""
        return tuple(part.name for part in self.parts)

    def is_quantised(self, shape: ModelShape) -> bool:
        """Whether it is quantised in a base of fewer bits: the matrix of a block's linear is."""
        return self.linear is not None and 1 <= self.layer <= shape.num_layers

    def by_stored_tensor(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """Split rows (out_size, ...), stacked as in this weight, by the stored tensor that they belong to.

        In a fused stored tensor they have its order; rows that belong to another weight are zeros.
        """
        found: dict[str, torch.Tensor] = {}
        for part, piece in zip(self.parts, rows.split([part.size for part in self.parts]), strict=True):
            if part.size == part.shape[0]:
                found[part.name] = piece
                continue
            whole = found.setdefault(part.name, rows.new_zeros(part.shape[0], *rows.shape[1:]))
            whole[part.start : part.start + part.size] = piece
        return found


def weight_rules(shape: ModelShape) -> tuple[WeightRule, ...]:
    """The name table, in the order of the flat list of layers. With tied embeddings the head has no entry."""
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
    """The shapes of the Hugging Face tensors that store some weights, by name."""
    return {part.name: part.shape for rule in rules for part in rule.parts}


def quantised_rules(shape: ModelShape) -> Iterator[WeightRule]:
    """The weights that are quantised in a base of fewer bits: the linears of all blocks."""
    return (rule for rule in weight_rules(shape) if rule.is_quantised(shape))


def stage_weight_rules(shape: ModelShape, *, has_embedding: bool) -> tuple[WeightRule, ...]:
    """The name table for a pipeline stage: with tied embeddings, a head without the embedding has its own copy."""
    found = weight_rules(shape)
    if shape.tied_embeddings and not has_embedding:
        last = shape.num_layers + 1
        found += (replace(found[0], name=f"layers.{last}.weight", layer=last),)
    return found


def num_base_parameters(shape: ModelShape) -> int:
    """The number of parameters of the base model; a tied embedding counts once."""
    return sum(math.prod(weight.shape) for weight in weight_rules(shape))


def _norm(norm: NormShape, *, layer: int, stored: str) -> Iterator[WeightRule]:
    for kind, name in (("weight", norm.name), ("bias", norm.bias_name)):
        if name is not None:
            part = StoredPart(f"{stored}{norm.source}.{kind}", (norm.size,), 0, norm.size)
            spec = ShardSpec(0 if norm.sharded else None, (norm.size,))
            yield WeightRule(f"layers.{layer}.{name}", layer, None, (norm.size,), spec, (part,))


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
