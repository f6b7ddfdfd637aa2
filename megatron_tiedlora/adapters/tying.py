"""The tie across stages and ranks: one sum of the tied gradients a step, and the proof that replicas are equal.

A and B stand on every stage and every data-parallel rank. Their gradient is the sum over the stages of the parts that
the stages' layers give, so it is summed once a step over pipeline x data, in one flat fp32 message. u stands on every
tensor-parallel and data-parallel rank of its stage, and is summed over those in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import distributed

from megatron_tiedlora.adapters.tied_adapter import AdapterPart, TiedAdapter
from megatron_tiedlora.parallel.collectives import all_gather
from megatron_tiedlora.parallel.groups import ParallelGroups, RankGroup
from megatron_tiedlora.parallel.step_sum import StepSum


def tied_trained(bank: TiedAdapter) -> list[str]:
    """The tensors that are tied and trained, in the adapter's order."""
    return [name for name in bank.config.num_trained() if bank.config.factor(name).tied]


def sum_tied_gradients_(bank: TiedAdapter, groups: ParallelGroups) -> list[str]:
    """Replace the gradients of tied tensors by their sum over stages and data-parallel ranks, counted once.

    The sum is left on the data-parallel rank 0 of each stage, and zeros on the others: the engine's own mean over the
    data-parallel ranks, which comes next, then adds zeros, so that every stage gets the same bits whatever its order of
    sums or its buckets. (A sum that every rank holds would be summed again in another order on each stage.)

    Only a stage without an adapted layer may be without a gradient. Elsewhere zeros take its place, so that no rank
    waits for this one, and the caller stops the run.

    Returns:
        the tensors whose gradient is missing on this rank, where it should not be.
    """
    parameters = [bank.get_parameter(name) for name in tied_trained(bank)]
    if not parameters:
        return []
    parts, missing = [], []
    for name, parameter in zip(tied_trained(bank), parameters, strict=True):
        if parameter.grad is None and bank.part.layers:
            missing.append(name)
        parts.append((torch.zeros_like(parameter) if parameter.grad is None else parameter.grad).flatten())
    flat = torch.cat(parts)
    distributed.all_reduce(flat, group=groups.tied.handle)
    if groups.data.rank != 0:
        flat.zero_()
    for parameter, total in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = total.view_as(parameter)
    return missing


def sum_of_u(groups: ParallelGroups) -> StepSum:
    """How u's gradient is summed: once a step over the ranks of a stage, and left on data-parallel rank 0.

    The engine's mean over the data-parallel ranks, which comes next, adds zeros to it, as in `sum_tied_gradients_`: it
    is another group for every tensor-parallel rank, and each might add in another order.
    """
    return StepSum(groups.stage, keeps=groups.data.rank == 0)


@dataclass(frozen=True)
class Mismatch:
    """Replicas of one tensor that differ: which ranks' from the first one's, and by how much at most."""

    tensor: str
    across: str
    first: int
    ranks: tuple[int, ...]
    largest: float

    def __str__(self) -> str:
        ranks = ", ".join(map(str, self.ranks))
        where = f"{self.tensor} differs between {self.across}"
        return f"{where}: rank {ranks} from rank {self.first} by up to {self.largest:.3g}"


def replica_groups(part: AdapterPart, groups: ParallelGroups, name: str) -> list[tuple[str, RankGroup]]:
    """The groups whose ranks hold equal copies of a tensor, with a name for each."""
    tied = part.config.factor(name).tied
    found = [("stages and data-parallel ranks", groups.tied) if tied else ("data-parallel ranks", groups.data)]
    if part.config.spec(name).dim is None:
        found.append(("tensor-parallel ranks", groups.tensor))
    return found


