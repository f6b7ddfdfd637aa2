"""AdamW with decoupled weight decay, and the schedule: linear warm-up, then cosine to zero."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR


def learning_rate_factor(step: int, *, warmup_steps: int, max_steps: int) -> float:
    """The fraction of the peak learning rate at `step` (0-based).

    It is (step + 1) / warmup_steps during warm-up, so the first step uses 1 / warmup_steps of the peak; then
    (1 + cos(pi (step - warmup) / (max - warmup))) / 2.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    span = max(max_steps - warmup_steps, 1)
    return 0.5 * (1.0 + math.cos(math.pi * min(step - warmup_steps, span) / span))


def make_optimizer(
    parameters: Iterable[nn.Parameter], *, learning_rate: float, weight_decay: float
) -> torch.optim.AdamW:
    """torch's AdamW with one group: all trained tensors have weight decay, as in the paper."""
    return torch.optim.AdamW(list(parameters), lr=learning_rate, weight_decay=weight_decay)


def make_scheduler(optimizer: torch.optim.Optimizer, *, warmup_steps: int, max_steps: int) -> LambdaLR:
    """The schedule, set to step 0; `resume_scheduler` sets it to a later step."""
    return LambdaLR(optimizer, lambda step: learning_rate_factor(step, warmup_steps=warmup_steps, max_steps=max_steps))


def resume_scheduler(scheduler: LambdaLR, step: int) -> None:
    """Set the schedule and the optimizer's groups to the next step, `step`.

    The rate depends only on the step, so it is computed, not read from the checkpoint.
    """
    scheduler.last_epoch = step
    rates = [base * factor(step) for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates
