"""Build the model under ZeRO-3, initialise its DeepSpeed engine with an optimizer, and compute gradient norms. Also
create the process groups of the (pp, dp, tp) grid, most of them by DeepSpeed's topology.

The engine's JSON has no precision section, so DeepSpeed treats the model as fp32. The frozen base keeps its own dtype.
The adapter's gradients and the optimizer state are fp32 at every ZeRO stage, and gradients are accumulated and reduced
in fp32.
"""

import importlib
import io
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout, suppress
from functools import partial
from typing import Any, cast

import torch
from torch import distributed, nn

from megatron_tiedlora.adapters.tied_adapter import TiedAdapter
from megatron_tiedlora.adapters.tying import gradient_norm_counts
from megatron_tiedlora.engine.engine_json import EngineConfig
from megatron_tiedlora.model.layer_specs import GatedMlp
from megatron_tiedlora.parallel.groups import ALONE, Grid, ParallelGroups, RankGroup

_LARGEST_SQUARE = torch.finfo(torch.float32).max


@contextmanager
def base_construction(
    config: EngineConfig, *, dtype: torch.dtype, device: torch.device, process_grid: Any
) -> Iterator[None]:
    """Provide a context in which the frozen base is built. Its weights are created uninitialised on `device`.

    Under ZeRO-3 the weights are partitioned immediately over the data-parallel ranks of DeepSpeed's grid.
    """
    if config.zero_stage < 3:
        with device:
            yield
        return
    import deepspeed

    # Without a precision section zero.Init makes fp32 weights, so bf16 is passed explicitly. fp32 must not be passed:
    # on devices without fp16 (CPUs), zero.Init treats any given dtype as bf16 (seen in 0.19.8).
    with deepspeed.zero.Init(
        config_dict_or_path=dict(config.values),
        dtype=None if dtype == torch.float32 else dtype,
        mpu=process_grid,
        data_parallel_group=process_grid.get_data_parallel_group(),
    ):
        yield


def parameter_access(config: EngineConfig) -> Callable[[list[nn.Parameter]], AbstractContextManager[Any]]:
    """Return a function that creates a context for writing parameters. Under ZeRO-3 the context gathers them.

    Under ZeRO-3 the data-parallel ranks must call that function for the same parameters in the same order. The values
    that the first rank writes are kept.
    """
    if config.zero_stage < 3:
        return nullcontext
    import deepspeed

    return partial(deepspeed.zero.GatheredParameters, modifier_rank=0)


def mark_parameters(adapter: TiedAdapter, groups: ParallelGroups) -> None:
    """Mark parameters for DeepSpeed's gradient norm: copies of tied tensors on later stages, and shards.

    The norm then counts each tied or replicated tensor once and each shard once. The marks follow from the `ShardSpec`
    of each tensor. Constructing a PipelineModule resets the marks, so call this function afterwards.
    """
    config = adapter.part.config
    for name, parameter in adapter.named_parameters():
        parameter.ds_pipe_replicated = config.is_tied(name) and groups.pipeline.rank > 0  # type: ignore[attr-defined]
        parameter.tensor_model_parallel = config.spec(name).dim is not None  # type: ignore[attr-defined]


def initialize_engine(
    model: nn.Module,
    config: EngineConfig,
    *,
    optimizer: torch.optim.Optimizer,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None,
    process_grid: Any,
) -> Any:
    """Call `deepspeed.initialize` with the given optimizer and schedule, and return the engine.

    The optimizer holds the trained parameters. With several stages, the norm by which DeepSpeed clips at ZeRO-0 would
    omit the untied tensors of later stages (seen in 0.19.8). So without ZeRO, `runner.Optimizers` steps the
    adapters, and the engine does not.
    """
    import deepspeed
    from deepspeed.runtime.pipe.module import PipelineModule
    from deepspeed.utils import groups as deepspeed_groups

    import_muon_uncompiled()
    deepspeed_groups.mpu = None  # an earlier pipeline engine of this process may have set it
    values = dict(config.values)
    if config.zero_stage == 3:  # an MLP reads its linears' weights itself, so they are gathered together
        deepspeed.utils.set_z3_leaf_modules(model, [GatedMlp])
    pipelined = isinstance(model, PipelineModule)
    if pipelined:
        # With sequence parallelism partitioned activations are silently wrong (seen in 0.19.8).
        values["pipeline"] = {"pipe_partitioned": False, "grad_partitioned": False, "use_reentrant": False}
    engine, _, _, _ = deepspeed.initialize(
        model=model,
        config=values,
        optimizer=optimizer,
        lr_scheduler=scheduler,
        mpu=None if pipelined else process_grid,  # a PipelineModule brings its own
    )
    return engine


