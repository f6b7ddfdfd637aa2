"""Define the adapter: a module with A, B, u, v of every target, for all adapted layers of a rank's stage.

This module defines shapes, sharding, initial values and the factors A and F = (alpha / r) diag(v) B diag(u). A tensor
has one slot per set of layers that share it (see `AdapterConfig.slot`). `low_rank` computes F A x and the gradients of
A and F. checkpoint/ writes files, and `tying` sums gradients over stages.
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from megatron_tiedlora.adapters.low_rank import AllRows, Slots, SomeTokens, factors_of_layers, fold, layer_slots
from megatron_tiedlora.base.methods import FACTORS, Factor, Method, find_method
from megatron_tiedlora.base.shapes import QKV, ModelShape, NamedLinear
from megatron_tiedlora.parallel.groups import ALONE, RankGroup, StepSum, gather_together
from megatron_tiedlora.parallel.shard_spec import ShardSpec, draw_normal

# Targets --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target(NamedLinear):
    """A linear with weight W (out, in) in every adapted layer: z = W x + (alpha / r) diag(v) B diag(u) A x. Its name is
    that in `BlockShape.adaptable`."""

    @property
    def prefix(self) -> str:
        """Return the prefix of the names of the target's tensors: "" for qkv, otherwise the target's name and a dot."""
        return "" if self.name == QKV else f"{self.name}."


def targets_of(shape: ModelShape, names: Sequence[str] = (QKV,)) -> tuple[Target, ...]:
    """Return the targets for the model's linears with these names, in the order of computation."""
    adaptable = shape.block.adaptable.items()
    return tuple(
        Target(name, linear.in_size, linear.blocks, linear.sharded_dim) for name, linear in adaptable if name in names
    )


