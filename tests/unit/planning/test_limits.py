"""What a stage saves, computes and allocates when it runs, beside its plan and beside formulas by hand; and what is
planned for one adapter more."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.planned import stage_memory
from support.tiny_models import write_tiny_model
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from megatron_tiedlora.adapters.adapter_groups import AdapterGroup, AdapterSegment
from megatron_tiedlora.adapters.tied_adapter import (
    AdapterConfig,
    AdapterShard,
    TiedAdapter,
    make_adapter_config,
    targets_of,
)
from megatron_tiedlora.base.shapes import (
    DOWN,
    GATE_UP,
    OUTPUT,
    QKV,
    TARGET_NAMES,
    AttentionKind,
    ModelShape,
    NormShape,
    RopeShape,
)
from megatron_tiedlora.config.fields import validate_settings
from megatron_tiedlora.config.tool_settings import BenchSettings
from megatron_tiedlora.model.batch import Supervised, find_supervised
from megatron_tiedlora.model.cpu_attention import find_query_tiles
from megatron_tiedlora.model.families import shape_from_hf
from megatron_tiedlora.model.layer_specs import layer_specs
from megatron_tiedlora.model.stage import Stage
from megatron_tiedlora.model.tail import SupervisedTail
from megatron_tiedlora.parallel.frozen_weight import padded
from megatron_tiedlora.parallel.kernels import EAGER
from megatron_tiedlora.planning.layout import Layout, MicroBatchShape, plan_stages, shared_shape
from megatron_tiedlora.planning.memory import LargestMicroBatch, group_bytes, step_memory
from megatron_tiedlora.planning.passes import saved_bytes, saved_per_token, stage_work, step_flops
from megatron_tiedlora.selfcheck.compare import OURS, make_sides
from megatron_tiedlora.selfcheck.step_bench import plan_benchmark
from megatron_tiedlora.selfcheck.timing import saved_by_autograd, storage_bytes
from megatron_tiedlora.training.throughput import ChosenKernels

ROWS, LENGTH, LAST = 2, 96, 4
SHAPE: ModelShape = shape_from_hf(
    {"model_type": "llama", "vocab_size": 512, "num_key_value_heads": 2, "hidden_size": 96, "intermediate_size": 256}
    | {"num_attention_heads": 6, "num_hidden_layers": LAST}
)
EVERY = (1, 2, 3, 4)


def _as_in_gemma(shape: ModelShape) -> ModelShape:
    """The model with all that a block and a head can have: four norms and head norms of 1 + w, windows, factors."""
    parts = dict.fromkeys(("attention_norm", "output_norm", "mlp_norm", "down_norm"), shape.hidden_size)
    norms = {part: NormShape(part, size, 1e-6, part, offset=1.0) for part, size in parts.items()}
    of_head = NormShape("norm", shape.heads.dim, 1e-6, "norm", offset=1.0)
    heads = replace(shape.heads, query_norm=of_head, key_norm=of_head, multiplier=0.2)
    block = replace(shape.block, heads=heads, **norms, activation="gelu", multiplier=0.5)  # type: ignore[arg-type]
    others: dict[str, Any] = {"final_norm": norms["mlp_norm"], "logit_divisor": 2.0, "logit_cap": 30.0}
    local = RopeShape(theta=100.0)
    kinds = tuple(AttentionKind(heads.rope if block % 2 else local, None if block % 2 else 32) for block in EVERY)
    return replace(shape, block=block, kinds=kinds, embedding_multiplier=9.8, **others)


GEMMA = _as_in_gemma(SHAPE)


def adapter(
    method: str, rank: int, layers: tuple[int, ...] = EVERY, targets: tuple[str, ...] = (QKV,)
) -> AdapterConfig:
    return make_adapter_config(method, rank=rank, layers=layers, targets=targets_of(SHAPE, targets), seed=rank)


def random_stage(
    *adapters: AdapterConfig, shape: ModelShape = SHAPE, dtype: torch.dtype = torch.bfloat16, recompute: str = "none"
) -> tuple[Stage, AdapterGroup]:
    """The model with random weights and these adapters, and the adapters."""
    adapter_group = AdapterGroup(
        {str(number): TiedAdapter(AdapterShard.whole(own)) for number, own in enumerate(adapters)}
    )
    held = adapter_group if len(adapters) > 1 else adapter_group.adapters["0"]
    specs = layer_specs(shape, dtype=dtype)
    stage, generator = Stage(specs, held, recompute=recompute), torch.Generator().manual_seed(1)
    for parameter in (*stage.parameters(), *(parameter for _, parameter in adapter_group.named_parameters())):
        parameter.data.normal_(0.0, 0.05, generator=generator)
    return stage, adapter_group


def batch(share: float = 0.5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(tokens, positions, labels); the labels of the last `share` of each row."""
    tokens = torch.randint(512, (ROWS, LENGTH), generator=torch.Generator().manual_seed(2))
    labels = tokens.roll(-1, dims=1)
    labels[:, : LENGTH - int(share * LENGTH)] = -100
    return tokens, torch.arange(LENGTH).expand(ROWS, LENGTH), labels


