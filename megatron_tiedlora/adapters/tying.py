"""Sum the gradients of tied tensors over stages and ranks in each step, and check that their replicas are equal.
This module also gathers the full tensors on rank 0 from all ranks, so that files do not depend on the layout.

A tied tensor, such as A and B of most methods, is replicated on every stage and data-parallel rank. Each stage has a
partial sum of its gradient, from its own layers. The partial sums are added once per step over pipeline x data, in one
flat fp32 message. u is replicated on the tensor-parallel ranks too, so its gradient is summed over these ranks as well.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, distributed, nn

from megatron_tiedlora.adapters.tied_adapter import AdapterConfig, AdapterShard, TiedAdapter
from megatron_tiedlora.parallel.groups import Grid, ParallelGroups, RankGroup, StepSum, all_gather


def sum_gradients_(
    adapters: Mapping[str, TiedAdapter], groups: ParallelGroups, *, engine_averages: bool = False
) -> dict[str, list[str]]:
    """Replace each gradient of the adapters by its sum over the ranks that have a replica of the tensor.

    Each process group has one message for all adapters together. A tied tensor is on every stage and data-parallel
    rank. u is on the tensor- and data-parallel ranks of its stage. Every other tensor is on the data-parallel ranks.
    The gradient of a tied u is summed over the tensor-parallel ranks first.

    A stage without layers of an adapter adds zeros. A gradient that is missing on a stage with layers also counts as
    zeros, so that no rank waits. The caller then ends the training of each adapter with a missing gradient.

    Args:
        adapters: the adapters that take a step, by name. Each of them has micro-batches on every rank.
        engine_averages: whether an engine averages the gradients over the data-parallel ranks afterwards. Then only
            tied gradients are summed here (`sum_of_u` sums the gradients of u). Data-parallel rank 0 of each stage gets
            the sum, and other ranks get zeros. So every stage gets the same bits for any order of sums or buckets. (If
            every rank had the sum, each stage would add the copies in a different order.)

    Returns:
        the names of the tensors whose gradient is missing on this rank, by adapter.
    """
    # The order of groups is the same on every rank. Groups with the same ranks are one key.
    by_group = {group: list[nn.Parameter]() for group in (groups.tensor, groups.stage, groups.tied, groups.data)}
    missing: dict[str, list[str]] = {}
    for name, adapter in adapters.items():
        for tensor, parameter in adapter.named_parameters():
            tied = adapter.config.is_tied(tensor)
            if not parameter.requires_grad or (engine_averages and not tied):
                continue
            if parameter.grad is None and adapter.part.layers:
                missing.setdefault(name, []).append(tensor)
            is_u = adapter.config.tensors[tensor][1] == "u"
            if is_u and tied and not engine_averages:
                by_group[groups.tensor].append(parameter)
            by_group[groups.tied if tied else groups.stage if is_u else groups.data].append(parameter)
    for group, parameters in by_group.items():
        _sum_together_(parameters, group, keeps=not engine_averages or groups.data.rank == 0)
    return missing


def _sum_together_(parameters: Sequence[nn.Parameter], group: RankGroup, *, keeps: bool) -> None:
    """Sum these gradients over the group in one message. A rank without `keeps` gets zeros instead of the sums."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    if group.size == 1 or not parameters:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce(flat, group=group.handle)
    if not keeps:
        flat.zero_()
    for gradient, total in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(total.view_as(gradient))


def sum_of_u(groups: ParallelGroups) -> StepSum:
    """Return the operation that sums the gradient of u in a step's last backward pass.

    ZeRO-2 and 3 use a gradient as soon as it exists, so `sum_gradients_` would be too late. Data-parallel rank 0 of a
    stage gets the sum and the other ranks get zeros, because the engine averages over the data-parallel ranks.
    """
    return StepSum(groups.stage, keeps=groups.data.rank == 0)


