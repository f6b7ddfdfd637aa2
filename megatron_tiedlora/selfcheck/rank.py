"""A rank of part ranks:  python -m megatron_tiedlora.selfcheck.rank FOLDER FIRST CASES

FOLDER has a small model, and gets the results of each case, of which FIRST is the first one's number and CASES has all
as JSON. Rank 0 writes losses and adapter. Ranks and master come from the environment. If FIRST is "killed", the ranks
train the first case until the last one kills itself.
"""

import json
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import save_file

from megatron_tiedlora.adapters.adapter_bank import ONLY
from megatron_tiedlora.base.child_process import end_with_parent
from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.runtime.ending import reported_end
from megatron_tiedlora.runtime.launch_env import prepare_environment, rank_and_world_size
from megatron_tiedlora.runtime.process_group import leave_process_group
from megatron_tiedlora.runtime.stopping import StopRequests
from megatron_tiedlora.selfcheck.running import step_settings
from megatron_tiedlora.selfcheck.step_bench import Started, plan_benchmark, start

ADAPTER, RESULT, MODEL, KILLED = "adapter.safetensors", "result.json", "model", "killed"
STEPS, SAMPLES, RATE = 3, 16, 1e-3  # steps of a case, samples of a step over all ranks, and the learning rate


class Case(NamedTuple):
    """A layout, a ZeRO stage and a dtype of the base; data-parallel size = world size / (tp x pp)."""

    tp: int = 1
    pp: int = 1
    zero: int = 1
    dtype: str = "fp32"
    sp: bool = True

    def named(self, world_size: int) -> str:
        """The case as short text."""
        words = [f"TP{self.tp}", f"PP{self.pp}", f"DP{world_size // (self.tp * self.pp)}", f"ZeRO-{self.zero}"]
        return f"{' '.join(words)}, {self.dtype}{'' if self.sp or self.tp == 1 else ', whole sequences'}"


def started(case: Case, folder: Path, rank: int, world_size: int, **changes: Any) -> Started:
    """A run of a case, with the same samples at every layout; `changes` as in `plan_benchmark`."""
    rows = SAMPLES // (world_size // (case.tp * case.pp))
    settings = step_settings(
        str(folder / MODEL),
        f"--dtype={case.dtype}",
        f"--tensor_parallel={case.tp}",
        f"--pipeline_parallel={case.pp}",
        f"--sequence_parallel={str(case.sp).lower()}",
        f"--ds_config=zero{case.zero}.json",
        "--rows=2",
        f"--micro_batches={rows // 2}",
        "--length=64",
        "--compile=false",
    )
    plan = plan_benchmark(settings, rank=rank, world_size=world_size, timeout_minutes=1.0, **changes)
    return start(plan, settings)


def run_case(case: Case, folder: Path, rank: int, world_size: int, results: Path) -> None:
    """Train the steps; rank 0 writes the results."""
    run = started(case, folder, rank, world_size, learning_rate=RATE, replica_check_steps=STEPS)
    losses = [run.take(next(run.loader)).loss for _ in range(STEPS)]
    state = run.runner.full_state(ONLY, run.plan.layout_of(run.plan.adapter))
    if rank == 0:
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, results / ADAPTER)
        (results / RESULT).write_text(json.dumps(losses))
    run.runner.engine.destroy()


def run_until_killed(case: Case, folder: Path, rank: int, world_size: int) -> int:
    """Train with a heartbeat, as tiedlora train does, until the last rank kills itself; returns the exit status."""
    with reported_end(rank, world_size, StopRequests()) as end:
        run = started(case, folder, rank, world_size)
        end.watch_peers(1.0)
        end.finished_step = lambda: run.train_step.finished[ONLY]
        for number in count():
            run.take(next(run.loader))
            if number == STEPS and rank == world_size - 1:
                os.kill(os.getpid(), signal.SIGKILL)
    return end.status


def main(argv: Sequence[str]) -> int:
    """Train the cases; returns the exit status."""
    end_with_parent()
    folder, cases = Path(argv[0]), [Case(*case) for case in json.loads(argv[2])]
    prepare_environment()
    rank, world_size = rank_and_world_size()
    if argv[1] == KILLED:
        return run_until_killed(cases[0], folder, rank, world_size)
    for number, case in enumerate(cases, start=int(argv[1])):
        results = folder / f"{world_size}-{number}"
        results.mkdir(exist_ok=True)
        try:
            run_case(case, folder, rank, world_size, results)
        except UserError as error:  # raised on every rank, so all of them continue with the next case
            (results / f"error{rank}").write_text(str(error))
        except Exception:
            (results / f"error{rank}").write_text(traceback.format_exc())
            traceback.print_exc()
            os._exit(1)  # at once: peers may wait for this rank, and ending the group would wait for them
    leave_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
