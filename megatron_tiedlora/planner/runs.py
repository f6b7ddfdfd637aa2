"""The run that is planned: of one adapter, or of those of --adapters. What a layout of either has is made here."""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from megatron_tiedlora.checkpoint.sources import ModelSource
from megatron_tiedlora.config.adapters_file import PER_ADAPTER, read_adapters
from megatron_tiedlora.config.settings import Settings, make_settings
from megatron_tiedlora.planning.layout import Layout
from megatron_tiedlora.training.first_step import FirstStep
from megatron_tiedlora.training.plan import RunPlan, plan_run

if TYPE_CHECKING:  # a plan of one adapter waits for neither, and one without data not for what reads it
    from megatron_tiedlora.training.group_plan import GroupPlan
    from megatron_tiedlora.training.run_data import RunData

_ALONE = ""  # the name of an adapter without --adapters


class Variant(NamedTuple):
    """A layout of a run, and the step that it is planned by: layouts share it that have the same micro-batches.

    `is_default` says whether micro-batch, sequence parallelism and recompute are those of a run without their flags.
    """

    layout: Layout
    step: FirstStep | GroupPlan
    is_default: bool


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
    data: Mapping[str, RunData] = field(default_factory=dict)
    _steps: dict[Hashable, FirstStep | GroupPlan] = field(default_factory=dict)

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
        settings = self.settings
        if settings.adapters is None:
            return {_ALONE: settings}
        assumed = {"global_batch_size"} - settings.model_fields_set
        given = {name: value for name, value in self.values.items() if name not in assumed}
        return read_adapters(settings.adapters, make_settings(given))

    def assumes(self, name: str) -> bool:
        """Whether a setting is a default, at least for one adapter."""
        if name in self.settings.model_fields_set:
            return False
        return name not in PER_ADAPTER or any(name not in own.model_fields_set for own in self.adapters.values())

    @property
    def common_batch(self) -> int:
        """The most samples that divide the global batch of each adapter."""
        given = (own for own in self.adapters.values() if "global_batch_size" in own.model_fields_set)
        assumed = [self.settings.global_batch_size] if self.assumes("global_batch_size") else []
        return math.gcd(*(own.global_batch_size for own in given), *assumed)

    @property
    def plans_of_step(self) -> Mapping[str, RunPlan]:
        """The plan of each adapter in one of the layouts, for what is the same in all."""
        return next(iter(self._steps.values())).plans

    def plans(self, choices: Mapping[str, Any], *, world_size: int) -> dict[str, RunPlan]:
        """The plan of each adapter with these settings of a layout.

        Raises:
            UserError: as a run does.
        """
        settings = make_settings({**self.values, **choices, "world_size": world_size})
        where = {"rank": 0, "world_size": world_size}
        if settings.adapters is None:
            return {_ALONE: plan_run(settings, **where, weights=False, source=self.source)}
        from megatron_tiedlora.training.member_plans import plan_group

        return plan_group(settings, **where, weights=False, source=self.source)

    def read_data(self, plans: Mapping[str, RunPlan]) -> None:
        """Read the data, which is the same for all layouts. Raises UserError as a run does."""
        if not any(plan.reads_data for plan in plans.values()):
            return
        if self.settings.adapters is None:
            from megatron_tiedlora.training.run_data import prepare_data

            self.data = {name: prepare_data(plan) for name, plan in plans.items()}
        else:
            from megatron_tiedlora.training.member_plans import prepare_group_data

            self.data = prepare_group_data(plans)

    def variants(
        self, plans: Mapping[str, RunPlan], rows: Sequence[int], sequences: Sequence[bool], recomputes: Sequence[str]
    ) -> Iterator[Variant]:
        """The layouts that differ from the plans in choices that no check depends on."""
        plans = {name: self._counted(name, plan) for name, plan in plans.items()}
        base = self._first_step(plans, with_data=False).layout
        for size, shards in itertools.product(rows, sequences):
            key = (base.tp_size, base.pp_size, base.dp_size, size, shards)
            if key not in self._steps:
                self._steps[key] = self._first_step({n: _varied(plan, size, shards) for n, plan in plans.items()})
            step = self._steps[key]
            shared = replace(base, rows=size, micro_batches=step.layout.micro_batches, shards_sequences=shards)
            for recompute in recomputes:
                is_default = (size, shards, recompute) == (base.rows, base.shards_sequences, base.recompute)
                yield Variant(replace(shared, recompute=recompute), step, is_default)

    def alone(self, variant: Variant) -> list[FirstStep]:
        """The first step of each adapter of --adapters as a run of its own, in the same layout."""
        found = []
        for name, plan in variant.step.plans.items():
            own = plan.layout
            layout = replace(variant.layout, adapters=own.adapters, named=False, micro_batches=own.micro_batches)
            found.append(FirstStep(plan, replace(layout, compiled=own.compiled), self.data.get(name)))
        return found

    def _counted(self, name: str, plan: RunPlan) -> RunPlan:
        return plan.counted(len(self.data[name].train)) if self.data else plan

    def _first_step(self, plans: Mapping[str, RunPlan], *, with_data: bool = True) -> FirstStep | GroupPlan:
        data = self.data if with_data else {}
        if self.settings.adapters is None:
            (plan,) = plans.values()
            return FirstStep(plan, plan.layout, data.get(_ALONE))
        from megatron_tiedlora.training.group_plan import first_step_of

        return first_step_of(plans, data, shares=self.settings.share_micro_batches)


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
