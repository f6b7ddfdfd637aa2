"""Five steps of `tiedlora train` whose tokens and numbers a client of the service can send, too."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import distributed

from megatron_tiedlora.adapters.adapter_groups import ONLY
from megatron_tiedlora.config.settings import make_settings
from megatron_tiedlora.data.loader import TrainingStep
from megatron_tiedlora.planning.run_plan import RunPlan, plan_run
from megatron_tiedlora.runtime.stopping import StopRequests
from megatron_tiedlora.service.batches import Division
from megatron_tiedlora.service.operations import Pass
from megatron_tiedlora.training.build import build_model
from megatron_tiedlora.training.step import TrainStep
from support.forked_ranks import join_as_launched

VOCABULARY = 256
TARGETS = ("qkv", "o_proj", "gate_up", "down_proj")
NUMBERS = {"beta2": 0.95, "weight_decay": 0.1, "gradient_clipping": 0.5, "learning_rate": 1e-2, "seed": 5}
NUMBERS |= {"global_batch_size": 8, "micro_batch_size": 1}  # powers of two, by which losses are divided
NUMBERS |= {"max_length": 32}  # the division of the layers into stages depends on it


def full_passes() -> list[list[Pass]]:
    """Five steps of two passes with 32 tokens each, all of weight 1/64: what divides the loss is exact in fp32."""
    found, drawn = [], torch.Generator().manual_seed(9)
    for _ in range(5):
        of_step = []
        for lengths in ((20, 12), (9, 7, 16)):
            tokens, targets = torch.randint(3, VOCABULARY, (2, 32), generator=drawn)
            inputs = torch.stack((torch.full((32,), 1 / 64), torch.zeros(32)))
            of_step.append(Pass(lengths, tokens, targets, inputs, "cross_entropy", {}, True))
        found.append(of_step)
    return found


def plan_of(settings: dict[str, Any], layout: tuple[int, int, int]) -> tuple[RunPlan, Division]:
    """The plan of a run with `NUMBERS` at a layout, and how a service divides its passes there."""
    sizes = {"tensor_parallel": layout[0], "pipeline_parallel": layout[1], "targets": TARGETS}
    own = {**settings, **sizes, **NUMBERS, "schedule": "constant", "warmup_steps": 0}
    plan = plan_run(make_settings(own), rank=distributed.get_rank(), world_size=distributed.get_world_size())
    return plan, Division(capacity=48, dp_size=plan.grid.dp_size, multiple=plan.layout.pad_multiple)


def train_five_steps(settings: dict[str, Any], layout: tuple[int, int, int], device: Any) -> dict[str, torch.Tensor]:
    """The full tensors after five steps of training, on rank 0."""
    plan, division = plan_of(settings, layout)
    grid, trained = plan.grid, TrainStep({ONLY: plan}, build_model({ONLY: plan}, device).runner, StopRequests())
    for of_step in full_passes():
        given = [batch for one in of_step for batch in division.micro_batches(one)[grid.dp_rank :: grid.dp_size]]
        mine = tuple(replace(batch, objectives=(), loss_inputs=None) for batch in given)
        largest = tuple(batch.tokens.numel() for batch in mine)
        report = trained.run({ONLY: TrainingStep(mine, 64, 64, (20, 12, 9, 7, 16), 64, largest, 0)})
        assert report.only.grad_norm > 0.5, "clipping is active"
    return trained.runner.full_state(ONLY, plan.layout_of(plan.adapter))


def five_steps_on_ranks(
    settings: dict[str, Any], layout: tuple[int, int, int], folder: str
) -> dict[str, torch.Tensor]:
    """`train_five_steps` of a rank."""
    return train_five_steps(settings, layout, join_as_launched(folder))
