"""Start a run: lock its folders, find the checkpoints to resume from, and write the first files after all checks.

A run of one adapter uses the run folder itself. In a run of several adapters, each adapter uses the folder RUN/NAME or
its own output_dir.
"""

import math
import shlex
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron_tiedlora.base.files import read_json_object, read_json_or_none, write_json
from megatron_tiedlora.base.messages import UserError, count_text, naming, user_path
from megatron_tiedlora.base.ownership import Owner
from megatron_tiedlora.checkpoint import resume
from megatron_tiedlora.checkpoint.native_adapter import load_native_adapter, save_adapter
from megatron_tiedlora.config.cli import (
    DATA_HASHES,
    HALVING_REASON,
    HUB_NAMES,
    OF_ALL,
    PER_ADAPTER,
    START_HASH,
    TEMPLATE_HASH,
    competitors_of,
)
from megatron_tiedlora.config.fields import declared, flag_value, marked
from megatron_tiedlora.config.settings import Settings
from megatron_tiedlora.data.chat import chat_template_sha256
from megatron_tiedlora.data.sources import hub_ids
from megatron_tiedlora.parallel.agreement import decided_by_rank_0, num_differing, sum_over_ranks
from megatron_tiedlora.planning import adapter_plans
from megatron_tiedlora.planning.planned import micro_batch_capacity
from megatron_tiedlora.planning.run_plan import RunPlan
from megatron_tiedlora.runtime.ending import End
from megatron_tiedlora.runtime.launch_env import rank_and_world_size
from megatron_tiedlora.runtime.run_folder import MetricsLog, RunFolder, read_metrics, take_run_folder, write_metrics
from megatron_tiedlora.runtime.stopping import StopRequests
from megatron_tiedlora.training.adapter_run import AdapterRun, is_trained
from megatron_tiedlora.training.build import BuiltModel, check_resumed_base
from megatron_tiedlora.training.loop import Finished, Trainer
from megatron_tiedlora.training.step import TrainStep
from megatron_tiedlora.training.throughput import Meter, Peak, find_peak, steps_over


@dataclass
class Start:
    """The state of a launch on this rank before its first step.

    Attributes:
        plans: the plans of all adapters, by name.
        folder: the folder of the run, which rank 0 has locked.
        end: the object that reports the end of the run and releases the folders.
        folders: the folder of each adapter. New folders are not locked until `make_trainer` creates them.
        checkpoints: the checkpoint from which each adapter resumes; None for a new adapter.
        finished: the adapters that finished in an earlier launch.
    """

    settings: Settings
    plans: dict[str, RunPlan]
    data: adapter_plans.Data
    folder: RunFolder
    end: End
    folders: dict[str, RunFolder] = field(default_factory=dict)
    checkpoints: dict[str, resume.Checkpoint | None] = field(default_factory=dict)
    finished: dict[str, Finished] = field(default_factory=dict)

    @property
    def own_folders(self) -> dict[str, RunFolder]:
        """The adapter folders by name, without the run folder itself."""
        return {name: own for name, own in self.folders.items() if own is not self.folder}

    @property
    def left(self) -> dict[str, RunPlan]:
        """The plans of the adapters that did not finish in an earlier launch."""
        return {name: plan for name, plan in self.plans.items() if name not in self.finished}


