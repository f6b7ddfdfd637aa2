"""One rank of an engine test: runs cases given as JSON through the package's own road, one after another.

    python engine_worker.py cases.json      (RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT in the environment)

A case: {"settings": {...}, "start": file of A, B, u, v or null, "output": folder}. Rank 0 leaves metrics.jsonl and
adapter.safetensors in the output folder.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from megatron_tiedlora.config.settings import make_settings
from megatron_tiedlora.pipeline.launch_env import (
    join_process_group,
    leave_process_group,
    prepare_environment,
    rank_and_world_size,
)


def run_case(case: dict[str, Any], rank: int, world_size: int, device: Any) -> None:
    from safetensors.torch import load_file, save_file

    from megatron_tiedlora.training import session
    from megatron_tiedlora.training.loop import Trainer
    from megatron_tiedlora.training.plan import plan_run
    from megatron_tiedlora.training.run_data import prepare_data
    from megatron_tiedlora.training.run_folder import MetricsLog, RunFolder
    from megatron_tiedlora.training.stopping import StopWatch

    plan = plan_run(make_settings(case["settings"]), rank=rank, world_size=world_size)
    data = prepare_data(plan, progress=False)
    folder = RunFolder(Path(case["output"]))
    built = session.build_model(plan, device, None)
    if case.get("start"):
        built.module.adapter.load_full(load_file(case["start"]))
    engine = session.start_engine(plan, built.module, None)
    if rank == 0:
        session.write_run_settings(plan, folder)
    log = MetricsLog(folder, resumed_step=0) if rank == 0 else None
    trainer = Trainer(plan, data, engine, built.base, folder, device, StopWatch(), log)
    trainer.run()
    state = trainer.full_adapter_state()
    if rank == 0:
        save_file(state, folder.path / "adapter.safetensors")
    engine.destroy()


def main() -> None:
    prepare_environment()
    rank, world_size = rank_and_world_size()
    device = join_process_group(2.0, expected_ranks=world_size)
    for case in json.loads(Path(sys.argv[1]).read_text()):
        run_case(case, rank, world_size, device)
    leave_process_group()


if __name__ == "__main__":
    main()