# Saved bytes ----------------------------------------------------------------------------------------------------------

# Of several, A of o_proj is frozen where it is adapted: on a CPU attention's output is one more copy if it is trained.
ADAPTERS = {
    "methods": (adapter("tl6", 8), adapter("lora", 3), adapter("tl1", 5), adapter("vera", 2)),
    "layers": (adapter("tl6", 8, (2, 3)), adapter("lora", 3, (3, 4)), adapter("tl5", 4, (3,)), adapter("tl3", 2, (4,))),
    "targets": (
        adapter("tl6", 8, targets=(GATE_UP,)),
        adapter("tl3", 3, (2, 4), (OUTPUT, DOWN)),
        adapter("tl2", 5, (1, 3, 4), (QKV, GATE_UP, DOWN)),
        adapter("tl1", 2, (4,), (DOWN,)),
    ),
    "late": (adapter("tl4", 6, (4,), (OUTPUT,)), adapter("tl5", 3, (4,), (GATE_UP,))),
    "one": (adapter("tl6", 8),),
    "one of all": (adapter("lora", 5, (2, 4), TARGET_NAMES),),
    "one of o_proj": (adapter("tl6", 5, (1,), (OUTPUT,)),),
    "one of down_proj": (adapter("tl1", 5, (4,), (DOWN,)),),
}
SHARES = (
    AdapterSegment("0", 2, 96),
    AdapterSegment("1", 1, 64),
    AdapterSegment("2", 3, 40),
    AdapterSegment("3", 1, 16),
)


def layout_of(*adapters: AdapterConfig, **changes: Any) -> Layout:
    return Layout(adapters, **{"length": 96, "rows": 4, "dtype": torch.bfloat16, "named": True, **changes})


