"""The optimizer step of each adapter of a bank: sums over ranks, norm, clipping, AdamW. Engines take no part in it.

The sums and the norms of all adapters are one message per group. From there on nothing of an adapter meets another's:
its norm, the factor by which it is clipped, its optimizer and its schedule are those of a run of its own.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from megatron_tiedlora.adapters.adapter_bank import AdapterBank
from megatron_tiedlora.adapters.bank_sums import sum_gradients_
from megatron_tiedlora.adapters.tied_adapter import TiedAdapter
from megatron_tiedlora.engine.engine import gradient_norms, scale_gradients_
from megatron_tiedlora.engine.runner import reported_norm
from megatron_tiedlora.parallel.groups import ParallelGroups


@dataclass(frozen=True)
class OwnStep:
    """What one adapter takes its steps with.

    Attributes:
        optimizer: of `trained_or_stand_in` of its part on this rank.
        max_norm: of its gradients; 0: they are not clipped.
    """

    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    max_norm: float

    @property
    def learning_rate(self) -> float:
        """Of the next step."""
        rate: float = self.optimizer.param_groups[0]["lr"]
        return rate


@dataclass(frozen=True)
class BankStep:
    """Takes the steps of the adapters, by name. All ranks call each method together, for the same adapters."""

    bank: AdapterBank
    groups: ParallelGroups
    steps: Mapping[str, OwnStep]
    device: torch.device

    def sum_gradients(self, taking: Collection[str]) -> list[str]:
        """Sum the gradients over the ranks. Returns those that are missing on this rank, see `sum_gradients_`."""
        return sum_gradients_(self.bank, self.groups, taking=taking)

    def norms(self, taking: Collection[str]) -> dict[str, float]:
        """The norm of each adapter's summed gradients before clipping, as `Runner.take_step` reports it."""
        found = gradient_norms([self.bank.adapters[name] for name in taking], self.groups, self.device)
        return {name: reported_norm(norm) for name, norm in zip(taking, found, strict=True)}

    def take(self, name: str, norm: float) -> None:
        """Clip the gradients of one adapter, whose norm is `norm`, and take its step."""
        own = self.steps[name]
        scale_gradients_(self.bank.adapters[name], norm, own.max_norm)
        own.optimizer.step()
        own.scheduler.step()

    def clear(self) -> None:
        """Drop all gradients, also of adapters that took no step."""
        for _, parameter in self.bank.named_parameters():
            parameter.grad = None


def trained_or_stand_in(adapter: TiedAdapter) -> list[nn.Parameter]:
    """The trained tensors of an adapter's part; if it has none, one number, since an optimizer wants a tensor."""
    return [p for p in adapter.parameters() if p.requires_grad] or [nn.Parameter(torch.zeros(1))]
