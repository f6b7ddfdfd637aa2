"""The pieces of tensor parallelism by themselves, in groups of 1, 2, 3 and 4: regions, layers, loss."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from forked_ranks import group_of, run_on_ranks
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_tiedlora.base.shapes import NormShape
from megatron_tiedlora.model.linears import NormedLinear, RowParallelLinear
from megatron_tiedlora.model.mlp import SwiGlu
from megatron_tiedlora.parallel import groups as collectives
from megatron_tiedlora.parallel.frozen_weight import FrozenWeight, VocabularyParallelEmbedding, frozen_parameter
from megatron_tiedlora.parallel.groups import ALONE, RankGroup, TensorParallel, TrafficCounter
from megatron_tiedlora.parallel.kernels import EAGER
from megatron_tiedlora.parallel.loss import VocabularyShard, sum_token_losses, token_losses
from megatron_tiedlora.parallel.shard_spec import ShardSpec

SIZES = (2, 3, 4)
RANKS = 4
# Some hundred fp64 products and sums in another order.
TOLERANCE = 1e-12
EPS = 1e-5
LENGTH, WIDTH, VOCABULARY = 12, 6, 322  # 12 divides by every size, 322 by 2 alone


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ------------------------------------------------------------------------------------------- what the ranks do

Region = Callable[[torch.Tensor, RankGroup], torch.Tensor]


def regions() -> dict[str, tuple[Region, bool, bool]]:
    """name -> (function, whether every rank has the same input, whether every rank has the same output).

    What every rank has alike is one vector, and counts once in a scalar product; else each rank's is its own.
    """
    found: dict[str, tuple[Region, bool, bool]] = {}
    for dim in (0, 1, 2, -1):
        found[f"gather_from {dim}"] = (
            lambda tensor, group, dim=dim: collectives.gather_from_tensor_parallel_region(tensor, group, dim),
            False,
            False,
        )
    for dim in (0, 1):
        found[f"gather_together {dim}"] = (
            lambda tensor, group, dim=dim: torch.cat(
                [part.flatten() for part in collectives.gather_together((tensor, 2 * tensor[0]), group, (dim, 1))]
            ),
            False,
            False,
        )
    for cut in (True, False):
        for name in ("enter", "leave"):
            function = getattr(collectives, f"{name}_tensor_parallel_region")
            found[f"{name} {cut}"] = (
                lambda tensor, group, function=function, cut=cut: function(tensor, TensorParallel(group, cut)),
                not cut and name == "enter",
                not cut and name == "leave",
            )
    return found


def try_regions(group: RankGroup) -> dict[str, Any]:
    found = {}
    for name, (function, same_input, same_output) in regions().items():
        # Not contiguous, as a transposed activation is.
        value = draw(LENGTH, 2, WIDTH, seed=0 if same_input else 1 + group.rank).transpose(0, 1)
        inputs = value.transpose(0, 1).clone().transpose(0, 1).requires_grad_()
        output = function(inputs, group)
        gradient = draw(*output.shape, seed=10 if same_output else 11 + group.rank)
        given = gradient.clone()
        output.backward(gradient)
        found[name] = {
            "input": value,
            "output": output.detach(),
            "given": given,
            "back": inputs.grad,
            "unchanged": torch.equal(inputs.detach(), value) and torch.equal(gradient, given),
            "contiguous": inputs.is_contiguous(),
        }
    return found


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


empty = partial(FrozenWeight.empty, dtype=torch.float64)
vector = partial(frozen_parameter, dtype=torch.float64)


def try_layers(group: RankGroup) -> dict[bool, Any]:
    """A norm, a column- and a row-parallel linear with biases; outputs and input gradients by sequence parallelism."""
    found = {}
    for cut in (True, False):
        tensor_parallel = TensorParallel(group, cut)
        local = 2 * LENGTH // group.size
        norm = NormShape("norm", WIDTH, EPS, "norm")
        column = NormedLinear(empty(local, WIDTH), norm=norm, bias=vector(local), dtype=torch.float64, kernels=EAGER)
        row = RowParallelLinear(empty(WIDTH, local // 2), bias=vector(WIDTH))
        blocks = ShardSpec(0, (LENGTH, LENGTH))
        values = dense_layers()
        for parameter, spec, value in (
            (column.weight, blocks, values[0]),
            (column.bias, blocks, values[1]),
            (column.norm, ShardSpec(None, ()), values[4]),
            (row.weight, ShardSpec(1, (LENGTH,)), values[2]),
            (row.bias, ShardSpec(None, ()), values[3]),
        ):
            assert not parameter.requires_grad
            parameter.data.copy_(spec.split(value, group.rank, group.size))
        hidden, gradient = draw(2, LENGTH, WIDTH, seed=20), draw(2, LENGTH, WIDTH, seed=21)
        if cut:
            hidden, gradient = (part_of(t, group.rank, group.size).clone() for t in (hidden, gradient))
        hidden.requires_grad_()
        output = SwiGlu(column, row, kernels=EAGER)(hidden, tensor_parallel)
        output.backward(gradient)
        found[cut] = output.detach(), hidden.grad
    return found


def part_of(hidden: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """A rank's part of the rows end to end; with one rank they stay as they are."""
    return hidden if size == 1 else hidden.flatten(0, 1).chunk(size)[rank][None]


