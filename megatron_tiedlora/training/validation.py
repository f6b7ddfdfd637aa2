"""The loss per supervised token on held-out data."""

from __future__ import annotations

import itertools

from tqdm import tqdm

from megatron_tiedlora.data.loader import evaluation_batches, num_evaluation_batches
from megatron_tiedlora.data.tokenizer import padding_id
from megatron_tiedlora.engine.runner import Runner
from megatron_tiedlora.parallel.agreement import sum_over_ranks
from megatron_tiedlora.runtime.stopping import StopRequests
from megatron_tiedlora.training.plan import RunPlan
from megatron_tiedlora.training.run_data import RunData


def validation_loss(plan: RunPlan, runner: Runner, data: RunData, stop: StopRequests) -> float:
    """Mean loss over all supervised tokens of the validation split, the same on every rank.

    Raises:
        RunStopped: all ranks agreed to stop before a batch (in a pipeline: before a few batches).
    """
    dataset, grid, size = data.validation, plan.grid, plan.batches.micro_batch_size
    total = num_evaluation_batches(dataset, micro_batch_size=size, dp_size=grid.dp_size)
    batches = evaluation_batches(
        dataset,
        micro_batch_size=size,
        dp_rank=grid.dp_rank,
        dp_size=grid.dp_size,
        pad_id=padding_id(data.tokenizer),
        pad_multiple=plan.layout.pad_multiple,
    )
    loss = 0.0
    with tqdm(total=total, desc="validation", unit="batch", disable=grid.rank > 0, leave=False) as bar:
        while some := [batch.model_input for batch in itertools.islice(batches, runner.inputs_at_once)]:
            stop.agree(True)
            loss += runner.evaluate(some)
            bar.update(len(some))
    return sum_over_ranks([loss])[0] / dataset.stats.supervised_tokens
