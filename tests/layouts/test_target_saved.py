"""Saved bytes of adapters at layouts: what autograd saves on each rank of a stage is what the dry run counts."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from support.cases import part_of
from support.forked_ranks import groups_of, run_on_ranks
from torch import distributed

from megatron_tiedlora.adapters import tied_adapter
from megatron_tiedlora.adapters.adapter_groups import ONLY, AdapterGroup, Dropout
from megatron_tiedlora.adapters.tying import sum_of_u
from megatron_tiedlora.base.shapes import TARGET_NAMES, ModelShape
from megatron_tiedlora.model.batch import find_supervised
from megatron_tiedlora.model.families import shape_from_hf
from megatron_tiedlora.model.layer_specs import layer_specs
from megatron_tiedlora.model.stage import Stage
from megatron_tiedlora.parallel.groups import Grid, ParallelGroups, TensorParallel
from megatron_tiedlora.planning.layout import Layout, MicroBatchShape, StagePlan, plan_stages
from megatron_tiedlora.planning.passes import saved_bytes
from megatron_tiedlora.selfcheck.timing import saved_by_autograd

pytestmark = pytest.mark.distributed

RANK, ROWS, LENGTH, TP = 5, 2, 96, 2
SHAPE: ModelShape = shape_from_hf(
    {"model_type": "llama", "vocab_size": 512, "num_key_value_heads": 2, "hidden_size": 96, "intermediate_size": 256}
    | {"num_attention_heads": 6, "num_hidden_layers": 4}
)
SUBSETS = (("qkv",), ("o_proj", "gate_up"), ("down_proj",), TARGET_NAMES)


class Case(NamedTuple):
    """One stage of `stages`, on a rank of two that share its layers."""

    method: str
    targets: tuple[str, ...]
    layers: tuple[int, ...]
    recompute: str
    shards_sequences: bool
    stages: int
    index: int
    dropout: float = 0.0


_ALL = [
    Case(method, targets, layers, recompute, shards_sequences, stages, index)
    for recompute, shards_sequences, (stages, index) in product(
        ("none", "selective", "full"), (True, False), ((1, 0), (2, 0), (2, 1))
    )
    for number, targets in enumerate(SUBSETS)
    for method, layers in ((("tl6", (1, 2, 3, 4)), ("tl1", (2, 4)), ("tl3", (4,)), ("lora", (2, 3)))[number - index],)
]
_ALL += [case._replace(dropout=0.3) for case in _ALL[::5]]  # whose masks are computed again, and not saved
# Every kind of recompute and of sequences meets each stage and all targets, and every kind of recompute each method.
CASES = part_of(
    _ALL,
    lambda case: (case.recompute, case.shards_sequences, case.stages, case.index),
    lambda case: (case.recompute, case.shards_sequences, case.targets),
    lambda case: (case.recompute, case.method),
    lambda case: (case.index, case.targets),
    lambda case: (case.recompute, case.dropout),
)


def run_case(case: Case, groups: ParallelGroups) -> float:
    """The bytes that are saved beyond the planned ones, without indices, cos and sin."""
    config = tied_adapter.make_adapter_config(
        case.method, rank=RANK, layers=case.layers, targets=tied_adapter.targets_of(SHAPE, case.targets), seed=0
    )
    layout = Layout(
        (config,),
        length=LENGTH,
        tp_size=TP,
        pp_size=case.stages,
        recompute=case.recompute,
        shards_sequences=case.shards_sequences,
    )
    plan = plan_stages(SHAPE, layout)[case.index]
    stage = build(case, config, plan, groups)
    tokens = torch.randint(512, (ROWS, LENGTH), generator=torch.Generator().manual_seed(2))
    labels = tokens.roll(-1, dims=1)
    labels[:, : LENGTH // 2] = -100
    inputs = tokens if plan.is_first else stage.empty_hidden(ROWS, LENGTH).normal_().requires_grad_()
    with saved_by_autograd(stage) as saved:
        numbers = torch.arange(ROWS * LENGTH).view(ROWS, LENGTH) if case.dropout else None
        output: Any = stage(inputs, torch.arange(LENGTH).expand(ROWS, LENGTH), token_index=numbers)
        if plan.is_last:
            stage.tail.loss(output, labels)
    after = len(find_supervised(labels, layout.sequence_parts).rows) if plan.is_last else 0
    counted = sum(
        tensor.untyped_storage().nbytes()
        for tensor in saved.values()
        if tensor.is_floating_point() and tensor.shape[-2:] != (1, SHAPE.heads.dim // 2)
    )
    return counted - wide_factors(plan) - saved_bytes(plan, MicroBatchShape((0,), (ROWS * LENGTH,), (after,), after))


def build(case: Case, config: tied_adapter.AdapterConfig, plan: StagePlan, groups: ParallelGroups) -> Stage:
    """The stage of this rank, with random weights."""
    first = plan.blocks[0] if case.index else 0
    last = plan.blocks[-1] + plan.is_last
    specs = layer_specs(SHAPE, dtype=torch.bfloat16, tp_size=TP)
    adapter = tied_adapter.TiedAdapter(tied_adapter.AdapterShard(config, plan.parts[0].layers, groups.tensor.rank, TP))
    adapter.u_sum = sum_of_u(groups)
    adapter.u_sum.start(1)
    tensor_parallel = TensorParallel(groups.tensor, case.shards_sequences)
    stage = Stage(
        specs[first : last + 1],
        AdapterGroup({ONLY: adapter}, {ONLY: Dropout(case.dropout, 0)} if case.dropout else None),
        tensor_parallel=tensor_parallel,
        recompute=case.recompute,
        is_engines=True,
    )
    for parameter in stage.parameters():
        parameter.data.normal_(0.0, 0.05)
    return stage


def wide_factors(plan: StagePlan) -> int:
    """The fp32 factors that are gathered, once for all layers, and read by the gradients of others; and u's copy."""
    part, method = plan.parts[0], plan.parts[0].config.method_spec
    read = {"A": False, "B": method.u.trained or method.v.trained, "v": method.B.trained or method.u.trained}
    held = 0
    for name, (_, factor) in part.config.tensors.items() if part.layers else ():
        if part.is_gathered(name) and read[factor]:
            held += TP * part.local_size(name)
    if part.layers and method.u.trained and len(part.config.targets) > 1:
        held += len(part.layers) * RANK * len(part.config.targets)
    return 4 * held


def differences(cases: list[Case]) -> list[float]:
    """On this rank, case by case."""
    grid = Grid(distributed.get_rank(), TP, tp_size=TP)
    groups = groups_of(grid)
    return [run_case(case, groups) for case in cases]


def test_saved_bytes_are_the_planned_ones_on_every_rank(tmp_path: Path) -> None:
    for by_case in run_on_ranks(differences, CASES, ranks=TP, folder=tmp_path):
        assert {case: found for case, found in zip(CASES, by_case, strict=True) if found} == {}
