"""AdamW with decoupled weight decay, and the schedule of the learning rate: linear warm-up, then one of `SCHEDULES`.

After warm-up the schedules are those of transformers' `get_scheduler`. They are written here because its cosine rounds
differently (505 of the 1,950 rates after the paper's warm-up differ in their last bit, which resumed runs would see),
and its warm-up starts at a rate of zero, with a step that changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import get_args

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from megatron_tiedlora.config.train_fields import Schedule

# By name, the fraction of the peak rate after `done` of the `span` steps that follow warm-up.
SCHEDULES: Mapping[Schedule, Callable[[int, int], float]] = {
    "cosine": lambda done, span: 0.5 * (1.0 + math.cos(math.pi * min(done, span) / span)),
    "linear": lambda done, span: max(0.0, (span - done) / span),
    "constant": lambda done, span: 1.0,
}
assert SCHEDULES.keys() == set(get_args(Schedule)), "--schedule offers the names of this table"


def learning_rate_factor(step: int, *, warmup_steps: int, max_steps: int, schedule: Schedule = "cosine") -> float:
    """The fraction of the peak learning rate at `step` (0-based).

    It is (step + 1) / warmup_steps during warm-up, so the first step uses 1 / warmup_steps of the peak; then it follows
    `schedule`, from 1 at the first step after warm-up to 0 (or 1, if it is constant) at `max_steps`.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    return SCHEDULES[schedule](step - warmup_steps, max(max_steps - warmup_steps, 1))


def make_optimizer(
    parameters: Iterable[nn.Parameter],
    *,
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.999),
) -> torch.optim.AdamW:
    """torch's AdamW with one group: all trained tensors have weight decay, as in the paper."""
    return torch.optim.AdamW(list(parameters), lr=learning_rate, betas=betas, weight_decay=weight_decay)


def make_scheduler(
    optimizer: torch.optim.Optimizer, *, warmup_steps: int, max_steps: int, schedule: Schedule = "cosine"
) -> LambdaLR:
    """The schedule, set to step 0; `resume_scheduler` sets it to a later step."""
    factor = partial(learning_rate_factor, warmup_steps=warmup_steps, max_steps=max_steps, schedule=schedule)
    return LambdaLR(optimizer, factor)


def resume_scheduler(scheduler: LambdaLR, step: int) -> None:
    """Set the schedule and the optimizer's groups to the next step, `step`.

    The rate depends only on the step, so it is computed, not read from the checkpoint.
    """
    scheduler.last_epoch = step
    rates = [base * factor(step) for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    scheduler._last_lr = rates
