"""Read an optimizer's moments by name from any ZeRO stage and write them into any other.

At stage 0 the optimizer is torch's; else this module knows where DeepSpeed's stores them. Values are fp32 tensors of
the rank's parameter, gathered over its data-parallel ranks; adapters/gathering joins the shards of tensor and pipeline
parallelism. Reading and writing are collective: every rank calls them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from megatron_tiedlora.adapters.gathering import MOMENTS


def read_moments(
    optimizer: Any, parameters: Mapping[str, nn.Parameter], *, zero_stage: int
) -> dict[str, dict[str, torch.Tensor]]:
    """The moments after at least one step, by moment and parameter name: fp32, in the parameters' shapes."""
    from deepspeed.utils import safe_get_full_optimizer_state

    state: dict[str, dict[str, torch.Tensor]] = {moment: {} for moment in MOMENTS}
    for name, parameter in parameters.items():
        for moment in MOMENTS:
            if zero_stage == 0:
                full = optimizer.state[parameter][moment]
            else:
                full = safe_get_full_optimizer_state(parameter, moment)
            state[moment][name] = full.detach().to(torch.float32, copy=True)
    return state


def write_moments(
    optimizer: Any,
    parameters: Mapping[str, nn.Parameter],
    *,
    zero_stage: int,
    moments: Mapping[str, Mapping[str, torch.Tensor]],
    step: int,
    dp_rank: int = 0,
) -> None:
    """Write moments, by moment and parameter name, and the step count into an optimizer that has not stepped yet.

    torch's AdamW creates its state at the first step, so it is created here, in the layout of the engine's partitions.
    """
    if zero_stage == 0:
        for name, parameter in parameters.items():
            optimizer.state[parameter] = _fresh_state(parameter, step)
            for moment in MOMENTS:
                optimizer.state[parameter][moment].copy_(moments[moment][name])
        return
    flat_masters = (
        optimizer.fp32_partitioned_groups_flat if zero_stage == 3 else optimizer.single_partition_of_fp32_groups
    )
    for flat in flat_masters:
        optimizer.optimizer.state[flat] = _fresh_state(flat, step)
    if zero_stage < 3:
        optimizer._lazy_init_hp_params_optimizer_state()
    for name, parameter in parameters.items():
        for moment in MOMENTS:
            _write_partition(optimizer, parameter, moment, moments[moment][name], zero_stage, dp_rank)


def _fresh_state(parameter: torch.Tensor, step: int) -> dict[str, torch.Tensor]:
    zeros = {moment: torch.zeros_like(parameter, memory_format=torch.preserve_format) for moment in MOMENTS}
    return {"step": torch.tensor(float(step)), **zeros}


def _write_partition(
    optimizer: Any, parameter: nn.Parameter, moment: str, value: torch.Tensor, zero_stage: int, dp_rank: int
) -> None:
    if zero_stage < 3:
        from deepspeed.utils import safe_set_full_optimizer_state

        safe_set_full_optimizer_state(parameter, value.to(parameter.device), moment)
        return
    # DeepSpeed's ZeRO-3 setter fails if the ranks do not divide a parameter, whose last partition is then padded.
    partition, _ = optimizer._get_fp32_opt_state_partition(
        parameter, release_swap_buffers=False, optim_state_key=moment
    )
    start = partition.numel() * dp_rank
    piece = value.flatten()[start : start + partition.numel()]
    partition.zero_()
    partition[: piece.numel()].copy_(piece)
