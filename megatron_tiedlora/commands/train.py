"""Fine-tune a language model with Tied-LoRA.

tiedlora run --ds_config zero2.json                                           the demo
tiedlora run --model meta-llama/Llama-2-7b-hf --train_file data.jsonl         your model and data
tiedlora run --model meta-llama/Llama-2-7b-hf --adapters four.yaml            several adapters of one model
"""

from megatron_tiedlora.base.installation import require_extra
from megatron_tiedlora.base.presets import is_preset
from megatron_tiedlora.config.settings import Settings
from megatron_tiedlora.runtime.launch_env import prepare_environment, rank_and_world_size


def main(settings: Settings) -> int:
    """Run one rank and return the exit status.

    The status is 0 if the run finished, 1 if an adapter failed, and 130, 143 or 138 if a signal stopped the run. A dry
    run returns 1 if the layout does not fit into the memory of --gpu.
    """
    if not settings.dry_run:
        require_extra("train")
    # The files that flags name are checked before the imports below, which take seconds.
    from megatron_tiedlora.checkpoint.sources import local_folder
    from megatron_tiedlora.config.cli import adapters_path
    from megatron_tiedlora.data.splits import check_files_exist
    from megatron_tiedlora.engine.engine_json import find_engine_json

    if settings.adapters is not None:
        adapters_path(settings.adapters)
    if not is_preset(settings.model):
        local_folder(settings.model)
    find_engine_json(settings.ds_config)
    check_files_exist(settings)
    prepare_environment()
    if settings.dry_run:
        rank, world_size = rank_and_world_size()
        if rank:
            return 0
        from megatron_tiedlora.planning.report import dry_run_report

        report = dry_run_report(settings, launched_ranks=world_size)
        print(report.text)
        return 0 if report.fits else 1
    from megatron_tiedlora.training.run import train_rank  # imports torch: --help and a wrong flag do not wait for it

    return train_rank(settings).status


if __name__ == "__main__":
    from megatron_tiedlora.commands.front import run

    run("train")
