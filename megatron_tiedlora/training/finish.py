"""The end of a run: scores of the best adapters, their plots, exports and checks, and the next commands."""

from __future__ import annotations

import logging
import os
import shlex
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from megatron_tiedlora.base.atomic import discard, write_json
from megatron_tiedlora.base.errors import UserError, named
from megatron_tiedlora.base.extras import install_hint
from megatron_tiedlora.base.json_files import read_json_object
from megatron_tiedlora.base.table import aligned_lines
from megatron_tiedlora.base.wording import bytes_in_words, count_text
from megatron_tiedlora.checkpoint.base_weights import BaseWeights
from megatron_tiedlora.checkpoint.native_adapter import NativeAdapter, load_native_adapter
from megatron_tiedlora.checkpoint.resume import Checkpoint
from megatron_tiedlora.convert.export_peft import Export, base_location, base_name, export_peft, serve_hints
from megatron_tiedlora.convert.layerwise import layerwise_loss
from megatron_tiedlora.convert.merge import is_merge_of, merge_adapter
from megatron_tiedlora.convert.verify import verify_export
from megatron_tiedlora.data.loader import evaluation_batches
from megatron_tiedlora.data.tasks import get_task
from megatron_tiedlora.data.tokenizer import padding_id
from megatron_tiedlora.evaluation.results import Score
from megatron_tiedlora.parallel.agreement import decided_by_rank_0
from megatron_tiedlora.runtime.ending import FAILED_STATUS, End
from megatron_tiedlora.runtime.run_folder import RunFolder, plot_losses, read_metrics
from megatron_tiedlora.runtime.stopping import RunStopped, StopRequests
from megatron_tiedlora.training.adapter_run import AdapterRun
from megatron_tiedlora.training.evaluation import of_start
from megatron_tiedlora.training.loop import Finished, Trainer, table_rows
from megatron_tiedlora.training.start import Start
from megatron_tiedlora.training.throughput import peak_memory_bytes

_LOGGER = logging.getLogger(__name__)
SAMPLES = "samples_sha256"  # the key beside each score in scores.json


def score_before(trainer: Trainer, checkpoints: Mapping[str, Checkpoint | None]) -> None:
    """Score the adapters that begin, before their first step. All ranks call it."""
    _score(trainer, [run for name, run in trainer.adapters.items() if checkpoints[name] is None], "before")


def score_after(trainer: Trainer) -> None:
    """Score the best adapter of each that has ended; the stage then holds it. All ranks call it."""
    for run in trainer.trained:
        with run.failing_alone():
            use_best_adapter(run, trainer.stop)
    _score(trainer, trainer.trained, "after")


def _score(trainer: Trainer, runs: Sequence[AdapterRun], moment: str) -> None:
    """Score adapters together on their test samples, and record that."""

    def score(some: Sequence[AdapterRun]) -> dict[str, dict[str, Score]]:
        return trainer.evaluation.scores(some, lambda run: run.data.scored)

    with trainer.stop.deferred():
        found = of_start(runs, score) if moment == "before" else score(runs)
    for run in runs:
        if run.name in found:
            with run.failing_alone():
                record_score(run, moment, found[run.name])


def use_best_adapter(run: AdapterRun, stop: StopRequests) -> None:
    """Load the best adapter into the model; the optimizer stays as it is, since training is over."""
    folder = run.folder.checkpoints / f"step_{run.progress.best_step}"
    # Other hosts may not see the run folder.
    best = decided_by_rank_0(lambda: load_native_adapter(folder), kind=NativeAdapter)
    with stop.deferred():
        with run.runner.optimizers.opened(run.name):
            run.adapter.load_full(best.state)
        stop.agree(True)


def record_score(run: AdapterRun, moment: str, scores: Mapping[str, Score]) -> None:
    """Add scores ("before" or "after" training) to scores.json, each with the hash of its samples.

    A resumed run finds the scores from before training there. It may have another test set.

    Raises:
        UserError: the file cannot be written; on every rank.
    """
    samples = run.data.scored
    if not scores or samples is None:
        return

    def write() -> None:
        file = run.folder.scores
        recorded = read_json_object(file, kind="scores") if file.is_file() else {}
        recorded[moment] = {name: {**score.plain(), SAMPLES: samples.sha256} for name, score in scores.items()}
        write_json(file, recorded, guard=run.folder.guard)

    decided_by_rank_0(write)


def set_end(trainer: Trainer, end: End) -> None:
    """How the run ends: as its only adapter, or by all of them; it fails if an adapter did."""
    failed, total = trainer.failed, count_text(len(trainer.everyone), "adapter")
    end.reason = f"{len(failed)} of {total} failed: {', '.join(failed)}" if failed else f"{total} trained"
    if failed:
        end.state, end.status = "failed", FAILED_STATUS
    for run in trainer.adapters.values():
        if not run.ends_apart:
            end.reason = run.reason


