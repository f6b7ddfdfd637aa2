"""Cases of traffic tests: what ranks that train real steps through the package's own road count of what each of these
sends, and what --dry_run's arithmetic predicts for it.

`count_steps` runs on every rank (see forked_ranks.py) and takes cases one after another.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed

from megatron_tiedlora.adapters.adapter_groups import ONLY
from megatron_tiedlora.config.settings import make_settings
from megatron_tiedlora.parallel.groups import DATA, Traffic, TrafficCounter, named_handles
from megatron_tiedlora.planning.adapter_plans import prepare_data
from megatron_tiedlora.planning.passes import engine_traffic, step_traffic
from megatron_tiedlora.planning.planned import StepPlan
from megatron_tiedlora.planning.run_plan import RunPlan, plan_run
from support.bytes_touched import saved_bytes_per_token
from support.cases import Starts, grouped
from support.engine_runs import settings_of
from support.forked_ranks import join_as_launched, run_on_ranks
from support.shared_tensors import tl6_shares
from support.tiny_models import write_tiny_model

# On a rank ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A run of one adapter or of several, of which one step is counted.

    Attributes:
        adapters: the settings of each, by name; those of a single one under ONLY.
        shares_micro_batches: whether adapters share them.
        ends: adapters that take no step after the first.
        checked: whether the run's checks of replicas and gradients are on in all steps.
        extra_message: put one more all-reduce into every block's forward pass.
        head_rows: in place of layer_specs.HEAD_ROWS.
        long_steps: let every step count as a long one, in which ranks agree on stopping after each micro-batch.
        early_stop: False to let recompute go on when all that the backward pass needs is there again.
        steps_before: steps before the counted one; two of them with the run's checks of gradients.
        shares: in which way of `shared_tensors` layers share the tensors of tl6.
    """

    adapters: Mapping[str, dict[str, Any]]
    shares_micro_batches: bool = True
    ends: tuple[str, ...] = ()
    checked: bool = False
    extra_message: bool = False
    head_rows: int | None = None
    long_steps: bool = False
    early_stop: bool = True
    steps_before: int = 0
    shares: str | None = None

    @property
    def settings(self) -> dict[str, Any]:
        """Of the only adapter, or of the first."""
        return next(iter(self.adapters.values()))

    def plans(self, rank: int, ranks: int) -> dict[str, RunPlan]:
        """The plan of each adapter on a rank."""
        return {
            name: plan_run(make_settings(settings), rank=rank, world_size=ranks)
            for name, settings in self.adapters.items()
        }


@dataclass(frozen=True)
class Counted:
    """What a rank counted.

    Attributes:
        traffic: of the counted step.
        first: of the first step, which is the counted one if there is none before.
        shapes: (rows, length, supervised tokens, adapters) of the counted step's micro-batches.
        base_bytes: of the base parameters that the rank's stage was built with.
        saved_bytes_per_token: what its last block keeps for the backward pass, by storage, parameters left out; of a
            single adapter.
    """

    traffic: Traffic
    first: Traffic
    shapes: list[tuple[int, int, int, int]]
    base_bytes: int
    saved_bytes_per_token: float


def count_steps(cases: list[Case], folder: str) -> list[Counted]:
    """Every case on this rank."""
    device = join_as_launched(folder)
    found = []
    for case in cases:
        with tl6_shares(case.shares), pytest.MonkeyPatch.context() as patch:
            found.append(_count(case, device, patch))
    return found


