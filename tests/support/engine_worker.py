"""One rank of an engine test: runs cases as the package trains, one after another (see forked_ranks.py).

A case: {"settings": {...}, "start": file of A, B, u, v or null, "optimizer": "adamw" or "sgd", "output": folder}, and
"faults": what to break before the model is built (see fault_patches.py); "may_fail": whether a run that ends with a
UserError is an answer (each rank then leaves its message in failureN.txt) or an error of the test; "shares": how layers
share the tensors of tl6 (see shared_tensors.py). Rank 0 leaves
metrics.jsonl and adapter.safetensors in the output folder, every rank its own part in rankN.safetensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fault_patches import apply_faults
from forked_ranks import join_as_launched
from shared_tensors import tl6_shares
from torch import distributed

from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.config.settings import make_settings


def sgd(parameters: Any, *, learning_rate: float, weight_decay: float, betas: Any = None) -> Any:
    """In place of training.build.make_optimizer: p -= lr (g + decay p), without momentum."""
    from torch.optim import SGD

    return SGD(list(parameters), lr=learning_rate, weight_decay=weight_decay)


def run_case(case: dict[str, Any], rank: int, world_size: int, device: Any) -> None:
    from safetensors.torch import load_file, save_file

    from megatron_tiedlora.adapters.adapter_bank import ONLY
    from megatron_tiedlora.adapters.tied_adapter import initial_values
    from megatron_tiedlora.planning.adapter_plans import prepare_data
    from megatron_tiedlora.planning.run_plan import plan_run
    from megatron_tiedlora.runtime.run_folder import MetricsLog, RunFolder
    from megatron_tiedlora.runtime.stopping import StopRequests
    from megatron_tiedlora.training import build, start
    from megatron_tiedlora.training.adapter_run import AdapterRun
    from megatron_tiedlora.training.loop import Trainer
    from megatron_tiedlora.training.step import TrainStep
    from megatron_tiedlora.training.throughput import Meter, Peak

    plan = plan_run(make_settings(case["settings"]), rank=rank, world_size=world_size)
    data = prepare_data(plan)
    folder = RunFolder(Path(case["output"]))
    use_sgd = case.get("optimizer") == "sgd"
    own = vars(build).setdefault("own_make_optimizer", build.make_optimizer)  # a rank runs many cases
    build.make_optimizer = sgd if use_sgd else own
    values = load_file(case["start"]) if case.get("start") else None
    build.initial_values = initial_values if values is None else lambda _: values
    built = build.build_model({ONLY: plan}, device)
    runner, layout = built.runner, plan.layout_of(plan.adapter)
    if rank == 0:
        folder.path.mkdir(parents=True)
        start.write_run_settings(plan, folder)
    stop = StopRequests()
    step = TrainStep({ONLY: plan}, runner, stop)
    run = AdapterRun(
        name=ONLY,
        plan=plan,
        data=data,
        runner=runner,
        base_identity=built.base_identity,
        layout=layout,
        folder=folder,
        log=MetricsLog(folder, resumed_step=0) if rank == 0 else None,
        meter=Meter(plan.source.shape, plan.adapter, Peak(1e9, "made up")),
        checks=step.checks[ONLY],
    )
    if use_sgd:
        run.save = lambda **_: None  # it has no moments to save
    Trainer({ONLY: run}, step, folder, stop, {ONLY: run}).run()
    save_file(
        {name: parameter.detach().clone() for name, parameter in runner.adapters[ONLY].named_parameters()},
        folder.path / f"rank{rank}.safetensors",
    )
    state = runner.full_state(ONLY, layout)
    if rank == 0:
        save_file(state, folder.path / "adapter.safetensors")
    runner.engine.destroy()


def run_cases(cases: Sequence[dict[str, Any]], folder: str) -> None:
    """All cases on this rank, which finds tokenised samples in `folder`."""
    device = join_as_launched(folder)
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    for case in cases:
        with apply_faults(case.get("faults", [])), tl6_shares(case.get("shares")):
            try:
                run_case(case, rank, world_size, device)
            except UserError as error:
                if not case.get("may_fail"):
                    raise
                Path(case["output"], f"failure{rank}.txt").write_text(str(error))