@dataclass(frozen=True)
class AdapterConfig:
    """The description of an adapter, without its values.

    Attributes:
        layers: adapted layers, 1-based, ascending.
        targets: the linears that are adapted in each of these layers. Each target has its own tensors A, B, u, v.
        init_std_a: initial std of A for the first target; for others, times sqrt(first input size / own input size).
    """

    method: str
    rank: int
    alpha: float
    layers: tuple[int, ...]
    targets: tuple[Target, ...]
    seed: int
    init_std_a: float
    init_std_b: float

    @property
    def scale(self) -> float:
        """Return alpha / r."""
        return self.alpha / self.rank

    @cached_property
    def of_one_layer(self) -> "AdapterConfig":
        """Return a copy with constants for fields without effect on a layer's operations. alpha becomes r or 2 r."""
        alpha = self.rank * (1.0 if self.scale == 1.0 else 2.0)
        return replace(self, layers=(1,), seed=0, alpha=alpha, init_std_a=1.0, init_std_b=1.0)

    @property
    def method_spec(self) -> Method:
        """Return the entry of `method` in `METHODS`."""
        return find_method(self.method)

    @property
    def facts(self) -> dict[str, Any]:
        """Return the fields that are written to the JSON files of runs, evaluations and conversions."""
        targets = [target.name for target in self.targets]
        return {
            "method": self.method,
            "rank": self.rank,
            "alpha": self.alpha,
            "layers": list(self.layers),
            "targets": targets,
        }

    @cached_property
    def tensors(self) -> dict[str, tuple[Target, str]]:
        """Return the target and the factor ("A", "B", "u" or "v") of every tensor, by tensor name."""
        return {target.prefix + factor: (target, factor) for target in self.targets for factor in FACTORS}

    def factor(self, name: str) -> Factor:
        """Return which layers share a tensor, whether it is trained, and how it is initialised."""
        return self.method_spec.factor(self.tensors[name][1])

    def slot(self, name: str, layer: int) -> int:
        """Return the slot of a tensor that an adapted layer (1-based) uses."""
        return layer_slots(self.factor(name).shared_by, self.layers)[layer]

    def num_slots(self, name: str) -> int:
        """Return the number of slots of a tensor."""
        return len(set(layer_slots(self.factor(name).shared_by, self.layers).values()))

    def groups(self, name: str) -> list[list[int]]:
        """Return a list with the adapted layers of each slot of a tensor."""
        slots = range(self.num_slots(name))
        return [[layer for layer in self.layers if self.slot(name, layer) == slot] for slot in slots]

    def is_tied(self, name: str) -> bool:
        """Return whether layers share a tensor. Every stage holds all slots of a tied tensor."""
        return self.factor(name).shared_by != "one"

    def is_stacked(self, name: str) -> bool:
        """Return whether a tensor's first dimension is its slots. A tied tensor with one slot has no such dimension."""
        return not self.is_tied(name) or self.num_slots(name) > 1

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the full shape: A (r, in), B (out, r), u (r), v (out). For a stacked tensor, slots come first."""
        target, factor = self.tensors[name]
        r, out = self.rank, target.out_size
        shape = {"A": (r, target.in_size), "B": (out, r), "u": (r,), "v": (out,)}[factor]
        return (self.num_slots(name), *shape) if self.is_stacked(name) else shape

    def spec(self, name: str) -> ShardSpec:
        """Return how a tensor is sharded over tensor-parallel ranks.

        B and v are sharded like the rows of W, and A like its columns. If W is not sharded along this dimension, a
        trained tensor is sharded nevertheless (see `gathered_dim`). A frozen tensor is then replicated, so that no
        message is needed. u is always replicated.
        """
        target, factor = self.tensors[name]
        last = len(self.shape(name)) - 1
        if factor == "u" or not (self.factor(name).trained or self._follows_weight(name)):
            return ShardSpec(None, ())
        if factor == "A":
            return ShardSpec(last, (target.in_size,))
        return ShardSpec(last - 1 if factor == "B" else last, target.blocks)

    def gathered_dim(self, name: str) -> int | None:
        """Return the dimension along which a sharded tensor is gathered before use, or None if it is not gathered."""
        return None if self._follows_weight(name) else self.spec(name).dim

    def _follows_weight(self, name: str) -> bool:
        """Return whether a tensor has the dimension along which W is sharded: rows for B and v, columns for A."""
        target, factor = self.tensors[name]
        return factor != "u" and (factor == "A") == (target.sharded_dim == "row")

    def num_trained(self) -> dict[str, int]:
        """Return the number of trained parameters in each trained tensor."""
        return {name: torch.Size(self.shape(name)).numel() for name in self.tensors if self.factor(name).trained}


@dataclass(frozen=True)
class AdapterShard:
    """The shard of an adapter that one rank holds: the adapted layers of its stage, sharded by tensor parallelism.

    Attributes:
        layers: the adapted layers of the stage, a contiguous range of `config.layers`, which may be empty.
    """

    config: AdapterConfig
    layers: tuple[int, ...]
    tp_rank: int = 0
    tp_size: int = 1

    @staticmethod
    def whole(config: AdapterConfig) -> "AdapterShard":
        """Return the shard that contains the full adapter."""
        return AdapterShard(config, config.layers)

    @staticmethod
    def of_stage(config: AdapterConfig, stage: Collection[int], tp_rank: int, tp_size: int) -> "AdapterShard":
        """Return the shard of a rank of the stage that has the layers in `stage`."""
        return AdapterShard(config, tuple(layer for layer in config.layers if layer in stage), tp_rank, tp_size)

    def slots(self, name: str) -> range:
        """Return the slots that this rank holds: all slots of a tied tensor, or the slots of the stage's layers."""
        if self.config.is_tied(name):
            return range(self.config.num_slots(name))
        first = self.config.slot(name, self.layers[0]) if self.layers else 0
        return range(first, first + len(self.layers))

    def exists(self, name: str) -> bool:
        """Return whether the rank holds slots of the tensor. Frozen tensors of ones are not stored."""
        factor = self.config.factor(name)
        return (factor.trained or factor.start != "one") and len(self.slots(name)) > 0

    def names(self, *, trained: bool) -> list[str]:
        """Return the names of the trained or of the frozen tensors that the rank holds."""
        config = self.config
        return [name for name in config.tensors if self.exists(name) and config.factor(name).trained == trained]

    def local_shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of this rank's shard of a tensor."""
        shape = self.config.shape(name)
        if self.config.is_stacked(name):
            shape = (len(self.slots(name)), *shape[1:])
        return self.config.spec(name).local_shape(shape, self.tp_size)

    def local_size(self, name: str) -> int:
        """Return the number of elements in this rank's shard of a tensor."""
        return math.prod(self.local_shape(name))

    def is_gathered(self, name: str) -> bool:
        """Return whether ranks gather the tensor in each forward pass and sum its gradient in each backward pass."""
        return self.tp_size > 1 and bool(self.layers) and self.config.gathered_dim(name) is not None

    def shard(self, name: str, full: Tensor) -> Tensor:
        """Return this rank's shard of a full tensor. A moment of the tensor is sharded in the same way."""
        slots = self.slots(name)
        held = full[slots.start : slots.stop] if self.config.is_stacked(name) else full
        return self.config.spec(name).split(held, self.tp_rank, self.tp_size)


