"""Settings of a checkpoint that contradict those of the run that continues it, and those that may differ."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_tiedlora.base.errors import UserError
from megatron_tiedlora.config.settings import make_settings
from megatron_tiedlora.training.plan import RunPlan, plan_run
from megatron_tiedlora.training.resumed import check_resumed_settings


def plan_of(**values: Any) -> RunPlan:
    settings = make_settings({"model": "llama2-7b", "train_file": "x", "dry_run": True, **values})
    return plan_run(settings, rank=0, world_size=1, weights=False)


def check(before: RunPlan, now: RunPlan, *, step: int = 4, without: tuple[str, ...] = ()) -> None:
    """Continue a checkpoint of `before`, whose settings lack those named, with `now`."""
    saved = {**before.resolved_settings(), "data_sha256": "1"}
    for name in without:
        del saved[name]
    check_resumed_settings(now, saved, step=step, data_sha256="1", source="step_4")


def refusal(before: RunPlan, now: RunPlan, **keywords: Any) -> str:
    with pytest.raises(UserError) as error:
        check(before, now, **keywords)
    return str(error.value)


@pytest.mark.parametrize("earlier", [False, True])
def test_other_targets_are_rejected(earlier: bool) -> None:
    """A checkpoint of an earlier version, whose settings have no targets, is one of QKV alone."""
    before, now = plan_of(targets="qkv"), plan_of(targets="qkv,o_proj")
    without = ("targets",) if earlier else ()
    check(before, before, without=without)
    assert "step_4: trained with --targets qkv, but now it is qkv,o_proj" in refusal(before, now, without=without)


@pytest.mark.parametrize(("name", "value"), [("schedule", "linear"), ("beta1", 0.8), ("beta2", 0.99), ("dropout", 0.1)])
def test_a_checkpoint_of_an_earlier_version_has_the_defaults(name: str, value: Any) -> None:
    before = plan_of()
    check(before, before, without=(name,))
    assert f"trained with --{name}" in refusal(before, plan_of(**{name: value}), without=(name,))


def test_a_constant_schedule_lets_a_run_go_on() -> None:
    before = plan_of(schedule="constant", max_steps=100)
    check(before, plan_of(schedule="constant", max_steps=200))
    check(before, plan_of(schedule="constant", max_steps=60))
    assert "is of step 70, after 60; give at least 70" in refusal(
        before, plan_of(schedule="constant", max_steps=60), step=70
    )


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_another_schedule_says_which_one_would(schedule: str) -> None:
    before = plan_of(schedule=schedule, max_steps=100)
    message = refusal(before, plan_of(schedule=schedule, max_steps=200))
    assert "trained with --max_steps 100, but now it is 200" in message
    assert f"--schedule {schedule} reaches 0" in message
    assert "--schedule constant" in message and "--init_from step_4" in message
    both = refusal(before, plan_of(schedule="constant", max_steps=200))
    assert f"--schedule {schedule} reaches 0" in both


def test_epochs_count_by_their_steps() -> None:
    before = plan_of(epochs=3).counted(1000)
    assert before.settings.max_steps == 12
    check(before, plan_of(max_steps=12, warmup_steps=12))
    check(before, plan_of(epochs=3.07).counted(1000))
    assert "is 24 (--epochs 6)" in refusal(before, plan_of(epochs=6, warmup_steps=12).counted(1000))


def test_where_it_is_reported_to_may_differ() -> None:
    check(plan_of(), plan_of(report_to="none", profile="3:4"))
