"""The plan that the adapters of a run share: whose stages they have, and what is rejected."""

from __future__ import annotations

import re
from typing import Any

import pytest

from megatron_tiedlora.base.errors import UserError, count_text
from megatron_tiedlora.config.settings import make_settings
from megatron_tiedlora.planning.adapter_plans import check_clipping, shared_plan
from megatron_tiedlora.planning.report import dry_run_report
from megatron_tiedlora.planning.run_plan import RunPlan, plan_run


def plan_of(**changes: Any) -> RunPlan:
    settings = {"model": "llama2-7b", "ds_config": "zero0.json", **changes}
    return plan_run(make_settings(settings), rank=0, world_size=1, weights=False)


def test_the_stages_are_those_of_the_lowest_adapted_layer() -> None:
    plans = {"late": plan_of(layers=(30, 31)), "early": plan_of(layers=(2,)), "middle": plan_of(layers=(9, 20))}
    assert shared_plan(plans) is plans["early"]


@pytest.mark.parametrize("stage", [1, 2])
def test_zero_1_and_2_would_clip_all_together(stage: int) -> None:
    with pytest.raises(UserError, match=rf"zero{stage}.json: ZeRO-{stage} clips .* Use zero0.json, or zero3.json"):
        check_clipping(plan_of(ds_config=f"zero{stage}.json"))
    check_clipping(plan_of(ds_config="zero3.json"))


# How many ranks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("world_size", "layout", "words"),
    [
        (1, {"tensor_parallel": 2}, "1 rank is not a multiple of --tensor_parallel 2 x --pipeline_parallel 1. Start 2"),
        (3, {"pipeline_parallel": 2}, "3 ranks are not a multiple of --tensor_parallel 1 x --pipeline_parallel 2."),
    ],
)
def test_too_few_ranks_are_told_both_ways_to_have_more(world_size: int, layout: dict[str, int], words: str) -> None:
    settings = make_settings({"model": "llama2-7b", "ds_config": "zero1.json", **layout})
    with pytest.raises(UserError) as caught:
        plan_run(settings, rank=0, world_size=world_size)
    ranks, said = world_size + 1, str(caught.value)
    assert said.startswith(words)
    assert f"`--dry_run --world_size {ranks}` plans without ranks, `tiedlora run --num_gpus {ranks} ...` starts" in said


def test_one_rank_and_one_step_are_no_plural() -> None:
    settings = make_settings({"model": "tiny", "dry_run": True, "max_steps": 1, "global_batch_size": 1})
    report = dry_run_report(settings).text
    assert "1 rank = tensor 1" in report and "1 data-parallel rank," in report and "  1 step, " in report
    assert not re.findall(r"\b1 (?:ranks|steps|rows|samples|data-parallel ranks|micro-batches)\b", report)
    assert [count_text(1, "micro-batch"), count_text(1200, "micro-batch")] == ["1 micro-batch", "1,200 micro-batches"]
