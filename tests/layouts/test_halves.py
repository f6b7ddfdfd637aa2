"""The two halves of a micro-batch, computed alternately: their bits, and what is computed beside each message.

Their gradients are compared with the oracle in test_parallel_gradients.py, their messages with the plan in
test_traffic.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from support.forked_ranks import run_on_ranks
from support.gradient_worker import Case, build_adapter, build_stage, run_cases
from support.oracle_adapter import ALL_TARGETS
from support.task_files import refusal
from support.tiny_models import write_tiny_model

from megatron_tiedlora.adapters import tied_adapter
from megatron_tiedlora.adapters.adapter_groups import ONLY, AdapterGroup
from megatron_tiedlora.checkpoint.sources import find_model
from megatron_tiedlora.config.settings import make_settings
from megatron_tiedlora.model.batch import find_supervised
from megatron_tiedlora.model.layer_specs import layer_specs
from megatron_tiedlora.model.stage import Stage
from megatron_tiedlora.parallel.frozen_weight import FrozenWeight
from megatron_tiedlora.parallel.groups import Grid, ParallelGroups, RankGroup, TensorParallel
from megatron_tiedlora.planning.run_plan import plan_run

RECOMPUTES = ("none", "selective", "full")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("model") / "m", tokenizer=False, num_layers=3, head_dim=6)


# Bits -----------------------------------------------------------------------------------------------------------------


class _LaterStage(Stage):
    """A stage behind an adapted layer, whose input needs a gradient."""

    needs_input_gradient = True  # type: ignore[assignment]


def _outcome(stage: Stage, rows: slice, *, overlap: bool) -> dict[str, torch.Tensor]:
    """Loss, and the gradient of the hidden states that the stage gets, of some of four rows."""
    parts, number, length = stage.tensor_parallel.sequence_parts, 1 + overlap, 12
    draw = torch.Generator().manual_seed(3)
    hidden = torch.randn(4, length, stage.empty_hidden(1, parts).shape[-1], generator=draw).double()[rows]
    labels = torch.randint(0, 60, (4, length), generator=draw).masked_fill(torch.arange(length) < 5, -100)[rows]
    halves = hidden.chunk(number)
    if parts > 1:  # each half is sharded along its own sequences
        rank = stage.tensor_parallel.group.rank
        halves = tuple(half.flatten(0, 1)[None].chunk(parts, dim=1)[rank] for half in halves)
    inputs = torch.cat(halves, dim=int(parts > 1)).requires_grad_()
    stage.tensor_parallel = replace(stage.tensor_parallel, overlap=overlap)
    supervised = [find_supervised(own, parts) for own in labels.chunk(number)]
    loss: Any = stage(inputs, torch.arange(length).expand(len(labels), -1), supervised)
    loss.backward()
    assert isinstance(inputs.grad, torch.Tensor)
    return {"loss": loss.detach(), "gradient": inputs.grad}


def run_bits(case: Case, grid: Grid, groups: ParallelGroups) -> float:
    """The blocks and the head on a micro-batch in two halves, and on each half alone. Returns the largest gradient."""
    adapter: Any = build_adapter(case, grid)
    stage = build_stage(case, AdapterGroup({ONLY: adapter}), grid, groups)
    stage.layers.pop(str(stage.embedding))
    stage.embedding, stage.__class__ = None, _LaterStage
    together = _outcome(stage, slice(None), overlap=True)
    first, second = (_outcome(stage, rows, overlap=False) for rows in (slice(0, 2), slice(2, 4)))
    assert torch.equal(together["loss"], first["loss"] + second["loss"])
    halves = torch.cat((first["gradient"], second["gradient"]), int(case.sequence_parallel))
    assert torch.equal(together["gradient"], halves)
    return float(halves.abs().max())


def run_all_bits(cases: list[Case]) -> list[float]:
    return run_cases(cases, run_bits)


@pytest.mark.distributed
def test_halves_have_the_bits_of_two_micro_batches(folder: Path, tmp_path: Path) -> None:
    cases = [
        Case(folder, (2, 1, 1), targets=targets, sequence_parallel=cut, recompute=recompute)
        for targets, cut, recompute in product((("qkv",), ALL_TARGETS), (True, False), RECOMPUTES)
    ]
    found = run_on_ranks(run_all_bits, cases, ranks=2, folder=tmp_path)
    assert all(largest > 1e-6 for of_rank in found for largest in of_rank)


# What is computed beside a message ------------------------------------------------------------------------------------


@dataclass
class _Work:
    """A message on its way."""

    log: list[tuple[str, int]]
    number: int

    def wait(self) -> None:
        self.log.append(("wait", self.number))


@dataclass(frozen=True)
class _LoggedGroup(RankGroup):
    """Two ranks, of which the other one is not there. What is sent is logged, and how: with or without a wait."""

    log: list[tuple[str, int]] = field(default_factory=list)

    def _send(self, async_op: bool) -> Any:
        self.log.append(("send" if async_op else "blocks", len(self.log)))
        return _Work(self.log, len(self.log) - 1) if async_op else None

    def all_reduce_(self, tensor: Any, op: Any = None, *, async_op: bool = False) -> Any:
        return self._send(async_op)

    def all_gather_into(self, gathered: Any, tensor: Any, *, async_op: bool = False) -> Any:
        gathered.copy_(torch.cat([tensor] * 2))
        return self._send(async_op)

    def reduce_scatter_into(self, mine: Any, parts: Any, *, async_op: bool = False) -> Any:
        mine.copy_(parts[: len(mine)])
        return self._send(async_op)


def _logged(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    *,
    cut: bool,
    recompute: str,
    layers: tuple[int, ...] = (1, 2, 3),
    overlap: bool = True,
    targets: tuple[str, ...] = ALL_TARGETS,
) -> list[tuple[str, int]]:
    """Messages, waits and matmuls with frozen weights of a forward and a backward pass, in their order."""
    log: list[tuple[str, int]] = []
    shape = find_model(str(folder)).shape
    group = _LoggedGroup(None, 0, 2, log)
    config = tied_adapter.make_adapter_config(
        "tl6", rank=4, layers=layers, targets=tied_adapter.targets_of(shape, targets), seed=0
    )
    adapter = tied_adapter.TiedAdapter(tied_adapter.AdapterShard(config, layers, 0, 2))
    parallel = TensorParallel(group, cut, overlap)
    specs = layer_specs(shape, dtype=torch.float32, tp_size=2)
    stage = Stage(specs, adapter, tensor_parallel=parallel, recompute=recompute)
    draw = torch.Generator().manual_seed(1)
    for parameter in stage.parameters():
        parameter.data = 0.1 * torch.randn(parameter.shape, generator=draw)
    for name in ("times", "times_transposed"):
        real = getattr(FrozenWeight, name)

        def logged(self: Any, *arguments: Any, real: Any = real, **keywords: Any) -> Any:
            log.append(("matmul", len(log)))
            return real(self, *arguments, **keywords)

        monkeypatch.setattr(FrozenWeight, name, logged)
    tokens = torch.arange(2 * 16).view(2, 16) % 50
    loss: Any = stage(tokens, torch.arange(16).expand(2, -1), tokens)
    loss.backward()
    return log


def _alone(log: list[tuple[str, int]]) -> int:
    """How many messages have no matmul between their start and their wait. Each message is waited for, once."""
    sent, waited = ([number for kind, number in log if kind == word] for word in ("send", "wait"))
    assert sent and sorted(sent) == sorted(waited) and len(set(sent)) == len(sent)
    places = ((log.index(("send", number)), log.index(("wait", number))) for number in sent)
    return sum(all(kind != "matmul" for kind, _ in log[start:stop]) for start, stop in places)


@pytest.mark.parametrize(
    ("recompute", "cut", "most"),
    [("none", True, 5), ("selective", True, 5), ("none", False, 1), ("selective", False, 1)],
)
def test_a_matmul_of_the_other_half_is_beside_each_message(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recompute: str, cut: bool, most: int
) -> None:
    """In both passes, for any number of layers. It is the other half's: what this half could compute needs the message.

    Alone are the first and the last message of each pass, and in the backward pass another one: of the first layer,
    which needs no gradient of its input.
    """
    longer, blocking = write_tiny_model(tmp_path / "m", tokenizer=False, num_layers=5, head_dim=6), set[int]()
    for model, layers in ((folder, (1, 2, 3)), (longer, (1, 2, 3, 4, 5))):
        with monkeypatch.context() as patch:
            log = _logged(model, patch, cut=cut, recompute=recompute, layers=layers)
            assert _alone(log) == most, layers
            blocking.add(sum(kind == "blocks" for kind, _ in log))
    assert len(blocking) == 1, "no message between the embedding and the last attention is waited for at once"


@pytest.mark.parametrize(("cut", "most"), [(True, 5), (False, 2)])
def test_a_recomputed_layer_begins_and_ends_alone(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: bool, most: int
) -> None:
    """With full recompute, both halves of a layer are recomputed together: at most five messages a layer are alone."""
    longer = write_tiny_model(tmp_path / "m", tokenizer=False, num_layers=5, head_dim=6)
    few, many = (
        _alone(_logged(model, monkeypatch, cut=cut, recompute="full", layers=tuple(range(1, number + 1))))
        for model, number in ((folder, 3), (longer, 5))
    )
    assert many - few <= 2 * most


@pytest.mark.parametrize(("recompute", "cut"), product(RECOMPUTES, (True, False)))
def test_halves_save_no_more(folder: Path, monkeypatch: pytest.MonkeyPatch, recompute: str, cut: bool) -> None:
    """Bytes between the passes, each storage once, but for the indices of supervised positions. An adapted MLP of the
    last layer would add the gradients of its factors once more, as the tail of each half saves its own."""

    def saved(overlap: bool) -> int:
        found: dict[int, Any] = {}

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.is_floating_point():
                found[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
            return tensor

        with monkeypatch.context() as patch, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            _logged(folder, patch, cut=cut, recompute=recompute, overlap=overlap, targets=("qkv",))
        return sum(storage.nbytes() for storage in found.values())

    assert 0 < saved(True) <= saved(False)


# The flag -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "--overlap halves hides the messages of --tensor_parallel, which is 1"),
        ({"tensor_parallel": 2, "micro_batch_size": 1}, "2, and there are 1. Give an even --micro_batch_size"),
        ({"tensor_parallel": 2, "micro_batch_size": 2, "ds_config": "zero3.json"}, "cannot be combined with ZeRO-3"),
    ],
)
def test_what_cannot_be_halved_is_refused(given: dict[str, object], words: str) -> None:
    same = {"model": "llama2-7b", "task": "demo", "overlap": "halves", "global_batch_size": 8}
    settings = make_settings({**same, **given})
    assert words in refusal(lambda: plan_run(settings, rank=0, world_size=4))


@pytest.mark.parametrize(("batch", "rows"), [(8, 4), (4, 2), (12, 2), (20, 2)])
def test_the_default_rows_are_even(batch: int, rows: int) -> None:
    given = {"model": "llama2-7b", "task": "demo", "overlap": "halves", "tensor_parallel": 2}
    plan = plan_run(make_settings({**given, "global_batch_size": batch}), rank=0, world_size=4)
    assert plan.batches.micro_batch_size == rows, "of a rank's samples, which are half of all"