def _count(case: Case, device: torch.device, patch: pytest.MonkeyPatch) -> Counted:
    from torch.utils.checkpoint import set_checkpoint_early_stop

    from megatron_tiedlora.data.tokenizer import padding_id
    from megatron_tiedlora.engine.engine import parameter_access
    from megatron_tiedlora.model import layer_specs
    from megatron_tiedlora.model.attention import Attention
    from megatron_tiedlora.planning.planned import micro_batch_capacity
    from megatron_tiedlora.runtime.stopping import StopRequests
    from megatron_tiedlora.training import build
    from megatron_tiedlora.training.step import GUARDED_STEPS, StepChecks, TrainStep

    plans = case.plans(distributed.get_rank(), distributed.get_world_size())
    data = {name: prepare_data(plan) for name, plan in plans.items()}
    of_attention, start_engine, of_base = Attention.steps, build._start_engine, list[float]()

    def with_extra_message(self: Any, hidden: Any, addend: Any, context: Any, parallel: Any, **keywords: Any) -> Any:
        distributed.all_reduce(torch.zeros(1), group=parallel.group.handle)
        return of_attention(self, hidden, addend, context, parallel, **keywords)

    def look(given: Any, model: Any, *others: Any) -> Any:
        plan, (stage, *_) = next(iter(plans.values())), model
        base = [p for name, p in stage.named_parameters() if name.startswith("layers.")]
        if plan.engine.zero_stage == 3:
            assert all(hasattr(parameter, "ds_id") for parameter in base), "partitioned as they are made, the head too"
        of_base.append(sum(parameter.numel() * parameter.element_size() for parameter in base))
        if ONLY in plans:  # the last block on a sequence of 256 tokens
            with parameter_access(plan.engine)(list(stage.parameters())):
                of_base.append(saved_bytes_per_token(stage, plan.dtype))
        return start_engine(given, model, *others)

    patch.setattr(torch.nn.functional, "linear", torch.nn.functional.linear)  # ZeRO-3 leaves its own behind
    patch.setattr(build, "_start_engine", look)
    if case.head_rows is not None:
        patch.setattr(layer_specs, "HEAD_ROWS", case.head_rows)
    if case.extra_message:
        patch.setattr(Attention, "steps", with_extra_message)
    with set_checkpoint_early_stop(case.early_stop):
        runner = build.build_model(plans, device).runner
        # On a busy machine the step before may have been a long one, after which ranks send a little more.
        long_seconds = 0.0 if case.long_steps else math.inf
        capacity = micro_batch_capacity(plans, shares=case.shares_micro_batches) if ONLY not in plans else 0
        step = TrainStep(plans, runner, StopRequests(), capacity=capacity, long_seconds=long_seconds)
        for name, plan in plans.items():
            assert case.checked or plan.settings.replica_check_steps == 0
            if not case.checked:
                made = step.checks[name] = StepChecks(runner, name, check_steps=0)
                if case.steps_before != GUARDED_STEPS and made._guard is not None:
                    made._guard.remove()
                    made._guard = None
        loaders = {
            name: plan.training_loader(data[name].train, pad_id=padding_id(data[name].tokenizer))
            for name, plan in plans.items()
        }
        shapes, accumulate, counted = list[tuple[int, int, int, int]](), runner.accumulate, list[Traffic]()

        def seen(batches: Any, *arguments: Any) -> dict[str, float]:
            shapes[:] = [(*batch.tokens.shape, batch.num_supervised, len(batch.segments)) for batch in batches]
            return accumulate(batches, *arguments)

        runner.accumulate = seen  # type: ignore[method-assign]
        for number in range(1 + case.steps_before):
            steps = {name: next(loader) for name, loader in loaders.items() if not number or name not in case.ends}
            with TrafficCounter(named_handles(runner.groups)) as counter:
                report = step.run(steps)
            assert all(own.failure is None for own in report.adapters.values()), report
            counted.append(counter.traffic)
    patch.undo()
    runner.engine.destroy()
    return Counted(counted[-1], counted[0], shapes, int(of_base[0]), float(sum(of_base[1:])))


# Starts and predictions -----------------------------------------------------------------------------------------------


# ZeRO sections beside those of ds_configs/.
ENGINES: dict[str, dict[str, Any]] = {
    "small1": {"stage": 1, "reduce_bucket_size": 300},
    "parted3": {"stage": 3, "reduce_bucket_size": 1000000, "stage3_param_persistence_threshold": 1000},
}


@dataclass(frozen=True)
class Ran:
    """A case and what its ranks counted."""

    case: Case
    counted: list[Counted]

    def plan(self, rank: int) -> RunPlan:
        """The plan of the rank's only adapter, or of its first, made without starting it."""
        return next(iter(self.case.plans(rank, len(self.counted)).values()))

    def step_plan(self, rank: int) -> StepPlan:
        """The plan of the counted step, from settings and data alone."""
        plans, samples = self.case.plans(rank, len(self.counted)), {}
        for name, plan in plans.items():
            if name not in self.case.ends:
                train = prepare_data(plan).train
                consumed = self.case.steps_before * plan.batches.global_batch_size
                samples[name] = train, plan.global_batch(train, consumed_samples=consumed)
        return StepPlan(plans, self.case.shares_micro_batches, samples)

    def predicted(self, rank: int) -> tuple[Traffic, int]:
        """Of the counted step, from settings and data alone: our messages, and the most that DeepSpeed sends."""
        plan = self.step_plan(rank)
        stage = plan.stages[plan.shared.grid.pp_rank]
        _, most = engine_traffic(stage, num_micro_batches=len(plan.batches)).of_group(DATA)
        return step_traffic(stage, plan.batches), most

    def check(self, rank: int) -> None:
        """Our messages are those that are predicted; DeepSpeed's bytes are too, and at most those under ZeRO-3."""
        (predicted, most), counted, layout = self.predicted(rank), self.counted[rank].traffic, self.plan(rank).layout
        if not layout.engine_steps and layout.zero_stage < 3:
            assert counted == predicted and not most, rank
            return
        assert ours(counted) == ours(predicted), rank
        size = counted.of_group(DATA)[1] - predicted.of_group(DATA)[1]
        assert size == most or (layout.zero_stage == 3 and 0 < size < most), (rank, size, most)


