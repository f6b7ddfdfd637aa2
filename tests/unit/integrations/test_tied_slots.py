"""Slots of tied adapters in a server, and their update on a CPU, against the dense update in fp64, without vLLM."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.integrations.vllm.cpu import CpuTokens, add_update_cpu
from megatron_tiedlora.integrations.vllm.factors import TargetFactors
from megatron_tiedlora.integrations.vllm.slots import LinearSlots

HEADS, KV_HEADS, DIM, HIDDEN, LAYERS = 8, 2, 4, 24, 3
QKV = (HEADS * DIM, KV_HEADS * DIM, KV_HEADS * DIM)
MLP = (20, 20)
CONFIG = SimpleNamespace(max_loras=4, max_lora_rank=6, lora_dtype=torch.float32)


@dataclass
class Layer:
    """What vLLM's linears with LoRA are to the slots: sizes, and how they cut A and B for a rank."""

    input_size: int
    output_slices: tuple[int, ...]
    firsts: tuple[int, ...]  # the first row of each slice within its fused block, on this rank
    columns: slice = field(default_factory=lambda: slice(None))
    fused: tuple[int, ...] = ()  # the sizes of the blocks that one slice contains
    device = torch.device("cpu")
    slots: TargetFactors | None = None

    def slice_lora_a(self, a: Tensor) -> Tensor:
        return a[:, self.columns]

    def slice_lora_b(self, b: Any) -> Any:
        if isinstance(b, list):
            sizes = self.output_slices
            return [part[first : first + size] for part, first, size in zip(b, self.firsts, sizes, strict=True)]
        if not self.fused:  # a row-parallel linear has all rows
            return b
        parts = b.split(self.fused)
        sizes = [size // (self.fused[0] // self.size_of_first) for size in self.fused]
        return torch.cat(
            [part[first : first + size] for part, first, size in zip(parts, self.firsts, sizes, strict=True)]
        )

    size_of_first: int = 0


def merged_qkv(tp_rank: int, tp_size: int) -> Layer:
    """q, k and v of a rank. With more ranks than key heads, several ranks have the same key and value heads."""
    kv_ranks = min(tp_size, KV_HEADS)
    kv_rank = tp_rank * kv_ranks // tp_size
    slices = QKV[0] // tp_size, QKV[1] // kv_ranks, QKV[2] // kv_ranks
    return Layer(HIDDEN, slices, (tp_rank * slices[0], kv_rank * slices[1], kv_rank * slices[2]))


def merged_mlp(tp_rank: int, tp_size: int) -> Layer:
    size = MLP[0] // tp_size
    return Layer(HIDDEN, (size, size), (tp_rank * size, tp_rank * size))


def one_slice_mlp(tp_rank: int, tp_size: int) -> Layer:
    """Gate and up that are stored as one tensor, as in Phi-3: one slice, cut in both halves."""
    size = MLP[0] // tp_size
    layer = Layer(HIDDEN, (2 * size,), (tp_rank * size, tp_rank * size), fused=MLP)
    layer.size_of_first = size
    return layer


def row_parallel(tp_rank: int, tp_size: int) -> Layer:
    size = QKV[0] // tp_size
    return Layer(size, (HIDDEN,), (0,), slice(tp_rank * size, (tp_rank + 1) * size))


CASES = {
    "qkv": (merged_qkv, QKV, HIDDEN),
    "gate_up": (merged_mlp, MLP, HIDDEN),
    "gate_up in one slice": (one_slice_mlp, MLP, HIDDEN),
    "o_proj": (row_parallel, (HIDDEN,), QKV[0]),
}


def random_factors(blocks: tuple[int, ...], in_size: int, *, rank: int, num_u: int = 1, seed: int = 0) -> TargetFactors:
    draw = torch.Generator().manual_seed(seed)
    out = sum(blocks)
    shapes = (rank, in_size), (out, rank), (LAYERS, num_u, rank), (LAYERS, out)
    return TargetFactors(*(torch.randn(shape, generator=draw) for shape in shapes))


def linear_slots(case: str, tp_rank: int = 0, tp_size: int = 1, *, index: range = range(LAYERS)) -> LinearSlots:
    make, blocks, _ = CASES[case]
    layers = {layer: make(tp_rank, tp_size) for layer in index}
    return LinearSlots(case, layers, None, case, blocks, range(len(blocks)), CONFIG)


def dense(factors: TargetFactors, layer: int, blocks: tuple[int, ...]) -> Tensor:
    """The update diag(v) B diag(u) A of a layer, (out, in) in fp64."""
    a, b, u, v = (factor.double() for factor in factors)
    rows = b.split(blocks)
    scaled = [part * u[layer, block if u.shape[1] > 1 else 0] for block, part in enumerate(rows)]
    return v[layer][:, None] * (torch.cat(scaled) @ a)


def updated(linear: LinearSlots, layer: int, x: Tensor, token_slots: list[int]) -> Tensor:
    """The update of one layer's output, from zeros, by the operation that the server calls."""
    tokens = CpuTokens(SimpleNamespace(token_lora_indices=torch.tensor(token_slots)), 64, 4)
    tokens.prepare()
    y = torch.zeros(len(x), sum(linear.slices))
    slots = linear.layers[layer].slots
    add_update_cpu(y, x, *slots, tokens.order, tokens.counts, list(linear.slices))
    return y


@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("num_u", [1, "blocks"])
@pytest.mark.parametrize("case", CASES)
def test_the_parts_of_all_ranks_are_the_whole_update(case: str, num_u: Any, tp_size: int) -> None:
    _, blocks, in_size = CASES[case]
    num_u = 1 if num_u == 1 or case == "gate_up in one slice" else len(blocks)
    factors = random_factors(blocks, in_size, rank=5, num_u=num_u)
    x = torch.randn(7, in_size, generator=torch.Generator().manual_seed(1))
    for layer in range(LAYERS):
        whole = x.double() @ dense(factors, layer, blocks).T
        by_row = torch.zeros_like(whole)
        for tp_rank in range(tp_size):
            linear = linear_slots(case, tp_rank, tp_size)
            linear.set(2, linear.cut(factors))
            own = linear.layers[layer]
            if case == "o_proj":  # the layer's all-reduce adds the parts
                by_row += updated(linear, layer, x[:, own.columns], [2] * 7)
                continue
            starts = [sum(blocks[:block]) for block in range(len(blocks))]
            sizes = own.output_slices if len(own.output_slices) > 1 else [own.output_slices[0] // 2] * 2
            rows = [
                torch.arange(start + first, start + first + size)
                for start, first, size in zip(starts, own.firsts, sizes, strict=True)
            ]
            torch.testing.assert_close(
                updated(linear, layer, x, [2] * 7).double(), whole[:, torch.cat(rows)], rtol=1e-5, atol=1e-4
            )
        if case == "o_proj":
            torch.testing.assert_close(by_row, whole, rtol=1e-5, atol=1e-4)


MIXES = {
    "runs": [0] * 5 + [-1] * 3 + [2] * 6 + [3] * 4,
    "runs in turns": [0, 2, -1, 0, 2, 0, 2, 0, 2, 0, 2, -1, 0, 2],
    "single tokens": [3, -1, 0, 2, 1, 3],
    "the base": [-1] * 4,
    "one": [1],
}


@pytest.mark.parametrize("mix", MIXES)
def test_each_token_gets_the_update_of_its_slot_and_the_base_none(mix: str) -> None:
    token_slots = MIXES[mix]
    linear = linear_slots("qkv")
    of_slot = [random_factors(QKV, HIDDEN, rank=3 + slot, num_u=1 + 2 * (slot % 2), seed=slot) for slot in range(4)]
    for slot, factors in enumerate(of_slot):
        linear.set(slot, linear.cut(factors))
    x = torch.randn(len(token_slots), HIDDEN, generator=torch.Generator().manual_seed(1))
    y = updated(linear, 1, x, token_slots)
    for token, slot in enumerate(token_slots):
        if slot < 0:
            assert not y[token].any()
        else:
            expected = dense(of_slot[slot], 1, QKV) @ x[token].double()
            torch.testing.assert_close(y[token].double(), expected, rtol=1e-5, atol=1e-4)


def test_a_slot_keeps_nothing_of_an_earlier_adapter() -> None:
    linear = linear_slots("qkv")
    linear.set(1, linear.cut(random_factors(QKV, HIDDEN, rank=6, num_u=3)))
    fresh = linear_slots("qkv")
    low = random_factors(QKV, HIDDEN, rank=2, seed=7)
    for each in (linear, fresh):
        each.set(1, each.cut(low))
    assert all(torch.equal(*pair) for pair in zip(linear.slots, fresh.slots, strict=True))
    linear.set(1, None)
    assert not any(part.any() for part in linear.slots)


def test_a_stage_holds_its_own_layers_only() -> None:
    factors = random_factors(QKV, HIDDEN, rank=6)
    linear = linear_slots("qkv", index=range(1, 3))
    linear.set(0, linear.cut(factors))
    x = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(1))
    assert len(linear.slots.u) == 2
    expected = x.double() @ dense(factors, 2, QKV).T
    torch.testing.assert_close(updated(linear, 2, x, [0] * 3).double(), expected, rtol=1e-5, atol=1e-4)


def test_a_part_of_a_linear_has_its_rows_and_its_u() -> None:
    """A server may keep q, k and v apart."""
    factors = random_factors(QKV, HIDDEN, rank=6, num_u=3)
    layers = {layer: Layer(HIDDEN, (QKV[1],), (0,)) for layer in range(LAYERS)}
    linear = LinearSlots("k_proj", layers, None, "qkv", QKV, [1], CONFIG)
    linear.set(0, linear.cut(factors))
    x = torch.randn(3, HIDDEN, generator=torch.Generator().manual_seed(1))
    expected = x.double() @ dense(factors, 0, QKV)[QKV[0] : QKV[0] + QKV[1]].T
    torch.testing.assert_close(updated(linear, 0, x, [0] * 3).double(), expected, rtol=1e-5, atol=1e-4)


def test_a_slot_takes_the_bytes_of_its_factors() -> None:
    rank, out = 6, sum(QKV)
    expected = 4 * (rank * HIDDEN + out * rank + LAYERS * out) + 4 * LAYERS * len(QKV) * rank
    assert linear_slots("qkv").bytes_per_slot == expected


def test_sizes_that_do_not_fit_are_named() -> None:
    linear = linear_slots("qkv")
    with pytest.raises(UserError, match=r"qkv: B has 40 rows, but the served model has 48"):
        linear.cut(random_factors(MLP, HIDDEN, rank=6))
    with pytest.raises(UserError, match=r"qkv: A has 20 columns, but the served model has 24"):
        linear.cut(random_factors(QKV, 20, rank=6))
    layers = {0: merged_qkv(0, 1), 1: merged_qkv(0, 2)}
    with pytest.raises(UserError, match="qkv_proj has different sizes in different layers"):
        LinearSlots("qkv_proj", layers, None, "qkv", QKV, range(3), CONFIG)
