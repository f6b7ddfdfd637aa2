"""For part correct: the engine's steps at every ZeRO stage against torch's AdamW on reference gradients in fp64."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from megatron_tiedlora.benchmark.layout import Started
from megatron_tiedlora.data.loader import TrainingStep
from megatron_tiedlora.gpu_checks.attention import relative, worst_of
from megatron_tiedlora.gpu_checks.records import CheckOptions, Report
from megatron_tiedlora.gpu_checks.reference import Document, loss_and_gradients
from megatron_tiedlora.gpu_checks.running import started, step_settings, write_small

STEPS = 3
RATE = 1e-2
BOUND = 1e-3  # relative to the change: an element whose gradient is only rounding error may change with either sign
FIX = "DeepSpeed's engine gives other results here: try another ZeRO stage, and report the versions of part env"


def check_zero_stages(report: Report, options: CheckOptions) -> None:
    """Check the change of the adapter over some steps at ZeRO 0 to 3, in fp32."""
    expected: dict[str, torch.Tensor] | None = None
    with tempfile.TemporaryDirectory() as folder:
        model = write_small(Path(folder))
        for stage in range(4):
            label = f"{STEPS} steps of AdamW at ZeRO-{stage}, fp32"
            flags = ("--random_weights", "--dtype=fp32", f"--ds_config=zero{stage}.json", "--rows=2", "--length=64")
            with report.attempt(label, fix=FIX):
                # No clipping and an almost constant schedule, so that the reference is plain AdamW.
                with started(
                    step_settings(model, *flags, "--compile=false", "--micro_batches=2"),
                    learning_rate=RATE,
                    gradient_clipping=0.0,
                ) as run:
                    steps = [next(run.loader) for _ in range(STEPS)]
                    before = adapter_values(run)
                    if expected is None:
                        expected = plain_steps(run, before, steps)
                    for step in steps:
                        run.take(step)
                    after = adapter_values(run)
                errors = {name: relative(after[name] - before[name], expected[name]) for name in expected}
                worst = worst_of(errors)
                report.at_most(label, errors[worst], BOUND, why=f"relative to the change of {worst}", fix=FIX)


def adapter_values(run: Started) -> dict[str, torch.Tensor]:
    """The adapter's full tensors."""
    (name,) = run.runner.adapters
    with run.runner.optimizers.opened(name):
        named = run.runner.adapters[name].named_parameters()
        return {tensor: factor.detach().clone() for tensor, factor in named}


def plain_steps(run: Started, start: dict[str, torch.Tensor], steps: list[TrainingStep]) -> dict[str, torch.Tensor]:
    """The change of each trained factor with torch's AdamW on the reference's gradients, in fp64."""
    settings, adapter, shape = run.plan.settings, run.plan.adapter, run.plan.source.shape
    layers = run.runner.stage.named_parameters()
    weights = {name: weight.detach().double() for name, weight in layers if name.startswith("layers")}
    trained = list(adapter.num_trained())
    factors = {name: tensor.double() for name, tensor in start.items()}
    optimizer = torch.optim.AdamW(
        [factors[name] for name in trained], lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    for step in steps:
        documents = [
            Document(tokens.to(run.runner.device), labels.to(run.runner.device))
            for batch in step.micro_batches
            for tokens, labels in zip(batch.tokens, batch.labels, strict=True)
        ]
        _, gradients = loss_and_gradients(shape, adapter.scale, weights, factors, trained, documents)
        for name in trained:
            factors[name].grad = gradients[name] / step.num_supervised
        optimizer.step()
    return {name: factors[name] - start[name] for name in trained}
