"""Faults put into the package on purpose, to show that the tests can fail. Each is a function that a rank calls before
it builds a model: it gets a MonkeyPatch, which takes the fault out again, and arguments from the case.

    {"settings": ..., "faults": [{"name": "tied_sum_left_out"}, {"name": "change_copy", "tensor": "A", ...}]}
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch.autograd.function import once_differentiable

RUNNING = "megatron_tiedlora.engine.runner"
SUM = "megatron_tiedlora.engine.optimizers.sum_gradients_"
MARK = "megatron_tiedlora.engine.engine.mark_parameters"
COUNTS = "megatron_tiedlora.engine.engine.gradient_norm_counts"
ADAPTER = "megatron_tiedlora.adapters.tied_adapter"
REGIONS = "megatron_tiedlora.model.regions"
STEP = "megatron_tiedlora.training.step"


def put_in(faults: Sequence[dict[str, Any]], patch: pytest.MonkeyPatch | None = None) -> None:
    """Put the faults into the package; without `patch` for good, as a prelude of launch/train.py."""
    patch = patch or pytest.MonkeyPatch()
    for fault in faults:
        arguments = {name: value for name, value in fault.items() if name != "name"}
        globals()[fault["name"]](patch, **arguments)


def _wrap(patch: pytest.MonkeyPatch, path: str, function: Callable[..., Any]) -> None:
    """Put `function`, whose first argument is the original, in the place of a module's function."""
    module, _, name = path.rpartition(".")
    patch.setattr(path, partial(function, getattr(importlib.import_module(module), name)))


def no_gradient_guard(patch: pytest.MonkeyPatch) -> None:
    """Not a fault: gradients are not looked at."""
    patch.setattr(f"{STEP}.GradientGuard", lambda adapter: None)


# The tie --------------------------------------------------------------------------------------------------------


def tied_sum_left_out(patch: pytest.MonkeyPatch) -> None:
    """Every stage trains its own A and B."""
    _sum_over(patch, lambda groups: replace(groups, tied=groups.data))


def _sum_over(patch: pytest.MonkeyPatch, others: Callable[[Any], Any]) -> None:
    """Gradients are summed over other groups."""
    _wrap(patch, SUM, lambda sums, adapters, groups, **keywords: sums(adapters, others(groups), **keywords))


def tied_sum_counted_twice(patch: pytest.MonkeyPatch) -> None:
    """What was summed over the stages is summed over them again."""

    def twice(sum_gradients: Any, adapters: Any, groups: Any, **keywords: Any) -> Any:
        assert groups.data.size == 1, "only tied gradients are summed again"
        missing = sum_gradients(adapters, groups, **keywords)
        sum_gradients(adapters, groups, engine_averages=True)
        return missing

    _wrap(patch, SUM, twice)


def tied_sum_divided_twice(patch: pytest.MonkeyPatch) -> None:
    """The tied sum is divided by the data-parallel ranks, and then the engine takes their mean."""

    def divided(sum_gradients: Any, adapters: Any, groups: Any, **keywords: Any) -> Any:
        missing = sum_gradients(adapters, groups, **keywords)
        for adapter in adapters.values():
            for name in ("A", "B"):
                getattr(adapter, name).grad.div_(groups.data.size)
        return missing

    _wrap(patch, SUM, divided)


# Sums over tensor-parallel ranks ----------------------------------------------------------------------------------


class _GatherAndSlice(torch.autograd.Function):
    """A gather whose backward pass keeps the rank's part of its own gradient, where a sum is due."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: Any, dim: int) -> torch.Tensor:
        from megatron_tiedlora.parallel.groups import all_gather

        ctx.group, ctx.dim = group, dim
        return all_gather(tensor, group, dim)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return gradient.chunk(ctx.group.size, dim=ctx.dim)[ctx.group.rank].contiguous(), None, None


def a_sum_left_out(patch: pytest.MonkeyPatch) -> None:
    """A's gradient is sliced over the tensor-parallel ranks, not reduce-scattered."""

    def gather_apart(tensors: Any, group: Any, dims: Any) -> list[Any]:
        return [_GatherAndSlice.apply(tensor, group, dim) for tensor, dim in zip(tensors, dims, strict=True)]

    patch.setattr(f"{ADAPTER}.gather_together", gather_apart)


def u_sum_left_out(patch: pytest.MonkeyPatch) -> None:
    """u's gradient is what the rank's own rows of B give."""
    patch.setattr("megatron_tiedlora.parallel.groups.StepSum.of", lambda step_sum, tensor: tensor)
    _sum_over(patch, lambda groups: replace(groups, stage=groups.data))