def end_at_once(start: Start, end: End) -> list[str]:
    """End a start that finds every adapter finished: rank 0 writes the table and the status. Returns lines to print."""
    end.reason = f"{count_text(len(start.finished), 'adapter')} trained"
    if start.is_main:
        start.folder.write_table(table_rows(start.finished))
        last = max(adapter.progress.step for adapter in start.finished.values())
        start.folder.write_status("finished", step=last, reason=end.reason)
    return table_lines(start.finished, start.folder)


def export_all(trainer: Trainer) -> list[str]:
    """Export each adapter that has ended, and record that it has finished. On rank 0. Returns lines to print.

    Raises:
        RunStopped: a signal came; those that are exported have finished.
    """
    lines: list[str] = []
    for run in trainer.trained:
        with run.failing_alone():
            exported = export(run, trainer.stop)
            lines += [*([] if run.ends_apart else summary_lines(run)), *exported]
            run.finish()
    trainer.write_table()
    return lines


def last_lines(trainer: Trainer) -> list[str]:
    """What a user has now, and the next commands. On rank 0."""
    alone = [run for run in trainer.adapters.values() if not run.ends_apart]
    if not alone:
        return table_lines(trainer.everyone, trainer.folder)
    return [line for run in alone for line in (*speed_lines(run), *next_steps(run))]


def original_losses(trainer: Trainer) -> list[str]:
    """The validation loss of each on the base as it is stored, if the run used another one. On rank 0."""
    finished = [run for run in trainer.adapters.values() if run.recorded and run.failure is None]
    lines = [(run, line) for run in finished for line in original_loss(run, trainer.stop)]
    return [named(run.name, line) for run, line in lines if line or not run.ends_apart]


def table_lines(adapters: Mapping[str, AdapterRun | Finished], folder: RunFolder) -> list[str]:
    """How each adapter ended, where its files are, and the commands that serve them. On rank 0."""
    rows = [("adapter", "state   ", "  step", "best step", "    best", "reason")]
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
    serving = serve_hints(exports, base_location(source), source.shape, named=base_name(source))
    return [*lines, "", "next", *(f"  {line}" for line in serving)]


def summary_lines(run: AdapterRun) -> list[str]:
    """The table at the end of a run: validation loss and scores before and after, read from the run folder."""
    rows = ["", f"{'':<34}{'before':>10}{'after':>10}"]
    metric, best = run.plan.settings.eval_metric, run.progress
    validation = [row for row in read_metrics(run.folder.metrics) if row["split"] == "validation"]
    by_step = {row["step"]: row for row in validation}
    for name in dict.fromkeys(("loss", metric)):
        start, end = (by_step.get(step, {}).get(name) for step in (0, best.best_step))
        chosen = f"   (best, step {best.best_step})" if name == metric else ""
        rows.append(f"{f'validation {name}':<34}{_number(start, name):>10}{_number(end, name):>10}{chosen}")
        worse = start is not None and end is not None and (start <= end if name == "loss" else end <= start)
        if name == metric and worse:
            rows.append(f"training did not improve the validation {name}: try another --learning_rate or more data")
    file = run.folder.scores
    return [*rows, *score_rows(read_json_object(file, kind="scores") if file.is_file() else {})]


