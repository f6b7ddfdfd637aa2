"""The run that is planned, with its adapters, and what each of its layouts has."""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from megatron_tiedlora.adapters.adapter_bank import ONLY
from megatron_tiedlora.checkpoint.sources import ModelSource
from megatron_tiedlora.config.adapters_file import PER_ADAPTER
from megatron_tiedlora.config.settings import Settings, make_settings
from megatron_tiedlora.planning.layout import Layout
from megatron_tiedlora.training.adapter_plans import Plans, adapter_settings, plan_adapters
from megatron_tiedlora.training.plan import RunPlan
from megatron_tiedlora.training.run_data import Data, counted, prepare_all_data
from megatron_tiedlora.training.step_plan import StepPlan


@dataclass
class PlannedRun:
    """A run by its settings, on a model.

    Attributes:
        settings: tiedlora train's, with the defaults of a plan.
        on_gpu: whether its ranks run on GPUs.
        data: of each adapter, once `read_data` was called; empty for a preset, or if no rows are named.
    """

    settings: Settings
    source: ModelSource
    on_gpu: bool
    data: Data = field(default_factory=dict)
    _steps: dict[Hashable, StepPlan] = field(default_factory=dict)

    @property
    def values(self) -> dict[str, Any]:
        """The settings that were given, and those that a plan gives."""
        return {
            **{name: getattr(self.settings, name) for name in self.settings.model_fields_set},
            **planned_values(self.settings, self.on_gpu),
        }

    @cached_property
    def adapters(self) -> dict[str, Settings]:
        """The settings of each adapter, without the batch that a plan assumes. Raises UserError as a run does."""
        assumed = {"global_batch_size"} - self.settings.model_fields_set
        return adapter_settings(make_settings({n: value for n, value in self.values.items() if n not in assumed}))

    def assumes(self, name: str) -> bool:
        """Whether a setting is a default, at least for one adapter."""
        if self.given(name):
            return False
        return name not in PER_ADAPTER or any(name not in own.model_fields_set for own in self.adapters.values())

    def given(self, name: str) -> bool:
        """Whether a flag was given."""
        return name in self.settings.model_fields_set

    def choices(self, name: str, values: Sequence[Any]) -> Sequence[Any]:
        """The values of a setting: the one that was given, or all."""
        return [getattr(self.settings, name)] if self.given(name) else values

    def grids(self, world_size: int) -> list[tuple[int, int]]:
        """Tensor and pipeline parallel sizes whose product divides the ranks; a given one in any case."""
        tensor, pipeline = (self.choices(f"{name}_parallel", divisors(world_size)) for name in ("tensor", "pipeline"))
        found = [(t, p) for t in tensor for p in pipeline if world_size % (t * p) == 0]
        return found or [(tensor[0], pipeline[0])]

    def rows(self, dp_size: int) -> list[int]:
        """Rows of a micro-batch: the divisors of a rank's part of the global batch, of each adapter's if several."""
        if self.settings.micro_batch_size is not None:
            return [self.settings.micro_batch_size]
        share, rest = divmod(self.common_batch, max(dp_size, 1))
        return [1] if rest else divisors(share)

    def sequences(self, tp_size: int) -> Sequence[bool]:
        """Whether sequences are sharded; of no consequence without tensor parallelism."""
        return self.choices("sequence_parallel", [self.settings.sequence_parallel] if tp_size == 1 else [True, False])

    @cached_property
    def common_batch(self) -> int:
        """The most samples that divide the global batch of each adapter."""
        given = (own for own in self.adapters.values() if "global_batch_size" in own.model_fields_set)
        assumed = [self.settings.global_batch_size] if self.assumes("global_batch_size") else []
        return math.gcd(*(own.global_batch_size for own in given), *assumed)

    @property
    def plans_of_step(self) -> Plans:
        """The plan of each adapter in one of the layouts, for what is the same in all."""
        return next(iter(self._steps.values())).plans

    def plans(self, choices: Mapping[str, Any], *, world_size: int) -> dict[str, RunPlan]:
        """The plan of each adapter with these settings of a layout.

        Raises:
            UserError: as a run does.
        """
        settings = make_settings({**self.values, **choices, "world_size": world_size})
        return plan_adapters(settings, rank=0, world_size=world_size, weights=False, source=self.source)

    def read_data(self, plans: Plans) -> None:
        """Read the data, which is the same for all layouts. Raises UserError as a run does."""
        if any(plan.reads_data for plan in plans.values()):
            self.data = prepare_all_data(plans)

    def variants(
        self, plans: Plans, rows: Sequence[int], sequences: Sequence[bool], recomputes: Sequence[str]
    ) -> Iterator[tuple[Layout, StepPlan, bool]]:
        """Layout, step and `is_default` of the candidates that differ in choices that no check depends on."""
        plans = counted(plans, self.data) if self.data else plans
        shares = self.settings.share_micro_batches
        base = StepPlan(plans, shares).layout
        for size, shards in itertools.product(rows, sequences):
            key = (base.tp_size, base.pp_size, base.dp_size, size, shards)
            if key not in self._steps:
                varied = {name: _varied(plan, size, shards) for name, plan in plans.items()}
                self._steps[key] = StepPlan.first(varied, self.data, shares=shares)
            step = self._steps[key]
            shared = replace(base, rows=size, micro_batches=step.layout.micro_batches, shards_sequences=shards)
            for recompute in recomputes:
                is_default = (size, shards, recompute) == (base.rows, base.shards_sequences, base.recompute)
                yield replace(shared, recompute=recompute), step, is_default

    def alone(self, layout: Layout, step: StepPlan) -> list[tuple[Layout, StepPlan]]:
        """The same layout for a run of each adapter of its own, and the first step of that."""
        found = []
        for name, plan in step.plans.items():
            own = StepPlan({ONLY: plan}, samples=None if step.samples is None else {ONLY: step.samples[name]})
            changes = {key: getattr(own.layout, key) for key in ("adapters", "named", "micro_batches", "compiled")}
            found.append((replace(layout, **changes), own))
        return found


def _varied(plan: RunPlan, rows: int, shards_sequences: bool) -> RunPlan:
    """The plan of a run with these choices."""
    settings = plan.settings.completed(sequence_parallel=shards_sequences)
    return replace(plan, settings=settings, batches=replace(plan.batches, micro_batch_size=rows))


def planned_values(settings: Settings, on_gpu: bool) -> dict[str, Any]:
    """The settings of a plan that differ from a run's."""
    return {
        "max_length": settings.max_length,
        "global_batch_size": settings.global_batch_size,
        "dry_run": True,
        "plan_for": "gpu" if on_gpu else "cpu",
    }


def divisors(number: int) -> list[int]:
    """The divisors of a number, in ascending order."""
    return [size for size in range(1, number + 1) if number % size == 0]