def make_adapter_config(
    method: str,
    *,
    rank: int,
    layers: tuple[int, ...],
    targets: tuple[Target, ...],
    seed: int,
    alpha: float | None = None,
    init_std_a: float | None = None,
    init_std_b: float | None = None,
) -> AdapterConfig:
    """Return an AdapterConfig. alpha is the rank by default. Raise UserError if the method is unknown."""
    # With stds of 1 / sqrt(d) for A and 1 / sqrt(r) for B, the elements of x, A x and B A x have the same magnitude. If
    # the initial update is not zero (tl1), the std of B is multiplied by 0.3. A real model's first loss is 3.5 with the
    # full std, 1.47 with 0.3, and 1.43 without an adapter (docs/start_widths.md). The final loss with 0.3 is as good.
    share_b = 1.0 if find_method(method).starts_at_base else 0.3
    std_a = 1.0 / math.sqrt(targets[0].in_size) if init_std_a is None else init_std_a
    std_b = share_b / math.sqrt(rank) if init_std_b is None else init_std_b
    return AdapterConfig(method, rank, float(rank if alpha is None else alpha), layers, targets, seed, std_a, std_b)


def initial_values(config: AdapterConfig) -> dict[str, Tensor]:
    """Return the initial values of every full tensor, in fp32. The values depend only on the config."""
    values = {}
    for name, (target, letter) in config.tensors.items():
        factor, shape = config.factor(name), config.shape(name)
        if factor.start != "normal":
            values[name] = torch.full(shape, 1.0 if factor.start == "one" else 0.0)
            continue
        wider = target.in_size / config.targets[0].in_size
        std = config.init_std_a / math.sqrt(wider) if letter == "A" else config.init_std_b
        draw = partial(draw_normal, std=std, seed=config.seed)
        if config.is_stacked(name):  # the first layer of a slot is part of its name
            values[name] = torch.stack([draw(shape[1:], name=f"{name}.{first}") for first, *_ in config.groups(name)])
        else:
            values[name] = draw(shape, name=name)
    return values


class LinearUpdate(NamedTuple):
    """The factors of the update F A x of one linear on one rank. All tensors are None if there is no update.

    Attributes:
        a: A, (r, local in), in the base's dtype; no gradient.
        f: F = (alpha / r) diag(v) B diag(u), (local out, r), in the base's dtype; no gradient.
        grad_a: the gradient slot of A, in A's shape and the adapter's dtype; None if A is frozen.
        grad_f: the gradient slot of F; None if B, u and v are frozen.
        rows: the tokens that the update applies to, and the dropout of its input.
    """

    a: Tensor | None = None
    f: Tensor | None = None
    grad_a: Tensor | None = None
    grad_f: Tensor | None = None
    rows: AllRows = AllRows()


LayerUpdate = Mapping[str, LinearUpdate]  # the updates of one adapted layer, by target name


def update_at(update: LayerUpdate, some: SomeTokens) -> LayerUpdate:
    """Return a layer's updates for the given tokens only."""
    return {name: linear._replace(rows=linear.rows.at(some)) for name, linear in update.items()}


