"""Define the model as one flat list of layers: embedding, L blocks, head. All code that builds a model uses this list.

This module also defines the MLP of a block, y = norm(W_down (act(W_gate x) * (W_up x))) with x = norm(hidden). Each of
the norms may not exist. Gate and up are one matmul. Saved are the norm's input, gate and up, and A x of each adapted
linear, r elements per token. The backward pass recomputes act(gate) * up.

The layers of a block are a chain of steps, each of which ends with a message to the other ranks or needs no message
before the next (`Block.steps`).
"""

from collections import Counter
from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from megatron_tiedlora.adapters.tied_adapter import LayerUpdate, LinearUpdate
from megatron_tiedlora.base.shapes import DOWN, GATE_UP, OUTPUT, Activation, LinearShape, ModelShape, NormShape
from megatron_tiedlora.model import linears
from megatron_tiedlora.model.attention import AnyCache, Attention, AttentionContext
from megatron_tiedlora.model.batch import Supervised
from megatron_tiedlora.model.regions import Needs, Recompute, RegionEntry, RegionExit, Steps, run_steps, steps_of
from megatron_tiedlora.parallel import frozen_weight, groups
from megatron_tiedlora.parallel.frozen_weight import RoundedRows
from megatron_tiedlora.parallel.kernels import EAGER, Kernels, soft_capped
from megatron_tiedlora.parallel.loss import VocabularyShard, first_derivative_only, label_logprobs, token_losses
from megatron_tiedlora.parallel.quantised_weight import QuantisedWeight, weight_maker
from megatron_tiedlora.parallel.rows import as_rows
from megatron_tiedlora.parallel.shard_spec import bias_spec, weight_spec


class GatedMlp(nn.Module):
    """The feed-forward network of a block. `activation` is the function of its gate."""

    def __init__(
        self, gate_up: linears.NormedLinear, down: linears.RowParallelLinear, *, activation: Activation
    ) -> None:
        super().__init__()
        self.activation = activation
        self.gate_up = gate_up
        self.down = down

    def forward(self, *arguments: Any, **keywords: Any) -> tuple[Tensor, Tensor]:
        """Return the result of `steps`."""
        return run_steps(self.steps(*arguments, **keywords))

    def steps(
        self,
        hidden: Tensor,
        addend: Tensor | None,
        tensor_parallel: groups.TensorParallel,
        update: LayerUpdate,
        *,
        recomputes: bool,
    ) -> Steps[tuple[Tensor, Tensor]]:
        """Yield after each step of the MLP, and return its input, hidden + addend, and its output.

        Args:
            hidden, addend: activations between layers, (b, s, d) or (1, b s / p, d).
            update: the updates of the layer; only gate_up and down_proj are used.
            recomputes: whether gate and up are recomputed in the backward pass instead of being saved.
        """
        linear, leaving = self.gate_up, RegionExit(tensor_parallel)
        gate_up, down = (update.get(name, LinearUpdate()) for name in (GATE_UP, DOWN))
        entered = linear.enter(hidden, addend, tensor_parallel, gate_up, num_rows=len(hidden), recomputes=recomputes)
        hidden, again, inputs = entered.hidden, None, tuple[Tensor | None, ...]()
        if recomputes:
            again = _GateUp(Recompute(entered.entry, linear.eps), linears.Projection(linear.frozen, gate_up.rows))
            inputs = hidden.detach(), gate_up.a, linear.norm_weight, linear.norm_bias
        yield
        (gates,) = linear.project(entered, gate_up)
        entry = entered.entry
        if again is not None and tensor_parallel.overlap and (gates.requires_grad or down.grad_a is not None):
            leaving.recompute = again.recompute
        del entered
        yield
        operands, projection = linears.Operands(down.a, down.f), linears.Projection(self.down.frozen, down.rows)
        saved = (*inputs, gate_up.f, linear.bias) if recomputes else ()
        partial: Tensor = _GatedDown.apply(
            *(gates, down.grad_a, down.grad_f, operands, projection, self.activation, entry, leaving, again), *saved
        )
        del gates
        leaving.send(partial)
        early = () if leaving.recompute is None else inputs
        yield
        return hidden, self.down.finish(leaving.receive(partial, *early))


@dataclass(frozen=True)
class _GateUp:
    """Recomputes gate and up in the backward pass."""

    recompute: Recompute
    projection: linears.Projection

    def again(self, *saved: Any) -> Tensor:
        *inputs, f, bias = saved
        x, ax = self.recompute.finish(*inputs)
        return self.projection.forward(x, linears.Operands(None, f, bias), ax, self.recompute.entry.take())[0]


