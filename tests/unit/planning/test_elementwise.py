"""Bytes that a block moves beside its frozen matmuls and attention: counted on tensors without data, and by formula.

    make test PYTEST_ARGS=-s TESTS=tests/unit/planning/test_elementwise.py

prints both.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from bytes_touched import BytesTouched
from torch.utils._python_dispatch import _disable_current_modes

from megatron_tiedlora.adapters import adapter_bank
from megatron_tiedlora.adapters.adapter_bank import AdapterBank, Share
from megatron_tiedlora.adapters.tied_adapter import AdapterConfig, AdapterPart, TiedAdapter
from megatron_tiedlora.checkpoint.sources import find_model
from megatron_tiedlora.config.settings import make_settings
from megatron_tiedlora.model import attention
from megatron_tiedlora.model.batch import find_supervised
from megatron_tiedlora.model.layer_specs import layer_specs
from megatron_tiedlora.model.stage import Stage
from megatron_tiedlora.parallel.kernels import EAGER
from megatron_tiedlora.planning.micro_batches import shared_shape
from megatron_tiedlora.planning.stages import plan_stages
from megatron_tiedlora.planning.work import Batch, stage_work
from megatron_tiedlora.training.plan import RunPlan, plan_run
from megatron_tiedlora.training.step_plan import StepPlan

LENGTH = 1024
CASES = [
    ("llama2-7b", "none", {}),
    ("llama2-7b", "selective", {}),
    ("llama2-7b", "full", {}),
    ("llama2-7b", "none", {"method": "lora", "targets": "all", "rank": 16}),
    ("llama2-7b", "selective", {"method": "lora", "targets": "all", "rank": 16}),
    ("llama2-7b", "none", {"method": "vera"}),
    ("llama2-70b", "none", {}),
    ("qwen3-8b", "full", {"targets": "qkv,down_proj"}),
]


class _Attend(torch.autograd.Function):
    """Results and gradients of attention, of which nothing is counted."""

    @staticmethod
    def forward(ctx: Any, *heads: torch.Tensor) -> torch.Tensor:
        ctx.heads = heads
        batch, num, length, dim = heads[0].shape
        with _disable_current_modes():
            return heads[0].new_empty(batch, length, num * dim)

    @staticmethod
    def backward(ctx: Any, _gradient: torch.Tensor) -> Any:
        with _disable_current_modes():
            return tuple(torch.empty_like(head.transpose(1, 2)).contiguous().transpose(1, 2) for head in ctx.heads)


@pytest.fixture
def _without_attention(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    route = type("Route", (), {"attend": staticmethod(lambda *_: None)})
    monkeypatch.setattr(attention, "attend_within", lambda query, key, value, *_: _Attend.apply(query, key, value))
    monkeypatch.setattr(attention.Attention, "route", lambda *_: route)
    yield


def planned(model: str, num_layers: int, recompute: str, changes: dict[str, Any]) -> RunPlan:
    values = {"model": model, "dry_run": True, "plan_for": "gpu", "compile": "true", "recompute": recompute, **changes}
    settings = make_settings({**values, "max_length": LENGTH, "global_batch_size": 1, "micro_batch_size": 1})
    source = find_model(model)
    source = replace(source, shape=replace(source.shape, num_layers=num_layers))
    return plan_run(settings, rank=0, world_size=1, weights=False, source=source)


def counted(plan: RunPlan, bank: Sequence[AdapterConfig] = ()) -> int:
    """Bytes of all operations of a micro-batch, forward and backward.

    Args:
        bank: the adapters that have as many of its tokens each, in place of the plan's.
    """
    counter, recompute, shape = BytesTouched(), plan.settings.recompute, plan.source.shape
    shares = tuple(Share(str(number), 1, LENGTH // len(bank)) for number in range(len(bank)))
    with torch.device("meta"):
        specs = layer_specs(
            shape, dtype=torch.bfloat16, kernels=counter.watched(EAGER), recomputes_gate=recompute == "selective"
        )
        owned = {str(number): TiedAdapter(AdapterPart.whole(own)) for number, own in enumerate(bank)}
        alone = TiedAdapter(AdapterPart.whole(plan.adapter))
        stage = Stage(specs, AdapterBank(owned) if bank else alone, recompute=recompute)
        tokens, positions = torch.zeros(2, 1, LENGTH, dtype=torch.int64).unbind(0)
    labels = torch.zeros(1, LENGTH, dtype=torch.int64)
    labels[:, -1] = -100
    supervised = find_supervised(labels, shares=shares if bank else ())
    supervised = supervised.moved(lambda tensor: tensor.to("meta"))
    stage.train()
    with counter:
        loss = stage(tokens, positions, supervised, shares=shares)
        assert isinstance(loss, torch.Tensor)
        loss.sum().backward()  # of several adapters, a loss of each
    return counter.total


def frozen_bytes(plan: RunPlan, *, passes: dict[str, int]) -> int:
    """Of a block's frozen matmuls: inputs and weights read, results written."""
    size = 0
    for name, linear in plan.source.shape.block.adaptable.items():
        size += passes[name] * 2 * (LENGTH * (linear.in_size + linear.out_size) + linear.num_weights)
    return size


