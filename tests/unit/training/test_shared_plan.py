"""The plan that the adapters of a run share: whose stages they have, and what is rejected."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.config.settings import make_settings
from megatron_tiedlora.training.member_plans import shared_plan
from megatron_tiedlora.training.plan import RunPlan, plan_run


def plan_of(**changes: Any) -> RunPlan:
    settings = {"model": "llama2-7b", "ds_config": "zero0.json", **changes}
    return plan_run(make_settings(settings), rank=0, world_size=1, weights=False)


def test_the_stages_are_those_of_the_lowest_adapted_layer() -> None:
    plans = {"late": plan_of(layers=(30, 31)), "early": plan_of(layers=(2,)), "middle": plan_of(layers=(9, 20))}
    assert shared_plan(plans) is plans["early"]


@pytest.mark.parametrize("stage", [1, 2])
def test_zero_1_and_2_would_clip_all_together(stage: int) -> None:
    with pytest.raises(UserError, match=rf"zero{stage}.json: ZeRO-{stage} clips .* Use zero0.json, or zero3.json"):
        shared_plan({"a": plan_of(ds_config=f"zero{stage}.json")})
    shared_plan({"a": plan_of(ds_config="zero3.json")})
