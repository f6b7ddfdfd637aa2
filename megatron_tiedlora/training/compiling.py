"""Compiles a run's kernels before its first step, so that the user sees it and it can fail early.

torch.compile caches compiled code on disk, so that a later run on the machine loads it in seconds.

On a CPU one graph serves all sizes above 1. The warm-up runs a small model, whose sizes differ from each other. Other
shapes are compiled when they occur: single tokens while one answer is generated, and rows of more than 4,096 tokens.

On a GPU every size except the number of tokens is a constant. The warm-up runs two layers of the run's own widths, with
enough tokens for Triton to time its variants, and then with one token, as in generation.
"""

import logging
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_tiedlora.adapters.tied_adapter import AdapterPart, TiedAdapter, make_adapter_config, targets_of
from megatron_tiedlora.base.messages import UserError, first_line
from megatron_tiedlora.base.output_folder import make_private_folder
from megatron_tiedlora.base.shapes import ModelShape
from megatron_tiedlora.model.batch import find_supervised
from megatron_tiedlora.model.layer_specs import layer_specs
from megatron_tiedlora.model.stage import Stage
from megatron_tiedlora.parallel.agreement import first_message, sum_over_ranks
from megatron_tiedlora.parallel.kernels import EAGER, Kernels
from megatron_tiedlora.parallel.quantise import slow_nf4
from megatron_tiedlora.planning.run_plan import RunPlan
from megatron_tiedlora.runtime.launch_env import rank_number

_LOGGER = logging.getLogger(__name__)
_CACHE_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
# With each of these torch.compile returns functions unchanged.
_SWITCHES = ("TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE")


@dataclass(frozen=True)
class ChosenKernels:
    """Kernels for the layers, and a few words for the user on how they were chosen."""

    kernels: Kernels
    description: str


def choose_kernels(plan: RunPlan, device: torch.device) -> ChosenKernels:
    """The kernels that --compile asks for, compiled on every rank or on none. All ranks call it.

    `auto` compiles if the run is long enough to repay it, and continues without compiling if that fails.

    Raises:
        UserError: on every rank, with --compile true, if a rank cannot compile.
    """
    slow = f"; {text}" if plan.settings.base == "nf4" and (text := slow_nf4(device, plan.dtype)) else ""
    if plan.settings.compile == "false":
        return ChosenKernels(EAGER, f"not compiled{slow}")
    if not plan.layout.compiled:
        return ChosenKernels(EAGER, f"not compiled, as the run is short (--compile true does it){slow}")
    if plan.grid.rank == 0:
        _LOGGER.info("compiling the kernels ...")
    started = time.monotonic()
    kernels, failure = EAGER, None
    # On a CPU one rank of each host compiles first and fills the cache for the others. With GPUs all compile at once.
    for turn in (True, False) if device.type == "cpu" else (None,):
        if turn is None or (rank_number(local=True) == 0) == turn:
            try:
                kernels = compiled_kernels(
                    plan.source.shape, dtype=plan.dtype, device=device, tp_size=plan.grid.tp_size
                )
            except UserError as error:
                failure = str(error)
        sum_over_ranks([0.0])  # wait for all ranks
    failure = first_message(failure)
    if failure is None:
        return ChosenKernels(kernels, f"compiled in {time.monotonic() - started:.1f} s{slow}")
    if plan.settings.compile == "true":
        raise UserError(f"--compile true: {failure}. Install a C++ compiler, or give --compile auto or false")
    return ChosenKernels(EAGER, f"not compiled: {failure}{slow}")


def compiled_kernels(shape: ModelShape, *, dtype: torch.dtype, device: torch.device, tp_size: int = 1) -> Kernels:
    """The kernels, compiled for a model's layers in `dtype` on `device`, sharded over `tp_size` ranks.

    Raises:
        UserError: compiling failed, or another user owns the folder of the cache; the reason in one line.
    """
    for name in _SWITCHES:
        if os.environ.get(name) == "1":
            raise UserError(f"{name} is 1")
    try:
        if _CACHE_VARIABLE not in os.environ:
            # torch.compile runs the code in its cache, and any user could create its default folder.
            folder = Path(tempfile.gettempdir()) / f"megatron_tiedlora-kernels-{os.getuid()}"
            make_private_folder(folder)
            os.environ[_CACHE_VARIABLE] = str(folder)
        kernels = Kernels().compiled(static_widths=device.type != "cpu")
        if device.type != "cpu":
            warm_up_widths(kernels, shape, dtype=dtype, device=device, tp_size=tp_size)
            return kernels
        # Every kernel is called, forwards and backwards, with each kind of shapes that training has. A rank's shard of
        # the vocabulary and the hidden size are the run's own, since compilers treat long and short rows differently.
        # All other sizes are small, and no two of them are equal, also where half of 28 is rotated.
        small = shape.resized(
            vocab_size=-(-shape.vocab_size // tp_size),
            intermediate_size=88,
            num_layers=2,
            heads=shape.heads.resized(num=6, num_kv=2, dim=28),
        )
        documents = (None, torch.arange(152) // 40)
        _call_all(kernels, small, 3, 152, dtype=dtype, device=device, documents=documents)
    except UserError:
        raise
    except Exception as error:  # compilers, or a missing one, can raise anything
        raise UserError(f"{type(error).__name__}: {first_line(error)}") from error
    return kernels


def warm_up_widths(
    kernels: Kernels, shape: ModelShape, *, dtype: torch.dtype, device: torch.device, tp_size: int
) -> None:
    """Call every kernel with a rank's own widths: forwards and backwards with several rows, whose number is marked as
    dynamic, and forwards with one row."""
    widths = shape.resized(
        vocab_size=-(-shape.vocab_size // tp_size),
        intermediate_size=shape.intermediate_size // tp_size,
        num_layers=2,
        heads=shape.heads.local(tp_size),
    )
    _call_all(kernels.marked(), widths, 3, 696, dtype=dtype, device=device)
    with torch.no_grad():
        _call_all(kernels, widths, 1, 1, dtype=dtype, device=device)


def _call_all(
    kernels: Kernels,
    shape: ModelShape,
    num_rows: int,
    length: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    documents: Sequence[torch.Tensor | None] = (None,),
) -> None:
    """Run a model of `shape` with zero weights on `num_rows` x `length` tokens, with each of `documents`.

    It runs forwards and backwards if gradients are enabled, else forwards to the logits.
    """
    from torch._inductor import config as inductor

    adapter = make_adapter_config("tl6", rank=4, layers=(1, 2), targets=targets_of(shape), seed=0)
    with device:
        stage = Stage(layer_specs(shape, dtype=dtype, kernels=kernels), TiedAdapter(AdapterPart.whole(adapter)))
    for parameter in stage.parameters():
        torch.nn.init.zeros_(parameter)
    ids = torch.arange(length).expand(num_rows, length)
    labels = find_supervised(ids % shape.vocab_size).moved(lambda tensor: tensor.to(device))
    tokens, positions = (ids % shape.vocab_size).to(device), ids.to(device)
    # Only on this thread, also backwards: the patch is thread-local, and without it compile workers would stay alive.
    with inductor.patch(compile_threads=1), torch.autograd.set_multithreading_enabled(False):
        for found in documents:
            packed = None if found is None else found.expand(num_rows, length)
            if torch.is_grad_enabled():
                stage(tokens, positions, labels, documents=packed).backward()
            else:
                stage.predict(tokens, positions, documents=packed)
