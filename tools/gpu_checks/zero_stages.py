"""For part correct: steps of the engine at every ZeRO stage against torch's AdamW on plain gradients in fp64."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from bench_layout import Started

from gpu_checks.attention import relative, worst_of
from gpu_checks.package import shape_of, small_config
from gpu_checks.records import CheckOptions, Report
from gpu_checks.reference import FACTORS, Document, loss_and_gradients
from gpu_checks.running import started, step_options, write_shape
from megatron_tiedlora.data.loader import TrainingStep
from megatron_tiedlora.engine.engine import all_open

STEPS = 3
RATE = 1e-2
BOUND = 1e-3  # of the change, relative: an element whose gradient is a rounding takes a step of either sign
FIX = "DeepSpeed's engine does something else here: try another ZeRO stage, and report the versions of part env"


def check_zero_stages(report: Report, options: CheckOptions) -> None:
    """The change of the adapter in some steps at ZeRO 0 to 3, in fp32."""
    expected: dict[str, torch.Tensor] | None = None
    with tempfile.TemporaryDirectory() as folder:
        model = write_shape(Path(folder), small_config())
        for stage in range(4):
            label = f"{STEPS} steps of AdamW at ZeRO-{stage}, fp32"
            flags = ("--random_weights", "--dtype=fp32", f"--ds_config=zero{stage}.json", "--rows=2", "--length=64")
            with report.attempt(label, fix=FIX):
                # No clipping, and a schedule that hardly falls, so that the reference is AdamW alone.
                with started(
                    step_options(model, *flags, "--compile=false", "--micro_batches=2"),
                    learning_rate=RATE,
                    gradient_clipping=0.0,
                ) as run:
                    steps = [next(run.loader) for _ in range(STEPS)]
                    before = adapter_values(run)
                    if expected is None:
                        expected = plain_steps(run, before, steps)
                    for step in steps:
                        run.train_step.run(step)
                    after = adapter_values(run)
                errors = {name: relative(after[name] - before[name], expected[name]) for name in expected}
                worst = worst_of(errors)
                report.at_most(label, errors[worst], BOUND, why=f"of the change of {worst}, relative", fix=FIX)


def adapter_values(run: Started) -> dict[str, torch.Tensor]:
    """The adapter's tensors as they stand, whole."""
    adapter = run.runner.adapter
    with all_open(adapter, run.plan.engine):
        return {name: factor.detach().clone() for name, factor in adapter.named_parameters()}


def plain_steps(run: Started, start: dict[str, torch.Tensor], steps: list[TrainingStep]) -> dict[str, torch.Tensor]:
    """The change of each trained factor by torch's AdamW on the reference's gradients, in fp64."""
    settings, adapter, model_shape = run.plan.settings, run.plan.adapter, run.plan.source.shape
    shape = shape_of(model_shape, adapter)
    layers = run.runner.stage.named_parameters()
    weights = {name: weight.detach().double() for name, weight in layers if name.startswith("layers")}
    trained = [name for name in FACTORS if adapter.row.factor(name).trained]
    factors = {name: tensor.double() for name, tensor in start.items()}
    optimizer = torch.optim.AdamW(
        [factors[name] for name in trained], lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    for step in steps:
        documents = [
            Document(tokens.to(run.runner.device), labels.to(run.runner.device))
            for batch in step.micro_batches
            for tokens, labels in zip(batch.input_ids, batch.labels, strict=True)
        ]
        _, gradients = loss_and_gradients(shape, weights, factors, trained, documents)
        for name in trained:
            factors[name].grad = gradients[name] / step.num_supervised
        optimizer.step()
    return {name: factors[name] - start[name] for name in trained}