def open_run(settings: Settings, plans: adapter_plans.Plans, data: adapter_plans.Data, end: End) -> Start:
    """Choose and lock the run folder on rank 0, and find the checkpoints. Return the state of the launch on every rank.

    A folder is not locked if its run cannot be resumed. No run files are written yet.

    Args:
        end: the object that releases the folders at the end of the run. It receives each folder as soon as the folder
            is locked. Other ranks can then release the folders if rank 0 dies while it reads checkpoints.

    Raises:
        UserError: on every rank, if a folder is in use or has a run that cannot be resumed, or if ranks have different
            data.
    """
    for own in {id(own): own for own in data.values()}.values():
        if differing := num_differing(own.shared_sha256):
            raise UserError(
                f"{count_text(differing, 'rank')} read training, validation or test data that differs from rank 0's."
                " Give every host the same files"
            )

    def reject_other_runs(folder: RunFolder) -> None:
        for name, own in adapter_plans.adapter_folders(plans, folder).items():
            with naming(name):
                reject_another_run(plans[name], data[name], own)

    after = partial(adapter_plans.check_run_folders, settings, plans)
    folder = _take_folder(settings, end=end, before=reject_other_runs, after=after)
    opened = Start(settings, dict(plans), data, folder, end, adapter_plans.adapter_folders(plans, folder))
    for name, run_folder in opened.own_folders.items():
        here = plans[name].settings.completed(output_dir=str(run_folder.path))
        opened.plans[name] = replace(plans[name], settings=here)
    # Existing run folders of adapters are locked before their checkpoints are read. New folders are created with the
    # run's first files. So a launch that is killed before then leaves no folder that the next launch would reject.
    if folders := opened.own_folders:
        there = decided_by_rank_0(lambda: [name for name, of in folders.items() if of.path.exists()], kind=list[str])
        opened.folders |= {name: _open_run_folder(name, opened) for name in there}
    for name, plan in opened.plans.items():
        with naming(name):
            read = partial(_read_checkpoint, plan, data[name], opened.folders[name])
            found = opened.checkpoints[name] = decided_by_rank_0(read, kind=resume.Checkpoint | None)
        opened.plans[name] = with_kept_values(plan, None if found is None else found.settings)
    opened.finished = _finished_before(opened)
    return opened


def _take_folder(
    settings: Settings,
    *,
    end: End,
    before: Callable[[RunFolder], None],
    after: Callable[[RunFolder], None] = lambda folder: None,
) -> RunFolder:
    """Lock a run folder on rank 0, and return the folder on every rank. Rank 0 calls `before` before it locks the
    folder, and `after` once the folder is locked."""

    def take() -> tuple[str, str]:
        folder, lock = take_run_folder(settings, before=before)
        end.held.callback(lock.release)
        after(folder)
        return str(folder.path), lock.owner.start

    path, start = decided_by_rank_0(take, kind=tuple[str, str])
    owner = Owner(Path(path), start, is_main=rank_and_world_size()[0] == 0)
    end.owners.append(owner)
    return RunFolder.of(settings, Path(path), owner)


def _open_run_folder(name: str, start: Start) -> RunFolder:
    """Lock the run folder of one of several adapters on rank 0, and return the folder on every rank."""
    plan, before = start.plans[name], partial(reject_another_run, start.plans[name], start.data[name])
    with naming(name):
        return _take_folder(plan.settings, end=start.end, before=before)


def _finished_before(start: Start) -> dict[str, Finished]:
    """Return the adapters that finished and were exported in an earlier launch, and have no steps left.

    An adapter whose training --halving ended counts as finished if this launch also uses --halving. In a run of one
    adapter, the adapter never counts as finished. Such a run scores and exports the adapter again.
    """
    folders = start.own_folders
    if not folders:
        return {}

    def reasons() -> dict[str, str]:
        found = {}
        for name, own in folders.items():
            plan, checkpoint = start.plans[name], start.checkpoints[name]
            status = read_json_or_none(own.status) or {}
            exported, reason = status.get("state") == "finished" and (own.path / "peft").is_dir(), status.get("reason")
            stopped = start.settings.halving and str(reason).startswith(HALVING_REASON)
            if exported and checkpoint is not None and (stopped or is_trained(plan.settings, checkpoint.progress)):
                found[name] = str(reason or "")
        return found

    found = {}
    for name, reason in decided_by_rank_0(reasons, kind=dict[str, str]).items():
        checkpoint = start.checkpoints[name]
        assert checkpoint is not None
        found[name] = Finished(name, start.plans[name], start.folders[name], checkpoint.progress, reason)
    return found