def find_mismatch(bank: TiedAdapter, groups: ParallelGroups) -> Mismatch | None:
    """Compare every replicated tensor bit by bit; the first that differs within a group of this rank, or None.

    Collective: every rank calls it, and sends the same messages whatever it finds. A group's largest and smallest bit
    patterns are equal only if all are.
    """
    first: Mismatch | None = None
    for name, parameter in bank.named_parameters():
        for across, group in replica_groups(bank.part, groups, name):
            if group.size == 1:
                continue
            bits = parameter.detach().contiguous().view(torch.int32)
            ends = torch.stack((bits, ~bits))
            distributed.all_reduce(ends, op=distributed.ReduceOp.MAX, group=group.handle)
            if bool((ends[0] != ~ends[1]).any()):  # on every rank of the group, so that all describe it together
                found = Mismatch(name, across, *_describe(parameter.detach(), group))
                first = first or found
    return first


def _describe(tensor: torch.Tensor, group: RankGroup) -> tuple[int, tuple[int, ...], float]:
    """The group's first rank, those that differ from it, and by how much; all ranks of the group call it together."""
    copies = all_gather(tensor[None], group, dim=0)
    bits = copies.view(torch.int32)  # as they were compared: a nan equals itself, and -0 is not 0
    differing = [number for number in range(group.size) if not torch.equal(bits[number], bits[0])]
    assert group.handle is not None
    first, *ranks = (distributed.get_global_rank(group.handle, number) for number in (0, *differing))
    return first, tuple(ranks), float((copies - copies[0]).abs().max())


class GradientGuard:
    """Watches the gradients of a run's first steps, as autograd hands them to the leaves.

    At step 1 every trained tensor of an adapted stage must have a gradient; by step 2 a non-zero one, layer by layer
    for factors that are per layer, on at least one of the ranks that hold it. (With v = 0 or B = 0 at the start, the
    partner's gradient is exactly zero at step 1.)
    """

    def __init__(self, bank: TiedAdapter) -> None:
        self._part = bank.part
        self._seen: set[str] = set()
        self._trained = [name for name, parameter in bank.named_parameters() if parameter.requires_grad]
        self._largest: dict[str, torch.Tensor] = {}
        self._hooks = [
            parameter.register_hook(lambda gradient, name=name: self._look(name, gradient))
            for name, parameter in bank.named_parameters()
            if parameter.requires_grad and bank.part.layers
        ]

    def _look(self, name: str, gradient: torch.Tensor) -> None:
        self._seen.add(name)
        per_layer = gradient.detach().abs() if not self._is_tied(name) else gradient.detach().abs()[None]
        largest = per_layer.flatten(1).amax(dim=1).nan_to_num(nan=torch.inf)  # a maximum over ranks may lose a nan
        before = self._largest.get(name)
        self._largest[name] = largest if before is None else torch.maximum(before, largest)

    def _is_tied(self, name: str) -> bool:
        return self._part.config.factor(name).tied

    def missing(self) -> list[str]:
        """Trained tensors of this rank that no gradient has reached so far."""
        return [name for name in self._trained if name not in self._seen] if self._part.layers else []

    def labels(self) -> list[str]:
        """What `largest` speaks of, in its order: tied tensors, and per-layer ones layer by layer; alike everywhere."""
        found = []
        for name in self._part.config.num_trained():
            layers = self._part.config.layers
            found += [name] if self._is_tied(name) else [f"{name} of layer {layer}" for layer in layers]
        return found

    def largest(self) -> list[float]:
        """The largest gradient seen on this rank for each of `labels`; 0 for what it does not hold."""
        config, numbers = self._part.config, []
        for name in config.num_trained():
            mine = self._largest[name].tolist() if name in self._largest else []
            if self._is_tied(name):
                numbers += mine or [0.0]
            else:
                whole = [0.0] * len(config.layers)
                whole[self._part.rows] = mine or [0.0] * len(self._part.layers)
                numbers += whole
        return numbers

    def remove(self) -> None:
        """Stop watching."""
        for hook in self._hooks:
            hook.remove()


def gradient_norm_counts(bank: TiedAdapter, groups: ParallelGroups) -> Sequence[str]:
    """The trained tensors whose gradient this rank counts in the norm: tied and replicated ones once, shards each."""
    part = bank.part
    return [
        name
        for name, parameter in bank.named_parameters()
        if parameter.requires_grad
        and (part.config.spec(name).dim is not None or groups.tensor.rank == 0)
        and (not part.config.factor(name).tied or groups.pipeline.rank == 0)
    ]
