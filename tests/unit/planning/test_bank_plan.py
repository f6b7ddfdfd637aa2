"""The prediction for several adapters: saved bytes of shared micro-batches, their shapes, and what one more costs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from planned import stage_memory

from megatron_tiedlora.adapters.adapter_bank import AdapterBank, Share
from megatron_tiedlora.adapters.tied_adapter import (
    AdapterConfig,
    AdapterPart,
    TiedAdapter,
    make_adapter_config,
    targets_of,
)
from megatron_tiedlora.base.shapes import DOWN, GATE_UP, OUTPUT, QKV, ModelShape
from megatron_tiedlora.benchmark.timing import saved_by_autograd, storage_bytes
from megatron_tiedlora.model.batch import Supervised, find_supervised
from megatron_tiedlora.model.families import shape_from_hf
from megatron_tiedlora.model.layer_specs import layer_specs
from megatron_tiedlora.model.stage import Stage
from megatron_tiedlora.planning.layout import Layout, MicroBatchShape, plan_stages, shared_shape
from megatron_tiedlora.planning.memory import LargestMicroBatch, bank_bytes, step_memory
from megatron_tiedlora.planning.passes import saved_bytes, saved_per_token, stage_work

LAST = 4
SHAPE: ModelShape = shape_from_hf(
    {"model_type": "llama", "vocab_size": 512, "num_key_value_heads": 2, "hidden_size": 96, "intermediate_size": 256}
    | {"num_attention_heads": 6, "num_hidden_layers": LAST}
)


def adapter(
    method: str,
    rank: int,
    layers: tuple[int, ...] = (1, 2, 3, 4),
    targets: tuple[str, ...] = (QKV,),
    shape: ModelShape = SHAPE,
    alpha: float | None = None,
) -> AdapterConfig:
    return make_adapter_config(
        method, rank=rank, layers=layers, targets=targets_of(shape, targets), seed=rank, alpha=alpha
    )


# A of o_proj is frozen where o_proj is adapted: on a CPU attention's output is one more copy if it is trained.
MIXED = {
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
}
SHARES = (Share("0", 2, 96), Share("1", 1, 64), Share("2", 3, 40), Share("3", 1, 16))


def layout_of(adapters: tuple[AdapterConfig, ...], **changes: Any) -> Layout:
    return Layout(adapters, **{"length": 96, "rows": 4, "dtype": torch.bfloat16, "named": True, **changes})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("name", MIXED)
def test_saved_bytes_of_a_shared_micro_batch(name: str, recompute: str, dtype: torch.dtype) -> None:
    """To the byte: each token has A x of its own adapter's rank, and the factors of its adapters are there once."""
    adapters = MIXED[name]
    shares = SHARES[: len(adapters)]
    bank = AdapterBank({str(number): TiedAdapter(AdapterPart.whole(own)) for number, own in enumerate(adapters)})
    stage = Stage(layer_specs(SHAPE, dtype=dtype, recomputes_gate=recompute == "selective"), bank, recompute=recompute)
    generator = torch.Generator().manual_seed(1)
    for parameter in (*stage.parameters(), *(parameter for _, parameter in bank.named_parameters())):
        parameter.data.normal_(0.0, 0.05, generator=generator)
    size = (1, sum(share.num_tokens for share in shares)) if len(shares) > 1 else shares[0][1:]
    tokens = torch.randint(512, size, generator=generator)
    labels = tokens.roll(-1, dims=1).where(torch.rand(size, generator=generator) < 0.4, -100)
    supervised = find_supervised(labels, shares=shares)
    positions = torch.cat([torch.arange(share.length).repeat(share.num_rows) for share in shares]).view(size)
    with saved_by_autograd(stage) as saved:
        stage(tokens, positions, supervised, shares=shares)
    own = {parameter.untyped_storage().data_ptr() for _, parameter in bank.named_parameters()}
    counted = {
        key: tensor
        for key, tensor in saved.items()
        if key not in own
        and tensor.is_floating_point()
        and tensor.shape[-2:] != (1, SHAPE.heads.dim // 2)  # cos and sin
    }
    after, sizes = positions_after(supervised, len(shares)), tuple(share.num_tokens for share in shares)
    planned = MicroBatchShape(tuple(range(len(shares))), sizes, tuple(after), sum(after))
    stage_plan = plan_stages(SHAPE, layout_of(adapters, dtype=dtype, recompute=recompute))[0]
    assert storage_bytes(counted) == saved_bytes(stage_plan, planned)


def positions_after(supervised: Supervised, num_owners: int) -> list[int]:
    """Of each owner, the positions that are computed after the last attention."""
    if num_owners == 1:
        return [len(supervised.rows)]
    found = [0] * num_owners
    for piece in supervised.pieces:
        found[piece.owner] += piece.size
    return found


def trains_f(config: AdapterConfig) -> bool:
    return any(config.method_spec.factor(name).trained for name in "Buv")


def test_a_token_s_bytes_are_those_of_its_own_adapter() -> None:
    """4 d + 2 k + 2 f + r numbers of bf16, a number for each norm and head, with r of the token's adapter.

    Alone, an adapter whose F is frozen does not save A x; in one tensor with that of others it does.
    """
    layout = layout_of(MIXED["methods"])
    d, k, f = SHAPE.hidden_size, SHAPE.heads.rows[1], SHAPE.intermediate_size
    for own in layout.adapters:
        ax = own.rank * trains_f(own)
        expected = 2 * (4 * d + 2 * k + 2 * f + ax) + 4 * (2 + SHAPE.heads.num)
        assert saved_per_token(SHAPE, replace(layout, adapters=(own,))) == expected
    stage = plan_stages(SHAPE, layout)[0]
    before = MicroBatchShape(tuple(range(4)), (64,) * 4, (16,) * 4, 64)
    for number, own in enumerate(layout.adapters):
        more = before._replace(tokens=tuple(72 if number == other else 64 for other in range(4)))
        grown = saved_bytes(stage, more) - saved_bytes(stage, before)
        of_last = 2 * (3 * d + 2 * k + own.rank) + 4 * (1 + SHAPE.heads.num)  # what follows its attention is not saved
        of_others = saved_per_token(SHAPE, replace(layout, adapters=(own,))) + 2 * own.rank * (not trains_f(own))
        assert grown == 8 * ((LAST - 1) * of_others + of_last)


def test_the_shares_of_a_micro_batch_are_those_that_are_computed() -> None:
    """Scattered labels of several adapters, in rows of several lengths, on one to four parts of the sequence."""
    draw = np.random.default_rng(4)
    for parts in (1, 2, 4) * 30:
        layout = layout_of(MIXED["methods"], tp_size=parts)
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
            shares.append(Share(str(number), len(rows), length))
        found = find_supervised(torch.cat(labels)[None], parts, shares)
        shape = shared_shape(layout, owned)
        assert shape.num_supervised == len(found.labels)
        assert list(shape.tokens) == [share.num_tokens for share in shares]
        assert list(shape.after) == positions_after(found, len(shares))


@pytest.mark.parametrize("changes", [{}, {"dp_size": 2, "zero_stage": 3}], ids=["ZeRO-0", "ZeRO-3"])
def test_adapters_are_whole_on_every_rank(changes: dict[str, Any]) -> None:
    """Their tensors, gradients and two moments, in fp32, beside the anchor that the engine trains."""
    stage = plan_stages(SHAPE, layout_of(MIXED["targets"], **changes))[0]
    memory = stage_memory(stage, tokens=96, adapters=(0, 1, 2, 3))
    assert memory.adapter + memory.gradients + memory.optimizer == sum(map(bank_bytes, stage.parts)) + 4 * 4
    for part, own in zip(stage.parts, MIXED["targets"], strict=True):
        every = sum(part.local_size(name) for name in own.tensors if part.exists(name))
        assert bank_bytes(part) == 4 * every + 12 * sum(own.num_trained().values())


def test_tokens_that_parts_do_not_divide_are_planned() -> None:
    """A micro-batch that several may fill has as many tokens as one of a single adapter, which may be no multiple."""
    stage = plan_stages(SHAPE, layout_of(MIXED["methods"], tp_size=2))[0]
    needed = [stage_memory(stage, tokens=tokens, adapters=(0, 1, 2)).activations for tokens in (992, 1001, 1008)]
    assert needed[0] < needed[1] <= needed[2]


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_one_adapter_needs_what_it_needs_alone(recompute: str) -> None:
    """With a name it has the activations and messages of one without, and all of its memory if no engine steps it."""
    own = MIXED["targets"][2]
    changes = {"pp_size": 2, "recompute": recompute, "micro_batches": 4}
    alone, together, unsharded = (
        plan_stages(SHAPE, layout_of((own,), named=named, zero_stage=zero_stage, **changes))
        for named, zero_stage in ((False, 1), (True, 1), (False, 0))
    )
    for bank, other in zip(together, unsharded, strict=True):
        assert stage_memory(bank, tokens=384) == stage_memory(other, tokens=384)
    for one, bank in zip(alone, together, strict=True):
        memories = [stage_memory(stage, tokens=384) for stage in (one, bank)]
        assert memories[0].activations == memories[1].activations and memories[0].engine == memories[1].engine
        assert memories[1].gradients - memories[0].gradients == 4, "the anchor"


def test_one_more_adapter_adds_its_factors_once_and_no_activation() -> None:
    """With the widest rank there already: bf16 copies of A and, with v and u, of F for each layer.

    Eight tokens are those of the narrower one, which saves 4 numbers less for each.
    """
    stage = plan_stages(SHAPE, layout_of((adapter("tl6", 8), adapter("tl6", 4))))[0]
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
    stage = plan_stages(SHAPE, layout_of(adapters, recompute=recompute))[0]
    rows = [np.arange(96) % 3 > 0] * 2
    parts = [shared_shape(stage.layout, [(number, rows)]) for number in range(3)]
    shape = shared_shape(stage.layout, [(number, rows) for number in range(3)])
    apart = [stage_work(stage, part._replace(squared_lengths=2 * 96**2)) for part in parts]
    together = stage_work(stage, shape._replace(squared_lengths=3 * 2 * 96**2))
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
