"""The pieces of tensor parallelism by themselves, in groups of 1, 2, 3 and 4: copies, loss and the grid.

tests/layouts/test_parallel_gradients.py has regions, linears and the embedding, in whole models.
"""

from __future__ import annotations

from itertools import product
from operator import attrgetter
from typing import Any

import pytest
import torch
from support.forked_ranks import group_of, run_on_ranks
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_tiedlora.engine.engine import make_topology
from megatron_tiedlora.parallel import groups as collectives
from megatron_tiedlora.parallel.frozen_weight import FrozenWeight
from megatron_tiedlora.parallel.groups import ALONE, Grid, RankGroup, TensorParallel, TrafficCounter
from megatron_tiedlora.parallel.loss import VocabularyShard, run_with_early_backward, token_losses

SIZES = (2, 3, 4)
RANKS = 4
LENGTH, WIDTH, VOCABULARY = 12, 6, 322  # 12 divides by every size, 322 by 2 alone


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ------------------------------------------------------------------------------------------- what the ranks do


class _Copies(TorchDispatchMode):
    """Counts operations that copy a tensor."""

    num = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.num += func.overloadpacket.__name__ in ("clone", "_to_copy", "cat")  # gloo itself uses copy_
        return func(*args, **(kwargs or {}))


def count_copies(group: RankGroup) -> int:
    """Copies around the messages of several rows that are cut along the sequence, forward and backward."""
    tensor_parallel = TensorParallel(group, sequence_parallel=True)
    hidden, addends = (draw(*shape, LENGTH, WIDTH, seed=2).requires_grad_() for shape in ((1,), (3,)))
    with _Copies() as copies:
        whole = collectives.enter_tensor_parallel_region(hidden, tensor_parallel)
        part = collectives.leave_tensor_parallel_region(addends, tensor_parallel)
        torch.autograd.grad((whole, part), (hidden, addends), (torch.ones_like(whole), torch.ones_like(part)))
    return copies.num


def loss_inputs(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(8, V) logits and labels: labels in every part and at their edges, and logits that overflow an exp."""
    logits = 3 * draw(8, VOCABULARY, seed=40)
    labels = torch.tensor([0, 160, 161, 321, 80, 81, 250, 240])
    logits[1, 160] = 1e4  # all the chance is at the label
    logits[2, 5] = 1e4  # all of it elsewhere, on another rank
    logits[3] -= 1e4
    logits[4] = 0.0
    logits[5, 200:] += 1e4  # other ranks underflow
    logits[6] *= 1e3
    return logits.to(dtype), labels


def capped(logits: torch.Tensor, cap: float | None) -> torch.Tensor:
    return logits if cap is None else cap * (logits / cap).tanh()


CAPS = (None, 30.0)


def try_loss(group: RankGroup) -> dict[tuple[torch.dtype, float | None], Any]:
    found = {}
    for dtype, cap in product((torch.float64, torch.float32, torch.bfloat16), CAPS):
        logits, labels = loss_inputs(dtype)
        share = -(-VOCABULARY // group.size)
        # With rows of the identity for weights products are exact: a rank's logits, and their gradient in its place.
        here = slice(group.rank * share, (group.rank + 1) * share)
        rows, frozen = logits.clone().requires_grad_(), FrozenWeight(torch.eye(VOCABULARY, dtype=dtype)[here])
        shard = VocabularyShard(frozen, here.start, group, rows_at_once=3, cap=cap)
        loss = token_losses(rows, labels, shard).sum()
        (loss * 0.37).backward()
        assert rows.grad is not None
        found[dtype, cap] = loss.detach(), rows.grad[:, here].clone()
        rows.grad[:, here] = 0
        assert not rows.grad.any()
        each = token_losses(rows.detach(), labels, shard)
        expected = functional.cross_entropy(capped(logits.double(), cap), labels, reduction="none")
        assert each.shape == expected.shape
        assert (each - expected).abs().max() <= 4 * torch.finfo(each.dtype).eps * expected.abs().max()
    return found


def try_all() -> dict[int, dict[str, Any]]:
    """Every piece in every group that this rank is in, and alone, by the group's size."""
    made = {2: [group_of([0, 1]), group_of([2, 3])], 3: [group_of([0, 1, 2])], 4: [group_of([0, 1, 2, 3])]}
    mine = {size: group for size, groups in made.items() for group in groups if group.handle is not None}
    mine = {size: group for size, group in mine.items() if group.rank >= 0}
    found: dict[int, dict[str, Any]] = {}
    for size, group in {1: ALONE, **mine}.items():
        with TrafficCounter({}) as counter:
            found[size] = {"rank": group.rank, "copies": count_copies(group), "loss": try_loss(group)}
        found[size]["messages"] = sum(counter.traffic.messages.values())
    return found


# ------------------------------------------------------------------------------------------- what must come of it


@pytest.fixture(scope="module")
def of_groups(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """What the ranks of one group of each size did, in their order."""
    by_rank = run_on_ranks(try_all, ranks=RANKS, folder=tmp_path_factory.mktemp("units"))
    last_pair = [found[2] for found in by_rank[2:]]  # not made of the first ranks: a group's rank is not the world's
    return {1: [by_rank[3][1]], 2: last_pair, **{size: [found[size] for found in by_rank[:size]] for size in (3, 4)}}


@pytest.mark.distributed
def test_a_group_of_one_sends_nothing(of_groups: dict[int, Any]) -> None:
    assert of_groups[1][0]["messages"] == 0
    assert all(found["messages"] > 0 for size in SIZES for found in of_groups[size])
    tensor, alone = draw(2, 3, 4, seed=1), TensorParallel()
    assert collectives.gather_from_tensor_parallel_region(tensor, ALONE, 0) is tensor
    for region in (collectives.enter_tensor_parallel_region, collectives.leave_tensor_parallel_region):
        assert region(tensor, alone) is tensor


@pytest.mark.distributed
@pytest.mark.parametrize("size", SIZES)
def test_parts_of_sequences_travel_without_a_copy(of_groups: dict[int, Any], size: int) -> None:
    assert [found["copies"] for found in of_groups[size]] == [0] * size


@pytest.mark.distributed
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1, *SIZES])
@pytest.mark.parametrize("cap", CAPS)
def test_cross_entropy_equals_torch(
    of_groups: dict[int, Any], cap: float | None, size: int, dtype: torch.dtype
) -> None:
    """In fp64 of the same, already rounded logits."""
    logits, labels = loss_inputs(dtype)
    logits = logits.double().requires_grad_()
    expected = functional.cross_entropy(capped(logits, cap), labels, reduction="sum")
    (expected * 0.37).backward()
    assert logits.grad is not None
    found = [found["loss"][dtype, cap] for found in of_groups[size]]
    losses = [loss for loss, _ in found]
    gradient = torch.cat([gradient for _, gradient in found], dim=1)
    assert all(torch.equal(loss, losses[0]) for loss in losses)  # the ranks' steps depend on it
    assert losses[0].dtype == torch.promote_types(dtype, torch.float32) and gradient.dtype == dtype
    wide = torch.finfo(losses[0].dtype).eps
    assert float(losses[0]) == pytest.approx(float(expected.detach()), rel=4 * wide)
    # A chance is exp(logit - total): as exact as the larger of the two, in at least fp32. The gradient is rounded to
    # its own dtype (bf16 has 8 bits) before it is scaled, and after.
    largest = logits.detach().abs().amax(dim=1, keepdim=True)
    bound = 4 * wide * (1 + largest) + torch.finfo(dtype).eps * logits.grad.abs()
    assert bool(((gradient.double() - logits.grad).abs() <= bound).all())