def ours(traffic: Traffic) -> Traffic:
    """What is sent in all groups but the data-parallel one, which is DeepSpeed's alone if it steps the adapter."""
    found = Traffic()
    for (group, kind), count in traffic.messages.items():
        if group != DATA:
            found.messages[group, kind], found.bytes[group, kind] = count, traffic.bytes[group, kind]
    return found


def write_inputs(folder: Path) -> dict[str, Any]:
    """Write models, data and engine settings, which cases name, to `folder`; returns settings that all cases share."""
    shape: dict[str, Any] = {"num_heads": 8, "num_kv_heads": 4, "head_dim": 6, "vocab_size": 321}
    for name, number in {"three": 3, "four": 4, "five": 5}.items():
        write_tiny_model(folder / name, num_layers=number, **shape)
    for name, number in {"olmo2 three": 3, "olmo2 four": 4}.items():
        write_tiny_model(folder / name, num_layers=number, family="olmo2", **shape)
    write_tiny_model(folder / "tied", num_layers=3, tied=True, attention_bias=True, **shape)
    for name, section in ENGINES.items():
        (folder / name).write_text(json.dumps({"zero_optimization": section}))
    write_even_data(folder / "even.jsonl")
    return {
        **settings_of(Path("five"), folder),
        "ds_config": "zero1.json",
        "packing": False,
        "max_steps": 10,
        "replica_check_steps": 0,
    }


def write_even_data(path: Path, *, rows: int = 64) -> Path:
    """Different samples of 64 tokens (the tokenizer's, a letter each), 32 of which are supervised."""
    with path.open("w", encoding="utf-8") as stream:
        for index in range(rows):
            row = {"prompt": f"{index:031}", "completion": f"{index:030}"}
            stream.write(json.dumps(row) + "\n")
    return path


def run_cases(
    changes: Mapping[str, dict[str, Any]], base: Mapping[str, Any], folder: Path, *, ranks: int
) -> dict[str, Ran]:
    """Every case of `changes` (to `base`, or a field of Case), by name, in one start of `ranks` ranks.

    Args:
        changes: where several adapters are trained, `adapters` has what each of them changes.
        folder: where `write_inputs` has been.
    """
    extras = {field.name for field in fields(Case)} - {"adapters"}
    cases = []
    for change in changes.values():
        shared = {name: value for name, value in change.items() if name not in {*extras, "adapters"}}
        adapters = {name: {**base, **own, **shared} for name, own in change.get("adapters", {ONLY: {}}).items()}
        for settings in adapters.values():
            for name in ("model", "train_file", "ds_config"):  # by their names in `folder`, where they are there
                if (folder / settings[name]).exists():
                    settings[name] = str(folder / settings[name])
        cases.append(Case(adapters, **{name: value for name, value in change.items() if name in extras}))
    start = folder / f"start{len([*folder.glob('start*')])}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MEGATRON_TIEDLORA_CACHE", str(folder / "cache"))
        counted = run_on_ranks(count_steps, cases, str(folder), ranks=ranks, folder=start)
    return {name: Ran(cases[index], [by_case[index] for by_case in counted]) for index, name in enumerate(changes)}


def starts(
    changes: Mapping[int, Mapping[str, dict[str, Any]]], base: Mapping[str, Any], folder: Path, slow: Collection[str]
) -> Starts[str, Ran]:
    """What the cases give, by name; the slow ones and the others are started apart.

    Args:
        changes: by the number of ranks, as for `run_cases`.
        slow: names of cases that are run by hand.
    """
    by_name = {name: (ranks, case) for ranks, cases in changes.items() for name, case in cases.items()}

    def run(names: Sequence[str]) -> list[Ran]:
        ranks = by_name[names[0]][0]
        found = run_cases({name: by_name[name][1] for name in names}, base, folder, ranks=ranks)
        return [found[name] for name in names]

    return Starts(grouped(by_name, lambda name: (by_name[name][0], name in slow)), run)
