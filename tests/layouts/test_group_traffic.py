"""What adapters send together is what is predicted: every message and byte, by group and kind, on every rank."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from support.cases import marked
from support.traffic_runs import Ran, starts, write_inputs

from megatron_tiedlora.parallel.groups import TENSOR, Traffic

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.cpu_seconds(30, reason="the first test makes the start that all share"),
]

OWN: dict[str, dict[str, Any]] = {
    "a": {"method": "tl6", "rank": 3},
    "b": {"method": "lora", "rank": 2, "layers": (2, 4), "seed": 5},
    "c": {"method": "tl2", "rank": 9, "targets": "all"},
    "d": {"method": "tl4", "rank": 1, "layers": (4, 5), "targets": "o_proj,gate_up"},
}
MICRO_BATCHES = {"a": 2, "b": 1, "c": 4, "d": 1}  # of two rows, on each data-parallel rank
# (tensor, pipeline, data) by name
LAYOUTS = {str(sizes): sizes for sizes in ((2, 2, 1), (1, 2, 2), (2, 1, 2))}
WHOLE = {"sequence_parallel": False}
TWICE = {"steps_before": 1}


def case(layout: str, names: str = "abcd", **changes: Any) -> dict[str, Any]:
    """The adapters of these names at a layout, with these settings or fields of Case."""
    tp, pp, dp = LAYOUTS[layout]
    adapters = {name: {**OWN[name], "global_batch_size": 2 * dp * MICRO_BATCHES[name]} for name in names}
    return {"adapters": adapters, "tensor_parallel": tp, "pipeline_parallel": pp, **changes}


def _cases() -> dict[str, dict[str, Any]]:
    cases = {}
    for layout, (tp, *_) in LAYOUTS.items():
        checked = {"checked": True, "replica_check_steps": 2, **TWICE}
        for names, own in (("one", "a"), ("four", "abcd")):
            cases[f"{names} at {layout}"] = case(layout, own, **TWICE)
            cases[f"{names} checked at {layout}"] = case(layout, own, **checked)
            if tp > 1:
                cases[f"{names} at {layout}, whole"] = case(layout, own, **WHOLE)
        for sequences, changes in (("", {}), (", whole", WHOLE)) if tp > 1 else (("", {}),):
            cases[f"four apart at {layout}{sequences}"] = case(layout, shares_micro_batches=False, **changes)
    cases["packed"] = case("(2, 2, 1)", packing=True)
    cases["recompute"] = case("(2, 2, 1)", recompute="full")
    cases["recompute, whole"] = case("(2, 1, 2)", "bd", recompute="full", **WHOLE)
    cases["recompute of gate and up"] = case("(2, 1, 2)", recompute="selective")
    cases["late layers"] = case("(2, 2, 1)", "bd", shares_micro_batches=False)
    cases["one has ended"] = case("(2, 2, 1)", ends=("c",), **TWICE)
    cases["zero3"] = case("(2, 1, 2)", ds_config="zero3.json", **TWICE)
    for model in ("four", "five"):
        cases[f"{model} layers"] = case("(2, 1, 2)", "ac", model=model)
        cases[f"{model} layers, whole"] = case("(2, 1, 2)", "ac", model=model, **WHOLE)
    return cases


CASES = _cases()
COUNTED = [name for name in CASES if "checked" not in name]
# Cases that differ from others in the layout or in the kind of sequences alone.
SLOW = (
    *(f"one at {layout}, whole" for layout in ("(2, 2, 1)", "(2, 1, 2)")),
    *(f"four apart at {layout}" for layout in ("(2, 2, 1), whole", "(1, 2, 2)", "(2, 1, 2)", "(2, 1, 2), whole")),
    *(f"four at {layout}, whole" for layout in ("(2, 2, 1)", "(2, 1, 2)")),
    *(f"{names} checked at {layout}" for layout in ("(1, 2, 2)", "(2, 1, 2)") for names in ("one", "four")),
    *("one at (2, 1, 2)", "four at (2, 1, 2)", "recompute of gate and up", "four layers, whole", "five layers, whole"),
)


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Ran]:
    folder = tmp_path_factory.mktemp("bank_traffic")
    return starts({4: CASES}, {**write_inputs(folder), "ds_config": "zero0.json"}, folder, SLOW)


@pytest.fixture(autouse=True)
def _cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MEGATRON_TIEDLORA_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("name", marked(COUNTED, SLOW))
def test_prediction_is_what_is_counted(ran: Mapping[str, Ran], name: str) -> None:
    found = ran[name]
    for rank, counted in enumerate(found.counted):
        shapes = [(shape.num_tokens, len(shape.adapters)) for shape in found.step_plan(rank).batches]
        assert shapes == [(rows * length, adapters) for rows, length, _, adapters in counted.shapes] and len(shapes) > 1
        found.check(rank)


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        pytest.param("", {"all-gather": 4, "reduce-scatter": 4}, id="sharded sequences"),
        pytest.param(", whole", {"all-reduce": 4}, id="full sequences", marks=pytest.mark.slow),
    ],
)
def test_messages_of_a_layer(ran: Mapping[str, Ran], name: str, kinds: dict[str, int]) -> None:
    """8 or 4 in each micro-batch, as of one adapter, and none more in a step."""
    for four, five in zip(ran[f"four layers{name}"].counted, ran[f"five layers{name}"].counted, strict=True):
        assert four.shapes == five.shapes and max(adapters for *_, adapters in five.shapes) > 1
        more = {key: count - four.traffic.messages[key] for key, count in five.traffic.messages.items()}
        expected = {(TENSOR, kind): count * len(five.shapes) for kind, count in kinds.items()}
        assert {key: count for key, count in more.items() if count} == expected


@pytest.mark.parametrize("name", marked([f"four at {layout}" for layout in LAYOUTS], SLOW))
def test_a_step_sums_in_as_many_messages_as_one_adapter_s(ran: Mapping[str, Ran], name: str) -> None:
    """In each group: the gradients of all, the squares of all norms, one report. Each adapter adds bytes alone."""
    for one, four in zip(ran[name.replace("four", "one")].counted, ran[name].counted, strict=True):
        sums = [all_reduces(found.traffic) for found in (one, four)]
        assert sums[0].messages == sums[1].messages and sum(sums[0].messages.values()) >= 3
        assert all(size > sums[0].bytes[key] for key, size in sums[1].bytes.items())


@pytest.mark.parametrize("name", marked([name for name in CASES if name.startswith("four checked")], SLOW))
def test_the_checks_of_all_send_as_many_messages_as_one_adapter_s(ran: Mapping[str, Ran], name: str) -> None:
    """Of gradients and replicas, in the first two steps; each group sends one message for all tensors it compares."""
    layout = name.removeprefix("four checked ")
    names = (f"one {layout}", f"one checked {layout}", f"four {layout}", name)
    for one, one_checked, four, four_checked in zip(*(ran[each].counted for each in names), strict=True):
        for step in ("first", "traffic"):
            of_one = getattr(one_checked, step).messages - getattr(one, step).messages
            of_four = getattr(four_checked, step).messages - getattr(four, step).messages
            assert of_one == of_four and 3 <= sum(of_one.values()) <= 6, (step, of_one)


def all_reduces(traffic: Traffic) -> Traffic:
    """Those outside a micro-batch, at a layout with sharded sequences or without tensor parallelism."""
    found = Traffic()
    for (group, kind), count in traffic.messages.items():
        if kind == "all-reduce":
            found.add(group, kind, traffic.bytes[group, kind])
            found.messages[group, kind] = count
    return found
