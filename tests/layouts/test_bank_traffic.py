"""What adapters send together is what is predicted: every message and byte, by group and kind, on every rank."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from bank_traffic_worker import BankCase, BankCounted, BankRan, run_bank_cases
from traffic_runs import ours, write_inputs

from megatron_tiedlora.parallel.groups import DATA, TENSOR, Traffic

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.cpu_seconds(90, reason="the first test makes the starts that all share"),
]

OWN: dict[str, dict[str, Any]] = {
    "a": {"method": "tl6", "rank": 3, "global_batch_size": 8},
    "b": {"method": "lora", "rank": 2, "layers": (2, 4), "global_batch_size": 4, "seed": 5},
    "c": {"method": "tl2", "rank": 9, "targets": "all", "global_batch_size": 16},
    "d": {"method": "tl4", "rank": 1, "layers": (4, 5), "targets": "o_proj,gate_up", "global_batch_size": 4},
}
# Of the layouts of four ranks, what is set; data parallel is what is left.
LAYOUTS: dict[str, dict[str, Any]] = {
    "(2, 2, 1)": {"tensor_parallel": 2, "pipeline_parallel": 2},
    "(1, 2, 2)": {"pipeline_parallel": 2},
    "(2, 1, 2)": {"tensor_parallel": 2},
}
WHOLE = {"sequence_parallel": False}
# Cases that differ from others in the layout or in the kind of sequences alone.
SLOW = (
    *(f"one at {layout}, whole" for layout in ("(2, 2, 1)", "(2, 1, 2)")),
    *(f"four apart at {layout}" for layout in ("(2, 2, 1), whole", "(1, 2, 2)", "(2, 1, 2)")),
    "four at (2, 2, 1), whole",
    *(f"{names} checked at {layout}" for layout in ("(1, 2, 2)", "(2, 1, 2)") for names in ("one", "four")),
)


def case(
    base: dict[str, Any], names: str = "abcd", *, of_case: dict[str, Any] | None = None, **changes: Any
) -> BankCase:
    return BankCase({name: {**base, **OWN[name], **changes} for name in names}, **(of_case or {}))


def _cases(base: dict[str, Any]) -> dict[str, BankCase]:
    cases = {}
    for layout, changes in LAYOUTS.items():
        for sequences in ("", ", whole") if "tensor_parallel" in changes else ("",):
            more = {**changes, **(WHOLE if sequences else {})}
            cases[f"one at {layout}{sequences}"] = case(base, "a", **more)
            cases[f"four at {layout}{sequences}"] = case(base, **more)
            cases[f"four apart at {layout}{sequences}"] = case(base, of_case={"shares": False}, **more)
        cases[f"one checked at {layout}"] = case(base, "a", of_case={"checked": True}, replica_check_steps=2, **changes)
        cases[f"four checked at {layout}"] = case(base, of_case={"checked": True}, replica_check_steps=2, **changes)
    both, tensor = LAYOUTS["(2, 2, 1)"], LAYOUTS["(2, 1, 2)"]
    cases["packed"] = case(base, packing=True, **both)
    cases["recompute"] = case(base, recompute="full", **both)
    cases["recompute, whole"] = case(base, "bd", recompute="full", **WHOLE, **tensor)
    cases["recompute of gate and up"] = case(base, recompute="selective", **tensor)
    cases["late layers"] = case(base, "bd", of_case={"shares": False}, **both)
    cases["one has ended"] = case(base, of_case={"ends": ("c",)}, **both)
    cases["zero3"] = case(base, ds_config="zero3.json", **tensor)
    cases["four layers"] = case(base, "ac", model=base["four"], **tensor)
    cases["five layers"] = case(base, "ac", **tensor)
    cases["four layers, whole"] = case(base, "ac", model=base["four"], **WHOLE, **tensor)
    cases["five layers, whole"] = case(base, "ac", **WHOLE, **tensor)
    for each in cases.values():
        for settings in each.adapters.values():
            settings.pop("four")
    return cases


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, BankCase]]:
    folder = tmp_path_factory.mktemp("bank_traffic")
    base = {**write_inputs(folder), "model": str(folder / "five"), "ds_config": "zero0.json"}
    return folder, _cases({**base, "four": str(folder / "four")})


@pytest.fixture(scope="module")
def ran(cases: tuple[Path, dict[str, BankCase]]) -> Mapping[str, BankRan]:
    """All but the slow ones."""
    folder, of_name = cases
    return run_bank_cases({name: case for name, case in of_name.items() if name not in SLOW}, folder, ranks=4)


@pytest.fixture(scope="module")
def all_ran(cases: tuple[Path, dict[str, BankCase]], ran: Mapping[str, BankRan]) -> Mapping[str, BankRan]:
    folder, of_name = cases
    return {**ran, **run_bank_cases({name: of_name[name] for name in SLOW}, folder / "slow", ranks=4)}


@pytest.fixture(autouse=True)
def _cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MEGATRON_TIEDLORA_CACHE", str(tmp_path / "cache"))


COUNTED = [name for name, of_name in _cases({"four": ""}).items() if not of_name.checked]


@pytest.mark.parametrize("name", [name for name in COUNTED if name not in SLOW])
def test_prediction_is_what_is_counted(ran: Mapping[str, BankRan], name: str) -> None:
    check_prediction(ran[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in COUNTED if name in SLOW])
def test_prediction_is_what_is_counted_elsewhere(all_ran: Mapping[str, BankRan], name: str) -> None:
    check_prediction(all_ran[name])


def check_prediction(found: BankRan) -> None:
    for rank, counted in enumerate(found.counted):
        plan = found.plan(rank)
        shapes = [(shape.num_tokens, len(shape.adapters)) for shape in plan.batches]
        assert shapes == counted.shapes and len(shapes) > 1
        predicted, most = found.predicted(rank)
        if plan.layout.zero_stage < 3:
            assert counted.traffic == predicted and not most
            continue
        assert ours(counted.traffic) == ours(predicted)  # beside these, what DeepSpeed gathers
        assert predicted.of_group(DATA)[1] < counted.traffic.of_group(DATA)[1] <= predicted.of_group(DATA)[1] + most


@pytest.mark.parametrize(
    ("name", "kinds"),
    [("", {"all-gather": 4, "reduce-scatter": 4}), (", whole", {"all-reduce": 4})],
    ids=["sharded sequences", "full sequences"],
)
def test_messages_of_a_layer(ran: Mapping[str, BankRan], name: str, kinds: dict[str, int]) -> None:
    """8 or 4 in each micro-batch, as of one adapter, and none more in a step."""
    for four, five in zip(ran[f"four layers{name}"].counted, ran[f"five layers{name}"].counted, strict=True):
        assert four.shapes == five.shapes and max(shares for _, shares in five.shapes) > 1
        more = {key: count - four.traffic.messages[key] for key, count in five.traffic.messages.items()}
        expected = {(TENSOR, kind): count * len(five.shapes) for kind, count in kinds.items()}
        assert {key: count for key, count in more.items() if count} == expected


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_step_sums_in_as_many_messages_as_one_adapter_s(ran: Mapping[str, BankRan], layout: str) -> None:
    """In each group: the gradients of all, the squares of all norms, one report. Each adapter adds bytes alone."""
    for one, four in zip(ran[f"one at {layout}"].counted, ran[f"four at {layout}"].counted, strict=True):
        sums = [of_step(found) for found in (one, four)]
        assert sums[0].messages == sums[1].messages and sum(sums[0].messages.values()) >= 3
        assert all(size > sums[0].bytes[key] for key, size in sums[1].bytes.items())


def test_the_checks_of_all_send_as_many_messages_as_one_adapter_s(ran: Mapping[str, BankRan]) -> None:
    check_messages_of_checks(ran, "(2, 2, 1)")


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["(1, 2, 2)", "(2, 1, 2)"])
def test_the_checks_of_all_send_as_many_elsewhere(all_ran: Mapping[str, BankRan], layout: str) -> None:
    check_messages_of_checks(all_ran, layout)


def check_messages_of_checks(ran: Mapping[str, BankRan], layout: str) -> None:
    """Of gradients and replicas, in the first two steps; each group sends one message for all tensors it compares."""
    names = (f"one at {layout}", f"one checked at {layout}", f"four at {layout}", f"four checked at {layout}")
    for one, one_checked, four, four_checked in zip(*(ran[name].counted for name in names), strict=True):
        for step in ("first", "traffic"):
            of_one = getattr(one_checked, step).messages - getattr(one, step).messages
            of_four = getattr(four_checked, step).messages - getattr(four, step).messages
            assert of_one == of_four and 3 <= sum(of_one.values()) <= 6, (step, of_one)


def of_step(counted: BankCounted) -> Traffic:
    """The all-reduces outside a micro-batch, at a layout with sharded sequences or without tensor parallelism."""
    found = Traffic()
    for (group, kind), count in counted.traffic.messages.items():
        if kind == "all-reduce":
            found.add(group, kind, counted.traffic.bytes[group, kind])
            found.messages[group, kind] = count
    return found