def _gates_gradient(grad_gated: Tensor, gate_up: Tensor, activation: Activation, entry: RegionEntry) -> Tensor | None:
    """Return the gradient of gate and up, (b, s, 2 f). If the linear before reads rounded rows, `entry` gets them, and
    the gradient is returned only for an update."""
    rows, factors = (as_rows(grad_gated), as_rows(gate_up)), entry.weight.gradient_factors
    if factors is None:
        return entry.kernels.gate_gradient(*rows, activation).view(gate_up.shape)
    rounded = entry.kernels.gate_gradient_rounded(*rows, factors, entry.adapted, activation)
    entry.operand = found = RoundedRows(*rounded)
    return None if found.values is None else found.values.view(gate_up.shape)


class _GatedDown(torch.autograd.Function):
    """Computes this rank's partial sum of y, (b, s, d), from gate and up, (b, s, 2 f)."""

    @staticmethod
    def forward(
        ctx: Any,
        gate_up: Tensor,
        grad_a: Tensor | None,
        grad_f: Tensor | None,
        operands: linears.Operands,
        projection: linears.Projection,
        activation: Activation,
        entry: RegionEntry,
        leaving: RegionExit,
        again: _GateUp | None,
        *inputs: Tensor | None,
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        needs = Needs(*ctx.needs_input_grad[:3])
        reads = needs.x or needs.a
        rows, rounded = as_rows(gate_up), None
        if projection.weight.gradient_factors is None:
            gated = entry.kernels.gate(rows, activation)
        else:
            rounded = RoundedRows(*entry.kernels.gate_rounded(rows, operands.a is not None, activation))
            gated = rounded.rows
        z, ax = projection.forward(gated, operands, None, rounded)
        ctx.needs, ctx.projection, ctx.entry, ctx.leaving = needs, projection, entry, leaving
        ctx.activation = activation
        ctx.again = again if reads else None
        ctx.wide = linears.gradient_dtype(grad_a, grad_f)
        saved = (gate_up,) if again is None else inputs
        ctx.save_for_backward(ax if needs.f else None, *operands[:2], *(saved if reads else (None,)))
        return z.view(*gate_up.shape[:-1], -1)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, ...]:
        ax, a, f, *saved = ctx.saved_tensors
        ctx.maybe_clear_saved_tensors()  # so that gate and up can be freed below; else autograd holds them to the end
        needs, num_inputs = ctx.needs, len(ctx.needs_input_grad)
        grad_z = ctx.leaving.receive_gradient(gradient).flatten(0, -2)
        gate_up = saved[0] if ctx.again is None else ctx.again.again(*saved)
        del saved
        gated = ctx.entry.kernels.gate(as_rows(gate_up), ctx.activation) if needs.a else None
        operands = linears.Operands(a, f)
        grad_gated, *of_factors = ctx.projection.backward(grad_z, gated, ax, operands, needs, ctx.wide)
        del gated, grad_z
        if grad_gated is not None:
            grad_gated = _gates_gradient(grad_gated, gate_up, ctx.activation, ctx.entry)
        return grad_gated, *of_factors, *(None,) * (num_inputs - 3)


# The number of supervised rows whose logits are in memory at once (1,024 rows of 49,152 logits are 0.2 GB in fp32).
HEAD_ROWS = 1024


class Block(nn.Module):
    """A transformer block: x = x + attention(x); x = x + mlp(x). Each norm is part of the linear before or after it.

    Run it by `steps`.

    Attributes:
        recomputes_gate: whether gate and up, and the norm before them, are recomputed in the backward pass instead of
            being saved (`Stage.set_recompute`).
    """

    recomputes_gate = False

    def __init__(self, attention: Attention, mlp: GatedMlp) -> None:
        super().__init__()
        self.attention = attention
        self.mlp = mlp

    def steps(
        self,
        hidden: Tensor,
        addend: Tensor | None,
        context: AttentionContext,
        tensor_parallel: groups.TensorParallel,
        *,
        update: LayerUpdate | None = None,
        cache: AnyCache | None = None,
    ) -> Steps[tuple[Tensor, Tensor]]:
        """Yield after each step of the block, and return two tensors. Their sum is the block's output.

        Args:
            hidden, addend: two tensors whose sum is the block's input, (b, s, d) or (1, b s / p, d). The sum is
                computed together with the norm.
            context, cache: see `Attention.steps`.
        """
        hidden, output = yield from self.attention.steps(
            hidden, addend, context, tensor_parallel, update=update, cache=cache
        )
        yield
        own, overlap = (update or {}).get(OUTPUT), tensor_parallel.overlap
        addend = yield from steps_of(self.attention.output, output, tensor_parallel, own, overlap=overlap)
        del output
        given = hidden, addend, tensor_parallel, update or {}
        return (yield from steps_of(self.mlp, *given, recomputes=self.recomputes_gate, overlap=overlap))