def make_trainer(start: Start, built: BuiltModel, device: torch.device, stop: StopRequests) -> Trainer:
    """Write the first files to the folder of each adapter, and return the trainer of all adapters.

    Raises:
        UserError: on every rank, if a folder cannot be written. The status file of each prepared folder has the error.
    """
    settings, left, end, adapters = start.settings, start.left, start.end, dict[str, AdapterRun]()
    folder_of_run = replace(
        start.folder,
        running=lambda: [(run.folder, run.progress.step) for run in adapters.values() if not run.recorded],
    )
    progress = {name: found.progress if (found := start.checkpoints[name]) else resume.Progress() for name in left}
    end.first_step = max(own.step for own in progress.values())
    end.finished_step = lambda: end.first_step
    if start.own_folders:
        _write_settings(start)
        end.enter(folder_of_run)
    competitors = (
        competitors_of({name: plan.settings for name, plan in start.plans.items()}) if settings.halving else {}
    )
    shared = adapter_plans.shared_plan(left)
    sum_over_ranks([0.0])  # so that all ranks measure at once, since several of them may share a processor
    own_peak = find_peak(device, shared.dtype)
    peak = Peak(sum_over_ranks([own_peak.flops_per_second])[0], own_peak.source)
    capacity = micro_batch_capacity(left, shares=settings.share_micro_batches)
    step = TrainStep(left, built.runner, stop, {name: own.step for name, own in progress.items()}, capacity)
    for name, plan in left.items():
        folder = start.folders[name]
        if folder.owner is None:
            folder = _open_run_folder(name, start)
        found = start.checkpoints[name]
        started = built.starts.get(name) if found is None else found.settings.get(START_HASH)
        recorded = {} if started is None else {START_HASH: started}
        adapters[name] = AdapterRun(
            name=name,
            plan=plan,
            data=start.data[name],
            runner=built.runner,
            base_identity=built.base_identity,
            layout=shared.layout_of(plan.adapter),
            folder=folder,
            log=occupy_run_folder(plan, folder, found, {DATA_HASHES: start.data[name].sources, **recorded}),
            meter=Meter(plan.source.shape, plan.adapter, peak),
            checks=step.checks[name],
            progress=progress[name],
            ends_apart=start.folders[name] is not start.folder,
            keeps_losses=bool(competitors.get(name)),
            recorded_start=recorded,
        )
    if not start.own_folders:  # not `end.folder`: a rank that does not see the folder has none
        end.enter(folder_of_run)
    everyone = {name: start.finished.get(name) or adapters[name] for name in start.plans}
    return Trainer(adapters, step, folder_of_run, stop, everyone, settings.profile, competitors)


def _write_settings(start: Start) -> None:
    """Write adapters.yaml on rank 0 with the shared settings and the settings of each adapter."""
    resolved = {name: plan.resolved_settings() for name, plan in start.plans.items()}
    (first, of_all), *_ = resolved.items()
    own = {name: {key: values[key] for key in values if key in PER_ADAPTER} for name, values in resolved.items()}
    shared = {key: value for key, value in of_all.items() if key not in PER_ADAPTER and key != "adapters"}
    shared["adapters"] = own
    shared |= {key: getattr(start.settings, key) for key in OF_ALL if key != "adapters"}
    decided_by_rank_0(lambda: start.folder.write_settings(shared, ranks=start.plans[first].grid.world_size))


def occupy_run_folder(
    plan: RunPlan, folder: RunFolder, checkpoint: resume.Checkpoint | None, hashes: Mapping[str, Any]
) -> MetricsLog | None:
    """Write the resumed checkpoint, run.yaml and the logs to the folder. Return the log on rank 0, else None.

    Raises:
        UserError: on every rank, if the folder cannot be written. The status file has the error.
    """
    start, logs = checkpoint.progress if checkpoint is not None else resume.Progress(), list[MetricsLog]()

    def occupy() -> None:
        try:
            if checkpoint is not None:
                adopt_checkpoint(folder, checkpoint)
                keep = plan.settings.keep_checkpoints
                resume.remove_superseded(folder.checkpoints, checkpoint.progress, keep=keep, guard=folder.guard)
            write_run_settings(plan, folder, hashes)
            log = MetricsLog(
                folder,
                resumed_step=start.step,
                evaluated_step=start.evaluated_step,
                report_to=plan.settings.report_to,
                settings=plan.resolved_settings(),
            )
            logs.append(log)
        except UserError as error:
            with suppress(UserError):  # the folder may be the cause
                if folder.is_run and not folder.status.exists():
                    folder.write_status("failed", step=start.step, reason=str(error))
            raise

    decided_by_rank_0(occupy)
    return logs[0] if logs else None


def write_run_settings(plan: RunPlan, folder: RunFolder, hashes: Mapping[str, Any] | None = None) -> None:
    """Write run.yaml with the resolved settings, hub names, library versions, a hash of the chat template, and the
    `hashes` of the data and of the adapter of --init_from."""
    settings = plan.resolved_settings() | dict(hashes or {})
    settings[HUB_NAMES] = hub_ids(settings["tokenizer"], *(settings[name] for name in marked(Settings, holds="rows")))
    if plan.settings.chat_template is not None:
        settings[TEMPLATE_HASH] = chat_template_sha256(plan.settings.chat_template)
    folder.write_settings(settings, ranks=plan.grid.world_size)


