"""Which slots of a tensor layers use, what they get of it, and its gradient, whatever layers share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from shared_tensors import DECLARED, GROUPS, tl6_shares

from megatron_tiedlora.adapters.low_rank import layer_slots
from megatron_tiedlora.adapters.tied_adapter import (
    AdapterConfig,
    AdapterPart,
    Target,
    TiedAdapter,
    initial_values,
    lora_factors,
    make_adapter_config,
)
from megatron_tiedlora.adapters.tying import GradientGuard
from megatron_tiedlora.base.methods import METHODS

TARGETS = (Target("qkv", 8, (8, 4, 4), "column"), Target("down_proj", 12, (8,), "row"))
LAYERS = (2, 3, 5, 7, 8)
STAGES = ((2, 3, 5), (7,), (8,))  # what stages of three hold


@pytest.mark.parametrize(
    ("shared_by", "slots"),
    [
        ("all", [0, 0, 0, 0, 0]),
        ("one", [0, 1, 2, 3, 4]),
        (2, [0, 0, 1, 1, 2]),
        (3, [0, 0, 0, 1, 1]),
        (9, [0, 0, 0, 0, 0]),
        (((7, 3), (8, 2)), [0, 1, 2, 1, 0]),  # in the order of their first layers, 5 alone
        (((1, 2), (4, 5, 6)), [0, 1, 2, 3, 4]),  # of which not all are adapted
        (((2, 3, 5, 7, 8),), [0, 0, 0, 0, 0]),
    ],
    ids=str,
)
def test_slots_of_layers(shared_by: Any, slots: list[int]) -> None:
    assert layer_slots(shared_by, LAYERS) == dict(zip(LAYERS, slots, strict=True))


def config_of(layers: tuple[int, ...] = LAYERS, method: str = "tl6") -> AdapterConfig:
    return make_adapter_config(method, rank=3, alpha=6.0, layers=layers, targets=TARGETS, seed=7)


@pytest.fixture(params=DECLARED)
def shared(request: pytest.FixtureRequest) -> Iterator[str]:
    with tl6_shares(request.param):
        yield request.param


def test_shapes_counts_and_slots_are_those_of_the_groups(shared: str) -> None:
    """As the groups of the first five layers say that are written by hand."""
    config = config_of((1, 2, 3, 4, 5))
    sizes = {"A": (3, 8), "B": (16, 3), "u": (3,), "v": (16,)}
    for letter, size in sizes.items():
        groups = GROUPS[shared].get(letter, tuple((layer,) for layer in config.layers))
        assert config.shape(letter) == ((len(groups), *size) if len(groups) > 1 else size)
        assert config.num_trained()[letter] == len(groups) * torch.Size(size).numel()
        for slot, layers in enumerate(groups):
            assert [config.slot(letter, layer) for layer in layers] == [slot] * len(layers)
        assert config.groups(letter) == [list(layers) for layers in groups]


def test_every_stage_holds_a_tied_tensor_whole(shared: str) -> None:
    """Others are divided over stages, and a stage without layers has none of them."""
    config = config_of()
    full = {name: torch.randn(config.shape(name)) for name in config.tensors}
    for layers in (*STAGES, ()):
        part = AdapterPart(config, layers)
        for name, tensor in full.items():
            if config.is_tied(name):
                assert torch.equal(part.shard(name, tensor), tensor) and part.exists(name)
            else:
                assert torch.equal(part.shard(name, tensor), tensor[[LAYERS.index(layer) for layer in layers]])
                assert part.exists(name) == bool(layers)
            assert part.shard(name, tensor).shape == part.local_shape(name)


def test_a_slot_starts_as_its_first_layer_does_alone(shared: str) -> None:
    config = config_of()
    values, alone = initial_values(config), initial_values(config_of(method="lora"))
    for name, (_, letter) in config.tensors.items():
        if letter == "A":  # of which tl6 and lora draw the same
            firsts = [LAYERS.index(layers[0]) for layers in config.groups(name)]
            assert torch.equal(values[name], alone[name][firsts])


def test_one_group_of_all_layers_is_a_tensor_of_all() -> None:
    tied = initial_values(config_of((3, 5)))
    with tl6_shares("pairs"):
        one_pair = initial_values(config_of((3, 5)))
    assert all(torch.equal(one_pair[name], tensor) for name, tensor in tied.items())


def test_updates_and_gradients_are_those_of_each_layers_own(shared: str) -> None:
    """F A and the gradients of all stages together, against autograd through each layer's LoRA."""
    config = config_of()
    state = {name: torch.randn(config.shape(name), dtype=torch.float64) for name in config.tensors}
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in state.items()}
    found = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    loss = torch.zeros((), dtype=torch.float64)
    for layers in STAGES:
        part = AdapterPart(config, layers)
        adapter = TiedAdapter(part, dtype=torch.float64)
        adapter.load_full(state)
        stand_ins, gradients = [], []
        for layer, update in zip(layers, adapter(dtype=torch.float64), strict=True):
            for target in TARGETS:
                a, f, grad_a, grad_f, _ = update[target.name]
                plain_a, plain_b = lora_factors(config, leaves, target, layer)
                torch.testing.assert_close(f @ a, plain_b @ plain_a)
                weight = torch.randn(target.out_size, target.in_size, dtype=torch.float64)
                loss = loss + (weight * (plain_b @ plain_a)).sum()
                stand_ins += [grad_a, grad_f]
                gradients += [f.t() @ weight, weight @ a.t()]
        torch.autograd.backward(stand_ins, gradients)
        for name, parameter in adapter.named_parameters():
            part.shard(name, found[name]).add_(parameter.grad)  # a view, as there is one tensor-parallel rank
    expected = torch.autograd.grad(loss, list(leaves.values()))
    for name, gradient in zip(leaves, expected, strict=True):
        torch.testing.assert_close(found[name], gradient, msg=name)