def score_rows(scores: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> list[str]:
    """The rows for scores.json. Scores of a metric before and after share a row if they are of the same samples."""
    before, after = (scores.get(moment, {}) for moment in ("before", "after"))
    rows = []
    for name in dict.fromkeys([*before, *after]):
        start, end = before.get(name), after.get(name)
        if start and end and start.get(SAMPLES) != end.get(SAMPLES):
            rows += [_score_row(name, start, None), _score_row(name, None, end)]
        else:
            rows.append(_score_row(name, start, end))
    return rows


def _score_row(name: str, start: Mapping[str, Any] | None, end: Mapping[str, Any] | None) -> str:
    label = f"{name}, {(start or end or {})['n']} test samples"
    before, after = (_number(entry["score"] if entry else None) for entry in (start, end))
    return f"{label:<34}{before:>10}{after:>10}"


def speed_lines(run: AdapterRun) -> list[str]:
    """The mean speed of the steps of this start, without its first one, and the peak memory.

    There are no lines if this start took fewer than two steps.
    """
    meter = run.meter
    mean, steps = meter.mean(), meter.steps
    if mean is None or steps is None:
        return []
    peak = meter.peak.flops_per_second
    shown = f"{peak / 1e12:,.1f} TFLOP/s" if peak >= 1e12 else f"{peak / 1e9:,.0f} GFLOP/s"
    return [
        "",
        f"speed       {mean['tokens_per_second']:,.0f} tokens/s, {mean['supervised_tokens_per_second']:,.0f} of them"
        f" supervised; MFU {mean['mfu']:.1%} of {shown}"
        f" ({meter.peak.source}); padding {mean['padding']:.1%}; steps {steps[0]} to {steps[1]}",
        f"memory      {bytes_in_words(peak_memory_bytes(run.runner.device))} at the peak, rank 0",
    ]


def _number(value: float | None, name: str = "") -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if name == "loss" else f"{value:.1f} %"


def original_loss(run: AdapterRun, stop: StopRequests) -> list[str]:
    """A line with the validation loss of the best adapter on the base as it is stored. On rank 0.

    There is none if the run used no other base. The run is over, so a signal or too little memory only end this.
    """
    plan = run.plan
    if plan.settings.base is None or plan.source.stored is not None:
        return []
    try:
        text = f"{_original_loss(run, stop):.4f}"
    except (RunStopped, torch.OutOfMemoryError) as error:
        text = "not computed, as " + ("a signal came" if isinstance(error, RunStopped) else "memory is too small")
    return ["", f"on the base as it is stored, in {plan.dtype_name}: validation loss {text}"]


def _original_loss(run: AdapterRun, stop: StopRequests) -> float:
    """It computes one layer at a time, so that it needs little memory beside the run's."""
    plan, data = run.plan, run.data
    source, size = plan.source, plan.batches.micro_batch_size
    batches = evaluation_batches(
        data.validation,
        micro_batch_size=size,
        dp_rank=0,
        dp_size=1,
        pad_id=padding_id(data.tokenizer),
        pad_multiple=plan.layout.pad_multiple,
    )
    with BaseWeights(source.weights_folder(), source.shape) as weights:
        loss = layerwise_loss(
            source.shape,
            weights.read,
            load_native_adapter(run.folder.adapter),
            batches,
            dtype=plan.dtype,
            device=run.runner.device,
            between=stop.raise_if_requested,
            progress=True,
        )
    return loss / data.validation.num_supervised


def export(run: AdapterRun, stop: StopRequests) -> list[str]:
    """Plot and export to PEFT; if the task asks for it, also merge, and verify both. On rank 0. Returns lines to print.

    Merging and verifying need disk space and memory for a whole model, so other tasks leave them to the tools.

    Raises:
        UserError: an export does not compute the same as the adapter.
        RunStopped: a signal came; the other ranks wait where they learn of it.
    """
    stop.raise_if_requested()
    folder, source, settings = run.folder, run.plan.source, run.plan.settings
    if find_spec("matplotlib") is None:
        _LOGGER.warning("note: loss.png is not drawn without matplotlib; %s", install_hint("train"))
    else:
        plot_losses(folder.metrics, folder.path / "loss.png", guard=folder.guard)
    adapter = load_native_adapter(folder.adapter)
    merged, peft = folder.path / "merged", folder.path / "peft"
    discard(peft, guard=folder.guard)  # an earlier start of this run may have exported another best adapter
    export_peft(source, adapter, peft, native=folder.adapter, new=folder.new_folder)
    if not get_task(settings.task).exports_merged or source.stored is not None:
        return []
    discard(merged, guard=folder.guard)
    merge_adapter(source, adapter, merged, tokenizer=settings.tokenizer, progress=True, new=folder.new_folder)
    found = verify_export(source, adapter, merged=merged, peft=peft)
    if not found.passed:
        _LOGGER.error(found.report())
        raise UserError(f"{folder.path}: an export computes other values than the adapter, see the table above")
    return ["", *found.report().split("\n")]


def next_steps(run: AdapterRun) -> list[str]:
    """The files that a user has now, and the next commands."""
    path, settings = run.folder.path, run.plan.settings
    peft = path / "peft"
    source = run.plan.source
    lines = [
        "",
        f"run folder  {path}",
        f"  adapter/  the adapter, {_size(run.folder)}",
        "  peft/     the same as a LoRA adapter for PEFT, vLLM and others",
    ]
    merged = path / "merged"
    if is_merge_of(merged, load_native_adapter(run.folder.adapter)):
        kind = "the base" if settings.base is None else "the base as it is stored (not --onto trained)"
        lines += [f"  merged/   {kind} with the adapter merged in, for transformers", "", "next"]
        load = f"from transformers import AutoModelForCausalLM; AutoModelForCausalLM.from_pretrained({str(merged)!r})"
        lines += ["  # Python", f"  {load}"]
    else:
        if os.path.lexists(merged):  # an earlier start may have had another best adapter
            lines.append("  merged/   not of this adapter; the first command below merges it anew")
        adapter = ["--adapter", str(path / "adapter")]
        merge = [*adapter, "--output", str(_first_free(merged))]
        merge += [] if settings.base is None else ["--onto", "trained"]
        merge += [] if settings.tokenizer is None else ["--tokenizer", settings.tokenizer]
        lines += ["", "next", f"  tiedlora merge {shlex.join(merge)}"]
        lines.append(f"  tiedlora verify {shlex.join([*adapter, '--peft', str(peft)])}")
    exported = Export(peft, settings.rank, settings.targets)
    serving = serve_hints({"tied": exported}, base_location(source), source.shape, named=base_name(source))
    return [*lines, *(f"  {line}" for line in serving)]


def _first_free(path: Path) -> Path:
    """The first of NAME, NAME-2, NAME-3, ... that does not exist."""
    free, number = path, 2
    while os.path.lexists(free):
        free, number = path.with_name(f"{path.name}-{number}"), number + 1
    return free


def _size(folder: RunFolder) -> str:
    size = sum(file.stat().st_size for file in folder.adapter.iterdir())
    return bytes_in_words(size)
