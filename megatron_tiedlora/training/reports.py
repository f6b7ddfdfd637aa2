"""What a run tells its user: the lines before its progress bar, the bar's text, and the lines at its end.

A run of one adapter tells of it in full; a run of several has a row for each.
"""

import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from megatron_tiedlora.base.files import read_json_object
from megatron_tiedlora.base.messages import aligned_lines, bytes_in_words, count_text, range_text
from megatron_tiedlora.base.output_folder import numbered
from megatron_tiedlora.base.shapes import QKV
from megatron_tiedlora.checkpoint.load_model import describe_dtype
from megatron_tiedlora.checkpoint.native_adapter import load_native_adapter
from megatron_tiedlora.checkpoint.resume import Checkpoint
from megatron_tiedlora.convert.export_peft import Export, base_location, base_name, serve_hints
from megatron_tiedlora.convert.merge import is_merge_of
from megatron_tiedlora.model.weights import num_base_parameters
from megatron_tiedlora.planning.adapter_plans import shared_plan
from megatron_tiedlora.planning.run_plan import RunPlan, steps_in_words
from megatron_tiedlora.runtime.ending import FAILED_STATUS, End
from megatron_tiedlora.runtime.run_folder import RunFolder, read_metrics
from megatron_tiedlora.training.adapter_run import AdapterRun
from megatron_tiedlora.training.build import BuiltModel
from megatron_tiedlora.training.compiling import ChosenKernels
from megatron_tiedlora.training.finish import SAMPLES
from megatron_tiedlora.training.loop import Finished, Trainer
from megatron_tiedlora.training.start import Start
from megatron_tiedlora.training.throughput import peak_memory_bytes, steps_over

HeadlineRow = tuple[str, str]  # of the headline: what a line tells of, and what


@dataclass(frozen=True)
class RunReport:
    """What a run tells, from its start to its end, with a row for each adapter. Rank 0 shows it."""

    start: Start
    trainer: Trainer
    built: BuiltModel

    saved = "the last step of each adapter is saved"  # after a signal; "" if the step says it

    def headline(self, chosen: ChosenKernels, device: torch.device) -> list[str]:
        """A summary of the run before its progress bar: what all adapters share, and each."""
        plan, attention = shared_plan(self.start.plans), self.built.runner.stage.attention
        settings = plan.settings
        model = f"{settings.model}, {num_base_parameters(plan.source.shape) / 1e6:,.1f} M parameters in"
        model += f" {describe_dtype(settings.dtype, plan.dtype_name)}, frozen"
        model += "" if settings.base is None else f"; the linears of its blocks in {settings.base}"
        model += "" if settings.products is None else f", products in {settings.products}"
        read, kept = (range_text(sizes, bytes_in_words) for sizes in (self.built.bytes_read, self.built.bytes_kept))
        stored = "" if settings.base is None else f", stored as {kept}"
        rows = [
            ("model", model),
            *self._adapters(),
            *_layout(plan),
            ("read", f"{read} of base weights per rank{stored}"),
            ("kernels", chosen.description),
            ("attention", str(attention.route(device, plan.dtype))),
            *self._starts(),
        ]
        return aligned_lines(rows, align="<")

    def _adapters(self) -> list[HeadlineRow]:
        """What is trained."""
        plans = self.start.plans
        plan, trained = shared_plan(plans), sum(sum(own.adapter.num_trained().values()) for own in plans.values())
        ranks = count_text(plan.grid.dp_size, "data-parallel rank")
        return [("adapters", f"{len(plans)}, {trained:,} trained parameters, ZeRO-{plan.engine.zero_stage}, {ranks}")]

    def _starts(self) -> list[HeadlineRow]:
        """The run's folder, and from where each adapter starts."""
        start, trainer = self.start, self.trainer
        rows = [("run folder", str(start.folder.path))]
        if over := steps_over(trainer.profile, trainer.last_step):
            rows.append(("note", over))
        rows += [("adapter", f"{name}: finished before") for name in start.finished]
        for name, run in trainer.adapters.items():
            own, checkpoint = run.plan.settings, start.checkpoints[name]
            samples, steps = count_text(len(run.data.train), "sample"), count_text(own.max_steps, "step")
            step = f"{own.method}, rank {own.rank}, {samples}, {own.global_batch_size} per step"
            rows.append(("adapter", f"{name}: {step}, {steps}{resumed_text(run.plan, checkpoint)}"))
            notes = (*run.data.notes, *(() if checkpoint is None else checkpoint.notes), *self.built.notes[name])
            rows += [("note", f"{name}: {note}") for note in notes]
            rows += [("warning", f"{name}: {warning}") for warning in run.data.warnings(run.plan)]
            if trainer.rivals.get(name) and len(run.evaluation_sizes) < 2:
                rows.append(("warning", f"{name}: --halving cannot tell noise, as the validation set is one batch"))
        return rows

    @staticmethod
    def progress(trainer: Trainer) -> str:
        """The text at the end of the progress bar."""
        states = [run.state for run in trainer.everyone.values()]
        shown = ("running", "ended", "failed", *(["finished"] if "finished" in states else []))
        counts = ", ".join(f"{states.count(state)} {state}" for state in shown)
        return "; ".join((counts, *trainer.rates[:1]))

    def set_end(self, end: End) -> None:
        """Set how the run ends: it fails if an adapter did."""
        if self.trainer.failed:
            end.state, end.status = "failed", FAILED_STATUS
        end.reason = self._reason()

    def _reason(self) -> str:
        """Why the run ended, for its run_status.json."""
        failed, total = self.trainer.failed, count_text(len(self.trainer.everyone), "adapter")
        return f"{len(failed)} of {total} failed: {', '.join(failed)}" if failed else f"{total} trained"

    def exported(self, run: AdapterRun, lines: list[str]) -> list[str]:
        """What is told of an adapter that has just been exported, and these lines of its export."""
        return lines

    def last_lines(self) -> list[str]:
        """What a user has now, and the next commands."""
        return table_lines(self.trainer.everyone, self.start.folder)


