"""Score and export the adapters of a run, and print the headline, the summary and the commands to use next.

A run of one adapter prints all details. A run of several adapters prints one row for each adapter.
"""

import logging
import os
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch

from megatron_tiedlora.base.files import discard, new_folder, read_json_object, write_json
from megatron_tiedlora.base.installation import install_hint
from megatron_tiedlora.base.messages import UserError, aligned_lines, bytes_in_words, count_text, range_text
from megatron_tiedlora.base.output_folder import numbered
from megatron_tiedlora.base.shapes import QKV
from megatron_tiedlora.checkpoint.base_weights import BaseWeights
from megatron_tiedlora.checkpoint.load_model import describe_dtype, layerwise_loss
from megatron_tiedlora.checkpoint.native_adapter import NativeAdapter, load_native_adapter
from megatron_tiedlora.checkpoint.resume import Checkpoint
from megatron_tiedlora.convert.export_peft import Export, export_peft
from megatron_tiedlora.convert.merge import is_merge_of, merge_adapter
from megatron_tiedlora.convert.serving import serve_hints
from megatron_tiedlora.convert.verify import verify_export
from megatron_tiedlora.data.tasks import get_task
from megatron_tiedlora.evaluation.answering import ScoredSet
from megatron_tiedlora.evaluation.results import Score
from megatron_tiedlora.model.weights import num_base_parameters
from megatron_tiedlora.parallel.agreement import decided_by_rank_0
from megatron_tiedlora.planning.adapter_plans import shared_plan
from megatron_tiedlora.planning.counted_steps import steps_in_words
from megatron_tiedlora.planning.machines import attention_in_words
from megatron_tiedlora.planning.run_plan import RunPlan
from megatron_tiedlora.runtime.ending import FAILED_STATUS, End
from megatron_tiedlora.runtime.run_folder import RunFolder, plot_losses, read_metrics
from megatron_tiedlora.runtime.stopping import RunStopped, StopRequests
from megatron_tiedlora.training.adapter_run import AdapterRun
from megatron_tiedlora.training.build import BuiltModel
from megatron_tiedlora.training.loop import Finished, Trainer, of_start, table_row
from megatron_tiedlora.training.start import Start
from megatron_tiedlora.training.throughput import ChosenKernels, peak_memory_bytes, steps_over

_LOGGER = logging.getLogger(__name__)
SAMPLES = "samples_sha256"  # the key of the samples' hash in scores.json


def score_after(trainer: Trainer) -> None:
    """Load the best checkpoint of each trained adapter, and score the adapter. All ranks must call this function.

    The optimizer state is not loaded, since training is over.
    """
    for run in trainer.trained:
        folder = run.folder.checkpoints / f"step_{run.progress.best_step}"
        with run.failing_alone():
            # Other hosts may not see the run folder.
            best = decided_by_rank_0(partial(load_native_adapter, folder), kind=NativeAdapter)
            with trainer.stop.deferred():
                with run.runner.optimizers.opened(run.name):
                    run.adapter.load_full(best.state)
                trainer.stop.agree(True)
    score_adapters(trainer, trainer.trained, "after")


def score_adapters(trainer: Trainer, runs: Sequence[AdapterRun], moment: str) -> None:
    """Score adapters together on their test samples, and add the scores to the scores.json of each adapter.

    All ranks must call this function. `moment` is "before" or "after" training. Each score is stored with a hash of the
    test samples, because a resumed run may have a different test set. An adapter is marked as failed if its scores.json
    cannot be written.
    """

    def score(some: Sequence[AdapterRun]) -> dict[str, dict[str, Score]]:
        return trainer.evaluation.scores(some, lambda run: run.data.scored)

    def write(run: AdapterRun, samples: ScoredSet, scores: Mapping[str, Score]) -> None:
        file = run.folder.scores
        recorded = read_json_object(file, kind="scores") if file.is_file() else {}
        recorded[moment] = {name: {**score.plain(), SAMPLES: samples.sha256} for name, score in scores.items()}
        write_json(file, recorded, guard=run.folder.guard)

    with trainer.stop.deferred():
        found = of_start(runs, score) if moment == "before" else score(runs)
    for run in runs:
        if (scores := found.get(run.name)) and run.data.scored is not None:
            with run.failing_alone():
                decided_by_rank_0(partial(write, run, run.data.scored, scores))


