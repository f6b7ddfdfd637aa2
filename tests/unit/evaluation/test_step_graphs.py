"""Decoding by graphs that are captured and replayed: the tokens, and the bits of all logits, are those without them."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from support.forked_ranks import groups_of, run_on_ranks
from support.native_files import native_adapter
from support.oracle import OracleConfig
from support.recorded_graphs import RecordedGraph, RecordedSteps, recorded
from support.tiny_decoders import build, calls_of
from support.tiny_models import random_adapter, write_tiny_model

from megatron_tiedlora.base import shapes
from megatron_tiedlora.checkpoint.load_model import load_model
from megatron_tiedlora.checkpoint.sources import find_model
from megatron_tiedlora.evaluation import decoder as decoding
from megatron_tiedlora.evaluation import generate as module
from megatron_tiedlora.evaluation import sampling, step_graphs
from megatron_tiedlora.evaluation.decoder import Decoder
from megatron_tiedlora.evaluation.generate import Prompts, RowSettings, ending_log_likelihoods, generate
from megatron_tiedlora.evaluation.step_graphs import StepGraphs, find_step_graphs
from megatron_tiedlora.model.attention import rotation_table
from megatron_tiedlora.model.stage import Stage
from megatron_tiedlora.parallel.groups import Grid, ParallelGroups, RankGroup
from megatron_tiedlora.training import loop

NEW = 19  # tokens
ALONE = Grid(0, 1)
GPU = torch.device("cuda")
Rows = list[list[int]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose four query heads share two key heads."""
    return write_tiny_model(tmp_path_factory.mktemp("graphs") / "model", tokenizer=False)


def prompts(seed: int, count: int = 6, longest: int = 30) -> Rows:
    draw = random.Random(seed)
    lengths = [1, longest, *(draw.randint(2, longest) for _ in range(count - 2))]
    return [[draw.randint(3, 319) for _ in range(length)] for length in lengths]


def decode(decoder: Decoder, batch: Rows, *, new: int = NEW, ends: tuple[int, ...] = ()) -> Rows:
    return generate(decoder, [Prompts(batch, [RowSettings(ends, new)] * len(batch))])[0]


def logits_of(monkeypatch: pytest.MonkeyPatch, run: Callable[[], Any]) -> list[torch.Tensor]:
    """All logits that tokens are chosen by."""
    found: list[torch.Tensor] = []
    choose = sampling.choose
    with monkeypatch.context() as patch:
        patch.setattr(module, "choose", lambda *given: found.append(given[0].clone()) or choose(*given))
        run()
    return found


