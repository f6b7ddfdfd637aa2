"""The start of a run of several adapters: their plans, data, folders and checkpoints, and the first lines for the user.

Each adapter's are those of a run of its own in RUN/NAME. All of them are checked before anything is written.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch

from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.base.json_files import read_json_or_none
from megatron_tiedlora.base.ownership import Owner
from megatron_tiedlora.base.paths import user_path
from megatron_tiedlora.base.versions import installed_versions
from megatron_tiedlora.base.wording import bytes_in_words, count_text
from megatron_tiedlora.checkpoint.load_model import describe_dtype
from megatron_tiedlora.checkpoint.resume import Checkpoint, Progress
from megatron_tiedlora.config.adapters_file import OF_ALL, PER_ADAPTER, RUN_OF_ALL, check_folders
from megatron_tiedlora.config.settings import Settings
from megatron_tiedlora.engine.bank_runner import OwnRunner
from megatron_tiedlora.model.weights import num_base_parameters
from megatron_tiedlora.parallel.agreement import decided_by_rank_0, raise_on_every_rank
from megatron_tiedlora.runtime.group_folder import GroupFolder
from megatron_tiedlora.runtime.run_folder import RunFolder, choose_run_folder, take_run_folder
from megatron_tiedlora.runtime.stopping import StopRequests
from megatron_tiedlora.training import session
from megatron_tiedlora.training.build_bank import BuiltBank
from megatron_tiedlora.training.compiling import ChosenKernels, choose_kernels
from megatron_tiedlora.training.group import Finished, Group
from megatron_tiedlora.training.group_plan import longest_run
from megatron_tiedlora.training.group_step import GroupStep
from megatron_tiedlora.training.halving import REASON, rivals_of
from megatron_tiedlora.training.loop import is_trained
from megatron_tiedlora.training.member import Member
from megatron_tiedlora.training.member_plans import Data, Plans, group_name, naming, shared_plan
from megatron_tiedlora.training.plan import RunPlan
from megatron_tiedlora.training.profiling import steps_over
from megatron_tiedlora.training.resumed import with_kept_warmup
from megatron_tiedlora.training.throughput import Meter, start_meter

Checkpoints = Mapping[str, Checkpoint | None]
Folders = Mapping[str, RunFolder]
Release = Callable[[], None]
Keep = Callable[[Release], None]


def open_group_folder(settings: Settings, plans: Plans, data: Data, *, keep: Keep) -> tuple[GroupFolder, Keep]:
    """Choose the folder of all on rank 0, which becomes its owner, and tell every rank. Nothing is written yet.

    Args:
        keep: called on rank 0 with the function that releases all folders at the end.

    Returns:
        the folder; and what to call with the function that releases an adapter's.

    Raises:
        UserError: the folder or an adapter's cannot be used; or the ranks have other data. On every rank.
    """
    for own in data.values():
        session.check_same_data(own)
    held = ExitStack()  # the folder of all is released last

    def reject_other_runs(folder: RunFolder) -> None:
        for name, plan in in_folder(plans, GroupFolder(folder.path)).items():
            with naming(name):
                session.reject_another_run(plan, data[name], RunFolder(Path(str(plan.settings.output_dir))))

    def take() -> tuple[str, str]:
        folder, lock = take_run_folder(
            settings.output_dir,
            name=group_name(settings),
            resume=settings.resume,
            take_over=settings.take_over,
            before=reject_other_runs,
            kind=GroupFolder,
        )
        held.callback(lock.release)
        keep(held.close)
        check_run_folders(settings, plans, folder)
        return str(folder.path), lock.owner.start

    path, start = decided_by_rank_0(take, kind=tuple[str, str])
    first = next(iter(plans.values()))
    owner = Owner(Path(path), start, is_main=first.grid.rank == 0)

    def hold(release: Release) -> None:
        held.callback(release)

    return GroupFolder(Path(path), owner), hold


def check_run_folders(settings: Settings, plans: Plans, folder: RunFolder) -> None:
    """Raise UserError if the folder of an adapter cannot be used beside the others and `folder`, the one of all."""
    own = {name: str(plan.settings.output_dir) for name, plan in in_folder(plans, folder).items()}
    check_folders(str(settings.adapters), {RUN_OF_ALL: str(folder.path), **own})
    for name, output_dir in own.items():
        with naming(name):
            choose_run_folder(output_dir, name=plans[name].name, resume=settings.resume)


def in_folder(plans: Plans, folder: RunFolder) -> dict[str, RunPlan]:
    """The plans with the run folder of each adapter: RUN/NAME, or what its entry says."""
    return {
        name: replace(
            plan, settings=plan.settings.completed(output_dir=plan.settings.output_dir or str(folder.path / name))
        )
        for name, plan in plans.items()
    }


def open_run_folders(plans: Plans, data: Data, *, keep: Keep) -> dict[str, RunFolder]:
    """The run folder of each adapter. Those that exist are taken, before their checkpoints are looked for.

    New ones are made with the run's first files: a start that is killed before these leaves nothing in the folder of
    all, which the next start would reject.

    Raises:
        UserError: as in a single run.
    """
    found = {name: RunFolder(user_path(str(plan.settings.output_dir))) for name, plan in plans.items()}
    there = decided_by_rank_0(lambda: [name for name, own in found.items() if own.path.exists()], kind=list[str])
    return found | {name: _open_run_folder(name, plans, data, keep) for name in there}


def _open_run_folder(name: str, plans: Plans, data: Data, keep: Keep) -> RunFolder:
    with naming(name):
        return session.open_run_folder(plans[name], data[name], keep=keep)


def find_checkpoints(plans: Plans, data: Data, folders: Folders) -> dict[str, Checkpoint | None]:
    """The checkpoint from which each adapter continues; None: it begins. Raises UserError as a single run does."""
    found = {}
    for name, plan in plans.items():
        with naming(name):
            found[name] = session.find_checkpoint(plan, data[name], folders[name])
    return found


def resumed(plans: Plans, checkpoints: Checkpoints) -> dict[str, RunPlan]:
    """The plans with the warm-up of the checkpoints."""
    saved = {name: None if found is None else found.settings for name, found in checkpoints.items()}
    return {name: with_kept_warmup(plan, saved[name]) for name, plan in plans.items()}


def finished_before(
    plans: Plans, folders: Folders, checkpoints: Checkpoints, *, halving: bool
) -> dict[str, Finished]:
    """The adapters that an earlier start has finished and exported, and that have no step left by their settings.

    Args:
        halving: what --halving stopped is then finished too; otherwise it has steps left.
    """

    def reasons() -> dict[str, str]:
        found = {}
        for name, plan in plans.items():
            own, checkpoint = folders[name], checkpoints[name]
            status = read_json_or_none(own.status) or {}
            exported, reason = status.get("state") == "finished" and (own.path / "peft").is_dir(), status.get("reason")
            stopped = halving and str(reason).startswith(REASON)
            if exported and checkpoint is not None and (stopped or is_trained(plan.settings, checkpoint.progress)):
                found[name] = str(reason or "")
        return found

    found = {}
    for name, reason in decided_by_rank_0(reasons, kind=dict[str, str]).items():
        checkpoint = checkpoints[name]
        assert checkpoint is not None
        found[name] = Finished(name, plans[name], folders[name], checkpoint.progress, reason)
    return found


def choose_group_kernels(plans: Plans, device: torch.device) -> ChosenKernels:
    """The kernels of all: those that the adapter with most tokens would have alone."""
    return choose_kernels(longest_run(plans), device)


def make_group(
    settings: Settings,
    plans: Plans,
    data: Data,
    folder: GroupFolder,
    folders: Folders,
    checkpoints: Checkpoints,
    built: BuiltBank,
    device: torch.device,
    stop: StopRequests,
    *,
    finished: Mapping[str, Finished],
    keep: Keep,
) -> Group:
    """Occupy the folder of each adapter, and make the group. The first files of the run are written here.

    Args:
        plans: of all adapters.
        folders: of each of them; those without an owner are new.
        finished: those of them that an earlier start has finished.

    Raises:
        UserError: a folder cannot be written; on every rank.
    """
    _write_settings(settings, plans, folder)
    names = tuple(plans)
    rivals = rivals_of({name: plan.settings for name, plan in plans.items()}) if settings.halving else {}
    plans = {name: plan for name, plan in plans.items() if name not in finished}
    meter = start_meter(shared_plan(plans), device)
    saved = {name: checkpoints[name] for name in plans}
    progress = {name: Progress() if found is None else found.progress for name, found in saved.items()}
    steps = {name: found.step for name, found in progress.items()}
    step = GroupStep(plans, built, stop, finished=steps, shares_micro_batches=settings.share_micro_batches)
    members = {}
    for name, plan in plans.items():
        own = folders[name]
        if own.owner is None:
            own = _open_run_folder(name, plans, data, keep)
        members[name] = Member(
            plan=plan,
            data=data[name],
            runner=OwnRunner(built.runner, name),
            base=built.base,
            folder=own,
            stop=stop,
            log=session.occupy_run_folder(plan, own, checkpoints[name]),
            meter=Meter(plan.source.shape, plan.adapter, meter.peak),
            progress=progress[name],
            name=name,
            layout=built.layout(plan),
            own_step=built.step.steps[name],
            own_checks=step.checks[name],
            keeps_losses=bool(rivals.get(name)),
        )
    group = Group(members, step, folder, stop, finished, names, settings.profile, rivals)
    group.folder = replace(folder, running=group.unrecorded)
    return group


def _write_settings(settings: Settings, plans: Plans, folder: GroupFolder) -> None:
    """Write adapters.yaml on rank 0: the settings of all, and those of each."""
    failure = None
    resolved = {name: plan.resolved_settings() for name, plan in plans.items()}
    (first, of_all), *_ = resolved.items()
    own = {name: {key: values[key] for key in values if key in PER_ADAPTER} for name, values in resolved.items()}
    shared = {key: value for key, value in of_all.items() if key not in PER_ADAPTER and key != "adapters"}
    shared |= {"adapters": own, **{key: getattr(settings, key) for key in OF_ALL}, "output_dir": str(folder.path)}
    ranks, versions = plans[first].grid.world_size, installed_versions("torch", "deepspeed", "transformers")
    if plans[first].grid.rank == 0:
        try:
            folder.write_settings({**shared, "adapters": own, "ranks": ranks, "versions": versions})
        except UserError as error:
            failure = error
    raise_on_every_rank(failure)


def headline(
    plans: Plans, data: Data, group: Group, built: BuiltBank, chosen: ChosenKernels, device: torch.device
) -> list[str]:
    """A summary of the run: a few lines for all, and one for each adapter."""
    plan = shared_plan(plans)
    settings, grid, stage = plan.settings, plan.grid, built.runner.stage
    trained = sum(sum(own.adapter.num_trained().values()) for own in plans.values())
    lines = [
        f"model      {settings.model}, {num_base_parameters(plan.source.shape) / 1e6:,.1f} M parameters in"
        f" {describe_dtype(settings.dtype, plan.dtype_name)}, frozen",
        f"adapters   {len(plans)}, {trained:,} trained parameters, ZeRO-{plan.engine.zero_stage}",
        f"layout     tensor {grid.tp_size} x pipeline {grid.pp_size} x data {grid.dp_size}",
        f"read       {bytes_in_words(max(built.bytes_read))} of base weights per rank",
        f"kernels    {chosen.description}",
        f"attention  {stage.attention.route(device, plan.dtype)}",
        f"run folder {group.folder.path}",
    ]
    if over := steps_over(group.profile, group.last_turn):
        lines.append(f"note       {over}")
    lines += [f"{name:<10} finished before" for name in group.finished]
    for name, member in group.members.items():
        own = member.plan.settings
        step = f", resumed from step {member.progress.step}" if member.progress.step else ""
        lines.append(
            f"{name:<10} {own.method}, rank {own.rank}, {count_text(len(data[name].train), 'sample')},"
            f" {own.global_batch_size} per step, {count_text(own.max_steps, 'step')}{step}"
        )
        lines += [f"note       {name}: {note}" for note in (*data[name].notes, *built.notes[name])]
        lines += [f"warning    {name}: {warning}" for warning in data[name].warnings(member.plan)]
        if group.rivals.get(name) and member.num_evaluation_batches < 2:
            lines.append(f"warning    {name}: --halving cannot tell noise, as the validation set is one batch")
    return lines
