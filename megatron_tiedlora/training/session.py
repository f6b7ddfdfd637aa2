"""From a plan to a running engine: the process group, the run folder, the model on its device, what is resumed."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

import megatron_tiedlora
from megatron_tiedlora.adapters.tied_adapter import TiedAdapter, start_values
from megatron_tiedlora.checkpoint.atomic import new_folder, remove_leftovers, write_text
from megatron_tiedlora.checkpoint.base_weights import BaseWeights, load_base_weights
from megatron_tiedlora.checkpoint.native_adapter import BaseIdentity, identify_base, load_adapter, save_adapter
from megatron_tiedlora.checkpoint.resume import (
    LATEST_FILE,
    STATE_FILE,
    Checkpoint,
    Progress,
    latest_checkpoint,
    load_checkpoint,
)
from megatron_tiedlora.config.errors import UserError
from megatron_tiedlora.model.families.llama import num_base_parameters, weight_rules
from megatron_tiedlora.model.layer_specs import layer_specs
from megatron_tiedlora.parallel.collectives import broadcast_object, decided_by_rank_0, sum_over_ranks
from megatron_tiedlora.pipeline.engine import (
    base_construction,
    initialize_engine,
    parameter_access,
    trained_parameters,
)
from megatron_tiedlora.pipeline.engine_state import MOMENTS, write_moments
from megatron_tiedlora.pipeline.sequential import SequentialModel
from megatron_tiedlora.training.optimizer import make_optimizer, make_scheduler, resume_scheduler
from megatron_tiedlora.training.plan import RunPlan, check_resumed_settings
from megatron_tiedlora.training.run_data import RunData
from megatron_tiedlora.training.run_folder import MetricsLog, RunFolder, choose_run_folder


def open_run_folder(plan: RunPlan, device: torch.device) -> RunFolder:
    """Choose the run folder on rank 0 and tell every rank. Raises UserError, on every rank, where it is not free."""

    def choose() -> Path:
        return choose_run_folder(plan.settings.output_dir, name=plan.name, resume=plan.settings.resume).path

    path = decided_by_rank_0(choose, device)
    assert isinstance(path, Path)
    return RunFolder(path)


def occupy_run_folder(
    plan: RunPlan, folder: RunFolder, checkpoint: Checkpoint | None, device: torch.device
) -> MetricsLog | None:
    """Make the folder this run's: what is resumed, run.yaml and the logs. Returns rank 0's log, None elsewhere.

    Raises:
        UserError: the folder cannot be written; on every rank.
    """
    logs: list[MetricsLog] = []

    def occupy() -> None:
        if checkpoint is not None:
            take_over(folder, checkpoint)
        write_run_settings(plan, folder)
        start = checkpoint.progress if checkpoint is not None else Progress()
        logs.append(MetricsLog(folder, resumed_step=start.step, evaluated_step=start.evaluated_step))

    decided_by_rank_0(occupy, device)
    return logs[0] if logs else None


def check_same_data(data: RunData, device: torch.device) -> None:
    """Every rank reads the data for itself; raise UserError where one found other samples than rank 0."""
    mine = data.sha256
    differing = sum_over_ranks([float(mine != broadcast_object(mine, device))], device)[0]
    if differing:
        raise UserError(
            f"{differing:.0f} ranks read other training or validation data than rank 0; give every host the same files"
        )


def find_checkpoint(plan: RunPlan, data: RunData, folder: RunFolder, device: torch.device) -> Checkpoint | None:
    """The checkpoint that --resume asks for, or None to start from the beginning.

    `auto` in a folder without a checkpoint starts from the beginning, so that one command serves a job's first and
    every later start.

    Raises:
        UserError: no such checkpoint, a broken one, or one whose settings or base contradict the plan.
    """
    path = decided_by_rank_0(lambda: _checkpoint_path(plan.settings.resume, folder), device)
    assert path is None or isinstance(path, Path)
    if path is None:
        return None
    checkpoint = load_checkpoint(path)
    check_resumed_settings(plan, checkpoint.settings, data_sha256=data.sha256, source=str(path))
    best = checkpoint.progress.best_step
    if best not in (None, checkpoint.progress.step) and not (path.parent / f"step_{best}").is_dir():
        # A checkpoint that was taken out of its run: the best one so far is gone, so the next evaluation makes it anew.
        forgotten = replace(
            checkpoint.progress, best_metric=None, best_step=None, evaluations_since_best=0, evaluated_step=None
        )
        return replace(checkpoint, progress=forgotten)
    return checkpoint


def _checkpoint_path(resume: str, folder: RunFolder) -> Path | None:
    if resume == "none":
        return None
    if resume == "auto":
        return latest_checkpoint(folder.checkpoints)
    path = Path(resume).expanduser()
    if not path.is_dir():
        raise UserError(f"--resume {resume}: no such checkpoint folder; give auto, or a checkpoints/step_N folder")
    if folder.is_run and path.resolve().parent != folder.checkpoints.resolve():
        raise UserError(f"--resume {resume}: {folder.path} holds another run; give a new --output_dir")
    return path


def take_over(folder: RunFolder, checkpoint: Checkpoint) -> None:
    """Make `checkpoint` the last one of the run folder, before training goes on from it; on rank 0.

    Out of another folder it is copied first, with the best checkpoint and the logs. Then `latest` names it, so that a
    later start goes on with this run, and adapter/ is the best one: a kill between two saves may have left an older.

    Raises:
        UserError: the folder cannot be written.
    """
    progress, source = checkpoint.progress, checkpoint.folder.resolve()
    if source.parent != folder.checkpoints.resolve():
        copies = {source: folder.checkpoints / f"step_{progress.step}"}
        if progress.best_step not in (None, progress.step):
            copies[source.parent / f"step_{progress.best_step}"] = folder.checkpoints / f"step_{progress.best_step}"
        for original, copy in copies.items():
            with new_folder(copy) as unfinished:
                shutil.copytree(original, unfinished, dirs_exist_ok=True)
        run = RunFolder(source.parent.parent)
        for earlier, copied in ((run.metrics, folder.metrics), (run.scores, folder.scores)):
            if run.is_run and earlier.is_file():
                write_text(copied, earlier.read_text(encoding="utf-8"))
    remove_leftovers(folder.path)
    write_text(folder.checkpoints / LATEST_FILE, f"step_{progress.step}\n")
    if progress.best_step is not None:
        best = load_adapter(folder.checkpoints / f"step_{progress.best_step}")
        save_adapter(folder.adapter, best.config, best.base, best.state)


def write_run_settings(plan: RunPlan, folder: RunFolder) -> None:
    """Write run.yaml: every setting as resolved, and the versions that computed it."""
    import deepspeed
    import transformers

    versions = {
        "megatron_tiedlora": megatron_tiedlora.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "deepspeed": deepspeed.__version__,
        "transformers": transformers.__version__,
    }
    settings = plan.resolved_settings()
    settings["output_dir"] = str(folder.path)
    folder.write_settings({**settings, "ranks": plan.grid.world_size, "versions": versions})


@dataclass(frozen=True)
class BuiltModel:
    """The model with base and adapter values in place, and which base that is."""

    module: nn.Module
    base: BaseIdentity
    bytes_read: int


def build_model(plan: RunPlan, device: torch.device, checkpoint: Checkpoint | None) -> BuiltModel:
    """Build the flat list on `device`, read the base weights into it, and give the adapter its values.

    Raises:
        UserError: weights that are missing or do not fit, or a checkpoint of another base.
    """
    config = plan.source.config
    with BaseWeights(plan.source.weights_folder(), weight_rules(config)) as weights:
        base = identify_base(plan.source, weights, plan.settings.dtype)
        if checkpoint is not None:
            checkpoint.adapter.check_base(base, source=str(checkpoint.folder))
        bank = TiedAdapter(plan.adapter).to(device)
        bank.load_full(start_values(plan.adapter) if checkpoint is None else checkpoint.adapter.state)
        specs = layer_specs(config, update_scale=plan.adapter.scale, dtype=plan.dtype)
        with base_construction(plan.engine, dtype=plan.dtype, device=device):
            model = SequentialModel(specs, bank, recompute=plan.settings.recompute)
        load_base_weights(
            weights,
            dict(model.named_parameters()),
            access=parameter_access(plan.engine),
            reads=plan.engine.zero_stage < 3 or plan.grid.rank == 0,
            progress=plan.grid.rank == 0,
        )
        return BuiltModel(model, base, weights.bytes_read)


def start_engine(plan: RunPlan, model: nn.Module, checkpoint: Checkpoint | None) -> Any:
    """The DeepSpeed engine around `model`, its optimizer and schedule standing where the checkpoint stood.

    Raises:
        UserError: a checkpoint without the moments of every trained tensor.
    """
    settings = plan.settings
    if checkpoint is not None:
        _check_moments(checkpoint, trained_parameters(model))
    optimizer = make_optimizer(
        trained_parameters(model).values(), learning_rate=settings.learning_rate, weight_decay=settings.weight_decay
    )
    scheduler = make_scheduler(optimizer, warmup_steps=settings.warmup_steps, max_steps=settings.max_steps)
    engine = initialize_engine(model, plan.engine, optimizer=optimizer, scheduler=scheduler)
    if checkpoint is not None:
        write_moments(
            engine,
            trained_parameters(model),
            plan.engine.zero_stage,
            moments=checkpoint.moments,
            step=checkpoint.progress.step,
        )
        resume_scheduler(scheduler, checkpoint.progress.step)
    return engine


def _check_moments(checkpoint: Checkpoint, parameters: Mapping[str, nn.Parameter]) -> None:
    for name, parameter in parameters.items():
        for moment in MOMENTS:
            stored = checkpoint.moments.get(f"{moment}.{name}")
            if stored is None or stored.shape != parameter.shape:
                found = "missing" if stored is None else f"of shape {tuple(stored.shape)}"
                raise UserError(
                    f"{checkpoint.folder / STATE_FILE}: {moment}.{name} is {found}, expected {tuple(parameter.shape)};"
                    " resume from another checkpoint"
                )


def headline(plan: RunPlan, data: RunData, folder: RunFolder, checkpoint: Checkpoint | None) -> list[str]:
    """What a run is, in a few lines, before its progress bar."""
    settings, batches = plan.settings, plan.batches
    trained, total = sum(plan.adapter.num_trained().values()), num_base_parameters(plan.source.config)
    layers = f"{len(plan.adapter.layers)} of {plan.source.config.num_layers} layers"
    start = "" if checkpoint is None else f", resumed from step {checkpoint.progress.step}"
    return [
        f"model      {settings.model}, {total / 1e6:,.1f} M parameters in {settings.dtype}, frozen",
        f"adapter    {settings.method}, rank {settings.rank}, {layers}: {trained:,} trained parameters",
        f"data       {settings.task}: {len(data.train):,} train, {len(data.validation):,} validation samples;"
        f" {data.train.truncated_prompts} prompts cut to {settings.max_length} tokens",
        f"batches    {batches.global_batch_size} samples a step = {batches.micro_batch_size} x"
        f" {batches.accumulation_steps} micro-batches x {batches.data_parallel} ranks, ZeRO-{plan.engine.zero_stage}",
        f"run folder {folder.path}{start}",
    ]
