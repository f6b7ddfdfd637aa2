"""Run one rank of a training job. The function `train_rank` lists the phases of a run in order."""

from megatron_tiedlora.base.messages import named, show
from megatron_tiedlora.config.settings import Settings
from megatron_tiedlora.runtime.ending import End, reported_end
from megatron_tiedlora.runtime.process_group import join_process_group, make_deterministic


def train_rank(settings: Settings) -> End:
    """Run one rank of a job and return the end of the run. Call `prepare_environment` first.

    A failure is reported and ends the process. If one of several adapters fails, the others continue, and the exit
    status is 1.
    """
    if settings.deterministic:
        make_deterministic()
    with reported_end() as end:
        rank, world_size, stop = end.rank, end.world_size, end.stop
        # These imports of DeepSpeed and transformers take seconds, so signals are handled before.
        from megatron_tiedlora.planning.adapter_plans import plan_and_read
        from megatron_tiedlora.planning.planned import longest_run
        from megatron_tiedlora.training import finish
        from megatron_tiedlora.training.build import build_model
        from megatron_tiedlora.training.start import make_trainer, open_run
        from megatron_tiedlora.training.throughput import choose_kernels

        plans, data = plan_and_read(settings, rank=rank, world_size=world_size)
        device = join_process_group(settings.timeout_minutes, expected_ranks=world_size)
        end.watch_peers(settings.timeout_minutes)
        start = open_run(settings, plans, data, end)
        if not start.left:
            end.reason = finish.end_at_once(start)
            if rank == 0:
                show(*finish.table_lines(start.finished, start.folder))
            return end
        ranks = {own.adapter.rank for own in start.left.values()}
        chosen = choose_kernels(longest_run(start.left), device, ranks=ranks)
        built = build_model(start.left, device, start.checkpoints, kernels=chosen.kernels)
        trainer = make_trainer(start, built, device, stop)
        end.finished_step = lambda: trainer.last_step
        if trainer.only is None:  # the message on a single adapter has its step
            end.saved = "the last step of each adapter is saved"
        if rank == 0:
            show(*finish.run_headline(start, trainer, built, chosen, device))
        new = [run for name, run in trainer.adapters.items() if start.checkpoints[name] is None]
        finish.score_adapters(trainer, new, "before")
        trainer.run()
        finish.score_after(trainer)
        finish.set_run_end(end, trainer)
        if rank == 0:
            lines, only = finish.export_all(trainer), trainer.only
            lines += finish.table_lines(trainer.everyone, trainer.folder) if only is None else finish.last_lines(only)
            show(*lines)
            finish.set_run_end(end, trainer)
            trained = [run for run in trainer.adapters.values() if run.state == "finished"]
            if lines := [named(run.name, line) for run in trained for line in finish.original_loss(run, stop)]:
                show("", *lines)
    return end
