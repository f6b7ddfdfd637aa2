"""Several adapters in shared micro-batches on one process: every bit of every gradient is that of the adapter alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import OracleConfig
from oracle_adapter import ALL_TARGETS
from shared_batches import Member, SharedBatch, joined, rounds
from tiny_models import random_adapter, write_tiny_model

from megatron_tiedlora.adapters.adapter_bank import ONLY, AdapterBank, Dropout
from megatron_tiedlora.adapters.tied_adapter import AdapterPart, TiedAdapter, make_adapter_config, targets_of
from megatron_tiedlora.checkpoint.base_weights import BaseWeights, load_base_weights
from megatron_tiedlora.checkpoint.sources import find_model
from megatron_tiedlora.model.layer_specs import layer_specs
from megatron_tiedlora.model.stage import Stage
from megatron_tiedlora.parallel.frozen_weight import frozen_weights
from megatron_tiedlora.parallel.loss import IGNORED_LABEL

ALPHA = 6.0
Gradients = dict[str, torch.Tensor]
TWO = (
    Member("a", {"method": "tl6", "rank": 8}, ((1, 1), (1,)), seed=1),
    Member("b", {"method": "lora", "rank": 3, "layers": (2, 3)}, ((1, 1, 1),), seed=2),
)
FOUR = (
    *TWO,
    Member("c", {"method": "vera", "rank": 16, "targets": ALL_TARGETS}, ((1,), (1, 1)), seed=3),
    Member("d", {"method": "tl1", "rank": 1, "targets": ("o_proj", "gate_up")}, ((1, 1, 1, 1),), seed=4),
)
EIGHT = (
    *FOUR,
    Member("e", {"method": "tl2", "rank": 5, "targets": ("down_proj",)}, ((1, 1), (1, 1), (1,)), seed=5),
    Member("f", {"method": "tl3", "rank": 2, "layers": (3,)}, ((1,),), seed=6),
    Member("g", {"method": "tl4", "rank": 7, "layers": (1,), "targets": ALL_TARGETS}, ((1, 1),), seed=7),
    Member("h", {"method": "tl5", "rank": 12}, ((1,), (1,)), seed=8),
)
PACKED = tuple(
    Member(m.name, m.adapter, rows, seed=m.seed, packed=True)
    for m, rows in zip(FOUR, (((3, 2), (4, 1)), ((5,),), ((2, 2, 3),), ((1,), (6, 2))), strict=True)
)


# The same samples, so rows of one length follow each other, and one of another length among them.
SAME = (
    *(Member(name, {"method": method, "rank": 4}, ((1, 1),), seed=9) for name, method in (("a", "tl6"), ("b", "lora"))),
    Member("c", {"method": "tl2", "rank": 2, "targets": ("o_proj",)}, ((1,),), seed=2),
    Member("d", {"method": "tl5", "rank": 3}, ((1, 1),), seed=9),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bank") / "model"
    shape: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 12, "num_layers": 3}
    return write_tiny_model(path, tokenizer=False, **shape)


def adapter_of(member: Member, folder: Path, dtype: torch.dtype) -> TiedAdapter:
    oracle = random_adapter(
        config=OracleConfig.from_folder(folder), alpha=ALPHA, seed=member.seed, dtype=dtype, **member.adapter
    )
    config = make_adapter_config(
        oracle.method,
        rank=oracle.rank,
        alpha=ALPHA,
        layers=oracle.layers,
        targets=targets_of(find_model(str(folder)).shape, oracle.targets),
        seed=0,
    )
    adapter = TiedAdapter(AdapterPart.whole(config), dtype=dtype)
    adapter.load_full(oracle.tensors)
    return adapter


def stage_of(folder: Path, adapter: TiedAdapter | AdapterBank, dtype: torch.dtype, recompute: str = "none") -> Stage:
    shape = find_model(str(folder)).shape
    stage = Stage(
        layer_specs(shape, dtype=dtype, recomputes_gate=recompute == "selective"), adapter, recompute=recompute
    )
    with BaseWeights(folder, shape) as weights:
        load_base_weights(weights, frozen_weights(stage))
    return stage


def gradients_of(adapter: TiedAdapter) -> Gradients:
    return {name: p.grad for name, p in adapter.named_parameters() if p.grad is not None}


def alone(member: Member, folder: Path, dtype: torch.dtype, **settings: Any) -> tuple[list[float], Gradients]:
    """Its losses and gradients, with micro-batches and a weight as in a run of its own."""
    adapter = adapter_of(member, folder, torch.promote_types(dtype, torch.float32))
    stage, losses = stage_of(folder, adapter, dtype, **settings), []
    for batch in member.micro_batches:
        assert batch.positions is not None
        loss = stage(batch.input_ids, batch.positions, batch.labels, documents=batch.documents)
        (loss / weight_of(member)).backward()
        losses.append(float(loss.detach()))
    return losses, gradients_of(adapter)


def weight_of(member: Member) -> float:
    """What its losses are divided by: no two have the same."""
    return sum(sample.num_supervised for sample in member.samples) / 3


def together(
    members: Sequence[Member],
    batches: Sequence[SharedBatch],
    folder: Path,
    dtype: torch.dtype,
    *,
    sick: str | None = None,
    **settings: Any,
) -> tuple[dict[str, list[float]], dict[str, Gradients]]:
    """The same of all, from one stage with a bank; the tensors of adapter `sick` hold NaN."""
    wide = torch.promote_types(dtype, torch.float32)
    bank = AdapterBank({member.name: adapter_of(member, folder, wide) for member in members})
    for name, parameter in bank.named_parameters():
        if name.startswith(f"{sick}."):
            parameter.data.fill_(torch.nan)
    stage, losses = stage_of(folder, bank, dtype, **settings), {member.name: [] for member in members}
    weights = {member.name: weight_of(member) for member in members}
    for batch in batches:
        found = stage(
            batch.tokens, batch.positions, batch.supervised(), documents=batch.documents, shares=batch.shares
        )
        (found / torch.tensor([weights[share.adapter] for share in batch.shares], dtype=wide)).sum().backward()
        for share, loss in zip(batch.shares, found.view(-1).tolist(), strict=True):
            losses[share.adapter].append(loss)
    assert stage.anchor is not None and stage.anchor.grad is not None and not stage.anchor.grad.any()
    return losses, {name: gradients_of(adapter) for name, adapter in bank.adapters.items()}


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("members", [TWO, FOUR, EIGHT, PACKED, SAME], ids=["two", "four", "eight", "packed", "same"])
def test_every_gradient_is_the_single_runs(
    members: tuple[Member, ...], dtype: torch.dtype, shared: bool, folder: Path
) -> None:
    check(members, rounds(members, shared=shared), folder, dtype)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recompute(recompute: str, folder: Path) -> None:
    check(PACKED, rounds(PACKED, shared=True), folder, torch.bfloat16, recompute=recompute)


def check(
    members: Sequence[Member], batches: Sequence[SharedBatch], folder: Path, dtype: torch.dtype, **settings: Any
) -> None:
    losses, gradients = together(members, batches, folder, dtype, **settings)
    for member in members:
        expected_losses, expected = alone(member, folder, dtype, **settings)
        assert losses[member.name] == expected_losses, member
        assert gradients[member.name].keys() == expected.keys()
        for name, gradient in expected.items():
            assert gradient.any() and torch.equal(gradients[member.name][name], gradient), (member, name)


@pytest.mark.parametrize("members", [FOUR, PACKED], ids=["unpacked", "packed"])
def test_micro_batches_without_a_supervised_token(members: tuple[Member, ...], folder: Path) -> None:
    """One of the first adapter's, and all of the third's: their losses are 0, and no one else changes by a bit."""
    first, second, third, fourth = members
    silent = (replace(first, silent=(0,)), second, replace(third, silent=(0, 1)), fourth)
    losses, gradients = together(silent, rounds(silent, shared=True), folder, torch.bfloat16)
    assert losses[first.name][0] == 0.0 and not any(losses[third.name])
    for member in silent:
        expected_losses, expected = alone(member, folder, torch.bfloat16)
        assert losses[member.name] == expected_losses and gradients[member.name].keys() == expected.keys()
        assert all(torch.equal(gradients[member.name][name], gradient) for name, gradient in expected.items())
        learns = any((batch.labels != IGNORED_LABEL).any() for batch in member.micro_batches)
        assert any(gradient.any() for gradient in expected.values()) == learns, member


@pytest.mark.parametrize("members", [FOUR, PACKED], ids=["unpacked", "packed"])
def test_a_neighbour_that_is_not_finite_changes_no_bit(members: tuple[Member, ...], folder: Path) -> None:
    """NaN times zero is NaN: no sum, mask or padding may take a row of another adapter."""
    batches = rounds(members, shared=True)
    losses, gradients = together(members, batches, folder, torch.bfloat16)
    for sick in (members[0], members[2]):  # the first, whose rows padding would take, and one of all targets
        found_losses, found = together(members, batches, folder, torch.bfloat16, sick=sick.name)
        assert torch.tensor(found_losses[sick.name]).isnan().any()
        for member in members:
            if member is not sick:
                assert found_losses[member.name] == losses[member.name]
                assert all(torch.equal(found[member.name][name], g) for name, g in gradients[member.name].items())


@pytest.mark.parametrize("members", [FOUR, PACKED], ids=["unpacked", "packed"])
def test_dropout_is_each_adapters_own(members: tuple[Member, ...], folder: Path) -> None:
    """Its own seed and probability, for the numbers of its own tokens; one adapter has none."""
    dropout = {"a": Dropout(0.3, 1), "c": Dropout(0.5, 2), "d": Dropout(0.1, 3)}
    parts = [(member.name, member.micro_batches[0]) for member in members]
    numbers = [torch.arange(b.input_ids.numel()).view_as(b.input_ids) + 7 * i for i, (_, b) in enumerate(parts)]
    shared, wide = joined(parts), torch.float32
    bank = AdapterBank({member.name: adapter_of(member, folder, wide) for member in members}, dropout)
    losses = stage_of(folder, bank, torch.bfloat16)(
        *(shared.tokens, shared.positions, shared.supervised()),
        documents=shared.documents,
        shares=shared.shares,
        numbers=torch.cat([own.flatten() for own in numbers])[None],
    )
    losses.sum().backward()
    for member, (name, batch), own, loss in zip(members, parts, numbers, losses.tolist(), strict=True):
        found: list[Gradients] = []
        for probability, seed in (dropout.get(name, Dropout(0.0, 0)), Dropout(0.0, 0)):
            adapter = adapter_of(member, folder, wide)
            own_dropout = {ONLY: Dropout(probability, seed)} if probability else None
            stage = stage_of(folder, AdapterBank({ONLY: adapter}, own_dropout), torch.bfloat16)
            alone = stage(batch.input_ids, batch.positions, batch.labels, documents=batch.documents, numbers=own)
            assert found or float(alone.detach()) == loss, name
            alone.backward()
            found.append(gradients_of(adapter))
        expected, without = found
        together = gradients_of(bank.adapters[name])
        assert together.keys() == expected.keys()
        assert all(torch.equal(together[tensor], gradient) for tensor, gradient in expected.items()), name
        assert (name in dropout) == any(not torch.equal(expected[t], without[t]) for t in expected), name


@pytest.mark.parametrize("targets", [("qkv",), ("o_proj",), ALL_TARGETS], ids=["qkv", "o_proj", "all"])
def test_a_token_saves_what_it_saves_alone(targets: tuple[str, ...], folder: Path) -> None:
    """Also of A x: the numbers of its own adapter's rank. The input of o_proj is the attention output that is kept."""
    methods = zip(("tl6", "lora", "tl2", "tl5"), (8, 3, 1, 12), strict=True)  # all train A and F
    members = [
        Member(method, {"method": method, "rank": rank, "targets": targets}, ((1, 1),), seed=rank)
        for method, rank in methods
    ]
    bank = AdapterBank({member.name: adapter_of(member, folder, torch.float32) for member in members})
    parts = [(member.name, member.micro_batches[0]) for member in members]
    shared, expected = joined(parts), 0
    for member, (_, batch) in zip(members, parts, strict=True):
        stage = stage_of(folder, bank.adapters[member.name], torch.bfloat16)
        expected += saved_bytes(stage, batch.input_ids, batch.positions)
    found = saved_bytes(stage_of(folder, bank, torch.bfloat16), shared.tokens, shared.positions, shared.shares)
    assert found == expected > 0


def saved_bytes(stage: Stage, tokens: torch.Tensor, positions: Any, shares: Any = ()) -> int:
    """The bytes that a forward pass without a head saves, without parameters, factors, cos and sin."""
    updates = stage.read_adapter(shares)
    linears = [linear for update in updates.values() for linear in update.values()]
    factors = [factor for linear in linears for factor in linear[:4] if factor is not None]
    held = {tensor.untyped_storage().data_ptr() for tensor in [*stage.parameters(), *factors]}
    saved: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        table = tensor.ndim == 3 and tensor.shape[1:] == (1, stage.attention.qkv.heads.dim // 2)
        if tensor.is_floating_point() and not table:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = stage.embed(tokens, stage.tensor_parallel)
        context = stage.context(positions, hidden.dtype, shares=shares)
        stage.run_blocks(hidden, context, stage.tensor_parallel, updates)
    return sum(t.untyped_storage().nbytes() for key, t in saved.items() if key not in held)
