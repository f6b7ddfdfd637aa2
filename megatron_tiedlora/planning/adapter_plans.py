"""The plans of the adapters of a run, by name, and their folders: those of --adapters, or one, whose name is "".

Each is the plan of a run of its own. What the engine cannot do for several together is rejected here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from megatron_tiedlora.adapters.adapter_bank import ONLY
from megatron_tiedlora.base.errors import UserError, naming
from megatron_tiedlora.base.paths import user_path
from megatron_tiedlora.base.progress import progress_bar
from megatron_tiedlora.checkpoint.sources import ModelSource
from megatron_tiedlora.config.adapters_file import RUN_OF_ALL, check_folders, check_halving, read_adapters
from megatron_tiedlora.config.settings import Settings, make_settings
from megatron_tiedlora.planning.run_plan import RunPlan, plan_run
from megatron_tiedlora.runtime.run_folder import RunFolder, choose_run_folder, last_run_folder, run_name

DS_CONFIG = "zero0.json"  # of --adapters by default, as others would clip all together, or shard the base

Plans = Mapping[str, RunPlan]  # by the adapter's name; they differ only in what belongs to an adapter


def adapter_settings(settings: Settings) -> dict[str, Settings]:
    """The settings of each adapter of a run, by name. A run without --adapters has one, whose name is ONLY.

    Raises:
        UserError: what is wrong with the file of --adapters.
    """
    if settings.adapters is None:
        return {ONLY: settings}
    found, output_dir = {}, settings.output_dir
    folder = last_run_folder(run_name(settings)).path if output_dir is None else user_path(output_dir)
    for name, given in read_adapters(settings.adapters, settings).items():
        own = {"ds_config": DS_CONFIG, **given.model_dump(exclude_unset=True)}
        if settings.resume != "none":  # a run that is resumed reads in its folder what its --init_from was
            own = {"output_dir": str(folder / name), **own}
        found[name] = make_settings(own)
    return found


def plan_adapters(
    settings: Settings, *, rank: int, world_size: int, weights: bool = True, source: ModelSource | None = None
) -> dict[str, RunPlan]:
    """The plan of each adapter of a run, by name. The model is looked for once.

    Args:
        weights, source: as of `plan_run`.

    Raises:
        UserError: as `plan_run`. It names the file and the adapter, if there is a file.
    """
    file, plans = settings.adapters, dict[str, RunPlan]()
    entries, shows = adapter_settings(settings).items(), rank == 0 and file is not None
    for name, own in progress_bar("planning", "adapter", entries, delay=0.5, leave=True, shows=shows):
        found = next(iter(plans.values())).source if plans else source
        with naming(name and f"{file}: {name}"):
            plans[name] = plan_run(own, rank=rank, world_size=world_size, weights=weights, source=found)
    if settings.halving:
        check_halving({name: plan.settings for name, plan in plans.items()})
    shared = shared_plan(plans)
    if file is not None:
        check_clipping(shared)
    for name, plan in plans.items():
        if plan.dtype_name != shared.dtype_name:
            raise UserError(f"{file}: {name} would have the base in {plan.dtype_name}, others not; give --dtype")
    return plans


def shared_plan(plans: Plans) -> RunPlan:
    """The plan whose stages all adapters have: that of the one whose first adapted layer is lowest."""
    return min(plans.values(), key=lambda plan: plan.adapter.layers[0])


def check_clipping(plan: RunPlan) -> None:
    """Raise UserError if the engine of a plan of several adapters would clip the gradients of all together."""
    if plan.engine.zero_stage in (1, 2):
        raise UserError(
            f"--ds_config {plan.settings.ds_config}: ZeRO-{plan.engine.zero_stage} clips the gradients of all adapters"
            " together, and would shard only their few MB. Use zero0.json, or zero3.json to shard the base"
        )


# Folders -------------------------------------------------------------------------------------------------------------


def adapter_folders(plans: Plans, folder: RunFolder) -> dict[str, RunFolder]:
    """The run folder of each adapter: the run's own if it is the only one, else RUN/NAME, or what its entry says."""
    if set(plans) == {ONLY}:
        return {ONLY: folder}
    given = {name: plan.settings.output_dir or str(folder.path / name) for name, plan in plans.items()}
    return {name: RunFolder(user_path(output_dir)) for name, output_dir in given.items()}


def in_folder(plans: Plans, folder: RunFolder) -> dict[str, RunPlan]:
    """The plans with the folder of each adapter that has one of its own."""
    found = dict(plans)
    for name, own in adapter_folders(plans, folder).items():
        if own is not folder:
            found[name] = replace(plans[name], settings=plans[name].settings.completed(output_dir=str(own.path)))
    return found


def choose_folder(settings: Settings, plans: Plans) -> RunFolder:
    """The folder that a run would have. Nothing is made.

    Raises:
        UserError: it cannot be used, or that of an adapter.
    """
    name, of_several = run_name(settings), settings.adapters is not None
    folder = choose_run_folder(settings.output_dir, name=name, resume=settings.resume, of_several=of_several)
    check_run_folders(settings, plans, folder)
    return folder


def check_run_folders(settings: Settings, plans: Plans, folder: RunFolder) -> None:
    """Raise UserError if the folder of an adapter cannot be used beside the others and the run's."""
    own = {name: str(of.path) for name, of in adapter_folders(plans, folder).items() if of is not folder}
    check_folders(str(settings.adapters), {RUN_OF_ALL: str(folder.path), **own})
    for name, output_dir in own.items():
        with naming(name):
            choose_run_folder(output_dir, name=plans[name].name, resume=settings.resume)
