"""tl6 whose layers share tensors in groups, which no method of the table does: exact at layouts, in files, in counts.

The model has five layers, which no number of stages here divides, and groups of layers cross the stages' boundaries.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from bank_steps_worker import run_bank_steps
from engine_runs import relative_distance, relative_errors
from forked_ranks import run_on_ranks
from gradient_worker import DTYPE, Case, joined
from gradient_worker import run_cases as run_gradients
from layout_runs import Layout, engine_json, five_layers, prepare, run_and_check
from native_files import with_adapter
from oracle import OracleConfig, cast_weights, load_weights, merged_weights, oracle_logits
from oracle_adapter import ALL_TARGETS, OracleAdapter
from oracle_training import OracleRun, oracle_train
from shared_steps_worker import LEARNING_RATE, MAX_NORM, STEPS, run_steps, samples_of
from shared_tensors import DECLARED, GROUPS, tl6_shares
from test_parallel_gradients import Answers, check_messages, check_numbers, check_ties, grids
from tiny_models import write_tiny_model
from traffic_runs import run_cases, write_inputs

from megatron_tiedlora.checkpoint.native_adapter import load_native_adapter, save_adapter
from megatron_tiedlora.convert.export_peft import export_peft
from megatron_tiedlora.convert.merge import merge_adapter
from megatron_tiedlora.convert.open_adapter import read_peft

pytestmark = pytest.mark.distributed

WAYS = tuple(DECLARED)
# (tp, pp, dp) by ranks.
LAYOUTS = {2: [(1, 2, 1), (2, 1, 1)], 3: [(1, 3, 1)], 4: [(2, 2, 1), (1, 4, 1), (1, 2, 2)]}
# The norm is that of gradients rounded to fp32, so that clipping has its rounding errors.
CLIPPED = 1e-7


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = {"num_layers": 5, "num_heads": 8, "num_kv_heads": 4, "head_dim": 6, "vocab_size": 321}
    return write_tiny_model(tmp_path_factory.mktemp("model") / "model", **shape)


def cases_of(model: Path, ranks: int) -> list[Case]:
    """Each way at each layout, with and without sequence parallelism, recompute and packing."""
    return [
        Case(model, layout, shares=way, sequence_parallel=layout[0] > 1, **more)
        for layout in LAYOUTS[ranks]
        for way in WAYS
        for more in ({}, {"targets": ALL_TARGETS, "recompute": "full", "packed": True})
    ]


def test_groups_of_layers_cross_stages(model: Path) -> None:
    """No number of stages divides the layers, and some groups are on several stages, but for pairs on three stages."""
    for layout in (layout for some in LAYOUTS.values() for layout in some if layout[1] > 1):
        case = Case(model, layout)
        stages = [{layer for layer in range(1, 6) if layer in stage} for stage in case.stages]
        assert 5 % layout[1] and case.shape.heads.num_kv < case.shape.heads.num
        for way in WAYS:
            inside = [any(stage.issuperset(group) for stage in stages) for group in GROUPS[way]["A"]]
            assert all(inside) == (layout[1] == 3 and way == "pairs"), (layout, way, stages)


@pytest.mark.cpu_seconds(20, reason="every case beside the oracle, in one start for each number of ranks")
@pytest.mark.parametrize("ranks", LAYOUTS)
def test_gradients_equal_the_oracle(model: Path, tmp_path: Path, ranks: int) -> None:
    """Loss, logits and each gradient in fp64, and copies to the last bit; messages, where the rules of them hold."""
    cases, answers = cases_of(model, ranks), Answers()
    by_rank = run_on_ranks(run_gradients, cases, ranks=ranks, folder=tmp_path)
    for case, outcomes in zip(cases, zip(*by_rank, strict=True), strict=True):
        with tl6_shares(case.shares):
            check_numbers(case, list(outcomes), answers)
            check_ties(case, list(outcomes))
            if case.shares == "pairs":  # u is each layer's own
                check_messages(case, list(outcomes))


@pytest.mark.cpu_seconds(20, reason="every case beside the oracle, in one start for each number of ranks")
@pytest.mark.parametrize("ranks", LAYOUTS)
def test_clipped_steps_equal_the_oracle(model: Path, tmp_path: Path, ranks: int) -> None:
    """Three steps in fp64 by our own sums, norm and clipping; the check of copies sees a slot that differs."""
    cases = cases_of(model, ranks)
    by_rank = run_on_ranks(run_steps, cases, ranks=ranks, folder=tmp_path)
    weights, config = cast_weights(load_weights(model), DTYPE), OracleConfig.from_folder(model)
    oracles: dict[Any, OracleRun] = {}
    for case, found in zip(cases, zip(*by_rank, strict=True), strict=True):
        key = case.shares, case.targets
        if key not in oracles:
            more: dict[str, Any] = {"learning_rate": LEARNING_RATE, "max_grad_norm": MAX_NORM, "optimizer": "sgd"}
            oracles[key] = oracle_train(weights, config, case.adapter, samples_of(case), max_steps=10**9, **more)
        oracle = oracles[key]
        assert min(oracle.grad_norms) > MAX_NORM, "clipping must be active"
        for steps in found:
            assert len(steps.losses) == STEPS and not steps.mismatches, case
            assert max(relative_errors(steps.losses, oracle.losses)) <= CLIPPED, case
            assert max(relative_errors(steps.norms, oracle.grad_norms)) <= CLIPPED, case
        copied = case.layout[1] * case.layout[2] > 1
        assert found[-1].damaged.startswith("A differs between stages" if copied else "None"), case
        with tl6_shares(case.shares):
            tensors = joined(case, [steps.tensors for steps in found])
        for name in case.adapter.trained:
            moved = relative_distance(tensors[name], case.adapter.tensors[name])
            assert moved > 1e-5, (name, case)
            assert relative_distance(tensors[name], oracle.adapter.tensors[name]) <= CLIPPED, (name, case)
