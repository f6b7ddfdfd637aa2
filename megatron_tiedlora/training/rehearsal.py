"""A trainer whose steps are handed in: real steps of a run that reads no data and writes nothing.

For benchmarks and tests, which take steps with `Trainer.take_step` and `Trainer.count_step`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from megatron_tiedlora.engine.runner import Runner
from megatron_tiedlora.runtime.run_folder import RunFolder
from megatron_tiedlora.runtime.stopping import StopWatch
from megatron_tiedlora.training.build import BuiltModel
from megatron_tiedlora.training.loop import Trainer
from megatron_tiedlora.training.plan import RunPlan
from megatron_tiedlora.training.throughput import Meter, Peak


def rehearsing_trainer(plan: RunPlan, built: BuiltModel, runner: Runner, device: torch.device) -> Trainer:
    """A trainer for steps alone; it cannot `run`."""
    data: Any = None  # steps are handed in
    meter = Meter(plan.source.shape, plan.adapter, Peak(1.0, "not asked for"))
    return Trainer(plan, data, runner, built.base, RunFolder(Path(os.devnull)), device, StopWatch(), None, meter)