def positions_after(supervised: Supervised, num_owners: int) -> list[int]:
    """The positions of each owner that are computed after the last attention."""
    if num_owners == 1:
        return [len(supervised.rows)]
    found = [0] * num_owners
    for span in supervised.spans:
        found[span.adapter] += span.size
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize(
    ("name", "shape"),
    [*(pytest.param(name, SHAPE, id=name) for name in ADAPTERS)]
    + [pytest.param(name, GEMMA, id=f"{name}, as in Gemma") for name in ("methods", "one of all")],
)
def test_saved_bytes_are_those_of_the_plan(name: str, shape: ModelShape, recompute: str, dtype: torch.dtype) -> None:
    """To the byte: each token has A x of its own adapter's rank, and the factors of its adapters are there once."""
    adapters = ADAPTERS[name]
    shares = SHARES[: len(adapters)]
    given = shares if len(shares) > 1 else ()
    stage, adapter_group = random_stage(*adapters, shape=shape, dtype=dtype, recompute=recompute)
    size = (1, sum(share.num_tokens for share in shares)) if len(shares) > 1 else shares[0][1:]
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(512, size, generator=generator)
    labels = tokens.roll(-1, dims=1).where(torch.rand(size, generator=generator) < 0.4, -100)
    supervised = find_supervised(labels, segments=given)
    positions = torch.cat([torch.arange(share.length).repeat(share.num_rows) for share in shares]).view(size)
    with saved_by_autograd(stage) as saved:
        stage(tokens, positions, supervised, segments=given)
    own = {parameter.untyped_storage().data_ptr() for _, parameter in adapter_group.named_parameters()}
    others = {key: tensor for key, tensor in saved.items() if key not in own and tensor.is_floating_point()}
    rotations = (1, SHAPE.heads.dim // 2)  # the shape of cos and sin
    counted = {key: tensor for key, tensor in others.items() if tensor.shape[-2:] != rotations}
    after, sizes = positions_after(supervised, len(shares)), tuple(share.num_tokens for share in shares)
    planned = MicroBatchShape(tuple(range(len(shares))), sizes, tuple(after), sum(after))
    stage_plan = plan_stages(shape, layout_of(*adapters, dtype=dtype, recompute=recompute))[0]
    assert storage_bytes(counted) == saved_bytes(stage_plan, planned)


@pytest.mark.parametrize("recompute", ["none", "selective"])
@pytest.mark.parametrize("targets", [(QKV,), TARGET_NAMES])
@pytest.mark.parametrize("method", ["tl6", "lora", "tl1", "vera"])
def test_a_token_s_bytes_by_hand(method: str, targets: tuple[str, ...], recompute: str) -> None:
    """4 d + 2 k + 2 f + t r numbers, one for each norm and head; selective recompute saves neither 2 f nor a norm's.

    An adapter whose F is frozen does not save A x.
    """
    own = adapter(method, 5, targets=targets)
    d, k, f = SHAPE.hidden_size, SHAPE.heads.rows[1], SHAPE.intermediate_size
    trains_f = any(own.method_spec.factor(name).trained for name in "Buv")
    numbers, scalars = 4 * d + 2 * k + len(targets) * own.rank * trains_f, 1 + SHAPE.heads.num
    if recompute == "none":
        numbers, scalars = numbers + 2 * f, scalars + 1
    assert saved_per_token(SHAPE, layout_of(own, recompute=recompute)) == 2 * numbers + 4 * scalars


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_the_bytes_of_norms_by_hand(recompute: str) -> None:
    """A norm of outputs saves its input and a root, and head norms a root for each head, if a block is not recomputed.

    A norm of 1 + w also saves this weight in fp32, once for a micro-batch.
    """
    layout = layout_of(adapter("tl6", 8), recompute=recompute)
    plans = [plan_stages(shape, layout)[0] for shape in (GEMMA, SHAPE)]
    batches = [MicroBatchShape((0,), (tokens,), (8,), 8) for tokens in (96, 104)]
    once, more = (saved_bytes(plans[0], some) - saved_bytes(plans[1], some) for some in batches)
    d, dim, roots = SHAPE.hidden_size, SHAPE.heads.dim, 4 * (SHAPE.heads.num + SHAPE.heads.num_kv)
    of_block, of_last, wide = 2 * (2 * d + 4) + roots, roots, (LAST - 1) * (4 * d + 2 * dim) + 2 * d + 2 * dim
    if recompute == "full":
        of_block, of_last, wide = 0, 0, d
    elif recompute == "selective":
        wide += (LAST - 1) * d  # of the MLP's norm, to compute gate and up again
    assert more - once == 8 * ((LAST - 1) * of_block + of_last)
    assert once - 12 * (more - once) == 4 * wide + 8 * (2 * d + 4)  # after the last attention, one norm of 8 outputs
    by_token = [saved_per_token(shape, layout) for shape in (GEMMA, SHAPE)]
    assert by_token[0] - by_token[1] == of_block


def test_one_more_token_saves_what_its_own_adapter_does() -> None:
    """In one tensor with those of others A x is saved whether or not the adapter's F is trained."""
    layout = layout_of(*ADAPTERS["methods"])
    stage = plan_stages(SHAPE, layout)[0]
    d, k, f = SHAPE.hidden_size, SHAPE.heads.rows[1], SHAPE.intermediate_size
    before = MicroBatchShape(tuple(range(4)), (64,) * 4, (16,) * 4, 64)
    for number, own in enumerate(layout.adapters):
        more = before._replace(tokens=tuple(72 if number == other else 64 for other in range(4)))
        of_block = 2 * (4 * d + 2 * k + 2 * f + own.rank) + 4 * (2 + SHAPE.heads.num)
        of_last = 2 * (3 * d + 2 * k + own.rank) + 4 * (1 + SHAPE.heads.num)  # what follows its attention is not saved
        assert saved_bytes(stage, more) - saved_bytes(stage, before) == 8 * ((LAST - 1) * of_block + of_last)


@pytest.mark.parametrize("share", [1.0, 0.25])
def test_behind_the_last_attention_one_gradient_is_saved(monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    """d numbers a supervised position and its place twice; nothing of the last MLP, the final norm and the head."""
    (stage, _), inputs = random_stage(adapter("tl6", 8)), batch(share)
    attended: list[Any] = []
    original = SupervisedTail.loss

    def watched(*arguments: Any) -> torch.Tensor:
        with saved_by_autograd(stage) as saved:
            loss = original(*arguments)
        attended.append(storage_bytes(saved))
        return loss

    monkeypatch.setattr(SupervisedTail, "loss", watched)
    stage(*inputs)
    assert attended == [len(find_supervised(inputs[2]).rows) * (2 * SHAPE.hidden_size + 2 * 8)]


# Operations -----------------------------------------------------------------------------------------------------------

SUBSETS = (*((name,) for name in TARGET_NAMES), ("o_proj", "down_proj"), TARGET_NAMES)


def operation_cases() -> Iterator[Any]:
    """All methods, targets and layers, by default a third of them, in which each pair of these occurs."""
    for (i, method), (j, names), (k, layers) in product(
        *map(enumerate, (("tl6", "lora", "vera", "tl1", "tl3"), SUBSETS, (EVERY, (2, 4), (4,))))
    ):
        name = f"{method}-{'+'.join(names)}-{''.join(map(str, layers))}"
        marks = [pytest.mark.slow] if (i + j + k) % 3 else []
        yield pytest.param(SHAPE, method, names, layers, id=name, marks=marks)
    yield pytest.param(GEMMA, "tl6", TARGET_NAMES, (2, 4), id="as in Gemma")


@pytest.mark.parametrize(("shape", "method", "names", "layers"), list(operation_cases()))
def test_operations_are_those_of_the_plan(
    shape: ModelShape, method: str, names: tuple[str, ...], layers: tuple[int, ...]
) -> None:
    """Attention on a CPU makes 7 products of tiles where the plan has 6: its scores anew, going back."""
    own = adapter(method, 5, layers, names)
    stage, _ = random_stage(own, shape=shape)
    tokens, positions, labels = batch()
    rows = find_supervised(labels)
    with FlopCounterMode(display=False) as counter:
        stage(tokens, positions, labels).backward()
    flops = step_flops(shape, own, (LENGTH,) * ROWS, padded(len(rows.labels)), num_after=len(rows.rows))
    counted = counter.get_flop_counts()["Global"]
    attention = sum(counted.pop(operation, 0) for operation in (torch.ops.aten.bmm, torch.ops.aten.baddbmm))
    assert sum(counted.values()) == pytest.approx(flops.total() - flops["attention"], rel=1e-3)
    products = 0
    for block in EVERY:
        tiles = find_query_tiles(None, LENGTH, size=64, window=shape.kind_of(block).window)
        # The first adapted block's attention has a backward pass if QKV is adapted.
        factor = 7 if block >= layers[0] + (QKV not in names) else 2
        products += factor * ROWS * sum((tile.stop - tile.start) * (tile.stop - tile.first) for tile in tiles)
    assert attention == products * 2 * SHAPE.heads.rows[0]


# Memory ---------------------------------------------------------------------------------------------------------------


def most_allocated(profiled: Any) -> int:
    """The most bytes that a profiled block held at once, of those that it allocated."""
    records = (event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]")
    held = most = 0
    for record in sorted(records, key=lambda event: event.start_ns()):
        held += record.nbytes()
        most = max(most, held)
    assert abs(held) < 1e5, "a step frees what it has allocated"
    return most


@pytest.mark.parametrize(
    "flags",
    [
        {"vocab_size": 320, "length": 128},  # the gradients of an MLP
        {"vocab_size": 320, "length": 512, "recompute": "selective"},
        {"vocab_size": 320, "length": 512, "recompute": "full", "dtype": "fp32"},
        {"vocab_size": 320, "length": 512, "intermediate_size": 64},  # tiles of attention
        {"vocab_size": 16384, "length": 128},  # logits
        {"vocab_size": 320, "length": 512, "intermediate_size": 64, "family": "gemma2"},  # capped tiles
        {"vocab_size": 320, "length": 512, "intermediate_size": 64, "family": "mistral", "sliding_window": 40},
    ],
    ids=lambda flags: " ".join(f"{name} {value}" for name, value in flags.items()),
)
def test_a_step_allocates_what_is_planned(flags: dict[str, Any], tmp_path: Path) -> None:
    changes = dict(flags)
    sizes = {"hidden_size": 128, "intermediate_size": 384, "num_layers": 4, "max_positions": 512}
    sizes |= {name: changes.pop(name) for name in tuple(changes) if name not in ("length", "recompute", "dtype")}
    model = write_tiny_model(tmp_path / "model", tokenizer=False, **sizes)
    values = {"model": str(model), "random_weights": True, "rows": 8, "supervised": 1.0, "compile": "false", **changes}
    settings = validate_settings(values, BenchSettings)
    plan = plan_benchmark(settings)
    side = make_sides(plan, settings, ChosenKernels(EAGER, "not compiled"))[OURS]()
    side.step()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        side.step()
    planned = step_memory(plan.stage, LargestMicroBatch(8 * settings.length, 8, settings.length)).activations
    # Masks, labels and copies of a tile are not planned.
    assert planned == pytest.approx(most_allocated(profiled), rel=0.04)


# Several adapters -----------------------------------------------------------------------------------------------------


def test_the_shares_of_a_micro_batch_are_those_that_are_computed() -> None:
    """Scattered labels of several adapters, in rows of several lengths, on one to four parts of the sequence."""
    draw = np.random.default_rng(4)
    for parts in (1, 2, 4) * 30:
        layout = layout_of(*ADAPTERS["methods"], tp_size=parts)
        owned, labels, shares = [], [], []
        for number in range(int(draw.integers(1, 5))):
            rows = [draw.random(int(draw.integers(1, 40))) < 0.3 for _ in range(int(draw.integers(1, 4)))]
            for row in rows:
                row[0] = False
            length = -(-max(map(len, rows)) // layout.pad_multiple) * layout.pad_multiple
            padded = torch.full((len(rows), length), -100)
            for index, row in enumerate(rows):
                padded[index, torch.from_numpy(np.flatnonzero(row)) - 1] = 7
            owned.append((number, rows))
            labels.append(padded.flatten())
            shares.append(AdapterSegment(str(number), len(rows), length))
        found = find_supervised(torch.cat(labels)[None], parts, shares)
        shape = shared_shape(layout, owned)
        assert shape.num_supervised == len(found.labels)
        assert list(shape.tokens) == [share.num_tokens for share in shares]
        assert list(shape.after) == positions_after(found, len(shares))


@pytest.mark.parametrize("changes", [{}, {"dp_size": 2, "zero_stage": 3}], ids=["ZeRO-0", "ZeRO-3"])
def test_adapters_are_whole_on_every_rank(changes: dict[str, Any]) -> None:
    """Their tensors, gradients and two moments, in fp32, beside the anchor that the engine trains."""
    stage = plan_stages(SHAPE, layout_of(*ADAPTERS["targets"], **changes))[0]
    memory = stage_memory(stage, tokens=96, adapters=(0, 1, 2, 3))
    assert memory.adapter + memory.gradients + memory.optimizer == sum(map(group_bytes, stage.parts)) + 4 * 4
    for part, own in zip(stage.parts, ADAPTERS["targets"], strict=True):
        every = sum(part.local_size(name) for name in own.tensors if part.exists(name))
        assert group_bytes(part) == 4 * every + 12 * sum(own.num_trained().values())


def test_tokens_that_parts_do_not_divide_are_planned() -> None:
    """A micro-batch that several may fill has as many tokens as one of a single adapter, which may be no multiple."""
    stage = plan_stages(SHAPE, layout_of(*ADAPTERS["methods"], tp_size=2))[0]
    needed = [stage_memory(stage, tokens=tokens, adapters=(0, 1, 2)).activations for tokens in (992, 1001, 1008)]
    assert needed[0] < needed[1] <= needed[2]


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_one_adapter_needs_what_it_needs_alone(recompute: str) -> None:
    """With a name it has the activations and messages of one without, and all of its memory if no engine steps it."""
    own = ADAPTERS["targets"][2]
    changes = {"pp_size": 2, "recompute": recompute, "micro_batches": 4}
    alone, together, unsharded = (
        plan_stages(SHAPE, layout_of(own, named=named, zero_stage=zero_stage, **changes))
        for named, zero_stage in ((False, 1), (True, 1), (False, 0))
    )
    for adapter_group, other in zip(together, unsharded, strict=True):
        assert stage_memory(adapter_group, tokens=384) == stage_memory(other, tokens=384)
    for one, adapter_group in zip(alone, together, strict=True):
        memories = [stage_memory(stage, tokens=384) for stage in (one, adapter_group)]
        assert memories[0].activations == memories[1].activations and memories[0].engine == memories[1].engine
        assert memories[1].gradients - memories[0].gradients == 4, "the anchor"


def test_one_more_adapter_adds_its_factors_once_and_no_activation() -> None:
    """With the widest rank there already: bf16 copies of A and, with v and u, of F for each layer.

    Eight tokens are those of the narrower one, which saves 4 numbers less for each.
    """
    stage = plan_stages(SHAPE, layout_of(adapter("tl6", 8), adapter("tl6", 4)))[0]
    cases = (((0,),), ((0, 1),), ((0,), (0, 1)))
    one, two, most = (step_memory(stage, LargestMicroBatch(384, 1, 384, owners)).activations for owners in cases)
    assert most == two, "the case that needs most"
    columns, rows = SHAPE.hidden_size, sum(SHAPE.heads.rows)
    assert two - one == 2 * 4 * (columns + LAST * rows) - 2 * LAST * 8 * 4


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_the_work_of_a_shared_micro_batch_is_that_of_its_parts(recompute: str) -> None:
    """The frozen FLOPs; the weights are read, and the blocks launched, once for all of them.

    What one needs all tokens move.
    """
    adapters = (adapter("tl6", 8), adapter("lora", 3, targets=(QKV, GATE_UP, DOWN)), adapter("vera", 2))
    stage = plan_stages(SHAPE, layout_of(*adapters, recompute=recompute))[0]
    rows = [np.arange(96) % 3 > 0] * 2
    parts = [shared_shape(stage.layout, [(number, rows)]) for number in range(3)]
    shape = shared_shape(stage.layout, [(number, rows) for number in range(3)])
    apart = [stage_work(stage, part._replace(lengths=(96,) * 2)) for part in parts]
    together = stage_work(stage, shape._replace(lengths=(96,) * 6))
    for index, whole in enumerate(together):
        singles = [work[index] for work in apart]
        for name in ("linears", "head", "attention"):
            expected = sum(single[name] for single in singles)
            assert whole[name] == pytest.approx(expected, rel=1e-9), (index, name)
        # Where one of them needs the gradient of A x, it is computed for all.
        low_rank = whole["low_rank"] / max(1, sum(single["low_rank"] for single in singles))
        assert low_rank == pytest.approx(1.03 if index == 1 else 1.0, abs=0.01) or not whole["low_rank"]
        added = {name: sum(single[name] for single in singles) for name in ("moved", "weights")}
        assert whole["moved"] >= 0.999 * added["moved"]  # a norm's weight is read once for all
        assert whole["blocks"] == singles[0]["blocks"] and whole["weights"] <= added["weights"]
    assert together.forward["low_rank"] > apart[1].forward["low_rank"] > apart[2].forward["low_rank"] > 0