def end_at_once(start: Start) -> str:
    """Write the table and the status if all adapters finished in earlier launches. Return the reason for the status."""
    reason = f"{count_text(len(start.finished), 'adapter')} trained"
    if shared_plan(start.plans).grid.rank == 0:
        start.folder.write_table([table_row(adapter) for adapter in start.finished.values()])
        last = max(adapter.progress.step for adapter in start.finished.values())
        start.folder.write_status("finished", step=last, reason=reason)
    return reason


def export_all(trainer: Trainer) -> list[str]:
    """Export each trained adapter, record that the adapter has finished, and return lines to print.

    Only rank 0 calls this function.

    Raises:
        RunStopped: a signal arrived. The adapters that were exported before the signal are recorded as finished.
    """
    lines: list[str] = []
    try:
        for run in trainer.trained:
            with run.failing_alone():
                exported = export(run, trainer.stop)
                lines += exported if trainer.only is None else [*summary_lines(run), *exported]
                run.finish()
    except BaseException:
        with suppress(UserError):  # the error that ended the export is the one to report
            trainer.write_table()
        raise
    trainer.write_table()
    return lines


def original_loss(run: AdapterRun, stop: StopRequests) -> list[str]:
    """Return a line with the best checkpoint's validation loss on the base as stored. Only rank 0 calls this function.

    The list is empty if the run did not quantise the base. Errors are reported in the line, since the run is over.
    """
    plan = run.plan
    if plan.settings.base is None or plan.source.stored is not None:
        return []
    try:
        text = f"{_original_loss(run, stop):.4f}"
    except RunStopped:
        text = "not computed, because a signal arrived"
    except torch.OutOfMemoryError:
        text = "not computed, because memory is too small"
    except UserError as error:
        text = f"not computed: {error}"
    return [f"on the base as it is stored, in {plan.dtype_name}: validation loss {text}"]


def _original_loss(run: AdapterRun, stop: StopRequests) -> float:
    """Return the validation loss on the base as stored. It is computed layer by layer to save memory."""
    plan, source = run.plan, run.plan.source
    with BaseWeights(source.weights_folder(), source.shape) as weights:
        loss = layerwise_loss(
            source.shape,
            weights.read,
            load_native_adapter(run.folder.adapter),
            run.evaluation_batches(all_of_them=True),
            dtype=plan.dtype,
            device=run.runner.device,
            between=stop.raise_if_requested,
        )
    return loss / run.data.validation.num_supervised


def export(run: AdapterRun, stop: StopRequests) -> list[str]:
    """Plot the losses, export the adapter to PEFT, and return lines to print. Only rank 0 calls this function.

    For some tasks the adapter is also merged and the exports are verified. Both need disk space and memory for the
    complete model, so for most tasks the user runs separate commands.

    Raises:
        UserError: an export does not compute the same values as the adapter.
        RunStopped: a signal arrived. The other ranks, which wait, also receive the error.
    """
    stop.raise_if_requested()
    folder, source, settings = run.folder, run.plan.source, run.plan.settings
    if find_spec("matplotlib") is None:
        _LOGGER.warning("note: loss.png is not drawn without matplotlib; %s", install_hint("train"))
    else:
        plot_losses(folder.metrics, folder.path / "loss.png", guard=folder.guard)
    adapter = load_native_adapter(folder.adapter)
    merged, peft = folder.path / "merged", folder.path / "peft"
    discard(peft, guard=folder.guard)  # an earlier launch of this run may have exported another best adapter
    new = partial(new_folder, guard=folder.guard)
    export_peft(source, adapter, peft, native=folder.adapter, new=new)
    if not get_task(settings.task).exports_merged or source.stored is not None:
        return []
    discard(merged, guard=folder.guard)
    merge_adapter(source, adapter, merged, tokenizer=settings.tokenizer, new=new)
    found = verify_export(source, adapter, merged=merged, peft=peft)
    if not found.passed:
        _LOGGER.error(found.report())
        raise UserError(f"{folder.path}: an export differs from the adapter (see above). Please report this error")
    return ["", *found.report().split("\n")]


# The output of a run --------------------------------------------------------------------------------------------------


HeadlineRow = tuple[str, str]  # label and text


