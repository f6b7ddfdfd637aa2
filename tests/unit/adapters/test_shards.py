"""Who holds what: cuts with padding, every factor at every place of a grid, start values, and the slots of
tensors that layers share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from support.shared_tensors import DECLARED, GROUPS, tl6_shares

from megatron_tiedlora.adapters.low_rank import layer_slots
from megatron_tiedlora.adapters.tied_adapter import (
    AdapterConfig,
    AdapterShard,
    Target,
    TiedAdapter,
    initial_values,
    make_adapter_config,
)
from megatron_tiedlora.adapters.tying import AdapterLayout, GradientGuard
from megatron_tiedlora.base.methods import METHODS
from megatron_tiedlora.parallel.groups import Grid
from megatron_tiedlora.parallel.shard_spec import ShardSpec

# ------------------------------------------------------------------------------------------- declarations


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_padding_fills_the_last_parts_and_is_gone_after_joining(dim: int) -> None:
    for size in range(1, 14):
        full = torch.arange(1.0, 1 + 6 * size).view(size, 2, 3).movedim(0, dim).contiguous()
        before, spec = full.clone(), ShardSpec(dim, (size,), padded=True)
        for tp_size in range(1, 6):
            share = -(-size // tp_size)
            parts = [spec.split(full, rank, tp_size) for rank in range(tp_size)]
            assert {part.shape for part in parts} == {torch.Size(spec.local_shape(full.shape, tp_size))}
            assert parts[0].shape[dim] == share
            glued = torch.cat(parts, dim=dim)
            assert torch.equal(glued.narrow(dim, 0, size), full)  # in order, without gaps
            assert not glued.narrow(dim, size, share * tp_size - size).any()
            assert torch.equal(spec.join(parts), full)
            held = [spec.block_slices(rank, tp_size)[0] for rank in range(tp_size)]
            assert [index for part in held for index in range(part.start, part.stop)] == list(range(size))
            assert torch.equal(full, before)


@pytest.mark.parametrize("tp_size", [2, 3])
def test_blocks_of_stacked_tensors(tp_size: int) -> None:
    """A cut dimension that is not the first, as in one B for each layer: (n, o, r)."""
    blocks, full = (12, 6, 6), torch.randn(5, 24, 2)
    spec = ShardSpec(1, blocks)
    parts = [spec.split(full, rank, tp_size) for rank in range(tp_size)]
    assert torch.equal(spec.join(parts), full)
    for rank, part in enumerate(parts):
        q, k, v = full.split(blocks, dim=1)
        wanted = torch.cat([block.chunk(tp_size, dim=1)[rank] for block in (q, k, v)], dim=1)
        assert torch.equal(part, wanted) and part.shape == spec.local_shape(full.shape, tp_size)


@pytest.mark.parametrize(
    "ask",
    [
        lambda spec, full: spec.split(full, 0, 4),
        lambda spec, full: spec.local_shape(full.shape, 4),
        lambda spec, full: spec.block_slices(1, 4),
        lambda spec, full: spec.join([full[:5]] * 4),
    ],
)
def test_what_does_not_divide_is_refused_unless_it_is_padded(ask: Callable[[ShardSpec, torch.Tensor], Any]) -> None:
    full = torch.zeros(18, 2)
    with pytest.raises(ValueError, match="18 is not divisible by the tensor-parallel size 4"):
        ask(ShardSpec(0, (18,)), full)
    ask(ShardSpec(0, (18,), padded=True), full)


# ------------------------------------------------------------------------------------------- the adapter

HEADS, KV_HEADS, HEAD_DIM, WIDTH, RANK = 8, 4, 6, 24, 3
# (tp, stages as runs of the flat list's blocks): uneven, and with stages that adapt nothing where layers are few
LAYOUTS: dict[str, tuple[int, tuple[range, ...]]] = {
    "1x1": (1, (range(1, 6),)),
    "2x1": (2, (range(1, 6),)),
    "1x2": (1, (range(1, 4), range(4, 6))),
    "2x2": (2, (range(1, 4), range(4, 6))),
    "4x3": (4, (range(1, 2), range(2, 5), range(5, 6))),
}


QKV = Target("qkv", WIDTH, (HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM), "column")
TARGETS = (QKV, Target("gate_up", WIDTH, (40, 40), "column"), Target("down_proj", 40, (WIDTH,), "row"))


def adapter_config(
    method: str, layers: tuple[int, ...] = (1, 2, 3, 4, 5), *, seed: int = 7, targets: tuple[Target, ...] = TARGETS
) -> AdapterConfig:
    return make_adapter_config(method, rank=RANK, layers=layers, targets=targets, seed=seed)


def rejoin(config: AdapterConfig, grid: Grid, local: dict[int, torch.Tensor], factor: str) -> torch.Tensor:
    """The full factor from the parts of ranks; copies must be equal."""
    by_stage = []
    for pp_rank in range(grid.pp_size):
        ranks = [grid.rank_of(pp_rank=pp_rank, tp_rank=tp_rank) for tp_rank in range(grid.tp_size)]
        if ranks[0] in local:
            by_stage.append(config.spec(factor).join([local[rank] for rank in ranks]))
            if config.spec(factor).dim is None:
                assert all(torch.equal(local[rank], local[ranks[0]]) for rank in ranks)
    if not config.is_tied(factor):
        return torch.cat(by_stage)
    assert len(by_stage) == grid.pp_size and all(torch.equal(other, by_stage[0]) for other in by_stage)
    return by_stage[0]


@pytest.mark.parametrize("layers", [(1, 2, 3, 4, 5), (2, 3), (4,)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("method", METHODS)
def test_cuts_of_every_factor_rejoin(method: str, layout: str, layers: tuple[int, ...]) -> None:
    config, (tp_size, stages) = adapter_config(method, layers), LAYOUTS[layout]
    grid = Grid(0, 2 * tp_size * len(stages), tp_size=tp_size, pp_size=len(stages))  # two data-parallel ranks
    parts = AdapterLayout(config, grid, stages).parts()
    assert set(parts) == {rank for rank in range(grid.world_size) if grid.at(rank).dp_rank == 0}
    values = {name: torch.randn(config.shape(name)) for name in config.tensors}
    held = {rank: TiedAdapter(part) for rank, part in parts.items()}
    for adapter in held.values():
        adapter.load_full(values)
    for factor, full in values.items():
        local = {rank: part.shard(factor, full) for rank, part in parts.items()}
        for rank, part in parts.items():
            assert local[rank].shape == part.local_shape(factor), (factor, rank)
            # exists where a tensor is needed, in the shape of the cut and with its values
            tensor = dict(held[rank].named_parameters()).get(factor)
            assert (tensor is not None) == part.exists(factor)
            assert tensor is None or torch.equal(tensor, local[rank])
        assert torch.equal(rejoin(config, grid, local, factor), full), factor


@pytest.mark.parametrize("method", ["lora", "tl6"])
def test_b_and_v_are_cut_by_heads(method: str) -> None:
    """Rank t of TP holds query heads 8 t / TP on, and the key-value heads that these use."""
    tp_size, config = 4, adapter_config(method)
    b, v = torch.randn(config.shape("B")), torch.randn(config.shape("v"))
    rows_dim = b.ndim - 2
    for tp_rank in range(tp_size):
        part = AdapterShard(config, config.layers, tp_rank, tp_size)
        queries = range(tp_rank * HEADS // tp_size, (tp_rank + 1) * HEADS // tp_size)
        keys = sorted({head // (HEADS // KV_HEADS) for head in queries})
        heads = [*queries, *(HEADS + key for key in keys), *(HEADS + KV_HEADS + key for key in keys)]
        rows = torch.tensor([head * HEAD_DIM + row for head in heads for row in range(HEAD_DIM)])
        assert torch.equal(part.shard("B", b), b.index_select(rows_dim, rows))
        assert torch.equal(part.shard("v", v), v.index_select(-1, rows))


def test_only_a_trained_a_is_cut_and_u_never() -> None:
    """A frozen A that was cut would have to be gathered; u is as long as the rank, which TP need not divide."""
    for method in METHODS:
        config = adapter_config(method)
        part, row = AdapterShard(config, config.layers, 1, 4), config.method_spec
        assert part.local_shape("A")[-1] == (WIDTH // 4 if row.A.trained else WIDTH)
        assert part.local_shape("A")[-2:-1] == (RANK,) and part.local_shape("u")[-1] == RANK


@pytest.mark.parametrize("method", METHODS)
def test_factors_of_a_row_parallel_target_are_cut_as_its_weight(method: str) -> None:
    """A by W's columns, whatever is trained; B and v, which a rank needs whole, in parts only where trained."""
    config = adapter_config(method)
    part = AdapterShard(config, config.layers, 1, 4)
    assert part.local_shape("down_proj.A")[-2:] == (RANK, 40 // 4) and config.gathered_dim("down_proj.A") is None
    assert part.local_shape("down_proj.u")[-1] == RANK
    for name, dim in {"down_proj.B": -2, "down_proj.v": -1}.items():
        size = part.local_shape(name)[dim]
        assert size == (WIDTH // 4 if config.factor(name).trained else WIDTH)
        assert (config.gathered_dim(name) is not None) == config.factor(name).trained
    gathered = {name for name in config.tensors if config.gathered_dim(name) is not None}
    assert gathered & {"A", "B", "u", "v"} == ({"A"} if config.method_spec.A.trained else set())


def test_tensors_of_qkv_are_the_same_whatever_else_is_adapted() -> None:
    state, alone = (initial_values(adapter_config("tl6", targets=targets)) for targets in (TARGETS, (QKV,)))
    assert list(alone) == ["A", "B", "u", "v"] and all(torch.equal(state[name], alone[name]) for name in alone)


def test_initial_values_of_a_are_as_wide_as_its_inputs_need() -> None:
    values = initial_values(adapter_config("lora", targets=(QKV, Target("down_proj", 100 * WIDTH, (WIDTH,), "row"))))
    assert values["down_proj.A"].std().item() == pytest.approx(0.1 * WIDTH**-0.5, rel=0.1)


def test_initial_values_follow_the_seed_the_name_and_the_layer() -> None:
    torch.rand(3)  # what was drawn before has no say
    tied = initial_values(adapter_config("tl6"))
    torch.manual_seed(99)
    assert all(torch.equal(tied[name], value) for name, value in initial_values(adapter_config("tl6")).items())
    assert not torch.equal(tied["A"], initial_values(adapter_config("tl6", seed=8))["A"])
    assert not torch.equal(tied["A"].flatten()[:50], tied["B"].flatten()[:50])
    assert not torch.equal(tied["A"], tied["gate_up.A"])  # of one size, drawn for another target
    every, few = initial_values(adapter_config("lora"))["A"], initial_values(adapter_config("lora", (2, 4)))["A"]
    assert torch.equal(few, every[[1, 3]])  # a layer's values stay when other layers are left out
    assert not torch.equal(every[0], every[1])
    assert torch.equal(initial_values(adapter_config("tl6", (3,)))["A"], tied["A"])


# Slots: which layers share a tensor -----------------------------------------------------------------------------------


SMALL = (Target("qkv", 8, (8, 4, 4), "column"), Target("down_proj", 12, (8,), "row"))
LAYERS = (2, 3, 5, 7, 8)


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
    return make_adapter_config(method, rank=3, alpha=6.0, layers=layers, targets=SMALL, seed=7)


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


def test_layers_with_the_same_slots_have_their_factors_in_common(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the memory of one; layers that share no tensor do not, and nothing is copied where all share a tensor."""

    def memories(method: str, **shared_by: Any) -> tuple[list[int], list[int]]:
        row = METHODS[method]
        own = {letter: replace(row.factor(letter), shared_by=of) for letter, of in shared_by.items()}
        monkeypatch.setitem(METHODS, method, replace(row, **own))
        updates = TiedAdapter(AdapterShard.whole(config_of(method=method)))(dtype=torch.bfloat16)
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
    adapter = TiedAdapter(AdapterShard(config, (3, 4)))
    adapter.load_full({name: torch.ones(config.shape(name)) for name in config.tensors})
    guard = GradientGuard(adapter)
    for name, parameter in adapter.named_parameters():
        if name.startswith("down_proj"):
            (parameter * 2.0).sum().backward()
    found = guard.largest()
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