def dense_layers() -> tuple[torch.Tensor, ...]:
    sizes = ((2 * LENGTH, WIDTH), (2 * LENGTH,), (WIDTH, LENGTH), (WIDTH,), (WIDTH,))
    return tuple(draw(*size, seed=30 + index) for index, size in enumerate(sizes))


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


def try_loss(group: RankGroup) -> dict[torch.dtype, Any]:
    found = {}
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        logits, labels = loss_inputs(dtype)
        share = -(-VOCABULARY // group.size)
        # With rows of the identity for weights products are exact: a rank's logits, and their gradient in its place.
        here = slice(group.rank * share, (group.rank + 1) * share)
        rows, frozen = logits.clone().requires_grad_(), FrozenWeight(torch.eye(VOCABULARY, dtype=dtype)[here])
        shard = VocabularyShard(frozen, here.start, group, rows_at_once=3)
        loss = sum_token_losses(rows, labels, shard)
        (loss * 0.37).backward()
        assert rows.grad is not None
        found[dtype] = loss.detach(), rows.grad[:, here].clone()
        rows.grad[:, here] = 0
        assert not rows.grad.any()
        each = token_losses(rows.detach(), labels, shard)
        expected = functional.cross_entropy(logits.double(), labels, reduction="none")
        assert close(each.double(), expected, 4 * torch.finfo(each.dtype).eps)
    return found


def embedding_inputs() -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    tokens[0] = torch.tensor([0, 321, 160, 161, 80, 81, 107, 108, 214, 215, 242, 243])  # edges of every cut
    return tokens, draw(VOCABULARY, WIDTH, seed=50)


def try_embedding(group: RankGroup) -> dict[bool, torch.Tensor]:
    tokens, table = embedding_inputs()
    found = {}
    for cut in (True, False):
        layer = VocabularyParallelEmbedding(empty(-(-VOCABULARY // group.size), WIDTH))
        layer.weight.data.copy_(ShardSpec(0, (VOCABULARY,), padded=True).split(table, group.rank, group.size))
        found[cut] = layer(tokens, TensorParallel(group, cut))
    return found


def try_all() -> dict[int, dict[str, Any]]:
    """Every piece in every group that this rank is in, and alone, by the group's size."""
    made = {2: [group_of([0, 1]), group_of([2, 3])], 3: [group_of([0, 1, 2])], 4: [group_of([0, 1, 2, 3])]}
    mine = {size: group for size, groups in made.items() for group in groups if group.handle is not None}
    mine = {size: group for size, group in mine.items() if group.rank >= 0}
    found: dict[int, dict[str, Any]] = {}
    for size, group in {1: ALONE, **mine}.items():
        with TrafficCounter({}) as counter:
            found[size] = {
                "rank": group.rank,
                "regions": try_regions(group),
                "layers": try_layers(group),
                "copies": count_copies(group),
                "loss": try_loss(group),
                "embedding": try_embedding(group),
            }
        found[size]["messages"] = sum(counter.traffic.messages.values())
    return found


# ------------------------------------------------------------------------------------------- what must come of it


@pytest.fixture(scope="module")
def of_groups(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """What the ranks of one group of each size did, in their order."""
    by_rank = run_on_ranks(try_all, ranks=RANKS, folder=tmp_path_factory.mktemp("units"))
    last_pair = [found[2] for found in by_rank[2:]]  # not made of the first ranks: a group's rank is not the world's
    return {1: [by_rank[3][1]], 2: last_pair, **{size: [found[size] for found in by_rank[:size]] for size in (3, 4)}}


def of_region(of_groups: dict[int, list[dict[str, Any]]], size: int, name: str, what: str) -> list[torch.Tensor]:
    return [found["regions"][name][what] for found in of_groups[size]]


def close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = TOLERANCE) -> bool:
    return found.shape == expected.shape and bool((found - expected).abs().max() <= tolerance * expected.abs().max())


@pytest.mark.distributed
@pytest.mark.parametrize("size", [1, *SIZES])
@pytest.mark.parametrize("name", regions())
def test_backward_is_the_adjoint(of_groups: dict[int, Any], name: str, size: int) -> None:
    """<f(x), y> = <x, f*(y)>, over the ranks."""
    _, same_input, same_output = regions()[name]
    inputs, outputs, given, back = (of_region(of_groups, size, name, w) for w in ("input", "output", "given", "back"))
    for same, tensors in ((same_input, inputs), (same_input, back), (same_output, outputs)):
        assert not same or all(torch.equal(tensor, tensors[0]) for tensor in tensors)
    left = sum(float((f * y).sum()) for f, y in list(zip(outputs, given, strict=True))[: 1 if same_output else size])
    right = sum(float((x * b).sum()) for x, b in list(zip(inputs, back, strict=True))[: 1 if same_input else size])
    assert left == pytest.approx(right, rel=1e-12) and abs(left) > 1e-3
    assert all(found["regions"][name]["unchanged"] for found in of_groups[size])
    assert not any(found["regions"][name]["contiguous"] for found in of_groups[size])


@pytest.mark.distributed
@pytest.mark.parametrize("size", [1, *SIZES])
def test_regions_do_what_their_names_say(of_groups: dict[int, Any], size: int) -> None:
    def check(name: str, expected: Callable[[list[torch.Tensor]], list[torch.Tensor]]) -> None:
        outputs, inputs = (of_region(of_groups, size, name, what) for what in ("output", "input"))
        assert all(map(close, outputs, expected(inputs))), name

    def scattered(parts: list[torch.Tensor]) -> list[torch.Tensor]:
        return [part_of(sum(parts), rank, size) for rank in range(size)]  # type: ignore[arg-type]

    def together(parts: list[torch.Tensor], dim: int) -> torch.Tensor:
        whole = torch.cat(parts, dim), torch.cat([2 * part[0] for part in parts], 1)
        return torch.cat([tensor.flatten() for tensor in whole])

    check("enter False", lambda parts: parts)
    check("leave False", lambda parts: [sum(parts)] * size)
    for dim in (0, 1, 2, -1):
        check(f"gather_from {dim}", lambda parts, dim=dim: [torch.cat(parts, dim=dim)] * size)
    for dim in (0, 1):
        check(f"gather_together {dim}", lambda parts, dim=dim: [together(parts, dim)] * size)
    check("enter True", lambda parts: [torch.cat(parts, dim=1)] * size)
    check("leave True", scattered)


@pytest.mark.distributed
def test_a_group_of_one_sends_nothing(of_groups: dict[int, Any]) -> None:
    assert of_groups[1][0]["messages"] == 0
    assert all(found["messages"] > 0 for size in SIZES for found in of_groups[size])
    tensor = draw(2, 3, 4, seed=1)
    for name, (function, _, _) in regions().items():
        assert function(tensor, ALONE) is tensor or name.startswith("gather_together"), name


@pytest.mark.distributed
@pytest.mark.parametrize("size", SIZES)
def test_parts_of_sequences_travel_without_a_copy(of_groups: dict[int, Any], size: int) -> None:
    assert [found["copies"] for found in of_groups[size]] == [0] * size


@pytest.mark.distributed
@pytest.mark.parametrize("cut", [True, False])
@pytest.mark.parametrize("size", [1, *SIZES])
def test_linear_layers_equal_dense_ones(of_groups: dict[int, Any], size: int, cut: bool) -> None:
    weight, bias, out_weight, out_bias, norm = dense_layers()
    hidden = draw(2, LENGTH, WIDTH, seed=20).requires_grad_()
    normed = functional.rms_norm(hidden, (WIDTH,), norm, EPS)
    gate, up = functional.linear(normed, weight, bias).chunk(2, dim=-1)
    output = functional.linear(functional.silu(gate) * up, out_weight, out_bias)
    output.backward(draw(2, LENGTH, WIDTH, seed=21))
    assert hidden.grad is not None
    for found in of_groups[size]:
        for tensor, expected in zip(found["layers"][cut], (output.detach(), hidden.grad), strict=True):
            assert close(tensor, part_of(expected, found["rank"], size) if cut else expected)


@pytest.mark.distributed
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1, *SIZES])
def test_cross_entropy_equals_torch(of_groups: dict[int, Any], size: int, dtype: torch.dtype) -> None:
    """In fp64 of the same, already rounded logits."""
    logits, labels = loss_inputs(dtype)
    logits = logits.double().requires_grad_()
    expected = functional.cross_entropy(logits, labels, reduction="sum")
    (expected * 0.37).backward()
    assert logits.grad is not None
    found = [found["loss"][dtype] for found in of_groups[size]]
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


@pytest.mark.distributed
@pytest.mark.parametrize("cut", [True, False])
@pytest.mark.parametrize("size", [1, *SIZES])
def test_embedding_picks_the_rows_of_the_whole_table(of_groups: dict[int, Any], size: int, cut: bool) -> None:
    tokens, table = embedding_inputs()
    expected = functional.embedding(tokens, table)
    for found in of_groups[size]:
        wanted = part_of(expected, found["rank"], size) if cut else expected
        assert torch.equal(found["embedding"][cut], wanted)  # others add zeros, so to the last bit


# ------------------------------------------------------------------------------------------- the grid