# The checkpoint from which an adapter resumes -------------------------------------------------------------------------

# Settings that are not `compared` may differ from the checkpoint's, as they do not change the results. --epochs may
# differ, since only the resulting number of steps matters. --max_steps may differ if the schedule is constant, and so
# does not depend on it. Without --warmup_steps, and with --learning_rate auto, the checkpoint's value is used.


def _read_checkpoint(plan: RunPlan, data: adapter_plans.RunData, folder: RunFolder) -> resume.Checkpoint | None:
    """Return the checkpoint that --resume selects, or None if training starts from the beginning.

    Rank 0 reads the checkpoint and sends it to all ranks, so only the host of rank 0 needs the run folder. With `auto`,
    a new run starts if the folder has no checkpoint. So every launch of a job can use the same command.

    Raises:
        UserError: the checkpoint does not exist, is broken, or was written with different settings or data.
    """
    checkpoint = _find_checkpoint(plan.settings.resume, folder)
    if checkpoint is None:
        return None
    step_folder = checkpoint.folder
    check_resumed_settings(plan, checkpoint, data_sha256=data.sha256)
    best = checkpoint.progress.best_step
    if best in (None, checkpoint.progress.step):
        return checkpoint
    notes = checkpoint.notes
    if (step_folder.parent / f"step_{best}").is_dir():
        try:
            load_native_adapter(step_folder.parent / f"step_{best}")
            return checkpoint
        except UserError as error:
            notes = (*notes, f"the best checkpoint is broken, so the next evaluation writes a new one: {error}")
    # The checkpoint was moved out of its run without the best checkpoint. The next evaluation writes a new best one.
    forgotten = replace(
        checkpoint.progress, best_metric=None, best_step=None, evaluations_since_best=0, evaluated_step=None
    )
    return replace(checkpoint, progress=forgotten, notes=notes)


def _find_checkpoint(given: str, folder: RunFolder) -> resume.Checkpoint | None:
    if given == "none":
        return None
    if given == "auto":
        return resume.find_newest_checkpoint(folder.checkpoints)
    path = user_path(given)
    if not path.is_dir():
        raise UserError(f"--resume {given}: no such checkpoint folder. Give auto, or a checkpoints/step_N folder")
    if folder.is_run and path.resolve().parent != folder.checkpoints.resolve():
        raise UserError(f"--resume {given}: {folder.path} contains a different run. Give a new --output_dir")
    return resume.load_checkpoint(path)


def adopt_checkpoint(folder: RunFolder, checkpoint: resume.Checkpoint) -> None:
    """Make `checkpoint` the last checkpoint of the run folder before training resumes. Only rank 0 calls this function.

    A checkpoint in another folder is copied first, with the best checkpoint and the logs. Then `latest` is set to the
    checkpoint, so that a later launch resumes from there. adapter/ is written from the best checkpoint, since an
    earlier launch may have been killed before it updated adapter/.

    Raises:
        UserError: the folder cannot be written, or a copied file is broken.
    """
    progress, source = checkpoint.progress, checkpoint.folder.resolve()
    if source != folder.checkpoints.resolve() / f"step_{progress.step}":
        copies = {source: folder.checkpoints / f"step_{progress.step}"}
        if progress.best_step not in (None, progress.step):
            copies[source.parent / f"step_{progress.best_step}"] = folder.checkpoints / f"step_{progress.best_step}"
        for original, copy in copies.items():
            if original != copy.parent.resolve() / copy.name:
                resume.copy_checkpoint(original, copy, guard=folder.guard)
        run = RunFolder(source.parent.parent)
        if run.is_run and run.path != folder.path.resolve():
            write_metrics(folder.metrics, read_metrics(run.metrics), guard=folder.guard)
            if run.scores.is_file():
                scores = read_json_object(run.scores, kind="a run's scores")
                write_json(folder.scores, scores, guard=folder.guard)
    resume.move_latest(folder.checkpoints, progress.step, guard=folder.guard)
    if progress.best_step is not None:
        best = load_native_adapter(folder.checkpoints / f"step_{progress.best_step}")
        save_adapter(folder.adapter, best, guard=folder.guard)


