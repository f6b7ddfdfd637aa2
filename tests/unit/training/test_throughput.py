"""Tokens a second, MFU, padding and memory: by hand, and in the rows and at the end of real runs at several cuts."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import psutil
import pytest
import torch
from support.run_files import metrics
from support.run_helpers import Base, Ended, run
from support.run_preludes import whole_run

from megatron_tiedlora.adapters.tied_adapter import make_adapter_config, targets_of
from megatron_tiedlora.base.shapes import ModelShape
from megatron_tiedlora.data.loader import TrainingStep
from megatron_tiedlora.data.token_dataset import sample_indices
from megatron_tiedlora.model.families import shape_from_hf
from megatron_tiedlora.planning.machines import listed_peak
from megatron_tiedlora.training import throughput
from megatron_tiedlora.training.throughput import (
    Meter,
    Peak,
    find_peak,
    matmul_rate,
    measured_peak,
    peak_memory_bytes,
    resident_bytes,
    timed,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SLACK = 2**20  # Linux sums resident pages over processors only now and then


def operations(shape: Mapping[str, int], rank: int, lengths: list[int], supervised: list[int]) -> int:
    """What tl6 in all layers takes on samples of these lengths, one by one: forward and backward, weights frozen."""
    d, f, layers = shape["hidden_size"], shape["intermediate_size"], shape["num_hidden_layers"]
    width = d // shape["num_attention_heads"]
    o = d + 2 * width * shape["num_key_value_heads"]
    total = 0
    for length, labels in zip(lengths, supervised, strict=True):
        for layer in range(1, layers + 1):
            after = labels if layer == layers else length
            total += 2 * 2 * after * (d * d + 3 * d * f)  # output, gate, up, down; and as much for their inputs
            total += (1 if layer == 1 else 2) * 2 * length * d * o  # nothing below layer 1 needs a gradient
            total += 3 * 2 * length**2 * d  # scores and mixing, causal; twice that backward
            total += 6 * length * rank * (d + o) - (2 * length * rank * d if layer == 1 else 0)
        total += 2 * 2 * labels * d * shape["vocab_size"]
    return total


# By hand ----------------------------------------------------------------------------------------------------------

SHAPE = {
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 20,
}


def make_meter(peak: float) -> Meter:
    config: ModelShape = shape_from_hf({"model_type": "llama", **SHAPE})
    adapter = make_adapter_config("tl6", rank=3, layers=(1, 2), targets=targets_of(config), seed=0)
    return Meter(config, adapter, Peak(peak, "made up"))


def make_step(lengths: list[int], supervised: list[int], *, positions: int) -> TrainingStep:
    sizes = sum(supervised), sum(lengths), tuple(lengths), positions
    return TrainingStep((), *sizes, largest=(), consumed_samples=0)


def test_the_rates_of_a_step() -> None:
    """Samples of 5 and 3 tokens in two rows of 8: half of the 16 positions are padding."""
    flops = operations(SHAPE, 3, [5, 3], [2, 1])
    # Products 2 x 2 x 8 x (64 + 288) and 2 x 2 x 3 x 352; QKV 3 x 2 x 8 x 8 x 16; 2 layers x 6 x 34 x 8 of attention;
    # adapter 2 x 6 x 8 x 3 x 24 - 2 x 8 x 3 x 8; head 4 x 3 x 160.
    assert flops == 11264 + 4224 + 6144 + 3264 + 6912 - 384 + 1920
    rates = make_meter(1e6).add(7, make_step([5, 3], [2, 1], positions=16), 0.5)
    assert rates == {
        "tokens_per_second": 16.0,
        "supervised_tokens_per_second": 6.0,
        "mfu": pytest.approx(flops / 0.5 / 1e6, rel=1e-12),
        "padding": 0.5,
    }


def test_the_mean_is_over_time_and_leaves_out_the_first_step() -> None:
    meter = make_meter(1e6)
    meter.add(11, make_step([2], [1], positions=100), 1000.0)
    assert meter.mean() is None and meter.steps is None
    meter.add(12, make_step([5, 3], [2, 1], positions=16), 0.5)
    assert meter.steps == (12, 12)
    meter.add(13, make_step([4], [3], positions=8), 1.5)
    assert meter.steps == (12, 13)
    flops = operations(SHAPE, 3, [5, 3, 4], [2, 1, 3])
    assert meter.mean() == {
        "tokens_per_second": 6.0,  # and not (16 + 4 / 1.5) / 2
        "supervised_tokens_per_second": 3.0,
        "mfu": pytest.approx(flops / 2 / 1e6, rel=1e-12),
        "padding": 0.5,
    }


def test_no_step_is_faster_than_the_peak() -> None:
    """One that is shows that a measured peak is too low; a data sheet's stays, since then our count would be wrong."""
    step, flops = make_step([5, 3], [2, 1], positions=16), operations(SHAPE, 3, [5, 3], [2, 1])
    meter = make_meter(1e4)
    assert [meter.add(number, step, 1.0)["mfu"] for number in (1, 2)] == [1.0, 1.0]
    assert meter.add(3, step, 4.0)["mfu"] == 0.25 and meter.peak == Peak(flops, throughput.FASTEST_STEP)
    listed = make_meter(1e4)
    listed.peak = Peak(1e4, throughput.DATA_SHEET)
    assert listed.add(1, step, 1.0)["mfu"] == flops / 1e4 > 1


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A100 80GB PCIe", 312.0),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA L40S", 362.1),
        ("NVIDIA L4", 121.0),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA GB200", 2500.0),
        ("NVIDIA L40", None),  # neither L4 nor L40S
        ("NVIDIA H100", None),  # of which kind?
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),  # a part of one
        ("NVIDIA GeForce RTX 4090", None),
        ("AMD Instinct MI300X", None),
    ],
)
def test_peaks_of_data_sheets(name: str, tera: float | None) -> None:
    assert listed_peak(name) == (None if tera is None else pytest.approx(tera * 1e12, rel=1e-12))


