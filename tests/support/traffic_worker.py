"""One rank of a traffic test: trains real steps through the package's own road and counts what each of them sends.

`count_steps` runs on every rank (see forked_ranks.py) and takes cases one after another.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from forked_ranks import join_as_launched
from saved_bytes import saved_bytes_per_token
from shared_tensors import tl6_shares
from torch import distributed

from megatron_tiedlora.adapters.adapter_bank import ONLY
from megatron_tiedlora.config.settings import make_settings
from megatron_tiedlora.parallel.groups import Traffic, TrafficCounter, named_handles
from megatron_tiedlora.planning.run_plan import RunPlan, plan_run


@dataclass(frozen=True)
class Case:
    """A run of one adapter or of several, of which one step is counted.

    Attributes:
        adapters: the settings of each, by name; those of a single one under ONLY.
        shares_micro_batches: whether adapters share them.
        ends: adapters that take no step after the first.
        checked: whether the run's checks of replicas and gradients are on in all steps.
        extra_message: put one more all-reduce into every block's forward pass.
        head_rows: in place of layer_specs.HEAD_ROWS.
        long_steps: let every step count as a long one, in which ranks agree on stopping after each micro-batch.
        early_stop: False to let recompute go on when all that the backward pass needs is there again.
        steps_before: steps before the counted one; two of them with the run's checks of gradients.
        shares: in which way of `shared_tensors` layers share the tensors of tl6.
    """

    adapters: Mapping[str, dict[str, Any]]
    shares_micro_batches: bool = True
    ends: tuple[str, ...] = ()
    checked: bool = False
    extra_message: bool = False
    head_rows: int | None = None
    long_steps: bool = False
    early_stop: bool = True
    steps_before: int = 0
    shares: str | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """Of the only adapter, or of the first."""
        return next(iter(self.adapters.values()))

    def plans(self, rank: int, ranks: int) -> dict[str, RunPlan]:
        """The plan of each adapter on a rank."""
        return {
            name: plan_run(make_settings(settings), rank=rank, world_size=ranks)
            for name, settings in self.adapters.items()
        }


@dataclass(frozen=True)
class Counted:
    """What a rank counted.

    Attributes:
        traffic: of the counted step.
        first: of the first step, which is the counted one if there is none before.
        shapes: (rows, length, supervised tokens, adapters) of the counted step's micro-batches.
        base_bytes: of the base parameters that the rank's stage was built with.
        saved_bytes_per_token: what its last block keeps for the backward pass, by storage, parameters left out; of a
            single adapter.
    """

    traffic: Traffic
    first: Traffic
    shapes: list[tuple[int, int, int, int]]
    base_bytes: int
    saved_bytes_per_token: float


def count_steps(cases: list[Case], folder: str) -> list[Counted]:
    """Every case on this rank."""
    device = join_as_launched(folder)
    found = []
    for case in cases:
        with tl6_shares(case.shares):
            found.append(_count(case, device))
    return found


def _count(case: Case, device: torch.device) -> Counted:
    from megatron_tiedlora.data.tokenizer import padding_id
    from megatron_tiedlora.planning.adapter_plans import prepare_data
    from megatron_tiedlora.planning.step_plan import micro_batch_capacity
    from megatron_tiedlora.runtime.stopping import StopRequests
    from megatron_tiedlora.training import build
    from megatron_tiedlora.training.step import GUARDED_STEPS, StepChecks, TrainStep

    plans = case.plans(distributed.get_rank(), distributed.get_world_size())
    data = {name: prepare_data(plan) for name, plan in plans.items()}
    with _patched(case):
        start_engine, of_base = build._start_engine, list[float]()

        def look(given: Any, model: Any, *others: Any) -> Any:
            plan = next(iter(plans.values()))
            saved = _saved_bytes_per_token(model.stage, plan) if ONLY in plans else 0.0
            of_base[:] = _base_bytes(model.stage, plan), saved
            return start_engine(given, model, *others)

        build._start_engine = look
        try:
            runner = build.build_model(plans, device).runner
        finally:
            build._start_engine = start_engine
        # On a busy machine the step before may have been a long one, after which ranks send a little more.
        long_seconds = 0.0 if case.long_steps else math.inf
        capacity = micro_batch_capacity(plans, shares=case.shares_micro_batches) if ONLY not in plans else 0
        step = TrainStep(plans, runner, StopRequests(), capacity=capacity, long_seconds=long_seconds)
        for name, plan in plans.items():
            assert case.checked or plan.settings.replica_check_steps == 0
            if not case.checked:
                made = step.checks[name] = StepChecks(runner, name, check_steps=0)
                if case.steps_before != GUARDED_STEPS and made._guard is not None:
                    made._guard.remove()
                    made._guard = None
        loaders = {
            name: plan.training_loader(data[name].train, pad_id=padding_id(data[name].tokenizer))
            for name, plan in plans.items()
        }
        shapes, accumulate, counted = list[tuple[int, int, int, int]](), runner.accumulate, list[Traffic]()

        def seen(batches: Any, *arguments: Any) -> dict[str, float]:
            shapes[:] = [(*batch.tokens.shape, batch.num_supervised, len(batch.shares)) for batch in batches]
            return accumulate(batches, *arguments)

        runner.accumulate = seen  # type: ignore[method-assign]
        for number in range(1 + case.steps_before):
            steps = {name: next(loader) for name, loader in loaders.items() if not number or name not in case.ends}
            with TrafficCounter(named_handles(runner.groups)) as counter:
                report = step.run(steps)
            assert all(own.failure is None for own in report.adapters.values()), report
            counted.append(counter.traffic)
    runner.engine.destroy()
    return Counted(counted[-1], counted[0], shapes, int(of_base[0]), of_base[1])


def _base_bytes(stage: Any, plan: Any) -> int:
    base = [p for name, p in stage.named_parameters() if name.startswith("layers.")]
    if plan.engine.zero_stage == 3:
        assert all(hasattr(parameter, "ds_id") for parameter in base), "partitioned as they are made, the head too"
    return sum(parameter.numel() * parameter.element_size() for parameter in base)


@contextlib.contextmanager
def _patched(case: Case) -> Iterator[None]:
    from torch.utils.checkpoint import set_checkpoint_early_stop

    from megatron_tiedlora.model import layer_specs
    from megatron_tiedlora.model.attention import Attention

    head_rows, attend, linear = layer_specs.HEAD_ROWS, Attention.attend, torch.nn.functional.linear

    def with_extra_message(self: Any, hidden: Any, positions: Any, tensor_parallel: Any, **keywords: Any) -> Any:
        distributed.all_reduce(torch.zeros(1), group=tensor_parallel.group.handle)
        return attend(self, hidden, positions, tensor_parallel, **keywords)

    if case.head_rows is not None:
        layer_specs.HEAD_ROWS = case.head_rows
    if case.extra_message:
        Attention.attend = with_extra_message  # type: ignore[method-assign]
    try:
        with set_checkpoint_early_stop(case.early_stop):
            yield
    finally:
        layer_specs.HEAD_ROWS, Attention.attend = head_rows, attend  # type: ignore[method-assign]
        torch.nn.functional.linear = linear  # ZeRO-3 leaves its own behind


def _saved_bytes_per_token(stage: Any, plan: Any) -> float:
    """The stage's last block on a sequence of 256 tokens, with the adapter where it has one."""
    from megatron_tiedlora.engine.engine import parameter_access

    with parameter_access(plan.engine)(list(stage.parameters())):
        return saved_bytes_per_token(stage, plan.dtype)