class Head(nn.Module):
    """The final norm, the vocabulary projection and the losses.

    With tied embeddings the stage passes the embedding's weight to `take_weight`, or a copy of it if the embedding is
    on another stage.
    """

    frozen: frozen_weight.FrozenWeight

    def __init__(
        self, norm: linears.Norm, weight: frozen_weight.FrozenWeight | None, *, shape: ModelShape, kernels: Kernels
    ) -> None:
        super().__init__()
        self.norm = norm
        self.vocab_size = shape.vocab_size
        self.divisor, self.cap = shape.logit_divisor, shape.logit_cap
        self.kernels = kernels
        self.rows_at_once = HEAD_ROWS
        if weight is not None:  # here, because ZeRO-3 partitions a module's weights when its __init__ ends
            self.take_weight(weight)

    def take_weight(self, weight: frozen_weight.FrozenWeight) -> None:
        """Use `weight`, (local vocabulary, d), as the vocabulary projection."""
        self.frozen = frozen_weight.register(self, weight)

    def forward(
        self,
        hidden: Tensor,
        tensor_parallel: groups.TensorParallel,
        supervised: Supervised | None = None,
        *,
        num_top: int | None = None,
    ) -> Tensor:
        """Return logits, (b, s, V) or (1, b s, V), or the cross entropy of each supervised position, (n,).

        They are equal on every rank.

        Args:
            hidden: activations between layers, (b, s, d) or (1, b s / p, d); with `supervised` only its `rows`, (1, m,
                d) or (1, m / p, d).
            num_top: if it is given, the result is the `label_logprobs` of each position, (n, 1 + 2 num_top).
        """
        group = tensor_parallel.group
        normed = self.norm(hidden)
        normed = normed if self.divisor == 1 else normed / self.divisor  # the projection is linear
        hidden = groups.enter_tensor_parallel_region(normed, tensor_parallel)
        del normed
        if supervised is None:
            return self._logits(hidden, group)
        first_id = group.rank * self.frozen.local_shape[0]
        weight = copy(self.frozen)
        weight.tensor = weight.tensor.detach()[: max(self.vocab_size - first_id, 0)]  # without the last rank's padding
        shard = VocabularyShard(weight, first_id, group, self.rows_at_once, self.kernels, self.cap)
        rows = hidden[0].index_select(0, supervised.supervised)
        del hidden  # frees as much memory as its gradient needs next
        if num_top is not None:
            parts = [rows.new_empty(0, 1 + 2 * num_top, dtype=torch.float64)]
            for start in range(0, len(rows), self.rows_at_once):
                part = slice(start, start + self.rows_at_once)
                parts.append(label_logprobs(self._logits(rows[part], group), supervised.labels[part], num_top))
            return torch.cat(parts)
        return token_losses(rows, supervised.labels, shard)

    def _logits(self, hidden: Tensor, group: groups.RankGroup) -> Tensor:
        """Return logits, (..., V), equal on every rank, from normed activations (..., d)."""
        local_logits = frozen_weight.frozen_linear(hidden, self.frozen)
        logits = groups.gather_from_tensor_parallel_region(local_logits, group, dim=-1)[..., : self.vocab_size]
        return soft_capped(logits, self.cap)


@dataclass(frozen=True)
class LayerSpec:
    """One entry of the flat list: its kind, its index, and a function that builds it."""

    kind: str
    index: int
    build: Callable[[], nn.Module]