@pytest.mark.usefixtures("_without_attention")
@pytest.mark.parametrize(("model", "recompute", "changes"), CASES, ids=str)
def test_a_block_moves_what_is_planned(model: str, recompute: str, changes: dict[str, Any]) -> None:
    """The difference that one more block makes, in the middle of the model."""
    plans = [planned(model, number, recompute, changes) for number in (2, 3)]
    fewer, more = (counted(plan) for plan in plans)
    again = {"none": [], "selective": ["gate_up"], "full": list(plans[0].source.shape.block.adaptable)}[recompute]
    passes = {name: 2 + (name in again) for name in plans[0].source.shape.block.adaptable}
    found = more - fewer - frozen_bytes(plans[0], passes=passes)
    work = [stage_work(plan.stage, StepPlan({"": plan}).batches.kinds[0]) for plan in plans]
    formula = sum(two.moved - one.moved for one, two in zip(*work, strict=True))
    print(f"\n{model} {recompute} {changes}: counted {found / 1e6:.1f} MB, formula {formula / 1e6:.1f} MB")
    assert formula == pytest.approx(found, rel=0.05)


@pytest.mark.usefixtures("_without_attention")
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_tokens_of_several_adapters_move_what_is_planned(recompute: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each adapter's tokens move what its own targets make them move."""
    # Tensors without data have one address, by which factors are joined once for all layers.
    monkeypatch.setattr(adapter_bank._Flat, "of", lambda _, factors: torch.cat([f.flatten() for f in factors]))
    found, formula = [], []
    for number in (2, 3):
        plans = [
            planned("llama2-7b", number, recompute, changes)
            for changes in ({"targets": "qkv"}, {"method": "lora", "targets": "all", "rank": 4})
        ]
        bank = tuple(plan.adapter for plan in plans)
        found.append(counted(plans[0], bank))
        layout = replace(plans[0].layout, adapters=bank, named=True)
        rows = [np.arange(LENGTH // 2) > 0]
        batch = Batch(shared_shape(layout, [(0, rows), (1, rows)]), 0)
        work = stage_work(plan_stages(plans[0].source.shape, layout)[0], batch)
        formula.append(sum(each.moved for each in work))
    again = {"none": [], "selective": ["gate_up"], "full": list(plans[0].source.shape.block.adaptable)}[recompute]
    passes = {name: 2 + (name in again) for name in plans[0].source.shape.block.adaptable}
    block = found[1] - found[0] - frozen_bytes(plans[0], passes=passes)
    print(f"\n{recompute}: counted {block / 1e6:.1f} MB, formula {(formula[1] - formula[0]) / 1e6:.1f} MB")
    assert formula[1] - formula[0] == pytest.approx(block, rel=0.05)