def run_headline(
    start: Start, trainer: Trainer, built: BuiltModel, chosen: ChosenKernels, device: torch.device
) -> list[str]:
    """Return the lines that a run prints before the progress bar: shared settings, and a summary of each adapter."""
    plan, stage, run = shared_plan(start.plans), built.runner.stage, trainer.only
    settings, route, shape = plan.settings, stage.attention_route(device, plan.dtype), plan.source.shape
    used: dict[str, Any] = {"heads": shape.heads, "windowed": shape.window is not None, "packing": settings.packing}
    model = f"{settings.model}, {num_base_parameters(plan.source.shape) / 1e6:,.1f} M parameters in"
    model += f" {describe_dtype(settings.dtype, plan.dtype_name)}, frozen"
    model += "" if settings.base is None else f"; the linears of its blocks in {settings.base}"
    model += "" if settings.products is None else f", matmuls in {settings.products}"
    read, kept = (range_text(sizes, bytes_in_words) for sizes in (built.bytes_read, built.bytes_kept))
    stored = "" if settings.base is None else f", stored as {kept}"
    sharded = " with sequence parallelism" if plan.layout.sequence_parallel else ""
    stages = ", ".join(f"{len(stage.layers)}" for stage in plan.stages)
    pipeline = f"pipeline {plan.grid.pp_size} ({stages} layers with embedding and head)"
    layout = f"tensor {plan.grid.tp_size}{sharded} x {pipeline} x data {plan.grid.dp_size}"
    trained = sum(sum(own.adapter.num_trained().values()) for own in start.plans.values())
    ranks = count_text(plan.grid.dp_size, "data-parallel rank")
    adapters = f"{len(start.plans)}, {trained:,} trained parameters, ZeRO-{plan.engine.zero_stage}, {ranks}"
    rows = [
        ("model", model),
        *([("adapters", adapters)] if run is None else _one_adapter(run)),
        *([("layout", layout)] if plan.grid.tp_size * plan.grid.pp_size > 1 else []),
        ("read", f"{read} of base weights per rank{stored}"),
        ("kernels", chosen.description),
        ("attention", attention_in_words(route, device, **used)),
        *(_all_starts(start, trainer, built) if run is None else _one_start(run, start, built)),
    ]
    return aligned_lines(rows, align="<")


def _all_starts(start: Start, trainer: Trainer, built: BuiltModel) -> list[HeadlineRow]:
    """Return rows with the run folder, and with the step from which each adapter starts."""
    rows = [("run folder", str(start.folder.path))]
    if over := steps_over(trainer.profile, trainer.last_step):
        rows.append(("note", over))
    rows += [("adapter", f"{name}: finished in an earlier launch") for name in start.finished]
    for name, run in trainer.adapters.items():
        own, checkpoint = run.plan.settings, start.checkpoints[name]
        samples, steps = count_text(len(run.data.train), "sample"), count_text(own.max_steps, "step")
        step = f"{own.method}, rank {own.rank}, {samples}, {own.global_batch_size} per step"
        steps += f", learning rate {run.plan.rate_in_words}"
        rows.append(("adapter", f"{name}: {step}, {steps}{resumed_text(run.plan, checkpoint)}"))
        notes = (*run.data.notes, *(() if checkpoint is None else checkpoint.notes), *built.notes[name])
        rows += [("note", f"{name}: {note}") for note in notes]
        rows += [("warning", f"{name}: {warning}") for warning in run.data.warnings(run.plan)]
        if trainer.competitors.get(name) and len(run.evaluation_sizes) < 2:
            rows.append(("warning", f"{name}: --halving cannot estimate noise from a single validation batch"))
    return rows


def _one_adapter(run: AdapterRun) -> list[HeadlineRow]:
    plan, data = run.plan, run.data
    settings, trained = plan.settings, sum(plan.adapter.num_trained().values())
    layers = f"{len(plan.adapter.layers)} of {plan.source.shape.num_layers} layers"
    if (targets := [target.name for target in plan.adapter.targets]) != [QKV]:
        layers += f" ({', '.join(targets)})"
    trains = f"{settings.method}, rank {settings.rank}, {layers}: {trained:,} trained parameters"
    samples = f"{settings.task}: {len(data.train):,} train, {len(data.validation):,} validation samples"
    cut = f"{count_text(data.train.truncated_prompts, 'prompt')} truncated to {settings.max_length} tokens"
    batch = f"{count_text(plan.batches.global_batch_size, 'sample')} per step, {plan.batches_in_words}"
    return [
        ("adapter", trains + (f", dropout {settings.dropout:g}" if settings.dropout else "")),
        ("data", f"{samples}; {cut}"),
        *(("", note) for note in data.notes),
        ("batches", f"{batch}, ZeRO-{plan.engine.zero_stage}"),
        ("length", f"{steps_in_words(settings, len(data.train))}, schedule {settings.schedule}"),
        ("rate", plan.rate_in_words),
    ]