def test_which_peaks_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(throughput, "measured_peak", lambda device, dtype: 5.0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert find_peak(CUDA, torch.bfloat16) == (pytest.approx(989.4e12), "data sheet")
    assert find_peak(CUDA, torch.float32) == (5.0, "measured")
    assert find_peak(CPU, torch.bfloat16) == (5.0, "measured")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA GeForce RTX 4090")
    assert find_peak(CUDA, torch.bfloat16) == (5.0, "measured")


def test_a_products_rate_is_of_its_best_time(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = iter((0.5, 0.25, 1.0))

    def scripted(step: Callable[[], Any], device: torch.device) -> float:
        assert step().shape == (4, 6)
        return next(taken)

    monkeypatch.setattr(throughput, "timed", scripted)
    assert matmul_rate(4, 5, 6, dtype=torch.float32, device=CPU, repeats=3) == 2 * 4 * 5 * 6 / 0.25


@pytest.mark.parametrize("peak", [1e12, 1e15])
def test_measuring_grows_to_a_product_that_can_be_timed(monkeypatch: pytest.MonkeyPatch, peak: float) -> None:
    """At 1e12 FLOP/s 2048 rows take 17 ms, still too short, and 4096 take 137 ms; at 1e15 they go no further."""
    sizes, clock = [], iter(step * 0.02 for step in range(100))

    def scripted(rows: int, inner: int, columns: int, **_: Any) -> float:
        assert rows == inner == columns
        sizes.append(rows)
        return peak if rows == 2048 else 0.9 * peak

    monkeypatch.setattr(throughput, "matmul_rate", scripted)
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: next(clock))
    assert measured_peak(CPU, torch.float32) == peak
    assert sizes[:5] == [256, 512, 1024, 2048, 4096] and set(sizes[5:]) == {4096} and len(sizes) < 15


def test_measuring_leaves_the_random_stream_alone() -> None:
    state = torch.get_rng_state()
    for dtype in (torch.float32, torch.bfloat16):
        assert 1e7 < measured_peak(CPU, dtype) < 1e15
    assert torch.equal(torch.get_rng_state(), state)


def test_time_runs_to_the_end_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append("end"))
    timed(lambda: waited.append("step"), CUDA)
    assert waited == ["step", "end"]
    timed(lambda: None, CPU)
    assert waited == ["step", "end"]


def test_memory_is_in_bytes_and_keeps_its_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    resident = psutil.Process().memory_info().rss
    assert resident_bytes("VmRSS") == pytest.approx(resident, rel=0.01)
    size = 2**26
    before = peak_memory_bytes(CPU)
    held = torch.ones((before - resident + size) // 4)
    after = peak_memory_bytes(CPU)
    assert size / 2 < after - before < 2 * size
    del held
    assert peak_memory_bytes(CPU) > after - SLACK
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 17)
    assert peak_memory_bytes(CUDA) == 17
    assert resident_bytes("VmNone") is None
    monkeypatch.setattr(throughput, "resident_bytes", lambda name: None)  # a Linux kernel may not tell either
    monkeypatch.setattr(throughput.resource, "getrusage", lambda who: type("Usage", (), {"ru_maxrss": 19}))
    for platform, size in (("darwin", 19), ("linux", 19 * 1024)):
        monkeypatch.setattr(throughput.sys, "platform", platform)
        assert peak_memory_bytes(CPU) == size


# In runs ------------------------------------------------------------------------------------------------------------

PEAK = 1e10  # of each rank, in place of a measured one
STEPS = 6
RUNS: dict[str, dict[str, Any]] = {
    "one": {},
    "dp": {"ranks": 2},
    "tp-packed": {"ranks": 2, "tensor_parallel": 2, "packing": True, "micro_batch_size": 1},
    "pp-recompute": {
        **{"ranks": 2, "pipeline_parallel": 2, "ds_config": "zero1.json"},
        **{"recompute": "full", "micro_batch_size": 4},
    },
}


def _fixed_peak() -> None:
    whole_run()
    throughput.measured_peak = lambda device, dtype: PEAK


