"""Plans of tools/plan.py in this process, for small models and clusters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.checkpoint.sources import ModelSource, find_model
from megatron_tiedlora.config.cli import parse_settings
from megatron_tiedlora.config.plan_settings import parse_plan
from megatron_tiedlora.config.settings import Settings, make_settings
from megatron_tiedlora.planning.adapter_plans import plan_adapters
from megatron_tiedlora.planning.cluster_report import find_machine
from megatron_tiedlora.planning.layout import Batches, MicroBatchShape, StagePlan
from megatron_tiedlora.planning.machines import GPUS, Constant, Machine, default_machine
from megatron_tiedlora.planning.memory import StageMemory, held_memory, step_memory, with_reserves
from megatron_tiedlora.planning.passes import stage_work
from megatron_tiedlora.planning.planned import Cluster
from megatron_tiedlora.planning.search import Candidate, ClusterPlan, search
from megatron_tiedlora.planning.step_plan import StepPlan
from megatron_tiedlora.planning.step_time import (
    Links,
    Order,
    Pass,
    Seconds,
    StepParts,
    simulate,
    stage_terms,
    sum_terms,
)

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
    return with_reserves(stage, held_memory(stage).plus(step.largest.step_memory(stage)), machine)


def searched(*flags: str, source: ModelSource, ranks: int, per_node: int = 8, machine: Machine = H100) -> ClusterPlan:
    """All layouts of a cluster."""
    command = parse_plan([f"--model={source.name}", *flags])
    cluster = Cluster(ranks, per_node, machine)
    return search(command.train, cluster, source=source, formats=command.settings.formats)


def the_only(*flags: str, source: ModelSource, ranks: int, per_node: int = 8, machine: Machine = H100) -> Candidate:
    """The one layout that the flags leave."""
    plan = searched(*flags, source=source, ranks=ranks, per_node=per_node, machine=machine)
    (candidate,) = plan.candidates
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
        cluster = Cluster(4, 4, find_machine(planned.settings))
        source = find_model(planned.train.model, weights=False)
        search(planned.train, cluster, source=source, formats=planned.settings.formats)
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
    step = step_memory(stage, tokens=tokens, documents=documents, longest=longest or tokens, adapters=adapters)
    machine = machine or default_machine(on_gpu=stage.layout.on_gpu)
    return with_reserves(stage, held_memory(stage).plus(step), machine)


def idle_shares(order: Order, cost: Callable[[int, Pass], Any]) -> list[Any]:
    """By rank, the share of a simulated step in which it waits."""
    seconds = simulate(order, cost)
    return [1 - sum(cost(rank, one) for one in passes) / seconds for rank, passes in enumerate(order)]


def step_parts(stages: Sequence[StagePlan], batches: Batches, links: Links, machine: Machine) -> StepParts:
    """The time of a layout's stages on these micro-batches, each stage by itself."""

    def seconds_of(stage: StagePlan, batch: MicroBatchShape) -> tuple[Seconds, Seconds]:
        forward, backward = stage_terms(stage_work(stage, batch), stage, links, machine)
        return Seconds.of(forward), Seconds.of(backward)

    by_stage = [[seconds_of(stage, batch) for batch in batches.kinds] for stage in stages]
    sums = max(sum(term.seconds for term in sum_terms(stage, batches, links, machine)) for stage in stages)
    return StepParts(batches, by_stage, sums, machine["step"])