def layer_specs(
    shape: ModelShape,
    *,
    dtype: torch.dtype,
    tp_size: int = 1,
    kernels: Kernels = EAGER,
    deterministic: bool = False,
    make_weight: frozen_weight.WeightMaker = frozen_weight.FrozenWeight.empty,
) -> tuple[LayerSpec, ...]:
    """Return the flat list of layers. Layer 0 is the embedding, 1 to L are the blocks, and L + 1 is the head.

    Blocks are numbered from 1, as in the paper. A layer is built with uninitialised weights of one tensor-parallel
    rank's sizes on the default device, and the checkpoint reader fills them. `tp_size` must divide the numbers of heads
    and key-value heads, and the feed-forward width. For `deterministic` see `choose_attention`. `make_weight` creates
    the weights of the blocks' linears (see `weight_maker`). Embedding and head are never quantised.
    """

    def embedding() -> nn.Module:
        multiplier = shape.embedding_multiplier
        if shape.rounds_embedding:
            multiplier = torch.tensor(multiplier, dtype=dtype, device="cpu").item()
        own = weight(shape.embedding, frozen_weight.FrozenWeight.empty)
        return frozen_weight.VocabularyParallelEmbedding(own, multiplier=multiplier)

    def weight(
        linear: LinearShape, make: frozen_weight.WeightMaker = make_weight, *, after_norm: bool = False
    ) -> frozen_weight.FrozenWeight:
        local_shape = weight_spec(linear).local_shape((linear.out_size, linear.in_size), tp_size)
        shards_rows = linear.sharded_dim == "row" and tp_size > 1
        return make(*local_shape, dtype=dtype, shards_rows=shards_rows, after_norm=after_norm)

    def bias(linear: LinearShape) -> nn.Parameter | None:
        local_shape = bias_spec(linear).local_shape((linear.out_size,), tp_size)
        return frozen_weight.frozen_parameter(*local_shape, dtype=dtype) if linear.bias else None

    def normed(linear: LinearShape, norm: NormShape | None) -> dict[str, Any]:
        own = weight(linear, after_norm=norm is not None)
        return {"weight": own, "norm": norm, "bias": bias(linear), "dtype": dtype, "kernels": kernels}

    def row_parallel(linear: LinearShape, norm: NormShape | None) -> linears.RowParallelLinear:
        own = None if norm is None else linears.Norm(norm, dtype=dtype, kernels=kernels)
        multiplier = shape.block.multiplier
        return linears.RowParallelLinear(weight(linear), bias=bias(linear), norm=own, multiplier=multiplier)

    def block(index: int) -> nn.Module:
        parts, local_heads, kind = shape.block, shape.heads.local(tp_size), shape.kind_of(index)
        of_qkv = normed(parts.qkv, parts.attention_norm)
        attention = Attention(
            linears.QkvLinear(local_heads=local_heads, rope=kind.rope, **of_qkv),
            row_parallel(parts.output, parts.output_norm),
            kind,
            kernels=kernels,
            deterministic=deterministic,
        )
        gate_up = linears.NormedLinear(**normed(parts.gate_up, parts.mlp_norm))
        mlp = GatedMlp(gate_up, row_parallel(parts.down, parts.down_norm), activation=parts.activation)
        return Block(attention, mlp)

    def head() -> nn.Module:
        own = None if shape.tied_embeddings else weight(shape.head, frozen_weight.FrozenWeight.empty)
        norm = linears.Norm(shape.final_norm, dtype=dtype, kernels=kernels)
        return Head(norm, own, shape=shape, kernels=kernels)

    return (
        LayerSpec("embedding", 0, embedding),
        *(LayerSpec("block", index, partial(block, index)) for index in range(1, shape.num_layers + 1)),
        LayerSpec("head", shape.num_layers + 1, head),
    )


# What a rank holds ---------------------------------------------------------------------------------------------------


class StoredTensor(NamedTuple):
    """The size of a parameter: number of elements, bytes per element, and whether its weight is quantised."""

    size: int
    itemsize: int
    quantised: bool = False

    @property
    def num_bytes(self) -> int:
        """Return the number of bytes of all elements."""
        return self.size * self.itemsize


@cache
def stored_tensors(
    shape: ModelShape, dtype: torch.dtype, tp_size: int, **storage: Any
) -> Mapping[str, Counter[StoredTensor]]:
    """Return how many parameters of each size the embedding, a block and the head have on one rank.

    They are counted on modules that are built on the meta device. All blocks have the same parameters.
    """
    with torch.device("meta"):
        maker = weight_maker(**storage)
        specs = layer_specs(shape, dtype=dtype, tp_size=tp_size, make_weight=maker)
        modules = {spec.kind: spec.build() for spec in (specs[0], specs[1], specs[-1])}
    found = {}
    for kind, module in modules.items():
        quantised = {
            id(parameter)
            for weight in frozen_weight.frozen_weights(module).values()
            if isinstance(weight, QuantisedWeight)
            for parameter in weight.parameters.values()
        }
        found[kind] = Counter(
            StoredTensor(parameter.numel(), parameter.itemsize, id(parameter) in quantised)
            for parameter in module.parameters()
        )
    return found