def import_muon_uncompiled() -> None:
    """Import DeepSpeed's Muon without compiling it. No run uses it, and compiling adds a second to each launch.

    On import, Muon's functions are decorated with torch.compile, which imports the compiler. DeepSpeed imports Muon to
    check whether ZeRO supports the optimizer (seen in 0.19.8). Remove this once DeepSpeed compiles Muon at first use.
    """
    importlib.import_module("torch._dynamo")  # before the variable is set, because dynamo might store its value
    switch = "TORCHDYNAMO_DISABLE"
    before = os.environ.get(switch)
    os.environ[switch] = "1"
    try:
        with suppress(ImportError):  # DeepSpeed also works without it
            importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    finally:
        os.environ.pop(switch)
        if before is not None:
            os.environ[switch] = before


def trained_parameters(adapter: TiedAdapter) -> dict[str, nn.Parameter]:
    """Return the trained parameters of the adapter by name."""
    return {name: parameter for name, parameter in adapter.named_parameters() if parameter.requires_grad}


def gradient_norms(adapters: Sequence[TiedAdapter], groups: ParallelGroups, device: torch.device) -> list[float]:
    """Return the 2-norm of each adapter's gradients over the complete model, with one message, on every rank.

    Each tied or replicated tensor and each shard counts once.
    """
    squares = torch.zeros(len(adapters), dtype=torch.float64, device=device)
    for square, adapter in zip(squares, adapters, strict=True):
        for name in gradient_norm_counts(adapter, groups):
            gradient = adapter.get_parameter(name).grad
            if gradient is not None:
                square += torch.linalg.vector_norm(gradient.detach().float()).double().square()
    if groups.model.size > 1:
        torch.distributed.all_reduce(squares, group=groups.model.handle)
    return cast(list[float], squares.sqrt().tolist())


def reported_norm(norm: float) -> float:
    """Return the gradient norm to report: inf or nan if its square is not finite in fp32, the dtype of second moments.

    A step with inf or nan must not be saved. This rule holds for all ZeRO stages. ZeRO-1 and 2 sum squares in fp32,
    skip the step and report inf (0.19.8) or -1 (earlier versions). The other stages sum squares in fp64.
    """
    if not norm >= 0:
        return math.nan
    return norm if norm * norm <= _LARGEST_SQUARE else math.inf


# Process groups -------------------------------------------------------------------------------------------------------


def quiet() -> AbstractContextManager[Any]:
    """Return a context that suppresses stdout, because DeepSpeed prints its topology and partition on rank 0."""
    return redirect_stdout(io.StringIO())


def make_topology(grid: Grid) -> Any:
    """Return DeepSpeed's topology for `grid`. Both number ranks as (pp * dp_size + dp) * tp_size + tp."""
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    topology = PipeModelDataParallelTopology(num_pp=grid.pp_size, num_mp=grid.tp_size, num_dp=grid.dp_size)
    here = topology.get_coord(grid.rank)
    assert (here.pipe, here.data, here.model) == (grid.pp_rank, grid.dp_rank, grid.tp_rank), (here, grid)
    return topology


def make_process_grid(grid: Grid) -> Any:
    """Return DeepSpeed's grid of process groups (its `mpu`). Every rank must call this function."""
    from deepspeed.runtime.pipe.topology import PipelineParallelGrid

    with quiet():
        return PipelineParallelGrid(topology=make_topology(grid))


def make_groups(grid: Grid, process_grid: Any) -> ParallelGroups:
    """Return the process groups of this rank. Every rank must call this function.

    Most groups are DeepSpeed's. Groups for tied tensors, for generated tokens and for u are created here if needed.
    """
    tensor, data = _group(process_grid.get_slice_parallel_group()), _group(process_grid.get_data_parallel_group())
    tied, choices, stage = data, ALONE, data if grid.tp_size == 1 else tensor
    if grid.pp_size > 1:
        tied = _group(_new_groups(grid, lambda at: at.tp_rank))
        choices = _group(_new_groups(grid, lambda at: (at.dp_rank, at.tp_rank)))
    if grid.tp_size > 1 and grid.dp_size > 1:
        stage = _group(_new_groups(grid, lambda at: at.pp_rank) if grid.pp_size > 1 else distributed.group.WORLD)
    return ParallelGroups(
        tensor=tensor,
        pipeline=_group(process_grid.get_pipe_parallel_group()),
        choices=choices,
        data=data,
        tied=tied,
        stage=stage,
        model=_group(process_grid.get_model_parallel_group()),
    )


def _new_groups(grid: Grid, key: Callable[[Grid], Any]) -> Any:
    """Create one process group per value of `key`, with the ranks that have this value. Return this rank's group."""
    import deepspeed

    made = grid.groups(key).items()
    handles = {value: deepspeed.comm.new_group(ranks) for value, ranks in made}  # with the run's time limit
    return handles[key(grid)]


def _group(handle: Any) -> RankGroup:
    size = distributed.get_world_size(handle)
    return ALONE if size == 1 else RankGroup(handle, distributed.get_rank(handle), size)
