"""What `tiedlora check-gpu` measures, tiny and on a CPU: layers, matmuls, attention, messages, traces, the driver."""

from __future__ import annotations

import gc
import gzip
import json
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType

from megatron_tiedlora.base.presets import PRESETS
from megatron_tiedlora.model.stage import Stage
from megatron_tiedlora.planning.machines import read_machine
from megatron_tiedlora.runtime import launch_env, process_group
from megatron_tiedlora.selfcheck import (
    machine_constants,
    parts,
    running,
    step_bench,
    test_attention,
    test_env,
    test_layers,
    test_ranks,
    test_speed,
    timing,
)

CPU = torch.device("cpu")
TINY = ("--random_weights", "--dtype=fp32", "--length=64", "--rows=1", "--supervised=1", "--compile=false")


class Told(dict[str, Any]):
    """What a check has recorded, and its warnings."""

    def __init__(self) -> None:
        super().__init__()
        self.warnings: list[str] = []

    def __call__(self, name: str, value: object) -> None:
        if name == parts.WARNING:
            self.warnings.append(str(value))
        else:
            self[name] = value


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
def model(tmp_path: Path) -> str:
    return running.write_small(tmp_path)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The only rank of a process group."""
    launch_env.prepare_environment()
    process_group.join_process_group(1.0, expected_ranks=1)
    yield
    process_group.leave_process_group()


# Layers ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tp_size", "flags"), [(1, ()), (2, ()), (1, ("--base=nf4",)), (1, test_layers.FORMATS["fp8"])]
)
def test_a_layer_is_the_difference_of_two_models(
    tp_size: int, flags: tuple[str, ...], model: str, told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int, int]] = []

    def seconds_of_call(step: Callable[[], object], device: torch.device) -> float:
        step()
        stage = step.args[0]  # type: ignore[attr-defined]
        seen.append((len(stage.blocks), stage.tensor_parallel.group.size, stage.tensor_parallel.sequence_parts))
        return 0.01 + 0.002 * len(stage.blocks)

    monkeypatch.setattr(timing, "seconds_of_call", seconds_of_call)
    monkeypatch.setitem(PRESETS, model, {"num_hidden_layers": 40})
    monkeypatch.setattr(test_layers, "find_peak", lambda *_: SimpleNamespace(flops_per_second=1e9))
    test_layers.measure_layer(model, tp_size, (*TINY, *flags), CPU, told)
    assert seen == [(depth, tp_size, tp_size) for depth in test_layers.DEPTHS]
    assert told["ms of a layer"] == pytest.approx(2) and told["ms of embedding and head"] == pytest.approx(10)
    speed = told["tokens/s per GPU of 40 layers, without messages"]
    assert speed == pytest.approx(64 / (0.01 + 40 * 0.002) / tp_size)
    # 6 FLOPs per weight and token would be those of a full backward pass; frozen weights need 4, and all else is small.
    weights = running.small_shape().block.num_weights
    assert told["TFLOP/s of a layer"] * 1e12 / (64 * 4 * weights / 0.002 / tp_size) == pytest.approx(1.0, abs=0.2)
    assert told["share of the bf16 peak"] == pytest.approx(told["TFLOP/s of a layer"] * 1e3)
    assert not told.warnings, "they are not compiled, as asked"


def test_every_case_of_a_layer_can_be_planned() -> None:
    cases = [*test_layers.SHORT, *test_layers.LONG]
    for preset, tp_size, name in cases:
        flags = (*test_layers.FLAGS, *test_layers.FORMATS[name], f"--tensor_parallel={tp_size}")
        settings = running.step_settings(preset.replace("model", "llama2-7b"), *flags, "--num_layers=5")
        plan = step_bench.plan_benchmark(settings, world_size=tp_size)
        assert plan.layout.sequence_parallel == (tp_size > 1) and plan.layout.compiled
    assert {size for preset, size, _ in cases if preset == test_layers.LARGE} == {1, 2, 4, 8}
    assert {size for _, size in test_layers.SHARDS} == {1, 2, 4, 8} and {name for *_, name in cases} == {
        *test_layers.FORMATS
    }
    for preset in ("model", test_layers.LARGE):
        assert {name for one, _, name in test_layers.SHORT if one == preset} == {"bf16", "fp8 matmuls", "nf4"}


# Matmuls and constants ------------------------------------------------------------------------------------------------


def test_every_matmul_has_its_shape_and_distance_of_rows(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[tuple[int, ...], tuple[int, ...], int]] = []

    def seconds_of_call(step: Any, device: torch.device) -> float:
        one, other = step.args
        shapes.append((tuple(one.shape), tuple(other.shape), one.stride(0)))
        assert step().shape == (one.shape[0], other.shape[1])
        return 1e-6

    monkeypatch.setattr(timing, "seconds_of_call", seconds_of_call)
    qkv = running.small_shape().block.linears[0]
    test_layers.measure_linear(qkv, 2, 64, CPU, told)
    rows, width = qkv.out_size // 2, qkv.in_size
    expected = []
    for apart in (0, 8, 16):
        expected += [((64, width), (width, rows), width + apart), ((64, rows), (rows, width), rows + apart)]
    assert shapes[:6] == expected
    assert [pair[:2] for pair in shapes[6:]] == [
        *(((64, width), (width, 8)), ((64, 8), (8, rows)), ((8, 64), (64, width)), ((rows, 64), (64, 8)))
    ]
    (line,) = told.values()
    assert f"d + 8 {2 * 64 * rows * width / 1e6:.0f}" in line or "d + 8 0 (" in line  # TFLOP/s
    assert line.endswith("A x 1 us; B ax 1 us; dA 1 us; dB 1 us")


def test_constants_are_what_plan_measures_and_can_be_read(
    told: Told, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []

    def measure_machine(source: Any, device: torch.device, *, seconds: float) -> Any:
        asked.append(seconds)
        return machine_constants.CPU

    monkeypatch.setattr(machine_constants, "measure_machine", measure_machine)
    config: Any = SimpleNamespace(getoption=lambda *_: str(tmp_path))
    test_layers.test_constants(CPU, "llama2-7b", True, config, told)
    assert read_machine(tmp_path / told["for tiedlora plan --constants"]) == machine_constants.CPU
    assert asked == [test_layers.SECONDS[1]] and machine_constants.CPU.constants.keys() < told.keys()


# Attention, messages --------------------------------------------------------------------------------------------------


def test_attention_is_counted_as_the_planner_counts_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(test_attention, "seconds_of_call", lambda step, _: (step(), 1e-6)[1])
    route = test_attention.attention_routes(CPU, torch.float32, 128, test_attention.PLAIN)[test_attention.CHOSEN]
    flops = 2 * 64**2 * 32 * 128  # of one matmul over the scores below the diagonal, twice
    said = test_attention.speed(route, 64, 64, 1e12, CPU)
    assert said.startswith(
        f"forwards 0.001 ms = {flops / 1e6:.0f} TFLOP/s, backwards 0.001 ms = {2.5 * flops / 1e6:.0f}"
    )
    assert said.endswith(f"the planner's share {3 * flops / 2e-6 / 1e12:.3f}")
    packed = test_attention.speed(route, 64, 20, 1e12, CPU)
    share = 3 * flops * (3 * 20**2 + 4**2) / 64**2 / 2e-6 / 1e12
    assert packed.endswith(f"share {share:.3f}"), "scores between documents are not computed"


def test_messages_are_timed_alone_and_beside_a_matmul(alone: None) -> None:
    found = test_ranks.time_messages(CPU, 64)
    kinds = ("an all-gather", "a reduce-scatter")
    assert list(found) == ["ms of a matmul"] + [
        f"ms of {kind}{beside}" for kind in kinds for beside in ("", " beside a matmul")
    ]
    assert min(found.values()) > 0


def test_messages_are_timed_with_the_blocks_that_were_asked_for(
    told: Told, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[dict[str, str]] = []

    def run(self: test_ranks.Ranks, first: str, cases: Any, size: int, share: float) -> Any:
        assert (first, size, share) == (test_ranks.MESSAGES, 2, test_ranks.TIMED)
        given.append(self.variables)
        if self.variables.get("NCCL_MIN_CTAS") != "4":
            (self.folder / test_ranks.RESULT).write_text(json.dumps({"ms": 1.5}))
        return test_ranks.EndedRanks([0, 1], ["", "an error"], 0.0)

    monkeypatch.setattr(test_ranks.Ranks, "run", run)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    ranks = test_ranks.Ranks(2, {"A": "1"}, [], tmp_path, tmp_path, 100.0)
    for ctas in ("0", "8"):
        test_ranks.test_messages(ctas, ranks, told)
    assert given == [{"A": "1"}, {"A": "1", "NCCL_MIN_CTAS": "8"}] and told == {"ms": 1.5}
    with pytest.raises(AssertionError, match="an error"):  # not the result of another number of blocks
        test_ranks.test_messages("4", ranks, told)
    late = test_ranks.EndedRanks([None, 0], ["importing", ""], 0.0)
    monkeypatch.setattr(test_ranks.Ranks, "run", lambda *_, **__: late)
    with pytest.raises(pytest.skip.Exception, match="no time is left"):
        test_ranks.test_messages("4", ranks, told)


# Steps and traces -----------------------------------------------------------------------------------------------------


def test_a_trace_of_two_steps_is_small_and_can_be_read(model: str, told: Told, tmp_path: Path) -> None:
    with running.started(running.step_settings(model, *TINY, "--num_layers=1", "--micro_batches=2")) as run:
        test_speed.record_steps(run, tmp_path / test_speed.TRACE, told)
        before = run.train_step.finished
    events = json.loads(gzip.decompress((tmp_path / test_speed.TRACE).read_bytes()))["traceEvents"]
    assert sum(event.get("name") == "aten::embedding" for event in events) == 4, "two steps of two micro-batches"
    assert before and not told.warnings


def test_the_longest_kernels_are_first() -> None:
    def event(name: str, microseconds: float, device: DeviceType = DeviceType.CUDA, **more: Any) -> Any:
        return SimpleNamespace(
            name=name, device_type=device, time_range=SimpleNamespace(elapsed_us=lambda: microseconds), **more
        )

    found = timing.seconds_by_kernel(
        [
            *(event("short", 10), event("long", 20), event("short", 15), event("op", 100, DeviceType.CPU)),
            event("a step", 1000, is_user_annotation=True),
        ]
    )
    assert list(found.items()) == [("short", (pytest.approx(25e-6), 2)), ("long", (pytest.approx(20e-6), 1))]


def report(**changes: Any) -> dict[str, Any]:
    """What `measure_layout` finds on a GPU."""
    found = {
        **{"model": "llama2-70b", "seconds": [2.0], "tokens": 8192, "micro_batches": 2, "mfu": 0.5},
        **{"kernels": "compiled in 1.0 s", "layout": {"recompute": "none"}, "share_of_matmul": 0.7},
        **{"ranks": [{"peak": 2e9}], "kernel_seconds": {"matmul": 1.5, "attention": 0.5, "other": 0.0}},
    }
    return {**found, **changes}


def test_a_step_of_some_layers_tells_of_all_of_them(told: Told) -> None:
    test_speed.judge_step("70B in nf4", report(), {}, 20, told)
    assert told["tokens/s"] == 4096 and told["tokens/s with 80 layers, about"] == 1024
    assert told["of them"] == "matmul 75%, attention 25%" and told["most memory allocated"] == "2.00 GB"
    assert told["its kernels' time as a share of the step's time"] == 1.0 and not told.warnings


@pytest.mark.parametrize(
    ("said", "warns"),
    [("not compiled: RuntimeError: no gcc", True), ("not compiled", False), ("compiled in 2.0 s", False)],
)
def test_speeds_without_compiled_kernels_are_not_what_they_would_be(said: str, warns: bool, told: Told) -> None:
    test_speed.judge_step("not compiled", report(kernels=said), {}, 80, told)
    assert bool(told.warnings) == warns
    if warns:
        assert "python3-dev" in told.warnings[0] or "missing software" in told.warnings[0] or "gcc" in told.warnings[0]
        assert told.warnings[0].endswith("speeds are not what they would be")


def test_slow_steps_are_told(told: Told) -> None:
    seconds: dict[str, float] = {}
    test_speed.judge_step("1 x 4,096 tokens", report(mfu=0.3), seconds, 32, told)
    test_speed.judge_step("20 documents a row", report(tokens=4096), seconds, 32, told)
    assert told.warnings == [test_speed.SLOW_FIX, test_speed.PACKED_FIX]


def test_as_little_as_possible_is_recomputed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "release", lambda: None)
    free = 80e9
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, free))
    base = (*test_speed.BASE, *test_speed.FORMS["70B in nf4"].flags)
    assert test_speed.flags_to_fit("llama2-70b", 20, *base) == ("--num_layers=20", "--recompute=none")
    assert test_speed.flags_to_fit("llama2-70b", 80, *base) == ("--num_layers=80", "--recompute=selective")
    free = 20e9
    layers, how = test_speed.flags_to_fit("llama2-70b", 80, *base)  # not all of them fit
    assert how == "--recompute=full" and 10 < int(layers.removeprefix("--num_layers=")) < 80


def test_a_benchmark_leaves_no_model_behind(model: str, alone: None) -> None:
    """The next one needs its memory. The planner keeps some without data, and tests before this one may keep theirs."""

    def stages() -> list[Stage]:
        gc.collect()
        found = (one for one in gc.get_objects() if type(one) is Stage)
        return [one for one in found if not next(one.parameters()).is_meta]

    before = set(map(id, stages()))
    found, _ = step_bench.measure_layout(running.step_settings(model, *TINY, "--num_layers=1", "--repeats=1"))
    assert found is not None and found["ranks"][0]["as_predicted"]
    assert not [one for one in stages() if id(one) not in before]


@pytest.mark.parametrize("name", test_speed.FORMS)
def test_every_kind_of_step_can_be_planned(name: str) -> None:
    form = test_speed.FORMS[name]
    settings = running.step_settings(form.model or "llama2-7b", "--num_layers=2", *test_speed.BASE, *form.flags)
    plan = step_bench.plan_benchmark(settings, **form.changes)
    assert all(getattr(plan.settings, setting) == value for setting, value in form.changes.items())


# The driver -----------------------------------------------------------------------------------------------------------


def smi(folder: Path, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Put a program with the name of the driver's into the path."""
    program = folder / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{code}\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.setattr(parts, "gpu_name", lambda _: "GPU-1")


