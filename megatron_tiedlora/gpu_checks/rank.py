"""One rank of part ranks:  python rank.py ORDER    (records.RankOrder as JSON; ranks and master from the environment)

It trains each case in turn; rank 0 writes losses and the adapter to the order's folder. An endless order trains until
this rank or a peer is killed.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from megatron_tiedlora.base.child_process import end_with_parent
from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.config.bench_settings import BenchSettings
from megatron_tiedlora.gpu_checks.rank_orders import ADAPTER, RESULT, STEPPING, Case, RankOrder
from megatron_tiedlora.runtime.launch_env import prepare_environment, rank_and_world_size
from megatron_tiedlora.runtime.process_group import leave_process_group


def settings_of(case: Case, order: RankOrder, world_size: int) -> BenchSettings:
    """bench_step.py's settings for a case: the same samples at every layout."""
    from megatron_tiedlora.gpu_checks.running import step_settings

    rows = order.samples // (world_size // (case.tp * case.pp))
    return step_settings(
        order.model,
        f"--dtype={case.dtype}",
        f"--tensor_parallel={case.tp}",
        f"--pipeline_parallel={case.pp}",
        f"--sequence_parallel={str(case.sp).lower()}",
        f"--ds_config=zero{case.zero}.json",
        "--rows=2",
        f"--micro_batches={rows // 2}",
        f"--length={order.length}",
        "--compile=false",
    )


def run_case(case: Case, order: RankOrder, rank: int, world_size: int, folder: Path) -> None:
    """Train the steps; rank 0 writes the results."""
    from safetensors.torch import save_file

    from megatron_tiedlora.adapters.adapter_bank import ONLY
    from megatron_tiedlora.benchmark.layout import start
    from megatron_tiedlora.benchmark.plan import plan_benchmark

    settings = settings_of(case, order, world_size)
    plan = plan_benchmark(
        settings,
        rank=rank,
        world_size=world_size,
        learning_rate=order.learning_rate,
        replica_check_steps=order.steps,
        timeout_minutes=1.0,
    )
    run = start(plan, settings)
    losses = [run.take(next(run.loader)).loss for _ in range(order.steps)]
    state = run.runner.full_state(ONLY, plan.layout_of(plan.adapter))
    if rank == 0:
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / ADAPTER)
        (folder / RESULT).write_text(json.dumps({"losses": losses}))
    run.runner.engine.destroy()


def run_endless(order: RankOrder, rank: int, world_size: int) -> int:
    """Train the first case with a heartbeat, as tiedlora train does, until a rank is lost."""
    from megatron_tiedlora.benchmark.layout import start
    from megatron_tiedlora.benchmark.plan import plan_benchmark
    from megatron_tiedlora.runtime.ending import reported_end
    from megatron_tiedlora.runtime.stopping import StopRequests

    with reported_end(rank, world_size, StopRequests()) as end:
        settings = settings_of(order.cases[0], order, world_size)
        plan = plan_benchmark(settings, rank=rank, world_size=world_size, timeout_minutes=1.0)
        run = start(plan, settings)
        end.watch_peers(1.0)
        end.finished_step = lambda: run.finished
        for number in range(1_000_000):
            run.take(next(run.loader))
            if number == order.steps:
                Path(order.folder, f"{STEPPING}{rank}").touch()
    return end.status


def main(argv: Sequence[str]) -> int:
    """Run the order; returns the exit status."""
    end_with_parent()
    order = RankOrder.from_json(argv[0])
    if order.device == "cpu":
        os.environ.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu")
    prepare_environment()
    rank, world_size = rank_and_world_size()
    if order.endless:
        return run_endless(order, rank, world_size)
    for number, case in enumerate(order.cases, start=order.first):
        folder = Path(order.folder, f"{world_size}-{number}")
        folder.mkdir(parents=True, exist_ok=True)
        try:
            run_case(case, order, rank, world_size, folder)
        except UserError as error:  # raised on every rank, so all of them continue with the next case
            (folder / f"error{rank}").write_text(str(error))
        except Exception:
            (folder / f"error{rank}").write_text(traceback.format_exc())
            traceback.print_exc()
            os._exit(1)  # at once: peers may wait for this rank, and ending the group would wait for them
    leave_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
