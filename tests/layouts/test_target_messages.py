"""The messages of adapters on other linears than QKV: those that are predicted, and none beside QKV's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from traffic_runs import Ran, run_cases, write_inputs

from megatron_tiedlora.base.shapes import TARGET_NAMES
from megatron_tiedlora.parallel.groups import TENSOR

pytestmark = pytest.mark.distributed

ALL = ",".join(TARGET_NAMES)
PARTS = {"sharded": {}, "whole": {"sequence_parallel": False}}
STAGES: dict[str, Any] = {"tensor_parallel": 1, "pipeline_parallel": 2}
BESIDE = "qkv,o_proj,down_proj"
# Layers 2 and 3 of 3: the backward pass ends at the first adapted linear of layer 2.
CASES: dict[str, dict[str, Any]] = {
    **{
        f"{parts} {targets}": {"targets": targets, **changes}
        for parts, changes in PARTS.items()
        for targets in ("qkv", BESIDE, ALL)
    },
    **{
        f"{method} {targets}, {recompute}": {
            "method": method,
            "targets": targets,
            "recompute": recompute,
            "layers": (2, 3),
        }
        for method, recompute in (("tl6", "none"), ("tl1", "selective"), ("tl3", "selective"), ("tl5", "full"))
        for targets in (*TARGET_NAMES, "o_proj,gate_up")
    },
    "whole down_proj": {"targets": "down_proj", "layers": (3,), **PARTS["whole"], "recompute": "selective"},
    "whole gate_up": {"targets": "gate_up", "layers": (2, 3), **PARTS["whole"]},
    "last layer, full": {"targets": "down_proj", "layers": (3,), "recompute": "full"},
    "last layer's output, full": {"targets": "o_proj", "layers": (3,), "recompute": "full"},
    **{f"stages, {targets}": {"targets": targets, **STAGES} for targets in ("qkv", ALL)},
    "stages, last layer": {"targets": "gate_up,down_proj", "layers": (3,), **STAGES},
}


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Ran]:
    """All cases, in one start of two ranks, with two micro-batches a step."""
    folder = tmp_path_factory.mktemp("targets")
    base = {**write_inputs(folder), "model": "three", "tensor_parallel": 2, "micro_batch_size": 4, "method": "tl6"}
    return run_cases(CASES, base, folder, ranks=2)


@pytest.mark.parametrize("name", CASES)
def test_prediction_is_what_is_counted(ran: Mapping[str, Ran], name: str) -> None:
    for rank, counted in enumerate(ran[name].counted):
        assert len(counted.shapes) == 2 and counted.traffic.messages
        ran[name].check(rank)


@pytest.mark.parametrize("targets", [BESIDE, ALL])
@pytest.mark.parametrize("parts", PARTS)
def test_no_target_adds_a_message(ran: Mapping[str, Ran], parts: str, targets: str) -> None:
    """Four send as many messages as one: those of the layers, two of the adapter a micro-batch, one sum of u a step."""
    for rank in range(2):
        one, more = (ran[f"{parts} {names}"].counted[rank] for names in ("qkv", targets))
        assert more.traffic.messages == one.traffic.messages and more.shapes == one.shapes


@pytest.mark.parametrize("parts", PARTS)
def test_bytes_of_row_parallel_targets_are_those_of_their_factors(ran: Mapping[str, Ran], parts: str) -> None:
    """B (32 x 3 each) and v (3 layers x 32) are gathered, and their gradients summed, once a micro-batch; u's sum is
    3 x 3 numbers longer for each. A layer sends no byte more. Gate-up adds A (3 x 32), and 8 columns a layer."""
    for rank in range(2):
        one, beside, four = (ran[f"{parts} {names}"].counted[rank] for names in ("qkv", BESIDE, ALL))
        more, most = ({**beside.traffic.bytes}, {**four.traffic.bytes})
        for found, factors in ((more, 2 * (32 * 3 + 3 * 32)), (most, 2 * (32 * 3 + 3 * 32) + 3 * 32)):
            for kind in ("all-gather", "reduce-scatter"):
                found[TENSOR, kind] -= 4 * factors * len(one.shapes)
        more[TENSOR, "all-reduce"] -= 4 * 2 * 3 * 3
        most[TENSOR, "all-reduce"] -= 4 * 3 * 3 * 3
        if parts == "sharded":
            columns = sum(4 * 8 * rows * length for rows, length, _ in one.shapes)
            after = sum(4 * 8 * sum(shape.after) for shape in _shapes(ran, parts, rank))
            for kind in ("all-gather", "reduce-scatter"):
                most[TENSOR, kind] -= 2 * columns + after  # layers 1 and 2, and supervised positions of the last
        assert more == one.traffic.bytes and most == one.traffic.bytes


def _shapes(ran: Mapping[str, Ran], parts: str, rank: int) -> Any:
    return ran[f"{parts} {ALL}"].micro_batches(rank)
