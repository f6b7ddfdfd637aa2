"""A model of a training service beside a plain loop with PEFT's LoRA on a model of transformers: each loss, and one
that the client computes itself.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from support.forked_ranks import join_as_launched, run_on_ranks
from support.oracle import OracleConfig
from support.oracle_training import SETTINGS, objective_losses
from support.peft_models import hf_model
from support.peft_training import through_lora_on_all_linears
from support.tiny_models import random_adapter, write_tiny_model

from megatron_tiedlora.config.settings import DEFAULT_TASK, make_settings
from megatron_tiedlora.planning.run_plan import plan_run
from megatron_tiedlora.service.batches import Division
from megatron_tiedlora.service.operations import Create, Pass, PassResult, Step, StepResult
from megatron_tiedlora.service.worker import Worker, WorkerCommand
from megatron_tiedlora.training.build import build_model

CUSTOM = "custom"  # squares of the distances of log-probabilities from -2, which the client differentiates
KINDS = [*SETTINGS, CUSTOM]
TARGETS = ("qkv", "o_proj", "gate_up", "down_proj")
RANK, ALPHA, STEPS = 3, 6.0, 3
NUMBERS = Step(2e-3, 0.9, 0.95, 1e-3, 0.1, 0.5)  # AdamW divides small gradients, and their rounding, by eps
# fp32 on both sides. Sums have a larger one: seen 1.8e-6 of a gradient norm of 1e3, and 3.8e-6 between the norms of
# PEFT's model in fp32 and in fp64.
TOLERANCE, OF_SUMS = 1e-6, 2e-6


def rows(step: int) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Tokens, targets and numbers of the rows of a step."""
    drawn, found = torch.Generator().manual_seed(step), []
    for length in (9, 14, 5):
        tokens, targets = torch.randint(3, 300, (2, length), generator=drawn)
        numbers = torch.randn(2, length, generator=drawn)
        numbers[0] = 0.5 * numbers[0] - 5.8
        found.append((tokens, targets, numbers))
    return found


def a_pass(kind: str, step: int, inputs: torch.Tensor, *, backward: bool = True) -> Pass:
    """The rows of a step as a pass, with other numbers than their own."""
    own, objective = rows(step), "cross_entropy" if kind == CUSTOM else kind
    tokens, targets = (torch.cat([row[index] for row in own]) for index in (0, 1))
    lengths = tuple(len(row[0]) for row in own)
    return Pass(lengths, tokens, targets, inputs, objective, SETTINGS[objective], backward)


def losses_of(kind: str, logprobs: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """The loss of each token."""
    return (logprobs + 2).square() if kind == CUSTOM else objective_losses(kind, logprobs, numbers, SETTINGS[kind])


def serve(kinds: list[str], settings: dict[str, Any], state: dict[str, torch.Tensor], folder: str) -> list[Any]:
    """Steps of one model for each kind: their losses, log-probabilities and norms, and the tensors at the end."""
    device, found = join_as_launched(folder), []
    plan = plan_run(make_settings(settings), rank=0, world_size=1)
    worker = Worker(plan, build_model({"largest": plan}, device, empty=True), Division(64), lambda _: [])
    worker.run(WorkerCommand(operations=tuple((kind, Create("lora", RANK, ALPHA, TARGETS, seed=1)) for kind in kinds)))
    for kind in kinds:
        worker.runner.adapters[kind].load_full(state)
    results: dict[str, list[Any]] = {kind: [] for kind in kinds}
    for step in range(STEPS):
        passes = dict[str, Pass]()
        for kind in kinds:
            numbers = torch.cat([row[2] for row in rows(step)], dim=1)
            if kind == CUSTOM:
                forward = a_pass(kind, step, torch.zeros_like(numbers), backward=False)
                (result,) = worker.run(WorkerCommand(operations=((kind, forward),)))
                assert isinstance(result, PassResult)
                numbers = torch.stack((-2 * (result.logprobs + 2), torch.zeros_like(result.logprobs)))
            passes[kind] = a_pass(kind, step, numbers)
        of_passes = worker.run(WorkerCommand(operations=tuple(passes.items())))
        of_steps = worker.run(WorkerCommand(operations=tuple((kind, NUMBERS) for kind in kinds)))
        for kind, own, taken in zip(kinds, of_passes, of_steps, strict=True):
            assert isinstance(own, PassResult) and isinstance(taken, StepResult)
            results[kind].append((own.loss, own.logprobs, taken.grad_norm))
    for kind in kinds:
        layout = plan.layout_of(worker.runner.adapters[kind].config)
        found.append((results[kind], worker.runner.full_state(kind, layout)))
    return found


def reference(kind: str, model: Any, tensors: Callable[[], Any]) -> tuple[list[Any], dict[str, torch.Tensor]]:
    """The same by a plain loop."""
    trained = [parameter for parameter in dict.fromkeys(model.parameters()) if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=NUMBERS.learning_rate, betas=(0.9, 0.95), eps=NUMBERS.eps, weight_decay=NUMBERS.weight_decay
    )
    found = []
    for step in range(STEPS):
        optimizer.zero_grad()
        total, logprobs, size = torch.zeros(()), [], 0.0
        for tokens, targets, numbers in rows(step):
            own = model(tokens[None]).logits[0].log_softmax(-1).gather(-1, targets[:, None])[:, 0]
            losses = losses_of(kind, own, numbers)
            total, size = total + losses.sum(), size + float(losses.detach().abs().sum())
            logprobs.append(own.detach())
        total.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, NUMBERS.max_norm)
        optimizer.step()
        found.append((float(total), torch.cat(logprobs), float(norm), size))
    return found, tensors()


def near(found: Any, expected: Any, tolerance: float = TOLERANCE) -> bool:
    """Whether no number differs by more than this part of the largest."""
    one, other = (torch.as_tensor(value, dtype=torch.float64) for value in (found, expected))
    return bool((one - other).abs().max() <= tolerance * other.abs().max())


def test_losses_beside_peft(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "base", num_attention_heads=4, num_key_value_heads=2)
    start = random_adapter(
        "lora", OracleConfig.from_folder(folder), rank=RANK, alpha=ALPHA, layers=None, seed=3, dtype=torch.float32,
        targets=TARGETS,
    )
    expected = {}
    for kind in KINDS:
        model, tensors = through_lora_on_all_linears(hf_model(folder), start)
        initial = {name: value.clone() for name, value in tensors().items()}
        expected[kind] = reference(kind, model, tensors)
    settings = {"model": str(folder), "task": DEFAULT_TASK, "dtype": "fp32", "ds_config": "zero0.json"}
    largest = {**settings, "method": "lora", "rank": 8, "targets": TARGETS}
    (found,) = run_on_ranks(serve, KINDS, largest, initial, str(tmp_path), ranks=1, folder=tmp_path)
    for kind, (steps, state) in zip(KINDS, found, strict=True):
        for own, other in zip(steps, expected[kind][0], strict=True):
            (loss, logprobs, norm), (right, right_logprobs, right_norm, size) = own, other
            assert near(logprobs, right_logprobs) and near(norm, right_norm, OF_SUMS), kind
            assert kind == CUSTOM or abs(loss - right) <= OF_SUMS * size, (kind, loss, right)
            assert right_norm > NUMBERS.max_norm, "clipping is active"
        for name, right in expected[kind][1].items():
            assert near(state[name], right) and not torch.equal(right, initial[name]), (kind, name)
