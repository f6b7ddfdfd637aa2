"""What is measured on held-out data: loss per supervised token, and exact match by greedy decoding."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from megatron_tiedlora.data.encode import TokenDataset
from megatron_tiedlora.data.loader import evaluation_batches, num_evaluation_batches
from megatron_tiedlora.evaluation.greedy import decode_batch
from megatron_tiedlora.evaluation.metrics import METRICS
from megatron_tiedlora.model.families.llama import LlamaConfig
from megatron_tiedlora.parallel.agreement import sum_over_ranks
from megatron_tiedlora.parallel.grid import Grid
from megatron_tiedlora.pipeline.running import Runner
from megatron_tiedlora.pipeline.stage import Stage
from megatron_tiedlora.training.run_data import ScoredSet

# Decoding reads all weights for each token, so a larger batch costs little; scores do not depend on it.
DECODING_BATCH = 24


def validation_loss(
    runner: Runner,
    dataset: TokenDataset,
    *,
    grid: Grid,
    device: torch.device,
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
    return sum_over_ranks([loss], device)[0] / dataset.stats.supervised_tokens


@dataclass(frozen=True)
class Scores:
    """Mean of a metric over a scored set, with what was predicted on this rank (for a look)."""

    metric: str
    mean: float
    num_samples: int
    predictions: Sequence[str]


@torch.no_grad()
def score_by_decoding(
    model: Stage,
    scored: ScoredSet,
    *,
    tokenizer: Any,
    config: LlamaConfig,
    grid: Grid,
    device: torch.device,
    max_new_tokens: int,
    check_stop: Callable[[], None],
    progress: bool = False,
) -> Scores:
    """Decode every prompt greedily, data-parallel ranks sharing the prompts, and score the texts.

    All ranks decode the same number of batches for the same number of steps, because under ZeRO-3 every call of the
    model is a collective; a rank without prompts left decodes the first one again and does not count it.
    """
    order = sorted(range(len(scored.prompts)), key=lambda index: len(scored.prompts[index]))
    batch_size = min(DECODING_BATCH, -(-len(order) // grid.dp_size))
    num_steps = -(-len(order) // (batch_size * grid.dp_size))
    total = 0.0
    predictions: list[str] = []

    def all_done(mine: bool) -> bool:
        check_stop()
        return sum_over_ranks([float(mine)], device)[0] == grid.world_size

    for step in tqdm(range(num_steps), desc="decoding", unit="batch", disable=not progress, leave=False):
        start = (step * grid.dp_size + grid.dp_rank) * batch_size
        indices = order[start : start + batch_size]
        prompts = [scored.prompts[index].tolist() for index in indices or order[:1]]
        decoded = decode_batch(
            model,
            prompts,
            config=config,
            eos_id=tokenizer.eos_token_id,
            max_new_tokens=max_new_tokens,
            all_done=all_done,
        )
        for index, tokens in zip(indices, decoded, strict=False):
            text = tokenizer.decode(tokens, skip_special_tokens=True)
            predictions.append(text)
            total += METRICS[scored.metric](text, scored.examples[index].references)
    mine = total if grid.tp_rank == 0 else 0.0  # a tensor-parallel group decodes the same prompts
    return Scores(scored.metric, sum_over_ranks([mine], device)[0] / len(order), len(order), predictions)