def adapter_input_gradient_left_out(patch: pytest.MonkeyPatch) -> None:
    """What the rank's rows of B give to the gradient of the layer's input is not summed; the frozen product's is."""
    entry = importlib.import_module(REGIONS).RegionEntry
    send, receive = entry.send_gradients, entry.receive_gradients

    def send_apart(self: Any, of_normed: Any, of_low: Any, a: Any) -> None:
        own = None if a is None or of_normed is None else (of_low @ a.to(of_low.dtype)).flatten(0, 1)
        send(self, of_normed, of_low, None if a is None else torch.zeros_like(a))
        self.own = own

    def receive_apart(self: Any, a: Any) -> Any:
        summed, low = receive(self, None if a is None else torch.zeros_like(a))
        if self.own is not None:
            parts = self.own.chunk(self.tensor_parallel.sequence_parts)
            summed = summed + parts[self.tensor_parallel.group.rank % len(parts)].view(summed.shape)
        return summed, low

    patch.setattr(f"{REGIONS}.RegionEntry.send_gradients", send_apart)
    patch.setattr(f"{REGIONS}.RegionEntry.receive_gradients", receive_apart)


# The norm ---------------------------------------------------------------------------------------------------------


def replica_mark_forgotten(patch: pytest.MonkeyPatch) -> None:
    """ZeRO-1 to 3 count A and B once for each stage."""
    _remark(patch, "ds_pipe_replicated")


def shard_mark_forgotten(patch: pytest.MonkeyPatch) -> None:
    """ZeRO-1 to 3 count the parts of A, B and v on tensor-parallel rank 0 alone."""
    _remark(patch, "tensor_model_parallel")


def _remark(patch: pytest.MonkeyPatch, mark: str) -> None:
    def forget(mark_parameters: Any, adapter: Any, groups: Any) -> None:
        mark_parameters(adapter, groups)
        for parameter in adapter.parameters():
            setattr(parameter, mark, False)

    _wrap(patch, MARK, forget)


def tied_counted_per_stage(patch: pytest.MonkeyPatch) -> None:
    """ZeRO-0: the same as `replica_mark_forgotten`."""

    def per_stage(counts: Any, adapter: Any, groups: Any) -> list[str]:
        tied = [n for n in "AB" if adapter.part.config.spec(n).dim is not None or groups.tensor.rank == 0]
        return list(dict.fromkeys([*counts(adapter, groups), *tied]))

    _wrap(patch, COUNTS, per_stage)


def shards_counted_on_rank_0(patch: pytest.MonkeyPatch) -> None:
    """ZeRO-0: the same as `shard_mark_forgotten`."""
    _wrap(patch, COUNTS, lambda counts, adapter, groups: [] if groups.tensor.rank else counts(adapter, groups))


def replicas_counted_per_rank(patch: pytest.MonkeyPatch) -> None:
    """ZeRO-0: u counts on every tensor-parallel rank."""
    _wrap(patch, COUNTS, lambda counts, adapter, groups: sorted({*counts(adapter, groups), "u"}))


# Start values and the loss ----------------------------------------------------------------------------------------


def start_from_local_shape(patch: pytest.MonkeyPatch) -> None:
    """Every rank draws as many numbers as it holds, from the same seed, instead of cutting the full draw."""
    module = importlib.import_module(ADAPTER)

    def draw(adapter: Any, values: Any = None) -> Any:
        config = adapter.config
        for name, parameter in adapter.named_parameters():
            factor = config.factor(name)
            if factor.start == "normal" and config.is_tied(name):
                std = config.init_std_a if name == "A" else config.init_std_b
                drawn = module.draw_normal(parameter.shape, std=std, seed=config.seed, name=name)
                parameter.data.copy_(drawn)
            else:
                parameter.data.copy_(adapter.part.shard(name, (values or module.initial_values(config))[name]))
        return adapter

    patch.setattr(f"{ADAPTER}.TiedAdapter.load_full", draw)


def loss_per_micro_batch(patch: pytest.MonkeyPatch) -> None:
    """The gradient is of the mean of the micro-batches' means, not of the mean over the step's supervised tokens."""
    module = importlib.import_module(RUNNING)
    of_step: list[float] = []  # what a mean of a micro-batch is divided by
    supervised: dict[int, int] = {}  # tokens of the micro-batch with these shares
    find, accumulate, weighted = module.Runner._supervised, module.Runner.accumulate, module.Losses.weighted

    def noted(runner: Any, batch: Any, losses: Any) -> Any:
        supervised[id(batch.segments)] = max(int((batch.labels != -100).sum()), 1)
        return find(runner, batch, losses)

    def divided(losses: Any, found: torch.Tensor, shares: Any) -> torch.Tensor:
        if not of_step:  # an evaluation
            return weighted(losses, found, shares)
        ((name, divisors),) = losses.divisors.items()
        assert divisors
        own = module.Losses({name: (supervised[id(shares)] * of_step[0],)}, losses.found)
        return weighted(own, found, shares)

    def accumulated(runner: Any, batches: Any, *others: Any) -> Any:
        # An engine divides by its accumulation steps, of which packed samples need fewer, and takes the mean.
        by_engine = runner.engine.gradient_accumulation_steps() * runner.groups.data.size
        share = 1 / by_engine if runner.optimizers.engine_steps else 1
        of_step.append(len(batches) * runner.groups.data.size * share)
        try:
            return accumulate(runner, batches, *others)
        finally:
            of_step.clear()

    patch.setattr(module.Runner, "_supervised", noted)
    patch.setattr(module.Losses, "weighted", divided)
    patch.setattr(module.Runner, "accumulate", accumulated)