def _one_start(run: AdapterRun, start: Start, built: BuiltModel) -> list[HeadlineRow]:
    plan, checkpoint = run.plan, start.checkpoints[run.name]
    rows, settings = list[HeadlineRow](), plan.settings
    if settings.init_from is not None and checkpoint is None:
        rows.append(("start", f"values of {settings.init_from}"))
    notes = [*(() if checkpoint is None else checkpoint.notes), *built.notes[run.name]]
    if checkpoint is not None and (over := steps_over(settings.profile, checkpoint.progress.step)):
        notes.append(over)
    rows.append(("run folder", f"{start.folder.path}{resumed_text(plan, checkpoint)}"))
    rows += [("note", note) for note in notes]
    return [*rows, *(("warning", warning) for warning in run.data.warnings(plan))]


def set_run_end(end: End, trainer: Trainer) -> None:
    """Set the final state of the run and the reason for this state. The run fails if any adapter failed."""
    failed, total = trainer.failed, count_text(len(trainer.everyone), "adapter")
    if failed:
        end.state, end.status = "failed", FAILED_STATUS
    if trainer.only is not None:
        end.reason = trainer.only.reason
    else:
        end.reason = f"{len(failed)} of {total} failed: {', '.join(failed)}" if failed else f"{total} trained"


def resumed_text(plan: RunPlan, checkpoint: Checkpoint | None) -> str:
    """Return a text that states the step from which the run resumes, and whether --packing has changed."""
    if checkpoint is None:
        return ""
    packing, before = plan.settings.packing, checkpoint.settings.get("packing", plan.settings.packing)
    changed = f" (--packing was {str(before).lower()} before, and is {str(packing).lower()} now)"
    return f", resumed from step {checkpoint.progress.step}{changed if before != packing else ''}"


# The end -------------------------------------------------------------------------------------------------------------


def table_lines(adapters: Mapping[str, AdapterRun | Finished], folder: RunFolder) -> list[str]:
    """Return lines with a table of the adapters' final states, the run folder, and serving commands."""
    rows = [("adapter", "state", "step", "best step", "best", "reason")]
    for name, run in adapters.items():
        progress = run.progress
        state = "finished" if run.failure is None else "failed"
        best = "-" if progress.best_metric is None else f"{progress.best_metric:.4f}"
        numbers = (str(progress.step), str(progress.best_step or "-"), best)
        rows.append((name, state, *numbers, run.failure or run.reason))
    lines = ["", *aligned_lines(rows, align="<<>>><"), "", f"run folder  {folder.path}"]
    lines += ["  NAME/      the run folder of each adapter, with peft/; or the output_dir of its entry"]
    finished = [run for run in adapters.values() if run.failure is None]
    if not finished:
        return lines
    source = finished[0].plan.source
    own = [(run.folder.path / "peft", run.plan.settings) for run in finished]
    exports = {of.name: Export(peft, its.rank, its.targets) for of, (peft, its) in zip(finished, own, strict=True)}
    serving = serve_hints(exports, source, adapters=folder.path)
    return [*lines, "", "next", *(f"  {line}" for line in serving)]


def summary_lines(run: AdapterRun) -> list[str]:
    """Return a table with the validation loss and the scores before and after training, read from the run folder."""
    rows, notes = [["", "before", "after"]], list[str]()
    metric, best = run.plan.settings.eval_metric, run.progress
    validation = [row for row in read_metrics(run.folder.metrics) if row["split"] == "validation"]
    by_step = {row["step"]: row for row in validation}
    for name in dict.fromkeys(("loss", metric)):
        start, end = (by_step.get(step, {}).get(name) for step in (0, best.best_step))
        chosen = f"(best, step {best.best_step})" if name == metric else ""
        rows.append([f"validation {name}", _number(start, name), _number(end, name), chosen])
        worse = start is not None and end is not None and (start <= end if name == "loss" else end <= start)
        if name == metric and worse:
            notes.append(f"training did not improve the validation {name}: try another --learning_rate or more data")
    file = run.folder.scores
    rows += score_rows(read_json_object(file, kind="scores") if file.is_file() else {})
    return ["", *aligned_lines(rows, align="<>><"), *notes]


