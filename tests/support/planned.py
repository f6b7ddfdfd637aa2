"""Plans of tools/plan.py in this process, for small models and clusters, and the tables of a dry run's report."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any, NamedTuple

from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.checkpoint.sources import ModelSource, find_model
from megatron_tiedlora.config.cli import parse_settings
from megatron_tiedlora.config.job_settings import parse_plan
from megatron_tiedlora.config.settings import Settings, make_settings
from megatron_tiedlora.planning.adapter_plans import plan_adapters
from megatron_tiedlora.planning.cluster_report import find_machine
from megatron_tiedlora.planning.layout import MicroBatchShape, StagePlan
from megatron_tiedlora.planning.machines import CPU, GPUS, Constant, Machine
from megatron_tiedlora.planning.memory import LargestMicroBatch, StageMemory, held_memory, step_memory, with_reserves
from megatron_tiedlora.planning.passes import stage_work
from megatron_tiedlora.planning.planned import StepPlan
from megatron_tiedlora.planning.search import Candidate, ClusterPlan, search
from megatron_tiedlora.planning.step_time import Links, Seconds, StepParts, stage_terms, sum_terms


def stage_table(text: str, title: str) -> list[dict[str, str]]:
    """The cells of the table under the section that starts with `title`, by stage and column; joint lines repeated."""
    section = text[re.search(rf"^{title}", text, re.MULTILINE).start() :].split("\n\n")[0]  # type: ignore[union-attr]
    table = [line for line in section.splitlines() if re.match(r"  (stage|\d+(-\d+)?) {2,}", line)]  # and no notes
    header, *lines = [re.split(" {2,}", line.strip()) for line in table]
    assert header[0] == "stage", header
    stages: list[dict[str, str]] = []
    for label, *cells in lines:
        first, last = (label.split("-") * 2)[:2]
        assert int(first) == len(stages)
        row = dict(zip(header[1:], cells, strict=True))
        stages += [row] * (int(last) - int(first) + 1)
    return stages


H100 = GPUS["h100"]
# A file of adapters that differ in what a step needs, for a model of at least 5 layers.
THREE = """\
- name: plain
- name: wide
  method: lora
  rank: 16
  targets: all
  global_batch_size: 24
  max_steps: 500
- name: late
  method: vera
  layers: 3,5
  targets: qkv,down_proj
  global_batch_size: 48
"""


def changed(machine: Machine, **values: float) -> Machine:
    """The machine with other constants; `__` stands for the dot in their names."""
    constants = {name.replace("__", "."): Constant(value, "a test") for name, value in values.items()}
    return machine.changed(constants, name="changed")


def short(model: str, num_layers: int) -> ModelSource:
    """A preset with fewer layers, which takes rows of up to 8,192 tokens."""
    source = find_model(model)
    limit = replace(source.shape.limit, tokens=8192)
    return replace(source, shape=replace(source.shape, num_layers=num_layers, limit=limit))


def largest_memory(step: StepPlan, stage: StagePlan, machine: Machine) -> StageMemory:
    """All that a rank of a stage needs for the largest micro-batch of a step."""
    return with_reserves(stage, held_memory(stage).plus(step_memory(stage, step.largest)), machine)


def searched(*flags: str, source: ModelSource, ranks: int, per_node: int = 8, machine: Machine = H100) -> ClusterPlan:
    """All layouts of a cluster."""
    command = parse_plan([f"--model={source.name}", *flags])
    return search(ClusterPlan(command.train, source, ranks, per_node, machine), command.settings.formats)


def the_only(*flags: str, **keywords: Any) -> Candidate:
    """The one layout that the flags leave; keywords as of `searched`."""
    (candidate,) = searched(*flags, **keywords).candidates
    return candidate


def group_of(source: ModelSource, ranks: int, **choices: Any) -> StepPlan:
    """The plan of a run on GPUs without data, of one adapter or of those of a file."""
    values = {"model": source.name, "dry_run": True, "plan_for": "gpu", "world_size": ranks}
    settings = make_settings({**values, **choices})
    plans = plan_adapters(settings, rank=0, world_size=ranks, weights=False, source=source)
    return StepPlan(plans, settings.share_micro_batches)


def words_of_a_run(flags: list[str]) -> str:
    """What launch/train.py says on 4 GPUs, '' if it accepts the flags."""
    try:
        settings = parse_settings([*flags, "--dry_run", "--world_size=4", "--plan_for=gpu"], Settings)
        plan_adapters(settings, rank=0, world_size=4, weights=False)
    except UserError as error:
        return str(error)
    return ""


def words_of_a_plan(flags: list[str]) -> str:
    """What tools/plan.py says of a node of 4 cards, '' if it has a layout."""
    try:
        formats = [] if any(flag.startswith("--base=") for flag in flags) else ["--formats=none"]
        planned = parse_plan([*flags, "--gpus_per_node=4", *formats])
        machine, source = find_machine(planned.settings), find_model(planned.train.model, weights=False)
        search(ClusterPlan(planned.train, source, 4, 4, machine), planned.settings.formats)
    except UserError as error:
        return str(error)
    return ""


def stage_memory(
    stage: StagePlan,
    *,
    tokens: int,
    documents: int = 1,
    longest: int | None = None,
    adapters: Sequence[int] = (0,),
    machine: Machine | None = None,
) -> StageMemory:
    """The bytes that a rank of a stage needs, if its largest micro-batch is this one."""
    step = step_memory(stage, LargestMicroBatch(tokens, documents, longest or tokens, (tuple(adapters),)))
    machine = machine or (H100 if stage.layout.on_gpu else CPU)
    return with_reserves(stage, held_memory(stage).plus(step), machine)


def step_parts(
    stages: Sequence[StagePlan], batches: Sequence[MicroBatchShape], links: Links, machine: Machine
) -> StepParts:
    """The time of a layout's stages on these micro-batches, each stage by itself."""

    def seconds_of(stage: StagePlan, batch: MicroBatchShape) -> tuple[Seconds, ...]:
        return tuple(map(Seconds.of, stage_terms(stage_work(stage, batch), stage, links, machine)))

    by_stage = [{batch: seconds_of(stage, batch) for batch in set(batches)} for stage in stages]
    sums = max(sum(term.seconds for term in sum_terms(stage, batches, links, machine)) for stage in stages)
    return StepParts(batches, by_stage, sums, machine["step"])