class FullReport(RunReport):
    """What a run of one adapter tells: all of it."""

    saved = ""

    def _adapters(self) -> list[HeadlineRow]:
        (plan,), (data,) = self.start.plans.values(), self.start.data.values()
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
        ]

    def _starts(self) -> list[HeadlineRow]:
        start = self.start
        (plan,), (data,), (checkpoint,) = start.plans.values(), start.data.values(), start.checkpoints.values()
        rows, settings = list[HeadlineRow](), plan.settings
        if settings.init_from is not None and checkpoint is None:
            rows.append(("start", f"values of {settings.init_from}"))
        (of_build,) = self.built.notes.values()
        notes = [*(() if checkpoint is None else checkpoint.notes), *of_build]
        if checkpoint is not None and (over := steps_over(settings.profile, checkpoint.progress.step)):
            notes.append(over)
        rows.append(("run folder", f"{start.folder.path}{resumed_text(plan, checkpoint)}"))
        rows += [("note", note) for note in notes]
        return [*rows, *(("warning", warning) for warning in data.warnings(plan))]

    @staticmethod
    def progress(trainer: Trainer) -> str:
        return "".join(trainer.rates[-1:])

    def _reason(self) -> str:
        (run,) = self.trainer.adapters.values()
        return run.reason

    def exported(self, run: AdapterRun, lines: list[str]) -> list[str]:
        return [*summary_lines(run), *lines]

    def last_lines(self) -> list[str]:
        (run,) = self.trainer.adapters.values()
        return [*speed_lines(run), *next_steps(run)]


def _layout(plan: RunPlan) -> list[HeadlineRow]:
    grid = plan.grid
    if grid.tp_size * grid.pp_size == 1:
        return []
    sharded = " with sequence parallelism" if plan.layout.sequence_parallel else ""
    stages = ", ".join(f"{len(stage.layers)}" for stage in plan.stages)
    pipeline = f"pipeline {grid.pp_size} ({stages} layers with embedding and head)"
    return [("layout", f"tensor {grid.tp_size}{sharded} x {pipeline} x data {grid.dp_size}")]


def resumed_text(plan: RunPlan, checkpoint: Checkpoint | None) -> str:
    """The step from which the run continues, and whether --packing was different before it."""
    if checkpoint is None:
        return ""
    packing, before = plan.settings.packing, checkpoint.settings.get("packing", plan.settings.packing)
    changed = f" (until there --packing {str(before).lower()}, from here {str(packing).lower()})"
    return f", resumed from step {checkpoint.progress.step}{changed if before != packing else ''}"


# The end -------------------------------------------------------------------------------------------------------------


def table_lines(adapters: Mapping[str, AdapterRun | Finished], folder: RunFolder) -> list[str]:
    """How each adapter ended, where its files are, and the commands that serve them. On rank 0."""
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
    serving = serve_hints(exports, base_location(source), source.shape, named=base_name(source))
    return [*lines, "", "next", *(f"  {line}" for line in serving)]


def summary_lines(run: AdapterRun) -> list[str]:
    """The table at the end of a run: validation loss and scores before and after, read from the run folder."""
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


def _score_row(name: str, start: Mapping[str, Any] | None, end: Mapping[str, Any] | None) -> list[str]:
    label = f"{name}, {(start or end or {})['n']} test samples"
    return [label, *(_number(entry["score"] if entry else None) for entry in (start, end))]


def _number(value: float | None, name: str = "") -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if name == "loss" else f"{value:.1f} %"


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
    speed = f"{mean['tokens_per_second']:,.0f} tokens/s, {mean['supervised_tokens_per_second']:,.0f} of them supervised"
    mfu = f"MFU {mean['mfu']:.1%} of {shown} ({meter.peak.source})"
    rows = [
        ("speed", f"{speed}; {mfu}; padding {mean['padding']:.1%}; steps {steps[0]} to {steps[1]}"),
        ("memory", f"{bytes_in_words(peak_memory_bytes(run.runner.device))} at the peak, rank 0"),
    ]
    return ["", *aligned_lines(rows, align="<")]


def next_steps(run: AdapterRun) -> list[str]:
    """The files that a user has now, and the next commands."""
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
        load = f"from transformers import AutoModelForCausalLM; AutoModelForCausalLM.from_pretrained({str(merged)!r})"
        lines += ["  # Python", f"  {load}"]
    else:
        if os.path.lexists(merged):  # an earlier start may have had another best adapter
            lines.append("  merged/   not of this adapter; the first command below merges it anew")
        adapter = ["--adapter", str(path / "adapter")]
        free = next(one for one in numbered(merged) if not os.path.lexists(one))
        merge = [*adapter, "--output", str(free)]
        merge += [] if settings.base is None else ["--onto", "trained"]
        merge += [] if settings.tokenizer is None else ["--tokenizer", settings.tokenizer]
        lines += ["", "next", f"  tiedlora merge {shlex.join(merge)}"]
        lines.append(f"  tiedlora verify {shlex.join([*adapter, '--peft', str(peft)])}")
    exported = Export(peft, settings.rank, settings.targets)
    serving = serve_hints({"tied": exported}, base_location(source), source.shape, named=base_name(source))
    return [*lines, *(f"  {line}" for line in serving)]
