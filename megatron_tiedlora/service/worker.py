"""Run the operations of a training service on one rank: the adapters that are there, their passes, steps and files.

All ranks run the same commands in the same order. The adapters share the frozen base, and their passes share
micro-batches, as in a run of several adapters. Sums over ranks are made for one model after the other, so that their
order of additions does not depend on other models.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch

from megatron_tiedlora.adapters.tied_adapter import make_adapter_config, targets_of
from megatron_tiedlora.base.files import new_folder
from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.checkpoint.base_identity import check_same_base
from megatron_tiedlora.checkpoint.native_adapter import NativeAdapter, save_adapter
from megatron_tiedlora.checkpoint.resume import (
    Checkpoint,
    Progress,
    load_checkpoint,
    stored_moments,
    write_checkpoint_files,
)
from megatron_tiedlora.data.loader import shared_micro_batch
from megatron_tiedlora.parallel.agreement import SentTensor, decided_by_rank_0, gather_on_rank_0, sum_over_ranks
from megatron_tiedlora.parallel.objectives import Objective
from megatron_tiedlora.planning.run_plan import RunPlan
from megatron_tiedlora.service.batches import Batches, Division
from megatron_tiedlora.service.operations import (
    Create,
    Done,
    Failure,
    Load,
    Operation,
    OperationResult,
    Pass,
    PassResult,
    Sample,
    Save,
    Step,
    StepResult,
)
from megatron_tiedlora.training.build import BuiltModel, make_adapter, own_optimizer, restore_moments
from megatron_tiedlora.training.step import AdapterStep, StepChecks, require_finite, take_steps

_SampleAll = Callable[[Sequence[Sample]], list[OperationResult]]
_ABSENT = Failure("the model is not in memory, because it could not be created or loaded", by_user=False)
CHECKED_STEPS = 2  # the first steps of a model after which the replicas of its tensors are compared


@dataclass(frozen=True)
class WorkerCommand:
    """What all ranks do next, in this order.

    Attributes:
        unload: the models whose tensors are freed.
        fresh: the models whose gradients are dropped.
        operations: operations with their models. Passes in a row share micro-batches, those of a model in their order;
            all of them have a backward pass, or none. Samples in a row share batches.
    """

    unload: tuple[str, ...] = ()
    fresh: tuple[str, ...] = ()
    operations: tuple[tuple[str, Operation], ...] = ()


class Worker:
    """The models of a service on one rank."""

    def __init__(self, plan: RunPlan, built: BuiltModel, division: Division, sampler: _SampleAll) -> None:
        """Take over a model that was built without adapters.

        Args:
            plan: the plan of the layout. Its adapter decides the adapted layers; models may have other sizes.
            sampler: a function that all ranks call, and that returns the results of samples on rank 0.
        """
        self.plan, self.runner, self.division = plan, built.runner, division
        self._identity, self._sampler = built.base_identity, sampler
        self._steps = dict[str, int]()  # the number of finished steps of each model
        self._checks = dict[str, StepChecks]()

    def run(self, command: WorkerCommand) -> list[OperationResult]:
        """Run a command. All ranks must call this method with the same command. Return the results of its operations on
        rank 0; those of other ranks are not complete."""
        for model in command.unload:
            self._remove(model)
        self.runner.optimizers.clear(model for model in command.fresh if model in self._steps)
        results = list[OperationResult]()
        for kind, some in groupby(command.operations, key=lambda given: type(given[1])):
            if kind is Pass:
                results += self._passes([(model, one) for model, one in some if isinstance(one, Pass)])
            elif kind is Sample:
                results += self._sampler([one for _, one in some if isinstance(one, Sample)])
            else:
                results += [self._alone(model, operation) for model, operation in some]
        return results

    def _passes(self, given: Sequence[tuple[str, Pass]]) -> list[OperationResult]:
        """Run passes of models in memory. The gradients of a model whose loss is not finite are dropped. Return the
        results of all passes on rank 0."""
        passes = [(model, one) for model, one in given if model in self._steps]
        if not passes:
            return [_ABSENT] * len(given)
        batches, backward, grid = Batches(self.division, passes), passes[0][1].backward, self.plan.grid
        inputs, tokens = [shared_micro_batch(some) for some in batches.on_rank(grid.dp_rank)], list[torch.Tensor]()
        if backward:
            self.runner.accumulate(inputs, {model: (1.0,) for model, _ in passes}, lambda: None, tokens=tokens)
        else:
            self.runner.evaluate(inputs, tokens=tokens)
        mine = [torch.cat(tokens).float().cpu()] if self.runner.counts_loss else []
        by_rank = gather_on_rank_0(mine, kind=list[SentTensor])
        results = list[OperationResult]()
        if by_rank is not None:
            # Ranks are numbered by stage, then data-parallel rank. Only the last stage has numbers.
            logprobs = batches.by_pass([-one for own in by_rank for one in own])
            results = [_result_of(one, own) for (_, one), own in zip(passes, logprobs, strict=True)]
        failed = [model for (model, _), own in zip(passes, results, strict=False) if isinstance(own, Failure)]
        self.runner.optimizers.clear(decided_by_rank_0(lambda: failed, kind=list[str]) if backward else [])
        left = iter(results)
        return [next(left, Done()) if model in self._steps else _ABSENT for model, _ in given]

    def _alone(self, model: str, operation: Operation) -> OperationResult:
        if model not in self._steps and not isinstance(operation, Create):
            return _ABSENT
        try:
            if isinstance(operation, Step):
                return self._step(model, operation)
            if isinstance(operation, Save):
                self._save(model, operation)
            elif isinstance(operation, Create | Load):
                self._start(model, operation)
        except UserError as error:  # raised on every rank
            return Failure(str(error), by_user=not isinstance(operation, Save))
        return Done()

    # Models ----------------------------------------------------------------------------------------------------------

    def _start(self, model: str, given: Create | Load) -> None:
        """Add a model, or replace its weights. Rank 0 reads a checkpoint, without whose optimizer steps start at 0."""
        found, state = None, None
        if given.folder:
            found = decided_by_rank_0(lambda: load_checkpoint(Path(given.folder)), kind=Checkpoint)
            check_same_base(found.adapter.base_identity, self._identity, source=given.folder, differs=False)
            config, state = found.adapter.config, found.adapter.state
        else:
            assert isinstance(given, Create)
            layers, targets = self.plan.adapter.layers, targets_of(self.plan.source.shape, given.targets)
            config = make_adapter_config(
                given.method, rank=given.rank, alpha=given.alpha, layers=layers, targets=targets, seed=given.seed
            )
        adapter = make_adapter(self.plan, config, state, self.runner.device)
        self.runner.adapters[model] = adapter
        self.runner.optimizers.own[model] = own_optimizer(self.plan.settings, adapter)
        self._checks[model] = StepChecks(self.runner, model, check_steps=CHECKED_STEPS, guards=False)
        self._steps[model] = 0
        if found is not None and given.optimizer:
            restore_moments(self.runner.optimizers, model, found)
            self._steps[model] = found.progress.step

    def _remove(self, model: str) -> None:
        for held in (self.runner.adapters, self.runner.optimizers.own, self._checks, self._steps):
            held.pop(model)

    def _step(self, model: str, given: Step) -> OperationResult:
        optimizers, number = self.runner.optimizers, self._steps[model] + 1
        numbers = {"lr": given.learning_rate, "betas": (given.beta1, given.beta2), "eps": given.eps}
        optimizers.set_numbers(model, max_norm=given.max_norm, weight_decay=given.weight_decay, **numbers)
        missing = optimizers.sum_gradients([model])
        (ranks_missing,) = sum_over_ranks([float(bool(missing.get(model)))])
        checks, reports = {model: self._checks[model]}, {model: AdapterStep(number, 0.0, given.learning_rate)}
        report = take_steps(self.runner, checks, reports, missing, {model: ranks_missing}, {}, {})[model]
        optimizers.clear([model])
        if report.failure is not None:
            return Failure(str(report.failure), by_user=True)
        self._steps[model] = number
        return StepResult(number, report.grad_norm)

    def _save(self, model: str, given: Save) -> None:
        step, config = self._steps[model], self.runner.adapters[model].config
        self._checks[model].before_save(step)
        layout = self.plan.layout_of(config)
        state = self.runner.full_state(model, layout)
        moments = stored_moments(self.runner.full_moments(model, layout)) if given.optimizer else {}
        adapter = NativeAdapter(config, self._identity, state)

        def write() -> None:
            if not all(bool(tensor.isfinite().all()) for tensor in state.values()):
                require_finite("adapter", math.nan, step=step, saved_step=None)
            if not given.optimizer:
                save_adapter(Path(given.folder), adapter)
                return
            with new_folder(Path(given.folder)) as temporary:
                progress = Progress(step=step, consumed_samples=step)
                write_checkpoint_files(temporary, adapter, moments, progress, {})

        decided_by_rank_0(write)


def _result_of(one: Pass, logprobs: torch.Tensor) -> OperationResult:
    losses = Objective(one.objective, one.settings).losses(logprobs.double(), one.inputs.double())
    loss = float(losses.sum())
    if not math.isfinite(loss):
        return Failure(f"the loss is {loss}; its gradients are dropped. Check the numbers of its tokens", by_user=True)
    return PassResult(loss, one.lengths, logprobs)