@pytest.mark.parametrize(
    ("active", "said"), [("0x0000000000000024", "power limit and heat (driver)"), ("0x0000000000000001", "not slowed")]
)
def test_the_state_of_a_gpu_names_what_slows_it(
    active: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    smi(tmp_path, monkeypatch, f'[ "$3" = --id=GPU-1 ] && echo "1200 MHz, 2619 MHz, 690.00 W, 71, {active}"')
    assert parts.gpu_state() == (
        "clocks.sm 1200 MHz, clocks.mem 2619 MHz, power.draw 690.00 W, temperature.gpu 71,"
        f" clocks_throttle_reasons.active {active} ({said})"
    )


def test_a_driver_that_says_nothing_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    smi(tmp_path, monkeypatch, 'echo "Field \\"x\\" is not a valid field"; echo more; exit 2')
    assert parts.gpu_state() == 'unknown: nvidia-smi: Field "x" is not a valid field'
    (tmp_path / "nvidia-smi").unlink()
    assert parts.ask_driver("clocks.sm").startswith("unknown: ") and "\n" not in parts.ask_driver("clocks.sm")


def test_segments_that_cannot_grow_are_told(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    for grow, warns in ((True, False), (False, True)):
        monkeypatch.setattr(
            torch.cuda, "memory_snapshot", lambda grow=grow: [{"is_expandable": grow}, {"is_expandable": True}]
        )
        told.warnings.clear()
        test_env.test_expandable_segments(CPU, told)
        assert bool(told.warnings) == warns and told["segments that can grow"] == f"{1 + grow} of 2"


def test_gpus_that_cannot_read_each_other_are_told(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda one, other: {one, other} != {0, 2})
    test_env.test_peers(CPU, told)
    assert told == {"pairs without peer access": "2 of 6"} and told.warnings == [test_env.PEERS_FIX]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    told.warnings.clear()
    test_env.test_peers(CPU, told)
    assert not told.warnings, "one has no peers"
