"""Steps in fp64 at a layout, by the package's sums, norm and clipping, without an engine: one rank of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from bank_steps_worker import BankRun, run_bank_steps
from forked_ranks import groups_of
from gradient_worker import Case, Walk, build_stage
from oracle_training import OracleBatch
from shared_tensors import tl6_shares
from tiny_models import random_batches
from torch import distributed

from megatron_tiedlora.adapters.adapter_bank import ONLY
from megatron_tiedlora.adapters.tied_adapter import TiedAdapter
from megatron_tiedlora.adapters.tying import find_mismatches, sum_gradients_
from megatron_tiedlora.engine.engine import gradient_norms, scale_gradients_, trained_parameters
from megatron_tiedlora.parallel.groups import Grid

STEPS, LEARNING_RATE, MAX_NORM = 3, 0.5, 0.05


@dataclass(frozen=True)
class Steps:
    """What a rank found.

    Attributes:
        losses, norms: by step; norms before clipping.
        tensors: the rank's parts of the trained tensors after the last step.
        mismatches: of copies, after each step; must be none.
        damaged: the mismatch that is found once the last rank has another last slot of A.
    """

    losses: list[float]
    norms: list[float]
    tensors: dict[str, torch.Tensor]
    mismatches: list[str]
    damaged: str


def samples_of(case: Case) -> list[list[OracleBatch]]:
    """The samples of each step."""
    return random_batches(STEPS, samples_per_step=6, vocab_size=case.shape.vocab_size, seed=18)


def run_steps(cases: list[Case]) -> list[Steps]:
    """Every case on this rank, one after another."""
    found = []
    for case in cases:
        tp_size, pp_size, _ = case.layout
        grid = Grid(distributed.get_rank(), distributed.get_world_size(), tp_size=tp_size, pp_size=pp_size)
        with tl6_shares(case.shares):
            found.append(_run(case, grid))
    return found


def _run(case: Case, grid: Grid) -> Steps:
    groups = groups_of(grid)
    stage = build_stage(case, grid, groups)
    adapter = stage.adapter
    assert adapter is not None
    adapter.u_sum = None  # as where no engine steps it
    walk, parameters = Walk(case, stage, grid, groups), trained_parameters(adapter)
    optimizer = torch.optim.SGD(parameters.values(), lr=LEARNING_RATE)
    losses, norms, mismatches = [], [], []
    for samples in samples_of(case):
        num_supervised, loss = sum(sample.num_supervised for sample in samples), 0.0
        for batch in case.arranged(samples)[grid.dp_rank :: grid.dp_size]:
            loss += walk.train(batch, num_supervised, None)[0]
        assert not sum_gradients_({ONLY: adapter}, groups), "a gradient is missing"
        (norm,) = gradient_norms([adapter], groups, torch.device("cpu"))
        scale_gradients_(adapter, norm, MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        total = torch.tensor(loss, dtype=torch.float64)
        distributed.all_reduce(total)
        losses.append(float(total) / grid.tp_size)  # the tensor-parallel ranks of the last stage have the same
        norms.append(norm)
        mismatches += [str(found) for found in find_mismatches([_fp32(adapter)], groups) if found]
    tensors = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    if grid.rank == grid.world_size - 1:
        with torch.no_grad():
            parameters["A"][-1] += 1.0
    (damaged,) = find_mismatches([_fp32(adapter)], groups)
    return Steps(losses, norms, tensors, mismatches, str(damaged))


def _fp32(adapter: TiedAdapter) -> TiedAdapter:
    """The adapter as runs hold it, which compare bits of this dtype."""
    copy = TiedAdapter(adapter.part)
    copy.load_state_dict(adapter.state_dict())
    return copy


def run_bank(way: str, cases: list[dict[str, Any]], folder: str) -> list[BankRun]:
    """The cases of `run_bank_steps`, in which layers share the tensors of tl6."""
    with tl6_shares(way):
        return run_bank_steps(cases, folder)