def reject_another_run(plan: RunPlan, data: adapter_plans.RunData, folder: RunFolder) -> None:
    """Raise UserError if these settings, data or base differ from those of the run that --resume selects."""
    try:
        checkpoint = _find_checkpoint(plan.settings.resume, folder)
    except UserError:  # raised again once this launch owns the folder and has restored moved files
        return
    if checkpoint is not None:
        check_resumed_settings(plan, checkpoint, data_sha256=data.sha256)
        check_resumed_base(plan, checkpoint)


def check_resumed_settings(plan: RunPlan, checkpoint: resume.Checkpoint, *, data_sha256: str) -> None:
    """Raise UserError if a checkpoint was trained with different settings or data than the plan has.

    The message names the setting and both values.
    """
    saved, step, source = checkpoint.settings, checkpoint.progress.step, str(checkpoint.folder)
    settings, marks, kept = plan.settings, declared(Settings), _kept(plan, saved)
    for name, value in plan.resolved_settings().items():
        if not marks[name].compared or name == "epochs":
            continue
        field = Settings.model_fields[name]
        default = None if field.is_required() else field.default  # for settings newer than the checkpoint
        if name not in saved and default in (None, value):
            continue
        if name == "max_new_tokens" and settings.eval_metric == "loss":  # has no effect in such a run
            continue
        before = saved.get(name, default)
        if (list(before) if isinstance(before, (list, tuple)) else before) == value:
            continue
        if name == "max_steps" and saved.get("schedule") == settings.schedule == "constant":
            if settings.max_steps < step:
                raise UserError(
                    f"{source}: the checkpoint is at step {step}, but --max_steps is {_steps_in_words(plan)};"
                    f" give at least {step}"
                )
            continue
        if name in kept:  # see with_kept_values
            if name == "warmup_steps" and kept[name] > settings.max_steps:
                raise UserError(
                    f"{source}: trained with a warm-up of {kept[name]} steps, but --max_steps is"
                    f" {_steps_in_words(plan)}; give at least {kept[name]}"
                )
            continue
        was, now = ("not set" if given is None else flag_value(given) for given in (before, value))
        found = f"{source}: trained with --{name} {was}, but now it is"
        if name == "max_steps":
            schedule = saved.get("schedule", Settings.model_fields["schedule"].default)
            schedule = settings.schedule if schedule == "constant" else schedule
            raise UserError(
                f"{found} {_steps_in_words(plan)}, and --schedule {schedule} depends on --max_steps"
                " (only --schedule constant, used from the first step, allows a different number of steps); resume with"
                f" the same value, or start a new run with --init_from {shlex.quote(source)}"
            )
        same = f"remove the flag, or give {was}" if name == "warmup_steps" else "resume with the same value"
        raise UserError(f"{found} {now}; {same}")
    if settings.resume != "auto" and (over := steps_over(settings.profile, step)):  # with auto the headline notes it
        left = f"give steps from {step + 1} to {settings.max_steps}" if step < settings.max_steps else "omit --profile"
        raise UserError(f"{over}; {left}")
    if saved.get("data_sha256") != data_sha256:
        raise UserError(
            f"{source}: trained on data that differs from --train_file and --validation_file, or the data is truncated"
            " or tokenised differently. Resume with the same data and settings"
        )


def with_kept_values(plan: RunPlan, saved: Mapping[str, Any] | None) -> RunPlan:
    """Return the plan with the computed values of the resumed run, whose settings are `saved` (None for a new run).

    The default warm-up depends on the number of steps, so it would change if the resumed run had more steps. So would
    the rate of --learning_rate auto, which a later version may also compute by different constants.
    """
    return plan if saved is None else replace(plan, settings=plan.settings.completed(**_kept(plan, saved)))


def _kept(plan: RunPlan, saved: Mapping[str, Any]) -> dict[str, Any]:
    """Return the valid values in a checkpoint's settings that replace values which the plan has computed."""
    kept, (warmup, rate) = dict[str, Any](), (saved.get(name) for name in ("warmup_steps", "learning_rate"))
    if "warmup_steps" not in plan.settings.model_fields_set and type(warmup) is int and warmup >= 0:
        kept["warmup_steps"] = warmup
    if plan.by_rule and type(rate) is float and 0 < rate < math.inf:
        kept["learning_rate"] = rate
    return kept


def _steps_in_words(plan: RunPlan) -> str:
    """Return the number of steps as text, followed by --epochs if that flag was given."""
    epochs = plan.settings.epochs
    return f"{plan.settings.max_steps}" + ("" if epochs is None else f" (--epochs {epochs:g})")
