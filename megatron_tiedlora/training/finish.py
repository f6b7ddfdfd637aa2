"""The end of a run: scores of the best adapters, their plots, exports and checks."""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from importlib.util import find_spec

import torch

from megatron_tiedlora.base.files import discard, read_json_object, write_json
from megatron_tiedlora.base.messages import UserError, count_text, install_hint, named
from megatron_tiedlora.checkpoint.base_weights import BaseWeights
from megatron_tiedlora.checkpoint.native_adapter import NativeAdapter, load_native_adapter
from megatron_tiedlora.checkpoint.resume import Checkpoint
from megatron_tiedlora.convert.export_peft import export_peft
from megatron_tiedlora.convert.layerwise import layerwise_loss
from megatron_tiedlora.convert.merge import merge_adapter
from megatron_tiedlora.convert.verify import verify_export
from megatron_tiedlora.data.tasks import get_task
from megatron_tiedlora.evaluation.results import Score
from megatron_tiedlora.parallel.agreement import decided_by_rank_0
from megatron_tiedlora.planning.adapter_plans import shared_plan
from megatron_tiedlora.runtime.run_folder import plot_losses
from megatron_tiedlora.runtime.stopping import RunStopped, StopRequests
from megatron_tiedlora.training.adapter_run import AdapterRun
from megatron_tiedlora.training.loop import Trainer, of_start, table_row
from megatron_tiedlora.training.start import Start

_LOGGER = logging.getLogger(__name__)
SAMPLES = "samples_sha256"  # the key beside each score in scores.json


def score_before(trainer: Trainer, checkpoints: Mapping[str, Checkpoint | None]) -> None:
    """Score the adapters that begin, before their first step. All ranks call it."""
    _score(trainer, [run for name, run in trainer.adapters.items() if checkpoints[name] is None], "before")


def score_after(trainer: Trainer) -> None:
    """Score the best adapter of each that has ended; the stage then holds it. All ranks call it.

    Optimizers stay as they are, since training is over.
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


def end_at_once(start: Start) -> str:
    """End a start that finds every adapter finished: rank 0 writes the table and the status. Returns the reason."""
    reason = f"{count_text(len(start.finished), 'adapter')} trained"
    if shared_plan(start.plans).grid.rank == 0:
        start.folder.write_table([table_row(adapter) for adapter in start.finished.values()])
        last = max(adapter.progress.step for adapter in start.finished.values())
        start.folder.write_status("finished", step=last, reason=reason)
    return reason


def export_all(trainer: Trainer, told: Callable[[AdapterRun, list[str]], list[str]]) -> list[str]:
    """Export each adapter that has ended, and record that it has finished. On rank 0. Returns lines to print.

    Args:
        told: makes the lines to print of the lines of an adapter's export.

    Raises:
        RunStopped: a signal came; those that are exported have finished.
    """
    lines: list[str] = []
    try:
        for run in trainer.trained:
            with run.failing_alone():
                exported = export(run, trainer.stop)
                lines += told(run, exported)
                run.finish()
    except BaseException:
        with suppress(UserError):  # what ends the export is the reason to report
            trainer.write_table()
        raise
    trainer.write_table()
    return lines


def original_losses(trainer: Trainer) -> list[str]:
    """The validation loss of each on the base as it is stored, if the run used another one. On rank 0."""
    finished = [run for run in trainer.adapters.values() if run.state == "finished"]
    lines = [named(run.name, line) for run in finished for line in original_loss(run, trainer.stop)]
    return ["", *lines] if lines else []


def original_loss(run: AdapterRun, stop: StopRequests) -> list[str]:
    """A line with the validation loss of the best adapter on the base as it is stored. On rank 0.

    There is none if the run used no other base. The run is over, so a signal, too little memory or a base that cannot
    be read only end this.
    """
    plan = run.plan
    if plan.settings.base is None or plan.source.stored is not None:
        return []
    try:
        text = f"{_original_loss(run, stop):.4f}"
    except RunStopped:
        text = "not computed, as a signal came"
    except torch.OutOfMemoryError:
        text = "not computed, as memory is too small"
    except UserError as error:
        text = f"not computed: {error}"
    return [f"on the base as it is stored, in {plan.dtype_name}: validation loss {text}"]


def _original_loss(run: AdapterRun, stop: StopRequests) -> float:
    """It computes one layer at a time, so that it needs little memory beside the run's."""
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
            progress=True,
        )
    return loss / run.data.validation.num_supervised


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