# Cuts of a list of layers into stages, for searching all --------------------------------------------------------------


def all_cuts(num_layers: int, num_stages: int) -> Iterator[list[range]]:
    """Every contiguous cut of layers 0 to num_layers - 1 whose stages each have a block."""
    blocks = set(range(1, num_layers - 1))
    for cuts in combinations(range(1, num_layers), num_stages - 1):
        stages = [range(a, b) for a, b in zip((0, *cuts), (*cuts, num_layers), strict=True)]
        if all(blocks & set(stage) for stage in stages):
            yield stages


def cost_key(costs: Sequence[float], stages: Sequence[range]) -> tuple[float, float]:
    """(largest cost of a stage, sum of squares): what is to be least, in this order."""
    sums = [sum(costs[index] for index in stage) for stage in stages]
    return max(sums), sum(value * value for value in sums)


# Orders of passes, of which the library has one -----------------------------------------------------------------------


FORWARD, BACKWARD = "F", "B"


class Pass(NamedTuple):
    """A forward or backward pass of one micro-batch through one part of the model; parts count from the embedding."""

    kind: str
    micro_batch: int
    part: int


Order = Sequence[Sequence[Pass]]
"""By rank, its passes one after another."""


def one_f_one_b(num_stages: int, num_micro_batches: int) -> list[list[Pass]]:
    """Forward passes until as many are in flight as stages follow, the own one included; then one back, one forward.

    It is the order of DeepSpeed's pipeline (0.19.8), which the trace of real steps shows.
    """
    orders = []
    for stage in range(num_stages):
        ahead = min(num_stages - stage, num_micro_batches)
        order = [Pass(FORWARD, index, stage) for index in range(ahead)]
        for index in range(num_micro_batches):
            order.append(Pass(BACKWARD, index, stage))
            if ahead + index < num_micro_batches:
                order.append(Pass(FORWARD, ahead + index, stage))
        orders.append(order)
    return orders


def simulate(order: Order, cost: Callable[[int, Pass], Any]) -> Any:
    """The time from the start to the end of the last pass of all ranks, if each pass runs as early as it can.

    A forward pass takes the result of the same micro-batch on the part before, a backward pass that of the part behind.

    Args:
        cost: of a pass on a rank, what it sends included.

    Raises:
        ValueError: the passes wait for each other in a circle.
    """
    num_parts = 1 + max(one.part for passes in order for one in passes)
    ends: dict[Pass, Any] = {}
    clocks: list[Any] = [0] * len(order)
    following = [0] * len(order)
    left = sum(map(len, order))
    while left:
        before = left
        for rank, passes in enumerate(order):
            while following[rank] < len(passes):
                one = passes[following[rank]]
                source = Pass(one.kind, one.micro_batch, one.part + (-1 if one.kind == FORWARD else 1))
                start = clocks[rank]
                if 0 <= source.part < num_parts:
                    if source not in ends:
                        break
                    start = max(start, ends[source])
                clocks[rank] = ends[one] = start + cost(rank, one)
                following[rank] += 1
                left -= 1
        if left == before:
            raise ValueError("the passes of this order wait for each other")
    return max(clocks)


def idle_shares(order: Order, cost: Callable[[int, Pass], Any]) -> list[Any]:
    """By rank, the share of a simulated step in which it waits."""
    seconds = simulate(order, cost)
    return [1 - sum(cost(rank, one) for one in passes) / seconds for rank, passes in enumerate(order)]