@pytest.mark.parametrize("granularity", [1, 4, 8])
def test_logits_have_the_same_bits(folder: Path, monkeypatch: pytest.MonkeyPatch, granularity: int) -> None:
    """Over the borders where more keys are read, for rows of different lengths. Every step after the second with as
    many keys is a replay, which calls no layer."""
    plain, ours = (build(folder, grid=ALONE) for _ in range(2))
    graphs, plain.granularity = recorded(ours, granularity=granularity), granularity
    batch = prompts(0)
    expected = logits_of(monkeypatch, lambda: decode(plain, batch))
    with calls_of(ours) as calls:
        found = logits_of(monkeypatch, lambda: decode(ours, batch))
    assert len(found) == len(expected) and all(map(torch.equal, found, expected))
    read = [min(-(-filled // granularity) * granularity, 30 + NEW) for filled in range(31, 30 + NEW)]
    again = len(read) - len(set(read))
    assert graphs.num_replays == again and (again > 9) == (granularity > 1)
    assert len(graphs.captured) == sum(read.count(number) > 1 for number in set(read))
    prompt_calls = len(expected) - len(read)
    assert len(calls) == prompt_calls + len(set(read)) + len(graphs.captured)
    usual = build(folder, grid=ALONE)
    assert usual.granularity == 1 and usual.graphs is None  # a CPU reads what is filled
    assert decode(usual, batch) == decode(ours, batch)


def test_rows_that_end_early(folder: Path) -> None:
    plain, ours = (build(folder, grid=ALONE) for _ in range(2))
    recorded(ours, granularity=8)
    batch = prompts(3, count=9)
    free = decode(plain, batch)
    ends = free[4][5], free[0][0]
    expected = decode(plain, batch, ends=ends)
    assert decode(ours, batch, ends=ends) == expected and len({len(row) for row in expected}) > 1


def test_later_batches_have_the_graphs_of_the_first(folder: Path) -> None:
    """If they have as many rows and are no longer; whatever the first left in the caches."""
    plain, ours = (build(folder, grid=ALONE) for _ in range(2))
    graphs = recorded(ours, granularity=64)
    assert decode(ours, prompts(0)) == decode(plain, prompts(0))
    assert len(graphs.captured) == 1 and len(ours.idle) == 1
    for cache in ours.idle[0]:
        cache.keys.fill_(torch.nan)
        cache.values.fill_(torch.nan)
    replays = graphs.num_replays
    shorter = prompts(1, longest=25)
    assert decode(ours, shorter) == decode(plain, shorter)
    assert len(graphs.captured) == 1 and graphs.num_replays == replays + NEW - 1
    assert not any(cache.filled for cache in ours.take_caches(6, 49))


@pytest.mark.parametrize("other", [{"count": 4}, {"longest": 31}])
def test_a_batch_of_another_shape_frees_what_it_cannot_use(folder: Path, other: dict[str, int]) -> None:
    plain, ours = (build(folder, grid=ALONE) for _ in range(2))
    graphs = recorded(ours, granularity=64)
    decode(ours, prompts(0))
    first = graphs.captured.pop()
    batch = prompts(2, **other)
    assert decode(ours, batch) == decode(plain, batch)
    assert len(graphs.captured) == 1 and graphs.captured[0].inputs[0] is not first.inputs[0]
    assert len(ours.idle) == 1 and len(ours.idle[0][0].keys) == len(batch) and graphs.num_kept == 1
    ending_log_likelihoods(ours, [([5, 6, 7], [[8, 9]])])
    assert not ours.idle and not graphs


def test_few_graphs_are_kept(folder: Path) -> None:
    plain, ours = (build(folder, grid=ALONE) for _ in range(2))
    graphs = recorded(ours, granularity=4, most=2)
    for _ in range(2):
        assert decode(ours, prompts(0)) == decode(plain, prompts(0))
        assert graphs.num_kept == 2
    assert len(graphs.captured) == 2 * 5


def test_a_decoder_and_its_graphs_are_freed_at_once(folder: Path) -> None:
    """A run decodes at each validation, and its next step needs the memory."""
    import gc
    import weakref

    decoder = build(folder, grid=ALONE)
    graphs = recorded(decoder, granularity=64)
    decode(decoder, prompts(0))
    graphs.captured.clear()
    caches = weakref.ref(decoder.idle[0][0].keys)
    gc.disable()
    try:
        del decoder, graphs
        assert caches() is None
    finally:
        gc.enable()


def test_several_adapters_of_which_some_have_ended(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, config = find_model(str(folder)), OracleConfig.from_folder(folder)
    adapters = {
        name: native_adapter(source, random_adapter(method, config, alpha=6, seed=seed))
        for seed, (name, method) in enumerate({"a": "tl6", "b": "lora"}.items())
    }
    plain, ours = (
        Decoder(load_model(source, adapters, dtype=torch.float32), ParallelGroups(), source.shape) for _ in range(2)
    )
    graphs, plain.granularity = recorded(ours, granularity=8), 8
    asked = [Prompts(prompts(0), [RowSettings((), 7)] * 6, "a")]
    asked.append(Prompts(prompts(1, longest=11), [RowSettings((), NEW)] * 6, "b"))
    expected = logits_of(monkeypatch, lambda: generate(plain, asked))
    found = logits_of(monkeypatch, lambda: generate(ours, asked))
    assert len(found) == len(expected) and all(map(torch.equal, found, expected))
    assert {len(found.inputs[0].flatten()) for found in graphs.captured} == {6, 12}  # of one adapter, and of both
    for name in adapters:  # the second has the caches of the first
        alone = [Prompts(prompts(2), [RowSettings((), NEW)] * 6, name)]
        assert generate(ours, alone) == generate(plain, alone)
    assert len({found.step.keywords["caches"][0].keys.data_ptr() for found in graphs.captured[-2:]}) == 1


def test_results_are_not_overwritten() -> None:
    """A stage may still send one while its next replay runs."""
    graphs, step = RecordedSteps(), lambda given: given * 2
    results = [graphs.run("key", step, torch.full((3,), 0.0))]
    assert graphs.lacks_some and graphs.capture("key", step, torch.ones(3)) and not graphs.lacks_some
    results += [graphs.run("key", step, torch.full((3,), float(number))) for number in range(1, 4)]
    assert [result.tolist() for result in results] == [[2.0 * number] * 3 for number in range(4)]
    assert graphs.num_replays == 3


def test_a_step_that_cannot_be_captured(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One line says so and why, and all steps run as without graphs. Nothing of them is kept, or tried again by the
    decoder of the next validation."""
    step_graphs._tell.cache_clear()
    plain, ours = (build(folder, grid=ALONE) for _ in range(2))
    graphs, predict, waits = recorded(ours, granularity=64), Stage.predict, []

    def predict_and_wait(self: Stage, *arguments: Any, **keywords: Any) -> torch.Tensor:
        found = predict(self, *arguments, **keywords)
        waits.append(float(found.sum()))
        return found

    monkeypatch.setattr(Stage, "predict", predict_and_wait)
    with calls_of(plain) as usual, calls_of(ours) as calls, caplog.at_level(logging.INFO, logger="megatron_tiedlora"):
        for _ in range(2):
            assert decode(ours, prompts(0)) == decode(plain, prompts(0))
            assert graphs.num_kept == 0 and not ours.idle
    assert plain.stage.can_be_captured and not ours.stage.can_be_captured
    with monkeypatch.context() as patch:
        patch.setattr(decoding, "find_step_graphs", lambda *_, **__: graphs)
        assert [Decoder(one.stage, ParallelGroups(), one.shape).graphs for one in (plain, ours)] == [graphs, None]
    (line,) = caplog.messages
    assert "without CUDA graphs" in line and "_local_scalar_dense" in line and "\n" not in line
    assert len(calls) == len(usual) + 1


def test_the_frequencies_of_a_rotation_come_from_the_host_only_once() -> None:
    """Those of a prompt are there when its answer is captured."""
    heads = shapes.HeadShape(4, 2, 16, shapes.RopeShape())
    yarn = shapes.YarnScaling(4.0, 32, 32.0, 1.0, True, 1.1)
    for scaling in (shapes.LongRopeScaling(tuple(1.5 + i for i in range(8)), 1.2), yarn):
        own = replace(heads, rope=shapes.RopeShape(scaling=scaling))
        expected = rotation_table(torch.arange(5)[None], own, torch.float32)
        positions = torch.arange(5)[None]
        with RecordedGraph() as graph:
            found = rotation_table(positions, own, torch.float32)
        graph.replay()
        assert all(map(torch.equal, found, expected))


# Where it can be captured ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("calls_together", "backend", "register", "reason"),
    [
        (True, "nccl", "0", "ZeRO-3"),
        (False, "gloo", "0", "go over gloo"),
        (False, "nccl", "1", "export NCCL_GRAPH_REGISTER=0"),
        (False, "nccl", "0", ""),
        (False, "cpu:gloo,cuda:nccl", "0", ""),
    ],
)
def test_which_gpus_capture(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    calls_together: bool,
    backend: str,
    register: str,
    reason: str,
) -> None:
    """Others say so in one line, on one rank; a CPU says nothing."""
    monkeypatch.setenv("NCCL_GRAPH_REGISTER", register)
    step_graphs._tell.cache_clear()
    monkeypatch.setattr(step_graphs.distributed, "get_backend", lambda _: backend)
    with caplog.at_level(logging.INFO, logger="megatron_tiedlora"):
        for told, rank in ((False, 1), (True, 0), (True, 0)):
            groups = ParallelGroups(tensor=RankGroup(None, rank, 2))
            found = find_step_graphs(GPU, groups, calls_together=calls_together)
            assert isinstance(found, StepGraphs) == (not reason)
            assert find_step_graphs(torch.device("cpu"), groups, calls_together=calls_together) is None
            assert len(caplog.messages) == (told and bool(reason)) and all(reason in line for line in caplog.messages)


def test_each_chunk_of_many_stages_keeps_two_graphs() -> None:
    """Else those of 17 chunks would be forgotten before they are captured, and no line would say so."""
    found = find_step_graphs(GPU, ParallelGroups(pipeline=RankGroup(None, 0, 17)), calls_together=False)
    assert found is not None
    ours = RecordedSteps(most=found._most)
    for step in range(2):
        for chunk in range(17):
            ours.run((chunk, step), torch.neg, torch.ones(1))
    assert all(ours.capture((chunk, 1), torch.neg, torch.ones(1)) for chunk in range(17))
    assert len(ours.captured) == 17 and ours.num_kept == 34


class _FakeCuda:
    """PyTorch's allocator during captures that fail, as versions before and after pull request 180395 leave it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, ends: bool) -> None:
        self.in_use: list[tuple[int, int]] = []
        self.released: list[tuple[int, int]] = []
        monkeypatch.setattr(torch.cuda, "CUDAGraph", SimpleNamespace)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 7))
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: SimpleNamespace(device_index=3))
        monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())

        @contextmanager
        def capture(_graph: Any, *, pool: tuple[int, int], **_: Any) -> Iterator[None]:
            self.in_use.append(pool)
            try:
                yield
            finally:
                if ends:
                    self.in_use.remove(pool)

        def end(device: int, pool: tuple[int, int]) -> None:
            if device != 3 or pool not in self.in_use:
                raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
            self.in_use.remove(pool)

        monkeypatch.setattr(torch.cuda, "graph", capture)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end)
        monkeypatch.setattr(torch._C, "_cuda_releasePool", lambda _, pool: self.released.append(pool))


