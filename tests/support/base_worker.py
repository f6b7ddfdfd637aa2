"""One rank that builds the base of a run at a layout and a ZeRO stage, and what its quantised weights hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from forked_ranks import join_as_launched
from torch import distributed

from megatron_tiedlora.adapters.adapter_bank import ONLY
from megatron_tiedlora.config.settings import make_settings
from megatron_tiedlora.engine.engine import parameter_access
from megatron_tiedlora.parallel.frozen_weight import frozen_weights
from megatron_tiedlora.parallel.quantised_weight import QuantisedWeight
from megatron_tiedlora.planning.run_plan import plan_run
from megatron_tiedlora.training.build import build_model

Values = dict[str, torch.Tensor]


def base_values(cases: Sequence[dict[str, Any]], folder: str) -> list[tuple[Values, int, int]]:
    """For each case of settings: this rank's shards by name as the engine has them, bytes stored and predicted."""
    device = join_as_launched(folder)
    found = []
    for settings in cases:
        plan = plan_run(
            make_settings(settings), rank=distributed.get_rank(), world_size=distributed.get_world_size()
        )
        built = build_model({ONLY: plan}, device)
        runner = built.runner
        values = {}
        for name, weight in frozen_weights(runner.stage).items():
            with parameter_access(plan.engine)(list(weight.parameters.values())):
                if isinstance(weight, QuantisedWeight):
                    values[name] = weight.values().clone()
        parts = plan.grid.dp_size if plan.engine.zero_stage == 3 else 1
        found.append((values, built.bytes_kept[plan.grid.rank], plan.stage.base_bytes // parts))
        runner.engine.destroy()
    return found
