"""Fine-tune a language model with Tied-LoRA.

    tiedlora run --ds_config zero2.json                                           the demo
    tiedlora run --model meta-llama/Llama-2-7b-hf --train_file data.jsonl         your model and data
    tiedlora run --model meta-llama/Llama-2-7b-hf --adapters four.yaml            several adapters of one model

Read top to bottom: it is the table of contents of a run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_tiedlora.base.errors import show
from megatron_tiedlora.base.extras import require_extra
from megatron_tiedlora.config.presets import is_preset
from megatron_tiedlora.config.settings import Settings
from megatron_tiedlora.runtime.launch_env import prepare_environment, rank_and_world_size

if TYPE_CHECKING:
    from megatron_tiedlora.runtime.ending import End
    from megatron_tiedlora.training.dry_run_tables import Report


def main(settings: Settings) -> int:
    """Run one rank; returns the exit status: 0 finished, 130, 143 or 138 stopped by a signal, 1 an adapter failed.

    A dry run returns 1 if the layout does not fit in the card of --gpu.
    """
    if not settings.dry_run:
        require_extra("train")
    _check_files(settings)
    prepare_environment()
    if settings.dry_run:
        rank, world_size = rank_and_world_size()
        if rank:
            return 0
        report = _report(settings, launched_ranks=world_size)
        print(report.text)
        return 0 if report.fits else 1
    return (train_rank if settings.adapters is None else train_together)(settings).status


def _check_files(settings: Settings) -> None:
    """Raise UserError if something that a flag names does not exist. What is imported later takes seconds."""
    from megatron_tiedlora.checkpoint.sources import local_folder
    from megatron_tiedlora.config.adapters_file import adapters_path
    from megatron_tiedlora.data.splits import check_files_exist
    from megatron_tiedlora.engine.engine_json import find_engine_json

    if settings.adapters is not None:
        adapters_path(settings.adapters)
    if not is_preset(settings.model):
        local_folder(settings.model)
    find_engine_json(settings.ds_config)
    check_files_exist(settings)


def _report(settings: Settings, *, launched_ranks: int) -> Report:
    """What --dry_run shows."""
    if settings.adapters is None:
        from megatron_tiedlora.training.dry_run import dry_run_report

        return dry_run_report(settings, launched_ranks=launched_ranks)
    from megatron_tiedlora.training.group_dry_run import group_report

    return group_report(settings, launched_ranks=launched_ranks)


def train_rank(settings: Settings) -> End:
    """Run one rank of a job; `prepare_environment` was called. A failure is reported and ends the process."""
    # These import torch, which takes a second: --help and a wrong flag do not wait for it.
    from megatron_tiedlora.runtime.determinism import make_deterministic
    from megatron_tiedlora.runtime.ending import reported_end
    from megatron_tiedlora.runtime.process_group import join_process_group
    from megatron_tiedlora.runtime.stopping import StopRequests

    if settings.deterministic:
        make_deterministic()
    rank, world_size = rank_and_world_size()
    is_main = rank == 0
    stop = StopRequests()
    stop.install()
    with reported_end(rank, world_size, stop) as end:
        # These import DeepSpeed and transformers, which takes seconds; signals are handled already.
        from megatron_tiedlora.checkpoint.resume import Progress
        from megatron_tiedlora.training import build, compiling, finish, session
        from megatron_tiedlora.training.loop import Trainer
        from megatron_tiedlora.training.plan import plan_run
        from megatron_tiedlora.training.resumed import with_kept_warmup
        from megatron_tiedlora.training.run_data import prepare_data
        from megatron_tiedlora.training.throughput import start_meter

        plan = plan_run(settings, rank=rank, world_size=world_size)
        data = prepare_data(plan)
        plan = plan.counted(len(data.train))
        device = join_process_group(settings.timeout_minutes, expected_ranks=world_size)
        end.watch_peers(settings.timeout_minutes)
        session.check_same_data(data)
        folder = session.open_run_folder(plan, data, keep=end.hold)
        end.owner = folder.owner
        checkpoint = session.find_checkpoint(plan, data, folder)
        plan = with_kept_warmup(plan, checkpoint.settings if checkpoint else None)
        start = checkpoint.progress if checkpoint else Progress()
        chosen = compiling.choose_kernels(plan, device)
        built = build.build_model(plan, device, checkpoint, kernels=chosen.kernels)
        runner = build.start_engine(plan, built, device, checkpoint)
        log = session.occupy_run_folder(plan, folder, checkpoint)
        end.enter(folder)
        end.first_step = start.step
        meter = start_meter(plan, device)
        trainer = Trainer(plan, data, runner, built.base, folder, stop, log, meter, start)
        end.finished_step = lambda: trainer.progress.step
        if is_main:
            show(*session.headline(plan, data, folder, checkpoint, built, chosen, device))
        if checkpoint is None:
            finish.record_score(trainer, "before", finish.score(trainer))
        end.reason = trainer.run()
        finish.use_best_adapter(trainer)
        finish.record_score(trainer, "after", finish.score(trainer))
        if is_main:
            exported = finish.export(trainer)
            show(*finish.summary_lines(trainer), *exported, *finish.speed_lines(trainer))
            show(*finish.next_steps(trainer), *finish.original_loss(trainer))
    return end


def train_together(settings: Settings) -> End:
    """The same for the adapters of --adapters. One that fails leaves the others; the exit status is then 1."""
    from megatron_tiedlora.runtime.determinism import make_deterministic
    from megatron_tiedlora.runtime.ending import reported_end
    from megatron_tiedlora.runtime.process_group import join_process_group
    from megatron_tiedlora.runtime.stopping import StopRequests

    if settings.deterministic:
        make_deterministic()
    rank, world_size = rank_and_world_size()
    stop = StopRequests()
    stop.install()
    with reported_end(rank, world_size, stop) as end:
        from megatron_tiedlora.training import group_finish, group_start, member_plans
        from megatron_tiedlora.training.build_bank import build_bank

        plans = member_plans.plan_group(settings, rank=rank, world_size=world_size)
        data = member_plans.prepare_group_data(plans)
        plans = member_plans.counted(plans, data)
        device = join_process_group(settings.timeout_minutes, expected_ranks=world_size)
        end.watch_peers(settings.timeout_minutes)
        folder, keep = group_start.open_group_folder(settings, plans, data, keep=end.hold)
        end.owner = folder.owner
        plans = group_start.in_folder(plans, folder)
        folders = group_start.open_run_folders(plans, data, keep=keep)
        checkpoints = group_start.find_checkpoints(plans, data, folders)
        plans = group_start.resumed(plans, checkpoints)
        finished = group_start.finished_before(plans, folders, checkpoints, halving=settings.halving)
        left = {name: plan for name, plan in plans.items() if name not in finished}
        if not left:
            lines = group_finish.end_at_once(finished, folder, end, is_main=rank == 0)
            if rank == 0:
                show(*lines)
            return end
        chosen = group_start.choose_group_kernels(plans, device)
        built = build_bank(left, device, checkpoints, kernels=chosen.kernels)
        group = group_start.make_group(
            settings,
            plans,
            data,
            folder,
            folders,
            checkpoints,
            built,
            device,
            stop,
            finished=finished,
            keep=keep,
        )
        end.enter(group.folder)
        end.first_step = group.last_turn
        end.finished_step = lambda: group.last_turn
        end.saved = "the last step of each adapter is saved"
        if rank == 0:
            show(*group_start.headline(plans, data, group, built, chosen, device))
        group_finish.score_before(group, checkpoints)
        group.run()
        group_finish.score_after(group)
        group_finish.set_end(group, end)
        if rank == 0:
            show(*group_finish.export_all(group), *group_finish.table_lines(group.everyone, group.folder))
            group_finish.set_end(group, end)
            show(*group_finish.original_losses(group))
    return end


if __name__ == "__main__":
    from megatron_tiedlora.commands.front import run

    run("train")