def find_mismatches(adapters: Sequence[TiedAdapter], groups: ParallelGroups) -> list[str | None]:
    """Compare all replicas of each tensor bit by bit. Return a text about each adapter's first tensor that differs.

    The text names the ranks that differ and the largest difference; None if all tensors of the adapter are equal. All
    ranks must call this function, which sends one message per process group. The bit patterns on all ranks of a group
    are equal if and only if the largest and the smallest are equal.
    """
    # The order of the groups is the same on every rank, even on a rank without tensors for a group.
    copies: dict[str, tuple[RankGroup, list[tuple[int, str, Tensor]]]] = {
        "stages and data-parallel ranks": (groups.tied, []),
        "data-parallel ranks": (groups.data, []),
        "tensor-parallel ranks": (groups.tensor, []),
    }
    for number, adapter in enumerate(adapters):
        for name, parameter in adapter.named_parameters():
            tied = adapter.config.is_tied(name)
            kinds = ["stages and data-parallel ranks" if tied else "data-parallel ranks"]
            if adapter.config.spec(name).dim is None:
                kinds.append("tensor-parallel ranks")
            for kind in kinds:
                copies[kind][1].append((number, name, parameter.detach().contiguous()))
    found: list[dict[str, str]] = [{} for _ in adapters]
    for across, (group, tensors) in copies.items():
        if group.size == 1 or not tensors:
            continue
        bits = torch.cat([tensor.view(torch.int32).flatten() for _, _, tensor in tensors])
        ends = torch.stack((bits, ~bits))
        distributed.all_reduce(ends, op=distributed.ReduceOp.MAX, group=group.handle)
        differs = (ends[0] != ~ends[1]).split([tensor.numel() for _, _, tensor in tensors])
        for (number, name, tensor), part in zip(tensors, differs, strict=True):
            if bool(part.any()):  # true on all ranks of the group, so they call _describe together
                found[number].setdefault(name, f"{name} differs between {across}: {_describe(tensor, group)}")
    names = [[name for name, _ in adapter.named_parameters()] for adapter in adapters]
    return [next((own[name] for name in order if name in own), None) for own, order in zip(found, names, strict=True)]


def _describe(tensor: Tensor, group: RankGroup) -> str:
    """Return a text with the ranks that differ from the first rank, and the largest difference. All ranks call this."""
    copies = all_gather(tensor[None], group, dim=0)
    bits = copies.view(torch.int32)  # compared as bits: a nan equals itself, and -0 is not 0
    differing = [number for number in range(group.size) if not torch.equal(bits[number], bits[0])]
    assert group.handle is not None
    first, *ranks = (distributed.get_global_rank(group.handle, number) for number in (0, *differing))
    return f"rank {', '.join(map(str, ranks))} from rank {first} by up to {float((copies - copies[0]).abs().max()):.3g}"


class GradientGuard:
    """Autograd hooks on the parameters that record the gradients in a run's first steps.

    At step 1 every trained tensor of a stage with adapted layers must have a gradient. By step 2, each slot of its
    gradient must have been non-zero on at least one rank that holds the tensor. (If v or B is initialised to zero, the
    gradients of the other factors are exactly zero at step 1.)
    """

    def __init__(self, adapter: TiedAdapter) -> None:
        self._part = adapter.part
        self._trained = {name: tensor for name, tensor in adapter.named_parameters() if tensor.requires_grad}
        self._largest: dict[str, Tensor] = {}
        self._of_step: dict[str, Tensor] = {}  # the largest gradients of this step only
        self._hooks = [
            parameter.register_hook(lambda gradient, name=name: self._look(name, gradient))
            for name, parameter in self._trained.items()
            if adapter.part.layers
        ]

    def _look(self, name: str, gradient: Tensor) -> None:
        by_slot = gradient.detach().abs() if self._part.config.is_stacked(name) else gradient.detach().abs()[None]
        largest = by_slot.flatten(1).amax(dim=1).nan_to_num(nan=torch.inf)  # the maximum over ranks may ignore a nan
        for seen in (self._largest, self._of_step):
            seen[name] = torch.maximum(seen[name], largest) if name in seen else largest

    def missing(self) -> list[str]:
        """Return the trained tensors of this rank that have had no gradient so far."""
        return [name for name in self._trained if name not in self._largest] if self._part.layers else []

    def begin_step(self) -> None:
        """Begin a new step, so that `sizes` does not use gradients of earlier steps."""
        self._of_step.clear()

    def sizes(self) -> tuple[float, float]:
        """Return the largest absolute gradient of the step and the largest absolute trained value on this rank.

        The second value is 0 if another rank holds the tensors, as under ZeRO-3.
        """
        gradients = (float(largest.max()) for largest in self._of_step.values())
        values = (float(tensor.detach().abs().max()) for tensor in self._trained.values() if tensor.numel())
        return max(gradients, default=0.0), max(values, default=0.0)

    def largest(self) -> dict[str, float]:
        """Return the largest absolute gradient so far of each tensor, or of each slot of a stacked tensor.

        A slot's key contains its layers. The value is 0 if this rank does not hold the slot."""
        config, found = self._part.config, dict[str, float]()
        for name in config.num_trained():
            full, held = [0.0] * config.num_slots(name), self._part.slots(name)
            if name in self._largest:
                full[held.start : held.stop] = self._largest[name].tolist()
            for layers, value in zip(config.groups(name), full, strict=True):
                words = f"layer{'s' if len(layers) > 1 else ''} {', '.join(map(str, layers))}"
                found[f"{name} of {words}" if config.is_stacked(name) else name] = value
        return found

    def remove(self) -> None:
        """Remove the hooks from the parameters."""
        for hook in self._hooks:
            hook.remove()