def test_layers_with_the_same_slots_have_their_factors_in_common(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the memory of one; layers that share no tensor do not, and nothing is copied where all share a tensor."""

    def memories(method: str, **shared_by: Any) -> tuple[list[int], list[int]]:
        row = METHODS[method]
        own = {letter: replace(row.factor(letter), shared_by=of) for letter, of in shared_by.items()}
        monkeypatch.setitem(METHODS, method, replace(row, **own))
        updates = TiedAdapter(AdapterPart.whole(config_of(method=method)))(dtype=torch.bfloat16)
        monkeypatch.setitem(METHODS, method, row)
        found = []
        for letter in ("a", "f"):
            places = [getattr(update["qkv"], letter).data_ptr() for update in updates]
            found.append([places.index(place) for place in places])
        return found[0], found[1]

    each, pairs, same = [0, 1, 2, 3, 4], [0, 0, 2, 2, 4], [0] * 5
    assert memories("lora") == (each, each)
    assert memories("tl6") == (same, each)
    assert memories("tl5") == (same, same)
    assert memories("tl5", A=2, B=2) == (pairs, pairs)
    assert memories("tl6", A=2, B=2, u=2, v="all") == (pairs, pairs)
    assert memories("tl6", A=2, B="all", u="all", v=3) == (pairs, [0, 0, 0, 3, 3])


def test_the_check_of_gradients_names_the_layers_of_a_slot(shared: str) -> None:
    config = config_of((1, 2, 3, 4, 5))
    adapter = TiedAdapter(AdapterPart(config, (3, 4)))
    adapter.load_full({name: torch.ones(config.shape(name)) for name in config.tensors})
    guard = GradientGuard(adapter)
    for name, parameter in adapter.named_parameters():
        if name.startswith("down_proj"):
            (parameter * 2.0).sum().backward()
    found = dict(zip(guard.labels(), guard.largest(), strict=True))
    if shared == "pairs":
        assert list(found)[:8] == [
            *("A of layers 1, 2", "A of layers 3, 4", "A of layer 5"),
            *("B of layers 1, 2", "B of layers 3, 4", "B of layer 5", "u of layer 1", "u of layer 2"),
        ]
        assert found["down_proj.u of layer 3"] == 2.0 and found["down_proj.u of layer 5"] == 0.0
    else:
        assert list(found)[:7] == [
            *("A of layers 1, 4", "A of layers 2, 5", "A of layer 3", "B of layers 1, 2, 3", "B of layers 4, 5"),
            *("u", "v of layers 1, 2"),
        ]
        assert found["down_proj.u"] == 2.0
    assert found["down_proj.A of layer 5" if shared == "pairs" else "down_proj.A of layer 3"] == 2.0
    assert all(value == 0.0 for label, value in found.items() if not label.startswith("down_proj"))
