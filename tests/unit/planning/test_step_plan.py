"""The plan of a step: a run of one adapter is a list of one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from megatron_tiedlora.config.settings import make_settings
from megatron_tiedlora.data.loader import GlobalBatch
from megatron_tiedlora.data.token_dataset import TokenDataset
from megatron_tiedlora.planning.run_plan import RunPlan, plan_run
from megatron_tiedlora.planning.step_plan import StepPlan


def plan_of(world_size: int = 1, **changes: Any) -> RunPlan:
    settings = make_settings({"model": "llama2-7b", "ds_config": "zero0.json", "global_batch_size": 8, **changes})
    return plan_run(settings, rank=0, world_size=world_size, weights=False)


def test_one_adapter_is_a_list_of_one() -> None:
    """Its layout is that of its plan, it shares with none, and a name alone changes no micro-batch and no work."""
    plan = plan_of(micro_batch_size=2)
    one, named = StepPlan({"": plan}), StepPlan({"a": plan})
    assert one.layout == plan.layout and not one.layout.named and named.layout.named
    assert one.rounds == [[("", number)] for number in range(4)]
    assert one.steps == plan.settings.max_steps and isinstance(one.steps, int)
    assert set(one.batches) == set(named.batches)
    assert (one.work, one.largest.tokens) == (named.work, named.largest.tokens)


@dataclass
class Lengths:
    """As much of a data set as the largest micro-batch needs."""

    lengths: list[int]

    @property
    def longest(self) -> int:
        return max(self.lengths)

    def lengths_of(self, indices: Sequence[int]) -> NDArray[np.int64]:
        return np.array([self.lengths[index] for index in indices])


def test_the_largest_packed_micro_batch_is_that_of_any_rank() -> None:
    """Rank 1 has most documents: three samples and the padding of their row."""
    plan = plan_of(2, packing=True, micro_batch_size=1, max_length=64)
    rows = [[[0]], [[1, 2, 3]]]
    batch = GlobalBatch(rows, rows, num_supervised=40, num_tokens=100, squared_lengths=0, consumed_samples=4)
    dataset = cast(TokenDataset, Lengths([40, 20, 20, 20]))
    largest = StepPlan({"": plan}, samples={"": (dataset, batch)}).largest
    assert largest.tokens == 64 and largest.documents == 4 and largest.longest == 40


def test_the_longest_document_is_that_of_any_adapter() -> None:
    plan = plan_of(packing=True, micro_batch_size=1, max_length=64)
    batch = GlobalBatch([[[0]]], [[[0]]], num_supervised=8, num_tokens=9, squared_lengths=0, consumed_samples=1)
    samples = {name: (cast(TokenDataset, Lengths([size])), batch) for name, size in (("a", 24), ("b", 40), ("c", 8))}
    assert StepPlan(dict.fromkeys(samples, plan), samples=samples).largest.longest == 40