def gradient_norm_counts(adapter: TiedAdapter, groups: ParallelGroups) -> Sequence[str]:
    """Return the names of the tensors that this rank adds to the gradient norm. Each element is added only once."""
    part = adapter.part
    return [
        name
        for name, parameter in adapter.named_parameters()
        if parameter.requires_grad
        and (part.config.spec(name).dim is not None or groups.tensor.rank == 0)
        and (not part.config.is_tied(name) or groups.pipeline.rank == 0)
    ]


# Full tensors ---------------------------------------------------------------------------------------------------------


# torch's names for AdamW's running means of a trained tensor's gradient and of its square.
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class AdapterLayout:
    """The distribution of an adapter's shards over the ranks.

    Attributes:
        stages: the layers of each pipeline stage.
    """

    config: AdapterConfig
    grid: Grid
    stages: Sequence[Collection[int]]

    def parts(self) -> dict[int, AdapterShard]:
        """Return the shards on the ranks with data-parallel rank 0, by rank. They contain the full adapter."""
        config, tp_size = self.config, self.grid.tp_size
        return {
            self.grid.rank_of(pp_rank=pp_rank, tp_rank=tp_rank): AdapterShard.of_stage(config, stage, tp_rank, tp_size)
            for pp_rank, stage in enumerate(self.stages)
            for tp_rank in range(tp_size)
        }


def gather_full(names: Sequence[str], local: Mapping[str, Tensor], layout: AdapterLayout) -> dict[str, Tensor]:
    """Gather full fp32 tensors on the CPU of rank 0 and return them there. Other ranks return {}. All ranks call this.

    Args:
        names: the tensors to gather, the same on every rank.
        local: this rank's shards of these tensors, or of their moments, by name.
    """
    config, grid, parts = layout.config, layout.grid, layout.parts()
    full: dict[str, Tensor] = {}
    for name in names:
        tied, sharded = config.is_tied(name), config.spec(name).dim is not None
        holders = [
            rank
            for rank, part in parts.items()
            if part.exists(name) and (sharded or part.tp_rank == 0) and (not tied or grid.at(rank).pp_rank == 0)
        ]
        if grid.rank in holders and grid.rank != 0:
            distributed.send(local[name].detach().to("cpu", torch.float32).contiguous(), dst=0)
        if grid.rank != 0:
            continue
        by_stage: dict[int, list[Tensor]] = {}
        for rank in holders:
            if rank == 0:
                shard = local[name].detach().to("cpu", torch.float32, copy=True)
            else:
                shard = torch.empty(parts[rank].local_shape(name), dtype=torch.float32)
                distributed.recv(shard, src=rank)
            by_stage.setdefault(grid.at(rank).pp_rank, []).append(shard)
        joined = [config.spec(name).join(shards) for shards in by_stage.values()]
        full[name] = joined[0] if len(joined) == 1 else torch.cat(joined)
    return full


def gather_state(local: Mapping[str, Tensor], layout: AdapterLayout) -> dict[str, Tensor]:
    """Return all full tensors on rank 0, including those frozen at one, and {} on other ranks. All ranks call this."""
    config = layout.config
    stored = [name for name in config.tensors if config.factor(name).trained or config.factor(name).start != "one"]
    full = gather_full(stored, local, layout)
    if layout.grid.rank != 0:
        return {}
    return {name: full[name] if name in full else torch.ones(config.shape(name)) for name in config.tensors}