@pytest.mark.parametrize("ends", [True, False])
def test_the_memory_of_a_capture_that_fails_is_not_kept(monkeypatch: pytest.MonkeyPatch, ends: bool) -> None:
    cuda, graphs = _FakeCuda(monkeypatch, ends=ends), StepGraphs(GPU)

    def step(_: torch.Tensor) -> torch.Tensor:
        assert cuda.in_use == [(0, 7)]
        raise ValueError("not permitted")

    with pytest.raises(ValueError, match="not permitted"):
        graphs._capture(step, (torch.ones(1),))
    assert not cuda.in_use and cuda.released == ([] if ends else [(0, 7)])


def test_an_error_frees_the_graphs(folder: Path) -> None:
    """A communicator cannot end before them, and an error's traceback may hold the decoder."""
    graphs = recorded(decoder := build(folder, grid=ALONE), granularity=64)
    with pytest.raises(ValueError, match="other"), closing(decoder):
        decode(decoder, prompts(0))
        assert graphs and decoder.idle
        raise ValueError("other")
    assert not graphs and not decoder.idle


def test_a_validation_that_fails_closes_its_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[str] = []

    def answer(*_: Any, **__: Any) -> None:
        raise RuntimeError(f"in flight, {len(closed)} closed")

    decoder = SimpleNamespace(is_last=True, close=lambda: closed.append("graphs"))
    monkeypatch.setattr(loop, "Decoder", lambda *_, **__: decoder)
    monkeypatch.setattr(loop, "answer_all", answer)
    with pytest.raises(RuntimeError, match="in flight, 0 closed"):
        loop.Evaluation._answers(MagicMock(), [MagicMock()], {"": MagicMock()})
    assert closed == ["graphs"]