class TiedAdapter(nn.Module):
    """The tensors A, B, u, v of each target on one rank, in fp32, with one slot per set of layers that share a tensor.

    The tensors are the module's parameters, with the names of `AdapterConfig.tensors`. Factors frozen at one (u and v
    of most methods) do not exist as tensors. Factors frozen at random values are parameters without gradient. A tied
    factor is one Parameter for all layers on every stage. An untied factor has the slots of the stage's layers.

    Attributes:
        u_sum: the operation that sums the gradient of u inside the backward passes, for an engine that uses a gradient
            immediately (see `tying.sum_of_u`); None if the gradient is summed after the backward passes, or not at all.
    """

    u_sum: StepSum | None = None

    def __init__(self, part: AdapterShard, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.part = part
        for target in part.config.targets:
            if target.prefix:
                self.add_module(target.name, nn.Module())
        self._slots: dict[str, Slots] = {}
        for name, (target, factor) in part.config.tensors.items():
            empty = torch.empty(part.local_shape(name), dtype=dtype) if part.exists(name) else None
            trained = part.config.factor(name).trained
            parameter = None if empty is None else nn.Parameter(empty, requires_grad=trained)
            self._module(target).register_parameter(factor, parameter)
            stacked, first = part.exists(name) and part.config.is_stacked(name), part.slots(name).start
            slots = tuple(part.config.slot(name, layer) - first for layer in part.layers)
            self._slots[name] = slots if stacked else None

    @property
    def config(self) -> AdapterConfig:
        """Return the description of the full adapter."""
        return self.part.config

    def load_full(self, values: Mapping[str, Tensor] | None = None) -> "TiedAdapter":
        """Copy this rank's shards of the full tensors in `values` [the initial values] into the parameters, and return
        the adapter. The shapes must match."""
        values = initial_values(self.part.config) if values is None else values
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                parameter.copy_(self.part.shard(name, values[name]))
        return self

    def forward(self, tensor_group: RankGroup = ALONE, *, dtype: torch.dtype) -> tuple[LayerUpdate, ...]:
        """Return the updates of each adapted layer of the stage. A and F have the sizes of this rank's shard of W.

        With tensor parallelism, sharded factors that ranks need in full are gathered here, in one message per call for
        all targets. The adjoint of the gather, a reduce-scatter, sums the ranks' partial gradients. The partial
        gradients of u are summed once per step.

        Args:
            dtype: the base's dtype.
        """
        if not self.part.layers:
            return ()
        (whole,) = full_factors([self], tensor_group)
        if self.u_sum is not None and self.config.method_spec.u.trained and torch.is_grad_enabled():
            names = [f"{target.prefix}u" for target in self.config.targets]
            u = [whole[name] for name in names]
            u = [self.u_sum.of(u[0])] if len(u) == 1 else list(self.u_sum.of(torch.stack(u)).unbind())
            whole |= dict(zip(names, u, strict=True))
        return self.updates(whole, dtype=dtype)

    def updates(self, whole: Mapping[str, Any], *, dtype: torch.dtype) -> tuple[LayerUpdate, ...]:
        """Return the updates of each adapted layer of the stage, from the factors that this rank's matmuls need."""
        of_layers = partial(factors_of_layers, num_layers=len(self.part.layers), dtype=dtype)
        updates: dict[str, Iterable[LinearUpdate]] = {}
        for target in self.config.targets:
            a, b, u, v = (whole[target.prefix + factor] for factor in FACTORS)
            of_a, *of_buv = (self._slots[target.prefix + factor] for factor in FACTORS)
            values_a, grad_a = of_layers((a, None, None), (of_a, None, None), 1.0)
            values_f, grad_f = of_layers((b, u, v), of_buv, self.config.scale)
            updates[target.name] = map(LinearUpdate, values_a, values_f, grad_a, grad_f)
        return tuple(dict(zip(updates, layer, strict=True)) for layer in zip(*updates.values(), strict=True))

    def factors(self) -> dict[str, Any]:
        """Return this rank's shard of every factor, by name. A factor frozen at one is None."""
        return {name: getattr(self._module(target), factor) for name, (target, factor) in self.config.tensors.items()}

    def _module(self, target: Target) -> nn.Module:
        return self.get_submodule(target.prefix.rstrip("."))


def full_factors(adapters: Sequence[TiedAdapter], tensor_group: RankGroup) -> list[dict[str, Any]]:
    """Gather and return the factors that this rank's matmuls need, by name. A factor frozen at one is None."""
    factors = [adapter.factors() if adapter.part.layers else {} for adapter in adapters]
    dims = [
        {name: dim for name in held if (dim := adapter.config.gathered_dim(name)) is not None}
        for adapter, held in zip(adapters, factors, strict=True)
    ]
    tensors = [held[name] for held, own in zip(factors, dims, strict=True) for name in own]
    gathered = iter(gather_together(tensors, tensor_group, [dim for own in dims for dim in own.values()]))
    return [held | {name: next(gathered) for name in own} for held, own in zip(factors, dims, strict=True)]


def lora_factors(
    config: AdapterConfig, state: Mapping[str, Tensor | None], target: Target, layer: int
) -> tuple[Tensor, Tensor]:
    """Return the update of a target in one layer (1-based) as a plain, differentiable LoRA pair.

    The pair is diag(u) A, (r, in), and (alpha / r) diag(v) B, (out, r). `state` holds the full tensors. u and v may be
    None if they are frozen at one.
    """
    factors = ((name, state[name]) for name in (target.prefix + factor for factor in FACTORS))
    a, b, u, v = (
        tensor if tensor is None or not config.is_stacked(name) else tensor[config.slot(name, layer)]
        for name, tensor in factors
    )
    assert a is not None and b is not None
    return (a if u is None else u[:, None] * a), fold(b, None, v, config.scale)
