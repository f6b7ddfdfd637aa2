"""Weights with columns for the adapter's update: rounding, storage, memory, and the settings that exclude them.

Gradients at layouts are in layouts/test_parallel_gradients.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.run_files import losses
from support.run_helpers import Base, run

from megatron_tiedlora.adapters.low_rank import AllRows, beside
from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.config.settings import make_settings
from megatron_tiedlora.model.linears import Operands, Projection
from megatron_tiedlora.model.regions import Needs
from megatron_tiedlora.parallel.frozen_weight import FrozenWeight
from megatron_tiedlora.parallel.kernels import EAGER, Kernels
from megatron_tiedlora.planning.run_plan import plan_run

ROUNDOFF = 2.0**-8  # half of the distance of two bf16 numbers, as a share
SETTINGS: dict[str, Any] = {"model": "llama2-7b", "dry_run": True, "plan_for": "gpu", "adapter_in_matmul": True}


def drawn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def made(spare: int, values: torch.Tensor) -> FrozenWeight:
    weight = FrozenWeight.empty(*values.shape, dtype=values.dtype, after_norm=True, spare=spare)
    weight.load(values)
    return weight


def test_each_sum_is_rounded_once() -> None:
    """Against fp64: an error of one rounding; with a matmul for the update it is also that of x W^T."""
    x, w, a, f = drawn(300, 192, seed=1), drawn(160, 192, seed=2), drawn(8, 192, seed=3), drawn(160, 8, seed=4)
    rows, errors, bounds = AllRows(), {}, {}
    ax = rows.reduce_input(x, a, local=False)
    base = x.double() @ w.double().t()
    exact = base + ax.double() @ f.double().t()
    accumulated = 200 * 2.0**-23 * (x.double().abs() @ w.double().abs().t() + ax.double().abs() @ f.double().abs().t())
    bounds[16] = ROUNDOFF * exact.abs() * 1.01 + accumulated
    bounds[0] = bounds[16] + ROUNDOFF * base.abs() * 1.01
    for spare, operand in ((16, torch.cat((x, ax), 1)), (0, None)):
        projection = Projection(made(spare, w), rows)
        z, _ = projection.forward(x, Operands(a, f), ax, operand)
        errors[spare] = (z.double() - exact).abs()
        assert (errors[spare] <= bounds[spare]).all(), spare
    assert (errors[0] > bounds[16]).any() and errors[16].norm() < errors[0].norm()


def test_both_gradients_come_from_one_matmul() -> None:
    w, f, grad_z = drawn(160, 192, seed=2).double(), drawn(160, 5, seed=4).double(), drawn(7, 160, seed=5).double()
    weight = made(16, w)
    weight.write_update(f)
    found = Projection(weight, AllRows()).gradients(grad_z, None, f, Needs(x=True, a=True), None)
    grad_x, grad_ax, _ = found
    assert grad_x is not None and grad_ax is not None and grad_x.stride() == (208, 1)
    torch.testing.assert_close(grad_x, grad_z @ w, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grad_ax, grad_z @ f, rtol=1e-12, atol=1e-12)
    assert beside(grad_x, grad_ax).data_ptr() == grad_x.data_ptr()


def test_what_is_beside_in_memory_is_not_copied() -> None:
    memory = torch.full((6, 48), 7.0)
    narrow = torch.randn(1, 6, 3)
    joined = beside(memory[:, :32][None], narrow)
    assert joined.data_ptr() == memory.data_ptr() and joined.shape == (1, 6, 48)
    assert torch.equal(memory[:, 32:35], narrow[0]) and bool((memory[:, :32] == 7).all())
    copied = beside(torch.ones(1, 6, 32), narrow)
    assert torch.equal(copied[..., 32:35], narrow) and not copied[..., 35:].any()


@pytest.mark.parametrize("start", [0, 3])
def test_loading_clears_the_spare_columns(start: int) -> None:
    weight = FrozenWeight.empty(8, 12, dtype=torch.float32, after_norm=True, spare=16)
    torch.nn.init.constant_(weight.tensor, torch.nan)
    values = weight.empty_values()
    assert values.shape == weight.local_shape == (8, 12)
    weight.load(torch.ones(8 - start, 12), start=start)
    expected = torch.cat((torch.ones(8 - start, 12), torch.zeros(8 - start, 16)), 1)
    assert torch.equal(weight.tensor[start:], expected) and bool(weight.tensor[:start, :12].isnan().all())
    assert FrozenWeight.empty(8, 12, dtype=torch.float32, spare=16).tensor.shape == (8, 12)


@pytest.mark.parametrize("adds", [False, True])
def test_the_norm_is_written_beside(adds: bool) -> None:
    hidden, addend, weight = drawn(9, 32, seed=1), drawn(9, 32, seed=2) if adds else None, drawn(1, 32, seed=3)[0]
    joined = torch.full((9, 48), 7.0, dtype=torch.bfloat16)
    total, none, root = EAGER.add_and_normalise(hidden, addend, weight, None, 1e-5, joined)
    summed = hidden if addend is None else hidden + addend
    normed, expected = Kernels().normalise(summed, weight, None, 1e-5)
    assert torch.equal(joined[:, :32], normed) and bool((joined[:, 32:] == 7).all()) and torch.equal(root, expected)
    assert none is None and (total is None) == (addend is None) and (total is None or torch.equal(total, summed))


def test_the_plan_counts_the_columns() -> None:
    plans = [
        plan_run(make_settings({**SETTINGS, "adapter_in_matmul": value}), rank=0, world_size=1, weights=False)
        for value in (False, True)
    ]
    plain, joined = (plan.stages[0].base_bytes for plan in plans)
    assert joined - plain == 32 * 16 * 2 * (3 * 4096 + 2 * 11008)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"base": "nf4"}, "a base that is not quantised"),
        ({"rank": 17}, "a --rank of at most 16"),
        ({"ds_config": "zero3.json"}, r"a ZeRO stage below 3 \(--ds_config\)"),
        ({"adapters": "adapters.yaml"}, r"a single adapter \(no --adapters\)"),
    ],
)
def test_what_excludes_it_is_one_line(changes: dict[str, Any], reason: str) -> None:
    message = f"^--adapter_in_matmul true needs {reason}. Remove --adapter_in_matmul$"
    with pytest.raises(UserError, match=message):
        plan_run(make_settings({**SETTINGS, **changes}), rank=0, world_size=1, weights=False)


@pytest.mark.distributed
def test_a_run_over_two_tensor_parallel_ranks(base: Base, tmp_path: Path) -> None:
    """The losses of the run without it, which may also go on from it."""
    found = {}
    for value in (False, True):
        run(base, tmp_path / str(value), ranks=2, tensor_parallel=2, max_steps=2, adapter_in_matmul=value)
        found[value] = [loss for split in ("train", "validation") for _, loss in losses(tmp_path / str(value), split)]
    assert found[True] == pytest.approx(found[False], rel=1e-5) and len(found[True]) > 2
    ended = run(base, tmp_path / "True", max_steps=2, resume="auto")
    assert "resumed from step 2" in ended.outputs[0]