def score_rows(scores: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[list[str]]:
    """Return table rows for scores.json. Scores before and after training are in one row if their samples are the same.

    Otherwise each of these scores has its own row."""
    before, after = (scores.get(moment, {}) for moment in ("before", "after"))
    rows = []
    for name in dict.fromkeys([*before, *after]):
        start, end = before.get(name), after.get(name)
        if start and end and start.get(SAMPLES) != end.get(SAMPLES):
            rows += [_score_row(name, start, None), _score_row(name, None, end)]
        else:
            rows.append(_score_row(name, start, end))
    return rows


def _score_row(name: str, start: Mapping[str, Any] | None, end: Mapping[str, Any] | None) -> list[str]:
    label = f"{name}, {(start or end or {})['n']} test samples"
    return [label, *(_number(entry["score"] if entry else None) for entry in (start, end))]


def _number(value: float | None, name: str = "") -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if name == "loss" else f"{value:.1f} %"


def last_lines(run: AdapterRun) -> list[str]:
    """Return lines with the mean speed of this launch and the peak memory, followed by `next_steps`.

    The mean excludes the first step. Without a second step in this launch, only `next_steps` are returned.
    """
    meter = run.meter
    mean, steps = meter.mean(), meter.steps
    if mean is None or steps is None:
        return next_steps(run)
    peak = meter.peak.flops_per_second
    shown = f"{peak / 1e12:,.1f} TFLOP/s" if peak >= 1e12 else f"{peak / 1e9:,.0f} GFLOP/s"
    speed = f"{mean['tokens_per_second']:,.0f} tokens/s, {mean['supervised_tokens_per_second']:,.0f} of them supervised"
    mfu = f"MFU {mean['mfu']:.1%} of {shown} ({meter.peak.source})"
    rows = [
        ("speed", f"{speed}; {mfu}; padding {mean['padding']:.1%}; steps {steps[0]} to {steps[1]}"),
        ("memory", f"{bytes_in_words(peak_memory_bytes(run.runner.device))} at the peak, including scores, rank 0"),
    ]
    return ["", *aligned_lines(rows, align="<"), *next_steps(run)]


def next_steps(run: AdapterRun) -> list[str]:
    """Return lines that list the written files and the commands to use next."""
    path, settings = run.folder.path, run.plan.settings
    peft = path / "peft"
    source = run.plan.source
    lines = [
        "",
        f"run folder  {path}",
        f"  adapter/  the adapter, {bytes_in_words(sum(file.stat().st_size for file in run.folder.adapter.iterdir()))}",
        "  peft/     the same as a LoRA adapter for PEFT, vLLM and others",
    ]
    merged = path / "merged"
    if is_merge_of(merged, load_native_adapter(run.folder.adapter)):
        kind = "the base" if settings.base is None else "the base as it is stored (not --onto trained)"
        lines += [f"  merged/   {kind} with the adapter merged in, for transformers", "", "next"]
        load = f"from transformers import {source.auto_class}; {source.auto_class}.from_pretrained({str(merged)!r})"
        lines += ["  # Python", f"  {load}"]
    else:
        if os.path.lexists(merged):  # an earlier launch may have had another best adapter
            lines.append("  merged/   has a different adapter; the first command merges this one")
        adapter = ["--adapter", str(path / "adapter")]
        free = next(one for one in numbered(merged) if not os.path.lexists(one))
        merge = [*adapter, "--output", str(free)]
        merge += [] if settings.base is None else ["--onto", "trained"]
        merge += [] if settings.tokenizer is None else ["--tokenizer", settings.tokenizer]
        lines += ["", "next", f"  tiedlora merge {shlex.join(merge)}"]
        lines.append(f"  tiedlora verify {shlex.join([*adapter, '--peft', str(peft)])}")
    exported = Export(peft, settings.rank, settings.targets)
    serving = serve_hints({"tied": exported}, source, adapters=path)
    return [*lines, *(f"  {line}" for line in serving)]
