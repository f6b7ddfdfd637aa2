"""What one layer more sends, counted as the difference of two runs: 8 messages of the layer, none of the adapter; and
what adapters on other linears than QKV send: no message beside QKV's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from support.cases import marked
from support.traffic_runs import Ran, starts, write_inputs

from megatron_tiedlora.base.methods import find_method
from megatron_tiedlora.base.shapes import TARGET_NAMES
from megatron_tiedlora.parallel.groups import TENSOR, TIED, Traffic
from megatron_tiedlora.planning.passes import saved_per_token

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.cpu_seconds(15, reason="the first test makes the start that all share"),
]

FULL: dict[str, Any] = {"recompute": "full"}
GATE: dict[str, Any] = {"recompute": "selective"}
WHOLE: dict[str, Any] = {"sequence_parallel": False}
TO_THE_END: dict[str, Any] = {"early_stop": False}
OLMO2: dict[str, Any] = {"model": "olmo2"}
STAGES: dict[str, Any] = {"tensor_parallel": 1, "pipeline_parallel": 2}

# By name: what changes, and the tensor-parallel messages of a layer by kind.
LAYERS: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "sharded sequences": ({}, {"all-gather": 4, "reduce-scatter": 4}),
    "sharded sequences, recompute": (FULL, {"all-gather": 6, "reduce-scatter": 5}),
    "sharded sequences, recompute to the end": ({**FULL, **TO_THE_END}, {"all-gather": 6, "reduce-scatter": 6}),
    "sharded sequences, recompute of gate and up": (GATE, {"all-gather": 5, "reduce-scatter": 4}),
    "full sequences": (WHOLE, {"all-reduce": 4}),
    "full sequences, recompute of gate and up": ({**WHOLE, **GATE}, {"all-reduce": 4}),
    "full sequences, recompute": ({**WHOLE, **FULL}, {"all-reduce": 5}),
    "full sequences, recompute to the end": ({**WHOLE, **FULL, **TO_THE_END}, {"all-reduce": 6}),
    "sharded sequences, lora": ({"method": "lora"}, {"all-gather": 4, "reduce-scatter": 4}),  # an A of each layer
    # Norms of all heads: one message more in each pass, which recompute repeats. It also repeats the last exit, as the
    # norm behind it keeps what that gives.
    "olmo2": (OLMO2, {"all-gather": 4, "reduce-scatter": 4, "all-reduce": 2}),
    "olmo2, recompute": ({**OLMO2, **FULL}, {"all-gather": 6, "reduce-scatter": 6, "all-reduce": 3}),
    "olmo2, full sequences, recompute of gate and up": ({**OLMO2, **WHOLE, **GATE}, {"all-reduce": 6}),
}
CASES: dict[str, dict[str, Any]] = {
    f"{name}, {number} layers": {**changes, "model": f"{changes.get('model', '')} {number}".strip()}
    for name, (changes, _) in LAYERS.items()
    for number in ("three", "four")
}
# These train u and v, an A and B of each layer, B alone, A and B, and all four: every kind of message there is.
# test_parallel_gradients.py counts those of all methods by rule.
METHODS = ("vera", "lora", "tl3", "tl5", "tl6")
for _method in METHODS:
    CASES[f"{_method}, three layers"] = {"method": _method, "layers": (1, 3), "model": "three"}
    CASES[f"{_method}, one more adapted"] = {"method": _method, "layers": (1, 2, 3), "model": "three"}
    CASES[f"{_method}, two stages"] = {"method": _method, "model": "three", **STAGES}

# Other targets than QKV, on a model of three layers. Of layers 2 and 3 the backward pass ends at the first adapted
# linear of layer 2.
ALL, BESIDE = ",".join(TARGET_NAMES), "qkv,o_proj,down_proj"
SEQUENCES: dict[str, dict[str, Any]] = {"sharded": {}, "whole": WHOLE}
LATE: dict[str, Any] = {"layers": (2, 3)}
TARGETS: dict[str, dict[str, Any]] = {
    f"{parts} {targets}": {"targets": targets, **changes}
    for parts, changes in SEQUENCES.items()
    for targets in ("qkv", BESIDE, ALL)
}
TARGETS |= {
    "tl6 o_proj,gate_up": {"targets": "o_proj,gate_up", **LATE},
    "tl1 gate_up": {"method": "tl1", "targets": "gate_up", **LATE, **GATE},
    "tl3 o_proj": {"method": "tl3", "targets": "o_proj", **LATE, **GATE},
    "tl5 down_proj": {"method": "tl5", "targets": "down_proj", **LATE, **FULL},
    "whole down_proj": {"targets": "down_proj", "layers": (3,), **WHOLE, **GATE},
    "last layer, full": {"targets": "down_proj", "layers": (3,), **FULL},
    "stages, all": {"targets": ALL, **STAGES},
    "stages, last layer": {"targets": "gate_up,down_proj", "layers": (3,), **STAGES},
}
CASES |= {name: {"model": "three", **changes} for name, changes in TARGETS.items()}


# By name, what is run by hand: each choice of theirs is made in another case too.
SLOW_LAYERS = {
    *("sharded sequences, recompute to the end", "full sequences", "full sequences, recompute of gate and up"),
    *("sharded sequences, lora", "olmo2, recompute", "olmo2, full sequences, recompute of gate and up"),
}
SLOW = {f"{name}, {number} layers" for name in SLOW_LAYERS for number in ("three", "four")}


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Ran]:
    """Cases on two ranks, with two micro-batches a step."""
    folder = tmp_path_factory.mktemp("layers")
    base = {**write_inputs(folder), "tensor_parallel": 2, "micro_batch_size": 4}
    return starts({2: CASES}, base, folder, SLOW)


def difference(one: Traffic, other: Traffic) -> dict[tuple[str, str], int]:
    """Messages of `other` that `one` has not, by group and kind, without zeros."""
    keys = one.messages.keys() | other.messages.keys()
    found = {key: other.messages[key] - one.messages[key] for key in keys}
    return {key: count for key, count in found.items() if count}


@pytest.mark.parametrize("name", marked([name for name, case in CASES.items() if "early_stop" not in case], SLOW))
def test_prediction_is_what_is_counted(ran: Mapping[str, Ran], name: str) -> None:
    for rank, counted in enumerate(ran[name].counted):
        assert len(counted.shapes) == 2 and counted.traffic.messages
        ran[name].check(rank)


@pytest.mark.parametrize("name", marked([n for n, case in CASES.items() if case.get("recompute") != "full"], SLOW))
def test_saved_bytes_are_those_of_a_built_block(ran: Mapping[str, Ran], name: str) -> None:
    """What is counted on tensors without data is what the last block keeps, with every target, method and norm."""
    for rank, counted in enumerate(ran[name].counted):
        plan = ran[name].plan(rank)
        if plan.stage.blocks[-1] in plan.adapter.layers:
            assert saved_per_token(plan.source.shape, plan.layout) == counted.saved_bytes_per_token, rank


@pytest.mark.parametrize("name", marked(LAYERS, SLOW_LAYERS))
def test_messages_of_a_layer(ran: Mapping[str, Ran], name: str) -> None:
    """8 with sequence parallelism, 4 without; recompute repeats all of the forward pass but the last exit.

    The layer more is an adapted one. What the last exit gives is what the block gives, and no backward pass needs that:
    recompute stops before it, as soon as all that was saved is there again. To the end, it would be 12 and 6.
    """
    for rank in range(2):
        three, four = (ran[f"{name}, {number} layers"].counted[rank] for number in ("three", "four"))
        assert three.shapes == four.shapes
        expected = {(TENSOR, kind): count * len(four.shapes) for kind, count in LAYERS[name][1].items()}
        assert difference(three.traffic, four.traffic) == expected


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_adds_no_message_to_a_layer(ran: Mapping[str, Ran], method: str) -> None:
    """Adapting one layer more adds bytes and not a message, in no group."""
    for rank in range(2):
        three, adapted = (ran[f"{method}, {name}"].counted[rank] for name in ("three layers", "one more adapted"))
        assert three.shapes == adapted.shapes
        assert difference(three.traffic, adapted.traffic) == {}
        assert adapted.traffic.of_group(TENSOR)[1] > three.traffic.of_group(TENSOR)[1]


@pytest.mark.parametrize("method", METHODS)
def test_the_tied_sum_is_one_message_a_step(ran: Mapping[str, Ran], method: str) -> None:
    """One where a tied factor is trained, however many; none where none is. A and B: rank 3, d 32, 96 rows of QKV."""
    tied = [factor.trained and factor.shared_by == "all" for factor in map(find_method(method).factor, "AB")]
    numbers = 3 * 32 * tied[0] + 3 * 96 * tied[1]
    for counted in ran[f"{method}, two stages"].counted:
        assert counted.traffic.of_group(TIED) == ((1, 4 * numbers) if numbers else (0, 0))


def test_bytes_of_a_layer(ran: Mapping[str, Ran]) -> None:
    """One adapted layer more is 8 tensor-parallel messages of h more in each micro-batch, and nothing else.

    Two of them also carry the adapter's columns.
    """
    four, three = (ran[f"sharded sequences, {number} layers"].counted[0] for number in ("four", "three"))
    assert four.shapes == three.shapes
    more = Traffic()
    for rows, length, *_ in four.shapes:
        for kind in ("all-gather", "reduce-scatter"):
            more.add(TENSOR, kind, 4 * 32 * rows * length, count=3)
            more.add(TENSOR, kind, 4 * (32 + 16) * rows * length)  # with h, or its gradient: 3 columns, filled up
    for kind in ("all-gather", "reduce-scatter"):
        key = (TENSOR, kind)
        assert four.traffic.messages[key] - three.traffic.messages[key] == more.messages[key]
        assert four.traffic.bytes[key] - three.traffic.bytes[key] == more.bytes[key]
    # u's gradient is one message a step, however many layers and micro-batches it is of.
    key = (TENSOR, "all-reduce")
    assert four.traffic.messages[key] == three.traffic.messages[key] == 1 < len(four.shapes)
    assert four.traffic.bytes[key] - three.traffic.bytes[key] == 4 * 3


def test_what_an_adapter_adds_per_micro_batch(ran: Mapping[str, Ran]) -> None:
    """Per micro-batch and stage a method sends at most a gather and a reduce-scatter of A; per step a sum for u.

    Where A is trained the gradient of A x travels too: beside that of x, and in the first adapted layer alone.
    """
    frozen = ran["tl3, three layers"].counted[0].traffic  # A frozen, no u: what is left are the layers' own
    for method in METHODS:
        counted, row = ran[f"{method}, three layers"].counted[0], find_method(method)
        micro_batches, size = len(counted.shapes), 4 * 3 * 32 * (1 if row.A.shared_by == "all" else 2)
        expected = Traffic(frozen.messages.copy(), frozen.bytes.copy())
        if row.A.trained:
            expected.add(TENSOR, "all-gather", size, count=micro_batches)
            expected.add(TENSOR, "reduce-scatter", size, count=micro_batches)
            for rows, length, *_ in counted.shapes:
                expected.add(TENSOR, "reduce-scatter", 4 * 3 * rows * length)
                expected.bytes[TENSOR, "reduce-scatter"] += 4 * 16 * rows * length  # of 2 adapted layers
        if row.u.trained:
            expected.add(TENSOR, "all-reduce", 4 * 3 * 2)
        for kind in ("all-gather", "reduce-scatter", "all-reduce"):
            assert counted.traffic.messages[TENSOR, kind] == expected.messages[TENSOR, kind], (method, kind)
            assert counted.traffic.bytes[TENSOR, kind] == expected.bytes[TENSOR, kind], (method, kind)


# Other targets -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [BESIDE, ALL])
@pytest.mark.parametrize("parts", SEQUENCES)
def test_no_target_adds_a_message(ran: Mapping[str, Ran], parts: str, targets: str) -> None:
    """Four send as many messages as one: those of the layers, two of the adapter a micro-batch, one sum of u a step."""
    for rank in range(2):
        one, more = (ran[f"{parts} {names}"].counted[rank] for names in ("qkv", targets))
        assert more.traffic.messages == one.traffic.messages and more.shapes == one.shapes


@pytest.mark.parametrize("parts", SEQUENCES)
def test_bytes_of_row_parallel_targets_are_those_of_their_factors(ran: Mapping[str, Ran], parts: str) -> None:
    """B (32 x 3 each) and v (3 layers x 32) are gathered, and their gradients summed, once a micro-batch; u's sum is
    3 x 3 numbers longer for each. A layer sends no byte more. Gate-up adds A (3 x 32), and 16 columns a layer."""
    for rank in range(2):
        one, beside, four = (ran[f"{parts} {names}"].counted[rank] for names in ("qkv", BESIDE, ALL))
        more, most = ({**beside.traffic.bytes}, {**four.traffic.bytes})
        for found, factors in ((more, 2 * (32 * 3 + 3 * 32)), (most, 2 * (32 * 3 + 3 * 32) + 3 * 32)):
            for kind in ("all-gather", "reduce-scatter"):
                found[TENSOR, kind] -= 4 * factors * len(one.shapes)
        more[TENSOR, "all-reduce"] -= 4 * 2 * 3 * 3
        most[TENSOR, "all-reduce"] -= 4 * 3 * 3 * 3
        if parts == "sharded":
            columns = sum(4 * 16 * rows * length for rows, length, *_ in one.shapes)
            after = sum(4 * 16 * sum(shape.after) for shape in ran[f"{parts} {ALL}"].step_plan(rank).batches)
            for kind in ("all-gather", "reduce-scatter"):
                most[TENSOR, kind] -= 2 * columns + after  # layers 1 and 2, and supervised positions of the last
        assert more == one.traffic.bytes and most == one.traffic.bytes