@dataclass(frozen=True)
class Ran:
    """A run's training rows and what it printed; `num_ranks` had a peak each."""

    rows: list[dict[str, Any]]
    ended: Ended
    num_ranks: int

    def seconds(self, row: Mapping[str, Any]) -> float:
        return float(row["supervised_tokens"] / row["supervised_tokens_per_second"])

    def tokens(self, row: Mapping[str, Any]) -> float:
        return float(row["tokens_per_second"] * self.seconds(row))

    def flops(self, row: Mapping[str, Any]) -> float:
        return float(row["mfu"] * self.seconds(row) * PEAK * self.num_ranks)


@pytest.fixture(scope="module")
def ran(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Ran]:
    """A run by its name in RUNS; each starts once."""
    folder = tmp_path_factory.mktemp("runs")

    @functools.cache
    def start(name: str) -> Ran:
        settings = {"max_steps": STEPS, "eval_interval": STEPS, "packing": False, **RUNS[name]}
        ended = run(base, folder / name, prelude=_fixed_peak, **settings)
        return Ran(metrics(folder / name), ended, RUNS[name].get("ranks", 1))

    return start


def samples_of(base: Base, step: int) -> tuple[list[int], list[int]]:
    """Tokens and supervised tokens of a step's samples; the tokeniser has a token for each byte."""
    rows = [json.loads(line) for line in base.train.read_text().splitlines()]
    chosen = [rows[index] for index in sample_indices(len(rows), seed=5, consumed=4 * (step - 1), count=4)]
    supervised = [len(" " + row["completion"]) + 1 for row in chosen]  # with EOS
    return [1 + len(row["prompt"]) + labels for row, labels in zip(chosen, supervised, strict=True)], supervised


def positions_of(lengths: list[int], rows: int) -> int:
    """Sorted by length, in micro-batches of some rows, each filled up to its longest and that to a multiple of 8."""
    lengths = sorted(lengths)
    longest = [max(lengths[start : start + rows]) for start in range(0, len(lengths), rows)]
    return sum(rows * ((length + 7) // 8 * 8) for length in longest)


@pytest.mark.distributed
@pytest.mark.parametrize("name", RUNS)
def test_rows_say_what_the_samples_are(base: Base, ran: Callable[[str], Ran], name: str) -> None:
    """Tokens, operations and padding of every step, exactly, at any layout."""
    found, shape = ran(name), json.loads((base.model / "config.json").read_text())
    assert [row["step"] for row in found.rows] == list(range(1, STEPS + 1))
    paddings = []
    for row in found.rows:
        lengths, supervised = samples_of(base, row["step"])
        assert row["supervised_tokens"] == sum(supervised)
        assert found.tokens(row) == pytest.approx(sum(lengths), rel=1e-12)
        assert found.flops(row) == pytest.approx(operations(shape, 3, lengths, supervised), rel=1e-12)
        padded = positions_of(lengths, RUNS[name].get("micro_batch_size", 2))
        paddings.append(1 - sum(lengths) / padded)
        if "packed" in name:
            paddings[-1] = row["padding"]  # which samples share a row is another test's
        assert row["padding"] == pytest.approx(paddings[-1], abs=1e-12)
    assert len(set(paddings)) > STEPS // 2 and 0 < min(paddings) < max(paddings) < 1
    peaks = [row["peak_memory_bytes"] for row in found.rows]
    assert all(later > peak - SLACK for peak, later in pairwise(peaks)) and all(isinstance(peak, int) for peak in peaks)
    assert 5e7 < peaks[0] < 1e11, "a process that has imported torch"


@pytest.mark.distributed
def test_packing_has_less_padding(ran: Callable[[str], Ran]) -> None:
    paddings = [[row["padding"] for row in ran(name).rows] for name in ("tp-packed", "pp-recompute")]
    assert sum(paddings[0]) < sum(paddings[1])


@pytest.mark.distributed
@pytest.mark.parametrize("name", ["one", "dp"])
def test_the_end_tells_the_mean(ran: Callable[[str], Ran], name: str) -> None:
    found = ran(name)
    output, counted = found.ended.outputs[0], found.rows[1:]
    seconds = sum(map(found.seconds, counted))
    (line,) = [line for line in output.splitlines() if line.startswith("speed ")]
    numbers = re.fullmatch(
        rf"speed +([\d,]+) tokens/s, ([\d,]+) of them supervised; MFU ([\d.]+)% of {10 * found.num_ranks} GFLOP/s"
        r" \(measured\); padding ([\d.]+)%; steps 2 to 6",
        line,
    )
    assert numbers is not None, line
    tokens, supervised, mfu, padding = (float(number.replace(",", "")) for number in numbers.groups())
    assert tokens == pytest.approx(sum(map(found.tokens, counted)) / seconds, abs=0.51)
    assert supervised == pytest.approx(sum(row["supervised_tokens"] for row in counted) / seconds, abs=0.51)
    assert mfu / 100 == pytest.approx(sum(map(found.flops, counted)) / seconds / PEAK / found.num_ranks, abs=6e-4)
    assert min(row["padding"] for row in counted) < padding / 100 < max(row["padding"] for row in counted)
    assert re.search(r"^memory +[\d.]+ [MG]B at the peak, including scores, rank 0$", output, re.MULTILINE), output
    assert "tokens/s, MFU " in found.ended.errors[0], "the progress bar"
