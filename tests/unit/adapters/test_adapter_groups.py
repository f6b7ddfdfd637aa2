"""Several adapters in shared micro-batches on one process: every bit of every gradient is that of the adapter alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.adapted_stages import loaded_stage
from support.oracle import OracleConfig
from support.oracle_adapter import ALL_TARGETS, dropout, kept
from support.tiny_models import random_adapter, write_tiny_model
from support.token_rows import Member, SharedBatch, rounds

from megatron_tiedlora.adapters.adapter_groups import AdapterGroup
from megatron_tiedlora.adapters.low_rank import InputDropout, dropout_salt, token_keys
from megatron_tiedlora.adapters.tied_adapter import AdapterShard, TiedAdapter, make_adapter_config, targets_of
from megatron_tiedlora.checkpoint.sources import find_model
from megatron_tiedlora.parallel.loss import IGNORED_LABEL

ALPHA = 6.0
Gradients = dict[str, torch.Tensor]
FOUR = (
    Member("a", {"method": "tl6", "rank": 8}, ((1, 1), (1,)), seed=1),
    Member("b", {"method": "lora", "rank": 3, "layers": (2, 3)}, ((1, 1, 1),), seed=2),
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
    path = tmp_path_factory.mktemp("adapter_group") / "model"
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
    adapter = TiedAdapter(AdapterShard.whole(config), dtype=dtype)
    adapter.load_full(oracle.tensors)
    return adapter


def gradients_of(adapter: TiedAdapter) -> Gradients:
    return {name: p.grad for name, p in adapter.named_parameters() if p.grad is not None}


def alone(member: Member, folder: Path, dtype: torch.dtype, **settings: Any) -> tuple[list[float], Gradients]:
    """Its losses and gradients, with micro-batches and a weight as in a run of its own."""
    adapter = adapter_of(member, folder, torch.promote_types(dtype, torch.float32))
    stage, losses = loaded_stage(folder, adapter, dtype, **settings), []
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
    """The same of all, from one stage with an adapter group; the tensors of adapter `sick` hold NaN."""
    wide = torch.promote_types(dtype, torch.float32)
    adapter_group = AdapterGroup({member.name: adapter_of(member, folder, wide) for member in members})
    for name, parameter in adapter_group.named_parameters():
        if name.startswith(f"{sick}."):
            parameter.data.fill_(torch.nan)
    stage, losses = loaded_stage(folder, adapter_group, dtype, **settings), {member.name: [] for member in members}
    weights = {member.name: weight_of(member) for member in members}
    for batch in batches:
        found = stage(
            batch.tokens, batch.positions, batch.supervised(), documents=batch.documents, segments=batch.segments
        )
        (found / torch.tensor([weights[segment.adapter] for segment in batch.segments], dtype=wide)).sum().backward()
        for segment, loss in zip(batch.segments, found.view(-1).tolist(), strict=True):
            losses[segment.adapter].append(loss)
    assert stage.anchor is not None and stage.anchor.grad is not None and not stage.anchor.grad.any()
    return losses, {name: gradients_of(adapter) for name, adapter in adapter_group.adapters.items()}


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("members", [EIGHT, PACKED, SAME], ids=["eight", "packed", "same"])
def test_every_gradient_is_the_single_runs(
    members: tuple[Member, ...], dtype: torch.dtype, shared: bool, folder: Path
) -> None:
    check(members, rounds(members, shared=shared), folder, dtype)


@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_recompute(recompute: str, folder: Path) -> None:
    check(PACKED, rounds(PACKED, shared=True), folder, torch.bfloat16, recompute=recompute)


def check(
    members: Sequence[Member], batches: Sequence[SharedBatch], folder: Path, dtype: torch.dtype, **settings: Any
) -> dict[str, list[float]]:
    """The losses of all, which are those of each alone, as the gradients are."""
    losses, gradients = together(members, batches, folder, dtype, **settings)
    for member in members:
        expected_losses, expected = alone(member, folder, dtype, **settings)
        learns = any((batch.labels != IGNORED_LABEL).any() for batch in member.micro_batches)
        assert losses[member.name] == expected_losses, member
        assert gradients[member.name].keys() == expected.keys()
        for name, gradient in expected.items():
            assert bool(gradient.any()) == learns, (member, name)
            assert torch.equal(gradients[member.name][name], gradient), (member, name)
    return losses


@pytest.mark.parametrize("members", [FOUR, PACKED], ids=["unpacked", "packed"])
def test_micro_batches_without_a_supervised_token(members: tuple[Member, ...], folder: Path) -> None:
    """One of the first adapter's, and all of the third's: their losses are 0, and no one else changes by a bit."""
    first, second, third, fourth = members
    silent = (replace(first, silent=(0,)), second, replace(third, silent=(0, 1)), fourth)
    losses = check(silent, rounds(silent, shared=True), folder, torch.bfloat16)
    assert losses[first.name][0] == 0.0 and not any(losses[third.name])


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


# Which inputs dropout keeps: the oracle's, whatever part of tokens and features is asked for, and like chance ---------

NUMBERS = [0, 1, 2**24, 2**24 + 1, 2**32 - 1, 2**32, 7 * 2**40 + 5]


def of(numbers: list[int], *, layer: int = 2, target: str = "qkv", p: float = 0.25, first: int = 0) -> InputDropout:
    keys = token_keys(torch.tensor(numbers), seed=11)
    return InputDropout(keys, keys[1:3], dropout_salt(11, layer=layer, target=target), first, p)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_values_are_the_oracle_s(dtype: torch.dtype) -> None:
    x = torch.randn(len(NUMBERS), 37, generator=torch.Generator().manual_seed(0)).to(dtype)
    expected = dropout(NUMBERS, seed=11, probability=0.25)(x.double(), 2, "qkv")
    found = of(NUMBERS).dropped(x, local=False)
    assert found.dtype == dtype and (found == 0).equal(expected == 0)
    assert torch.allclose(found.double(), expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6)


def test_parts_of_tokens_and_features_are_parts_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.ones(len(NUMBERS), 40)
    whole = of(NUMBERS).dropped(x, local=False)
    assert of(NUMBERS, first=10).dropped(x[:, 10:25], local=False).equal(whole[:, 10:25])
    assert of(NUMBERS).dropped(x[1:3], local=True).equal(whole[1:3])
    some, local = torch.tensor([4, 0, 4]), torch.tensor([1])
    assert of(NUMBERS).at(some, local).dropped(x[some], local=False).equal(whole[some])
    assert of(NUMBERS).at(some, local).dropped(x[2:3], local=True).equal(whole[2:3])
    monkeypatch.setattr("megatron_tiedlora.adapters.low_rank.HOST_NUMBERS_AT_ONCE", 100)  # two tokens at a time
    assert of(NUMBERS).dropped(x, local=False).equal(whole)


def test_layers_targets_seeds_and_tokens_draw_their_own() -> None:
    numbers = list(range(200))
    x = torch.ones(200, 64)
    masks = [
        of(numbers, layer=layer, target=target).dropped(x, local=False) > 0
        for layer, target in ((1, "qkv"), (2, "qkv"), (1, "down_proj"), (11, "qkv"))
    ]
    other = InputDropout(
        token_keys(torch.arange(200), seed=12), masks[0], dropout_salt(12, layer=1, target="qkv"), 0, 0.25
    )
    masks += [other.dropped(x, local=False) > 0, masks[0].roll(1, 0), masks[0].roll(1, 1)]
    for index, one in enumerate(masks):
        assert abs(float(one.float().mean()) - 0.75) < 0.02
        for another in masks[:index]:  # 0.75^2 + 0.25^2 agree by chance
            assert abs(float((one == another).float().mean()) - 0.625) < 0.02


@pytest.mark.parametrize("p", [0.05, 0.5])
def test_rows_and_columns_are_like_chance(p: float) -> None:
    """Among 64 x 64 pairs of 4,096 numbers each, the largest correlation is what chance gives (5 sigma are 0.08)."""
    numbers = [n * 2**24 + t for n in range(64) for t in range(64)]
    mask = kept(numbers, seed=3, layer=1, target="qkv", width=64, probability=p).astype(float)
    correlations = np.corrcoef(mask.T) - np.eye(64)
    assert np.abs(correlations).max() < 0.08
    rows = np.corrcoef(kept(numbers[:64], seed=3, layer=1, target="qkv", width=4096, probability=p)) - np.eye(64)
    assert np.abs(rows).max() < 0.08