# ------------------------------------------------------------------------------------------- the grid


def test_the_grid_is_deepspeeds() -> None:
    """Ranks, coordinates and groups of the topology that the pipeline engine runs on."""
    for tp_size, pp_size, dp_size in product((1, 2, 3, 4, 8), (1, 2, 3, 5), (1, 2, 3, 4)):
        grid = Grid(0, tp_size * pp_size * dp_size, tp_size=tp_size, pp_size=pp_size)
        topology = make_topology(grid)
        assert topology.world_size() == grid.world_size
        for here in map(grid.at, range(grid.world_size)):
            place = {"pp_rank": here.pp_rank, "dp_rank": here.dp_rank, "tp_rank": here.tp_rank}
            coordinates = topology.get_coord(here.rank)
            assert (coordinates.pipe, coordinates.data, coordinates.model) == tuple(place.values())
            assert topology.get_rank(pipe=here.pp_rank, data=here.dp_rank, model=here.tp_rank) == here.rank
            assert grid.rank_of(**place) == here.rank
        for axis, names in (("pipe", ("dp", "tp")), ("data", ("pp", "tp")), ("model", ("pp", "dp"))):
            ours = grid.groups(attrgetter(*(f"{name}_rank" for name in names)))
            assert sorted(map(sorted, topology.get_axis_comm_lists(axis))) == sorted(
                ranks for ranks in ours.values() if len(ranks) > 1 or topology.get_dim(axis) == 1
            )


# ---------------------------------------------------------------------------- a backward pass inside a forward pass


def test_an_early_backward_pass_is_for_its_input_alone() -> None:
    """The factor that comes in later scales the gradient; another tensor gets none, rather than an unscaled one."""
    hidden, other = torch.arange(3.0, requires_grad=True), torch.tensor([1.0, 2.0, 4.0], requires_grad=True)
    factor, frozen = torch.tensor([1.0, 0.5, 2.0], requires_grad=True), torch.ones(3)

    def function(inner: torch.Tensor, nothing: None, factor: torch.Tensor, frozen: torch.Tensor) -> torch.Tensor:
        assert nothing is None
        return (inner * inner * factor * frozen * other).sum()

    loss = run_with_early_backward(function, hidden * 1, None, factor, frozen)
    assert loss.item() == 33.0 and hidden.grad is None
    (loss / 8).backward()
    expected = 2 * hidden * other * factor / 8, hidden * hidden * other / 8
    for found, gradient in zip((hidden.grad, factor.grad), expected, strict=True):
        torch.testing.assert_close(found, gradient.detach(), rtol=0, atol=0)
    assert other.grad is None and frozen.grad is None
