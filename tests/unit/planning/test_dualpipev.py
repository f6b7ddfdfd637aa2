"""What DualPipeV would gain, from DeepSpeed's own order of passes; docs/planning_log.md has the rows of 70B.

Every rank has two chunks of the model: the parts r and 2 p - 1 - r of 2 p. Chunks are equal here, and a pass of one
costs half of a stage's pass and all of what a stage sends. DeepSpeed waits for all messages of a rank together. That is
left out, so its engine is slower than this.
"""

from __future__ import annotations

from itertools import accumulate, chain

import pytest
from deepspeed.runtime.pipe.schedule import BackwardPass, DualPipeVSchedule, ForwardPass
from support.folders import ROOT
from support.planned import BACKWARD, FORWARD, H100, Order, Pass, idle_shares, one_f_one_b, simulate, the_only

from megatron_tiedlora.checkpoint.sources import find_model
from megatron_tiedlora.planning.machines import GPUS, Machine

TEXT = (ROOT / "docs" / "planning_log.md").read_text()


def dualpipev(num_stages: int, num_micro_batches: int) -> list[list[Pass]]:
    """The passes of DeepSpeed's schedule, by rank."""
    orders: list[list[Pass]] = [[] for _ in range(num_stages)]
    for rank, order in enumerate(orders):
        for one in chain.from_iterable(DualPipeVSchedule(num_micro_batches, num_stages, rank).steps()):
            if isinstance(one, ForwardPass | BackwardPass):
                part = rank if one.phase == 0 else 2 * num_stages - 1 - rank
                kind = FORWARD if isinstance(one, ForwardPass) else BACKWARD
                order.append(Pass(kind, one.buffer_id % num_micro_batches, part))
    return orders


def most_in_flight(order: Order, *, chunks: int) -> float:
    """The most micro-batches that a rank has started and not finished, in those of a whole stage."""
    changes = ([1 if one.kind == FORWARD else -1 for one in passes] for passes in order)
    return max(max(accumulate(some)) for some in changes) / chunks


@pytest.mark.parametrize(
    ("num_stages", "num_micro_batches"), [(2, 8), (2, 16), (4, 8), (4, 16), (4, 32), (8, 16), (8, 32), (8, 64)]
)
def test_idle_shares(num_stages: int, num_micro_batches: int) -> None:
    """With equal passes; half the bubble, for half a micro-batch more of activations."""
    p, m = num_stages, num_micro_batches
    usual, other = one_f_one_b(p, m), dualpipev(p, m)
    idle, less = (max(idle_shares(order, lambda *_: 1.0)) for order in (usual, other))
    assert idle == pytest.approx((p - 1) / (m + p - 1)) and less == pytest.approx((p - 1) / (2 * m + p - 1))
    held, more = most_in_flight(usual, chunks=1), most_in_flight(other, chunks=2)
    assert (held, more) == (p, p + 0.5)


@pytest.mark.parametrize(
    ("machine", "tensor", "pipeline", "recompute"),
    [
        (H100, 2, 2, "none"),
        (H100, 1, 4, "selective"),
        (GPUS["h200"], 1, 2, "none"),
    ],
)
def test_layouts_of_70b_on_32_gpus(machine: Machine, tensor: int, pipeline: int, recompute: str) -> None:
    """Seconds of a step and gigabytes, planned: with 1F1B, and with two chunks."""
    flags = [f"--tensor_parallel={tensor}", f"--pipeline_parallel={pipeline}", f"--recompute={recompute}"]
    flags += ["--micro_batch_size=1", "--sequence_parallel=true", "--ds_config=zero0.json", "--formats=none"]
    one = the_only(*flags, source=find_model("llama2-70b"), ranks=32, machine=machine)
    parts, memory = one.parts, one.fullest[1]
    order = dualpipev(pipeline, len(parts.batches))
    cost = {}
    for kind in (FORWARD, BACKWARD):
        passes = [stage[parts.batches[0]][kind == BACKWARD] for stage in parts.stages]
        cost[kind] = sum(each.total - each.pipeline for each in passes) / len(passes) / 2
        cost[kind] += max(each.pipeline for each in passes)
    seconds = float(simulate(order, lambda _, passed: cost[passed.kind])) + parts.sums + parts.outside
    more = most_in_flight(order, chunks=2) / most_in_flight(one_f_one_b(pipeline, len(parts.batches)), chunks=1)
    grown = (more - 1) * (memory.activations + memory.engine) * (1 + machine["slack"])
    row = (
        f"| {machine.name} | {one.name} | {len(parts.batches)} | {one.seconds.total:.2f} | {seconds:.2f}"
        f" | {one.seconds.total / seconds - 1:+.1%} | {one.needed / 1e9:.1f} | {(one.needed + grown) / 1e9:.1f} |"
    )
    print(f"\n{row}")
    assert seconds < one.seconds.total and row in TEXT
