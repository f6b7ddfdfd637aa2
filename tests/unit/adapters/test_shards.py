"""Who holds what: cuts with padding, every factor at every place of a grid, start values, and the slices read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from gradient_worker import fill_stage
from safetensors.torch import load_file
from tiny_models import write_tiny_model

from megatron_tiedlora.adapters.tied_adapter import (
    AdapterConfig,
    AdapterPart,
    Target,
    TiedAdapter,
    initial_values,
    lora_factors,
    make_adapter_config,
)
from megatron_tiedlora.adapters.tying import AdapterLayout
from megatron_tiedlora.base.methods import METHODS
from megatron_tiedlora.checkpoint.base_identity import identify_base
from megatron_tiedlora.checkpoint.base_weights import BaseWeights
from megatron_tiedlora.checkpoint.sources import find_model
from megatron_tiedlora.model.layer_specs import layer_specs
from megatron_tiedlora.model.partition import layer_costs, partition
from megatron_tiedlora.model.stage import Stage
from megatron_tiedlora.parallel.groups import Grid, RankGroup, TensorParallel
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
    assert spec.block_offsets() == (0, 12, 18)


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
    with pytest.raises(ValueError, match="18 is not divisible by tensor parallel 4"):
        ask(ShardSpec(0, (18,)), full)
    ask(ShardSpec(0, (18,), padded=True), full)


# ------------------------------------------------------------------------------------------- the adapter

HEADS, KV_HEADS, HEAD_DIM, WIDTH, LAYERS, RANK = 8, 4, 6, 24, 5, 3
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
    method: str,
    layers: tuple[int, ...] = (1, 2, 3, 4, 5),
    *,
    seed: int = 7,
    targets: tuple[Target, ...] = TARGETS,
) -> AdapterConfig:
    return make_adapter_config(method, rank=RANK, layers=layers, targets=targets, seed=seed)


def parts_of(config: AdapterConfig, layout: str) -> tuple[Grid, dict[int, AdapterPart]]:
    """The grid, with two data-parallel ranks, and the parts of the adapter by rank."""
    tp_size, stages = LAYOUTS[layout]
    grid = Grid(0, 2 * tp_size * len(stages), tp_size=tp_size, pp_size=len(stages))
    stage_layers = [tuple(layer for layer in config.layers if layer in stage) for stage in stages]
    return grid, AdapterLayout(config, grid, tuple(stage_layers)).parts()


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
    config = adapter_config(method, layers)
    grid, parts = parts_of(config, layout)
    assert set(parts) == {rank for rank in range(grid.world_size) if grid.at(rank).dp_rank == 0}
    for factor in config.tensors:
        full = torch.randn(config.shape(factor))
        local = {rank: part.shard(factor, full) for rank, part in parts.items()}
        for rank, part in parts.items():
            assert local[rank].shape == part.local_shape(factor), (factor, rank)
            # exists where a tensor is needed, in the shape of the cut
            tensor = dict(TiedAdapter(part).named_parameters()).get(factor)
            assert (tensor is not None) == part.exists(factor)
            assert tensor is None or tensor.shape == local[rank].shape
        assert torch.equal(rejoin(config, grid, local, factor), full), factor


@pytest.mark.parametrize("method", ["lora", "tl6"])
def test_b_and_v_are_cut_by_heads(method: str) -> None:
    """Rank t of TP holds query heads 8 t / TP on, and the key-value heads that these use."""
    tp_size, config = 4, adapter_config(method)
    b, v = torch.randn(config.shape("B")), torch.randn(config.shape("v"))
    rows_dim = b.ndim - 2
    for tp_rank in range(tp_size):
        part = AdapterPart(config, config.layers, tp_rank, tp_size)
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
        part, row = AdapterPart(config, config.layers, 1, 4), config.method_spec
        assert part.local_shape("A")[-1] == (WIDTH // 4 if row.A.trained else WIDTH)
        assert part.local_shape("A")[-2:-1] == (RANK,) and part.local_shape("u")[-1] == RANK


@pytest.mark.parametrize("method", METHODS)
def test_factors_of_a_row_parallel_target_are_cut_as_its_weight(method: str) -> None:
    """A by W's columns, whatever is trained; B and v, which a rank needs whole, in parts only where trained."""
    config = adapter_config(method)
    part = AdapterPart(config, config.layers, 1, 4)
    assert part.local_shape("down_proj.A")[-2:] == (RANK, 40 // 4) and config.gathered_dim("down_proj.A") is None
    assert part.local_shape("down_proj.u")[-1] == RANK
    for name, dim in {"down_proj.B": -2, "down_proj.v": -1}.items():
        size = part.local_shape(name)[dim]
        assert size == (WIDTH // 4 if config.factor(name).trained else WIDTH)
        assert (config.gathered_dim(name) is not None) == config.factor(name).trained
    gathered = {name for name in config.tensors if config.gathered_dim(name) is not None}
    assert gathered & {"A", "B", "u", "v"} == ({"A"} if config.method_spec.A.trained else set())


@pytest.mark.parametrize("method", METHODS)
def test_every_target_has_an_update_of_its_own(method: str) -> None:
    """F A of each target and layer is the weight's update; qkv's tensors are the same whatever else is adapted."""
    config = adapter_config(method, (2, 5))
    state = initial_values(config)
    alone = initial_values(adapter_config(method, (2, 5), targets=(QKV,)))
    assert list(alone) == ["A", "B", "u", "v"] and all(torch.equal(state[name], alone[name]) for name in alone)
    for name, values in state.items():
        if config.factor(name).trained:
            values.uniform_(-1, 1)
    tied_adapter = TiedAdapter(AdapterPart.whole(config))
    tied_adapter.load_full(state)
    updates = tied_adapter(dtype=torch.float32)
    assert [list(update) for update in updates] == [["qkv", "gate_up", "down_proj"]] * 2
    for layer, update in zip(config.layers, updates, strict=True):
        for target in TARGETS:
            a, f, *_ = update[target.name]
            plain_a, plain_b = lora_factors(config, state, target, layer)
            torch.testing.assert_close(f @ a, plain_b @ plain_a)


def test_initial_values_of_a_are_as_wide_as_its_inputs_need() -> None:
    values = initial_values(adapter_config("lora", targets=(QKV, Target("down_proj", 100 * WIDTH, (WIDTH,), "row"))))
    assert values["down_proj.A"].std().item() == pytest.approx(0.1 * WIDTH**-0.5, rel=0.1)


@pytest.mark.parametrize("method", METHODS)
def test_initial_values_do_not_depend_on_the_layout(method: str) -> None:
    """Bit for bit, and not on what was drawn before either."""
    config = adapter_config(method)
    expected = initial_values(config)
    for layout in LAYOUTS:
        grid, parts = parts_of(config, layout)
        local: dict[str, dict[int, torch.Tensor]] = {name: {} for name in config.tensors}
        for rank, part in parts.items():
            torch.manual_seed(rank)
            torch.rand(rank)
            adapter = TiedAdapter(part)
            adapter.load_full(initial_values(config))
            for factor, tensor in adapter.named_parameters():
                local[factor][rank] = tensor.detach()
        for factor, by_rank in local.items():
            if by_rank:
                assert torch.equal(rejoin(config, grid, by_rank, factor), expected[factor]), (factor, layout)
            else:
                assert torch.equal(expected[factor], torch.ones(config.shape(factor)))


def test_initial_values_follow_the_seed_the_name_and_the_layer() -> None:
    tied = initial_values(adapter_config("tl6"))
    assert not torch.equal(tied["A"], initial_values(adapter_config("tl6", seed=8))["A"])
    assert not torch.equal(tied["A"].flatten()[:50], tied["B"].flatten()[:50])
    assert not torch.equal(tied["A"], tied["gate_up.A"])  # of one size, drawn for another target
    every, few = initial_values(adapter_config("lora"))["A"], initial_values(adapter_config("lora", (2, 4)))["A"]
    assert torch.equal(few, every[[1, 3]])  # a layer's values stay when other layers are left out
    assert not torch.equal(every[0], every[1])
    assert torch.equal(initial_values(adapter_config("tl6", (3,)))["A"], tied["A"])


# ------------------------------------------------------------------------------------------- the base


class Recorder(BaseWeights):
    """Also keeps what was read."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.reads: list[tuple[str, slice | None, int]] = []

    def read(self, name: str, part: slice | None = None, dim: int = 0) -> torch.Tensor:
        self.reads.append((name, part, dim))
        return super().read(name, part, dim)


def read_at(folder: Path, stages: Sequence[range], grid: Grid) -> tuple[Stage, Recorder]:
    """What the rank of `grid` builds and reads, the base's identity included."""
    source = find_model(str(folder))
    specs = layer_specs(source.shape, dtype=torch.float32, tp_size=grid.tp_size)
    group = RankGroup(None, grid.tp_rank, grid.tp_size)
    stage = Stage([specs[index] for index in stages[grid.pp_rank]], None, tensor_parallel=TensorParallel(group))
    with Recorder(folder, source.shape) as weights:
        identify_base(source, weights, "fp32")
        fill_stage(stage, weights, source.shape, grid)
    return stage, weights


@pytest.mark.parametrize("tied", [False, True])
def test_each_rank_reads_only_its_slices(tmp_path: Path, tied: bool) -> None:
    """TP = 2 x PP = 2: every number once, but for norms and output biases (by both TP ranks), the final norm that says
    which base this is (by all), and a tied embedding (in both stages)."""
    folder = write_tiny_model(
        tmp_path, tokenizer=False, num_layers=5, head_dim=6, vocab_size=321, attention_bias=True, tied=tied
    )
    config, stored = find_model(str(folder)).shape, load_file(folder / "model.safetensors")
    stages = partition(layer_costs(config, length=64, first_adapted=1), 2)
    times = {name: torch.zeros(tensor.shape, dtype=torch.int64) for name, tensor in stored.items()}
    total = 0
    for rank in range(4):
        stage, weights = read_at(folder, stages, Grid(rank, 4, tp_size=2, pp_size=2))
        held = {name: parameter.shape for name, parameter in stage.named_parameters()}
        padding = 0
        for name, part, dim in weights.reads:
            whole = part is None or (part.start, part.stop) == (0, stored[name].shape[dim])
            times[name][(slice(None),) * dim + (slice(None) if part is None else part,)] += 1
            assert whole == (name.endswith("norm.weight") or name.endswith("o_proj.bias")), (name, part)
            if "embed_tokens" in name or "lm_head" in name:
                assert part is not None
                padding += (161 - (part.stop - part.start)) * config.hidden_size
        numbers = sum(torch.Size(shape).numel() for shape in held.values()) - padding + config.hidden_size
        assert weights.bytes_read == 4 * numbers, "what a rank holds, and the norm that identifies the base"
        assert padding == (config.hidden_size if rank % 2 else 0)  # 321 words in two parts of 161
        total += weights.bytes_read
    for name, count in times.items():
        wanted = 1
        if name.endswith("norm.weight") or name.endswith("o_proj.bias"):
            wanted = 2 + 4 * (name == "model.norm.weight")
        elif tied and name == "model.embed_tokens.weight":
            wanted = 2
        assert bool((count == wanted).all()), (name, wanted, count.unique())
    checkpoint = sum(tensor.numel() for tensor in stored.values())
    replicated = (2 * 5 + 1 + 5 + 4) * config.hidden_size + (stored["model.embed_tokens.weight"].numel() if tied else 0)
    assert total == 4 * (checkpoint + replicated)
