"""Cases of traffic tests, run on ranks; and what --dry_run's arithmetic predicts for each."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
from engine_runs import write_uneven_data
from forked_ranks import run_on_ranks
from tiny_models import write_tiny_model
from traffic_worker import Case, Counted, count_steps

from megatron_tiedlora.adapters.adapter_bank import ONLY
from megatron_tiedlora.parallel.groups import DATA, Traffic
from megatron_tiedlora.planning.adapter_plans import prepare_data
from megatron_tiedlora.planning.passes import engine_traffic, step_traffic
from megatron_tiedlora.planning.run_plan import RunPlan
from megatron_tiedlora.planning.step_plan import StepPlan

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
        "model": "five",
        "train_file": str(write_uneven_data(folder / "train.jsonl")),
        "validation_file": str(write_uneven_data(folder / "validation.jsonl", rows=4, seed=1)),
        "ds_config": "zero1.json",
        "dtype": "fp32",
        "rank": 3,
        "seed": 11,
        "max_length": 128,
        "packing": False,
        "global_batch_size": 8,
        "micro_batch_size": 2,
        "warmup_steps": 2,
        "max_steps": 10,
        "gradient_clipping": 0.05,
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
