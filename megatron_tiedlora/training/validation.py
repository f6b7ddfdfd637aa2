"""The loss per supervised token on held-out data."""

from __future__ import annotations

import itertools
from collections.abc import Callable

from tqdm import tqdm

from megatron_tiedlora.data.encode import TokenDataset
from megatron_tiedlora.data.loader import evaluation_batches, num_evaluation_batches
from megatron_tiedlora.engine.runner import Runner
from megatron_tiedlora.parallel.agreement import sum_over_ranks
from megatron_tiedlora.parallel.grid import Grid


def validation_loss(
    runner: Runner,
    dataset: TokenDataset,
    *,
    grid: Grid,
    micro_batch_size: int,
    pad_id: int,
    pad_multiple: int,
    check_stop: Callable[[], None],
    progress: bool = False,
) -> float:
    """Mean loss over all supervised tokens of `dataset`, the same on every rank.

    Args:
        check_stop: called before each batch (each few in a pipeline), on all ranks together; may raise.
    """
    total = num_evaluation_batches(dataset, micro_batch_size=micro_batch_size, dp_size=grid.dp_size)
    batches = evaluation_batches(
        dataset,
        micro_batch_size=micro_batch_size,
        dp_rank=grid.dp_rank,
        dp_size=grid.dp_size,
        pad_id=pad_id,
        pad_multiple=pad_multiple,
    )
    loss = 0.0
    with tqdm(total=total, desc="validation", unit="batch", disable=not progress, leave=False) as bar:
        while some := [batch.model_input for batch in itertools.islice(batches, runner.inputs_at_once)]:
            check_stop()
            loss += runner.evaluate(some)
            bar.update(len(some))
    return sum_over_ranks([loss])[0] / dataset.stats.supervised_tokens