# Copies and gradients, for the run's own checks -------------------------------------------------------------------


def change_copy(
    patch: pytest.MonkeyPatch,
    *,
    tensor: str,
    rank: int,
    step: int,
    index: int = 0,
    value: float | None = None,
    before_save: bool = False,
) -> None:
    """After training step `step` one rank's entry `index` of a tensor has its last bit flipped, or is `value`.

    Args:
        before_save: only when the checkpoint of that step is about to be written.
    """
    checks = importlib.import_module(STEP).StepChecks
    check_before, check_after = checks.before_save, importlib.import_module(STEP).after_steps

    def change(made: Any, number: int) -> None:
        if number == step and torch.distributed.get_rank() == rank:
            parameter = getattr(made._adapter, tensor)
            held = parameter.data if parameter.numel() else parameter.ds_tensor  # ZeRO-3 keeps this rank's piece there
            flat = held.view(-1)
            if value is None:
                flat.view(torch.int32)[index] ^= 1
            else:
                flat[index] = value

    def changed_before(made: Any, number: int) -> None:
        change(made, number)
        check_before(made, number)

    def changed_after(stepped: Any) -> Any:
        for made, number in stepped.values():
            change(made, number)
        return check_after(stepped)

    if before_save:
        patch.setattr(checks, "before_save", changed_before)
    else:
        patch.setattr(f"{STEP}.after_steps", changed_after)


def no_gradient(patch: pytest.MonkeyPatch, *, tensor: str, layers: Sequence[int] | None = None, since: int = 1) -> None:
    """The gradient of a tensor (of some layers) does not arrive, from training step `since` on."""
    step = _current_step(patch)
    _change_factor(patch, tensor, layers, lambda factor: factor.detach() if step() >= since else factor)


def zero_gradient(patch: pytest.MonkeyPatch, *, tensor: str, layers: Sequence[int] | None = None) -> None:
    """The gradient of a tensor (of some layers) is zero in every entry."""
    _change_factor(patch, tensor, layers, lambda factor: factor.detach() + 0.0 * factor)


def one_gradient(patch: pytest.MonkeyPatch, *, tensor: str, layers: Sequence[int], step: int, value: float) -> None:
    """One entry of a tensor's gradient in a layer is `value` at training step `step`."""
    current = _current_step(patch)

    def replaced(gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.contiguous().clone()
        gradient.view(-1)[0] = value
        return gradient

    def change(factor: torch.Tensor) -> torch.Tensor:
        if current() == step and factor.requires_grad:
            factor = factor.view_as(factor)
            factor.register_hook(replaced)
        return factor

    _change_factor(patch, tensor, layers, change)


def _current_step(patch: pytest.MonkeyPatch) -> Callable[[], int]:
    """What gives the number of the training step that is under way, 0 before the first."""
    trainer = importlib.import_module("megatron_tiedlora.training.loop").Trainer
    train_step, current = trainer._train_step, [0]

    def note(made: Any, *positional: Any) -> None:
        current[0] = made.last_step + 1
        train_step(made, *positional)

    patch.setattr(trainer, "_train_step", note)
    return lambda: current[0]


def _change_factor(
    patch: pytest.MonkeyPatch,
    tensor: str,
    layers: Sequence[int] | None,
    change: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    """Pass a factor of some layers (all: None) through `change` where it is read; a tied one on their stages."""
    adapter = importlib.import_module(ADAPTER).TiedAdapter
    forward = adapter.forward

    def changed(module: Any, *positional: Any, **keywords: Any) -> Any:
        parameter = getattr(module, tensor)
        mine = [layers is None or layer in layers for layer in module.part.layers]
        if parameter is None or not any(mine):
            return forward(module, *positional, **keywords)
        if module.config.is_tied(tensor):
            factor = change(parameter)
        else:
            factor = torch.stack([change(row) if chosen else row for row, chosen in zip(parameter, mine, strict=True)])
        module._parameters[tensor] = factor
        try:
            return forward(module, *positional, **keywords)
        finally:
            module._parameters[tensor] = parameter

    patch.setattr(adapter, "forward", changed)
