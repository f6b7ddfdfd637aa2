"""The plans of the adapters of --adapters, and their data, before anything of a run is built.

Each is the plan of a run of its own. What the engine cannot do for several together is rejected here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.base.paths import last_name, user_path
from megatron_tiedlora.base.progress import progress_bar
from megatron_tiedlora.checkpoint.sources import ModelSource
from megatron_tiedlora.config.adapters_file import read_adapters
from megatron_tiedlora.config.fields import marked
from megatron_tiedlora.config.settings import Settings, make_settings
from megatron_tiedlora.runtime.run_folder import last_run_folder
from megatron_tiedlora.training.halving import check_halving
from megatron_tiedlora.training.plan import RunPlan, plan_run
from megatron_tiedlora.training.run_data import RunData, prepare_data

DS_CONFIG = "zero0.json"  # by default, as others would clip all adapters together, or shard the base
Plans = Mapping[str, RunPlan]  # by the adapter's name; they differ only in what belongs to an adapter
Data = Mapping[str, RunData]


def plan_group(
    settings: Settings, *, rank: int, world_size: int, weights: bool = True, source: ModelSource | None = None
) -> dict[str, RunPlan]:
    """The plan of each adapter of --adapters, by name. The model is looked for once.

    Args:
        weights, source: as of `plan_run`.

    Raises:
        UserError: names the file and the adapter, if its settings do not fit.
    """
    file, plans = settings.adapters, dict[str, RunPlan]()
    assert file is not None
    output_dir = settings.output_dir
    folder = last_run_folder(group_name(settings)).path if output_dir is None else user_path(output_dir)
    entries = read_adapters(file, settings).items()
    for name, given in progress_bar("planning", "adapter", entries, delay=0.5, leave=True, shows=rank == 0):
        own = {"ds_config": DS_CONFIG, **given.model_dump(exclude_unset=True)}
        if settings.resume != "none":  # a run that is resumed reads in its folder what its --init_from was
            own = {"output_dir": str(folder / name), **own}
        found = next(iter(plans.values())).source if plans else source
        try:
            plans[name] = plan_run(make_settings(own), rank=rank, world_size=world_size, weights=weights, source=found)
        except UserError as error:
            raise UserError(f"{file}: {name}: {error}") from None
    if settings.halving:
        check_halving({name: plan.settings for name, plan in plans.items()})
    shared = shared_plan(plans)
    for name, plan in plans.items():
        if plan.dtype_name != shared.dtype_name:
            raise UserError(f"{file}: {name} would have the base in {plan.dtype_name}, others not; give --dtype")
    return plans


def shared_plan(plans: Plans) -> RunPlan:
    """The plan whose stages all adapters have: that of the one whose first adapted layer is lowest.

    Raises:
        UserError: the engine would clip all adapters together.
    """
    plan = min(plans.values(), key=lambda plan: plan.adapter.layers[0])
    if plan.engine.zero_stage in (1, 2):
        raise UserError(
            f"--ds_config {plan.settings.ds_config}: ZeRO-{plan.engine.zero_stage} clips the gradients of all adapters"
            " together, and would shard only their few MB. Use zero0.json, or zero3.json to shard the base"
        )
    return plan


def group_name(settings: Settings) -> str:
    """MODEL-FILE, the name of the folder of all."""
    return f"{last_name(settings.model)}-{Path(str(settings.adapters)).stem}"


def prepare_group_data(plans: Plans) -> dict[str, RunData]:
    """The data of each adapter, read once for all whose settings of data are the same.

    Raises:
        UserError: names the adapter.
    """
    data, read = {}, dict[tuple[str, int], RunData]()
    for name, plan in plans.items():
        values = plan.settings.model_dump_json(include=set(marked(Settings, decides="data"))), plan.max_new_tokens
        if values not in read:
            with naming(name):
                read[values] = prepare_data(plan)
        data[name] = read[values]
    return data


def counted(plans: Plans, data: Data) -> dict[str, RunPlan]:
    """The plans whose --max_steps is counted for --epochs."""
    found = {}
    for name, plan in plans.items():
        with naming(name):
            found[name] = plan.counted(len(data[name].train))
    return found


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Inside, an error says which adapter it is of."""
    try:
        yield
    except UserError as error:
        named = UserError(f"{name}: {error}")
        named.of_peer = error.of_peer
        raise named from None
