"""The sums of a bank's gradients over ranks: once per step, in one message per group, however many adapters there are.

A tied tensor is on every stage and data-parallel rank, u on the tensor- and data-parallel ranks of its stage, and any
other tensor on the data-parallel ranks. Each gets its gradient from one message among all ranks that have a copy.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import distributed, nn

from megatron_tiedlora.adapters.adapter_bank import AdapterBank
from megatron_tiedlora.parallel.groups import ParallelGroups, RankGroup


def sum_gradients_(bank: AdapterBank, groups: ParallelGroups, *, taking: Collection[str]) -> list[str]:
    """Replace the gradients of the adapters that take a step by their sums over the ranks with a copy of the tensor.

    An adapter without tokens on this rank adds zeros. All ranks of a stage have the same trained tensors.

    Args:
        taking: names of the adapters that take a step.

    Returns:
        the tensors that have no gradient although others of their adapter have one on this rank, as NAME.TENSOR.
    """
    # In one order on every rank; groups of the same ranks are one.
    by_group: dict[RankGroup, list[nn.Parameter]] = {groups.stage: [], groups.tied: [], groups.data: []}
    missing = []
    for name, adapter in bank.adapters.items():
        if name not in taking:
            continue
        trained = {tensor: p for tensor, p in adapter.named_parameters() if p.requires_grad}
        present = any(parameter.grad is not None for parameter in trained.values())
        for tensor, parameter in trained.items():
            if parameter.grad is None and present:
                missing.append(f"{name}.{tensor}")
            letter = adapter.config.tensors[tensor][1]
            tied = adapter.config.factor(tensor).tied
            by_group[groups.stage if letter == "u" else groups.tied if tied else groups.data].append(parameter)
    for group, parameters in by_group.items():
        _sum_together_(parameters, group)
    return missing


def _sum_together_(parameters: list[nn.Parameter], group: RankGroup) -> None:
    """One message for the gradients of all these tensors; a missing one counts as zeros."""
    if not parameters:
        return
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    if group.size == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce(flat, group=group.handle)
    for gradient, total in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(total.view_as(gradient))
