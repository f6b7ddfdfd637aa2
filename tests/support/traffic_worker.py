"""One rank of a traffic test: trains real steps through the package's own road and counts what one of them sends.

`count_steps` runs on every rank (see forked_ranks.py) and takes cases one after another.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from forked_ranks import join_as_launched
from saved_bytes import saved_bytes_per_token
from shared_tensors import tl6_shares
from torch import distributed

from megatron_tiedlora.parallel.groups import Traffic, TrafficCounter, named_handles


@dataclass(frozen=True)
class Case:
    """A run of which one step is counted.

    Attributes:
        extra_message: put one more all-reduce into every block's forward pass.
        head_rows: in place of layer_specs.HEAD_ROWS.
        long_steps: let every step count as a long one, in which ranks agree on stopping after each micro-batch.
        steps_before: steps that are not counted, with the run's checks of gradients. Without them, nothing is checked.
        shares: in which way of `shared_tensors` layers share the tensors of tl6.
        early_stop: False to let recompute go on when all that the backward pass needs is there again.
    """

    settings: dict[str, Any]
    extra_message: bool = False
    head_rows: int | None = None
    long_steps: bool = False
    early_stop: bool = True
    steps_before: int = 0
    shares: str | None = None


@dataclass(frozen=True)
class Counted:
    """What a rank counted.

    Attributes:
        shapes: (rows, length, supervised tokens) of the step's micro-batches.
        base_bytes: of the base parameters that the rank's stage was built with.
        saved_bytes_per_token: what its last block keeps for the backward pass, by storage, parameters left out.
    """

    traffic: Traffic
    shapes: list[tuple[int, int, int]]
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
    from megatron_tiedlora.adapters.adapter_bank import ONLY
    from megatron_tiedlora.config.settings import make_settings
    from megatron_tiedlora.data.tokenizer import padding_id
    from megatron_tiedlora.planning.adapter_plans import prepare_data
    from megatron_tiedlora.planning.run_plan import plan_run
    from megatron_tiedlora.runtime.stopping import StopRequests
    from megatron_tiedlora.training import build
    from megatron_tiedlora.training.step import GUARDED_STEPS, StepChecks, TrainStep

    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    plan = plan_run(make_settings(case.settings), rank=rank, world_size=world_size)
    assert plan.settings.replica_check_steps == 0
    data = prepare_data(plan)
    with _patched(case):
        start_engine, of_base = build._start_engine, list[float]()

        def look(plans: Any, model: Any, *others: Any) -> Any:
            of_base[:] = _base_bytes(model.stage, plan), _saved_bytes_per_token(model.stage, plan)
            return start_engine(plans, model, *others)

        build._start_engine = look
        try:
            runner = build.build_model({ONLY: plan}, device).runner
        finally:
            build._start_engine = start_engine
        # On a busy machine the step before may have been a long one, after which ranks send a little more.
        train_step = TrainStep(
            {ONLY: plan}, runner, StopRequests(), long_seconds=0.0 if case.long_steps else math.inf
        )
        loader = plan.training_loader(data.train, pad_id=padding_id(data.tokenizer))
        assert case.steps_before in (0, GUARDED_STEPS), "the last checked step says more than those after it"
        train_step.checks[ONLY] = StepChecks(runner, ONLY, check_steps=0, guarded_steps=case.steps_before)
        for _ in range(case.steps_before):
            train_step.run({ONLY: next(loader)})
        step = next(loader)
        with TrafficCounter(named_handles(runner.groups)) as counter:
            _ = train_step.run({ONLY: step}).only
    runner.engine.destroy()
    shapes = [(*batch.labels.shape, batch.num_supervised) for batch in step.micro_batches]
    base_bytes, saved = of_base
    return Counted(counter.traffic, shapes, int(base_bytes), saved)


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
