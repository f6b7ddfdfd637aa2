"""A benchmark of a training step or of decoding; see --help, and megatron_tiedlora/benchmark."""

from __future__ import annotations

from megatron_tiedlora.base.errors import show
from megatron_tiedlora.base.extras import require_extra
from megatron_tiedlora.base.paths import user_path
from megatron_tiedlora.config.bench_settings import BenchSettings
from megatron_tiedlora.runtime.launch_env import prepare_environment, rank_and_world_size


def main(settings: BenchSettings) -> int:
    """Measure and print on one rank; returns its exit status."""
    require_extra("train", only=["deepspeed"])
    file = None if settings.json_file is None else user_path(settings.json_file, flag="--json")
    prepare_environment()
    rank, world_size = rank_and_world_size()
    what = settings.measured_on(world_size)
    # These import DeepSpeed and transformers, which takes seconds: a wrong path does not wait for it.
    from megatron_tiedlora.base.atomic import write_json
    from megatron_tiedlora.benchmark import compare, layout
    from megatron_tiedlora.benchmark.report import report_lines
    from megatron_tiedlora.parallel.agreement import decided_by_rank_0
    from megatron_tiedlora.runtime.process_group import leave_process_group
    from megatron_tiedlora.runtime.stopping import RunStopped, exit_status

    try:
        if what == "layout":
            found = layout.measure_layout(settings, rank=rank, world_size=world_size)
        else:
            found = compare.measure_sides(settings)
    except RunStopped as stop:
        return exit_status(stop.signal_number)

    def publish() -> None:
        assert found is not None, "rank 0 has the report"
        show(*report_lines(found))
        if file is not None:
            write_json(file, found)

    decided_by_rank_0(publish)
    leave_process_group()
    return 0