def _decode_rank(folder: str, world_size: int, tp: int, pp: int) -> dict[str, Any]:
    grid = Grid(torch.distributed.get_rank(), world_size, tp_size=tp, pp_size=pp)
    decoder = build(Path(folder), grid=grid)
    graphs = recorded(decoder, granularity=8)
    rows = [decode(decoder, prompts(seed)) for seed in (0, 1)]
    on_gpu = find_step_graphs(GPU, groups_of(grid), calls_together=False)
    return {"rows": rows, "replays": graphs.num_replays, "captures": on_gpu is not None}


@pytest.mark.distributed
@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2), (1, 4)])
def test_layouts(tmp_path: Path, tp: int, pp: int) -> None:
    """A stage that is replayed sends what it computed, and receives into the tensors that were captured. None has
    messages in flight when it captures. A GPU's messages over gloo cannot be captured."""
    folder = write_tiny_model(tmp_path / "model", tokenizer=False, num_layers=4)
    alone = build(folder, grid=ALONE)
    expected = [decode(alone, prompts(seed)) for seed in (0, 1)]
    for found in run_on_ranks(_decode_rank, str(folder), tp * pp, tp, pp, ranks=tp * pp, folder=tmp_path / "ranks"):
        assert found["rows"] == expected and found["replays"] > NEW
        assert found["captures"] == (tp == 1)
