"""The schedules beside transformers' own, bit for bit what runs have used, and the optimizer's settings."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from transformers import get_scheduler

from megatron_tiedlora.config.settings import Settings, make_settings
from megatron_tiedlora.config.train_fields import Schedule
from megatron_tiedlora.training.build import (
    SCHEDULES,
    learning_rate_factor,
    make_training,
    resume_scheduler,
)


def rates_of_transformers(schedule: str, warmup: int, total: int) -> list[float]:
    """Its factors of the steps after warm-up."""
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    factor = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=total).lr_lambdas[0]
    return [factor(step) for step in range(warmup, total + 3)]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("warmup", "total"), [(50, 2000), (0, 7), (3, 3)])
def test_after_warm_up_the_rates_are_those_of_transformers(schedule: str, warmup: int, total: int) -> None:
    ours = [
        learning_rate_factor(step, warmup_steps=warmup, max_steps=total, schedule=schedule)
        for step in range(warmup, total)
    ]
    theirs = rates_of_transformers(schedule, warmup, total)[: len(ours)]
    assert ours == pytest.approx(theirs, abs=1e-15)


def test_every_name_of_schedule_has_a_function() -> None:
    assert set(get_args(Settings.model_fields["schedule"].annotation)) == SCHEDULES.keys()


def test_cosine_has_the_bits_that_runs_have_used() -> None:
    for step in range(2010):
        expected = (step + 1) / 50 if step < 50 else 0.5 * (1.0 + math.cos(math.pi * min(step - 50, 1950) / 1950))
        assert learning_rate_factor(step, warmup_steps=50, max_steps=2000) == expected


def test_ends() -> None:
    def factor(step: int, schedule: Schedule) -> float:
        return learning_rate_factor(step, warmup_steps=4, max_steps=10, schedule=schedule)

    for schedule in SCHEDULES:
        assert [factor(step, schedule) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factor(7, "linear") == 0.5
    assert [factor(step, "linear") for step in (10, 30)] == [0.0, 0.0]
    assert [factor(step, "cosine") for step in (10, 30)] == [0.0, 0.0]
    assert factor(10**6, "constant") == 1.0


def test_scheduler_resumes_at_any_step() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    own = {"learning_rate": 0.5, "weight_decay": 0.1, "beta1": 0.8, "beta2": 0.95}
    optimizer, scheduler = make_training(
        make_settings({**own, "warmup_steps": 2, "max_steps": 10, "schedule": "linear"}), [parameter]
    )
    assert optimizer.defaults["betas"] == (0.8, 0.95) and optimizer.defaults["weight_decay"] == 0.1
    resume_scheduler(scheduler, 6)
    assert optimizer.param_groups[0]["lr"] == 0.25
