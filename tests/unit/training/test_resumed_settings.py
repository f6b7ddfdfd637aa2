"""Settings of a checkpoint that contradict those of the run that continues it, and those that may differ."""

from __future__ import annotations

from typing import Any

import pytest
from support.native_files import checkpoint_of
from support.task_files import refusal

from megatron_tiedlora.adapters.learning_rates import RULES
from megatron_tiedlora.config.settings import make_settings
from megatron_tiedlora.planning.run_plan import RunPlan, plan_run
from megatron_tiedlora.training.finish import resumed_text
from megatron_tiedlora.training.start import check_resumed_settings, with_kept_values
from megatron_tiedlora.training.throughput import steps_over


def plan_of(**values: Any) -> RunPlan:
    settings = make_settings({"model": "llama2-7b", "train_file": "x", "dry_run": True, **values})
    return plan_run(settings, rank=0, world_size=1, weights=False)


def check(before: RunPlan, now: RunPlan, step: int = 4, without: str = "") -> None:
    """Continue a checkpoint of `before` after `step`, whose settings lack that one, with `now`."""
    saved = {**before.resolved_settings(), "data_sha256": "1"}
    if without:
        del saved[without]
    check_resumed_settings(now, checkpoint_of(saved, step), data_sha256="1")


@pytest.mark.parametrize(
    ("name", "value"),
    [("targets", "qkv,o_proj"), ("schedule", "linear"), ("beta1", 0.8), ("beta2", 0.99), ("dropout", 0.1)],
)
def test_another_value_of_a_setting_is_rejected(name: str, value: Any) -> None:
    before, now = plan_of(), plan_of(**{name: value})
    check(before, before)
    message = refusal(check, before, now)
    assert f"step_4: trained with --{name} " in message and f"but now it is {value}" in message


def test_a_setting_that_the_checkpoint_does_not_name_had_its_default() -> None:
    """One that came later."""
    before = plan_of(max_steps=100)
    check(before, plan_of(max_steps=100), without="beta1")
    now = plan_of(max_steps=100, beta1=0.8)
    assert "trained with --beta1 0.9, but now it is 0.8" in refusal(check, before, now, without="beta1")
    now = plan_of(max_steps=200)
    assert "--schedule cosine depends on --max_steps" in refusal(check, before, now, without="schedule")


def test_the_first_lines_say_where_packing_changes() -> None:
    """Not for a checkpoint that does not name it."""
    now = plan_of(packing=False)
    said = {saved: resumed_text(now, checkpoint_of({"packing": saved}, 4)) for saved in (True, False)}
    changed = " (--packing was true before, and is false now)"
    assert said == {True: f", resumed from step 4{changed}", False: ", resumed from step 4"}
    assert resumed_text(now, checkpoint_of({}, 4)) == ", resumed from step 4" and resumed_text(now, None) == ""


def test_a_constant_schedule_lets_a_run_continue() -> None:
    before = plan_of(schedule="constant", max_steps=100)
    check(before, plan_of(schedule="constant", max_steps=200))
    short = plan_of(schedule="constant", max_steps=60)
    check(before, short)
    assert "is at step 70, but --max_steps is 60; give at least 70" in refusal(check, before, short, step=70)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_another_schedule_says_which_one_would(schedule: str) -> None:
    before = plan_of(schedule=schedule, max_steps=100)
    message = refusal(check, before, plan_of(schedule=schedule, max_steps=200))
    assert "trained with --max_steps 100, but now it is 200" in message
    assert f"--schedule {schedule} depends on --max_steps" in message
    assert "--schedule constant" in message and "--init_from step_4" in message
    both = refusal(check, before, plan_of(schedule="constant", max_steps=200))
    assert f"--schedule {schedule} depends on --max_steps" in both


def test_epochs_count_by_their_steps() -> None:
    before = plan_of(epochs=3).counted(1000)
    assert before.settings.max_steps == 12
    check(before, plan_of(max_steps=12, warmup_steps=12))
    check(before, plan_of(epochs=3.07).counted(1000))
    assert "is 24 (--epochs 6)" in refusal(check, before, plan_of(epochs=6, warmup_steps=12).counted(1000))


def test_the_default_warm_up_of_a_longer_run_is_that_of_its_checkpoint() -> None:
    """20 steps have 20 of warm-up by default, 100 have 50; the 20 that were trained with stay."""
    before, now = plan_of(schedule="constant", max_steps=20), plan_of(schedule="constant", max_steps=100)
    saved = before.resolved_settings()
    assert (saved["warmup_steps"], now.settings.warmup_steps) == (20, 50)
    check(before, now)
    kept = with_kept_values(now, saved)
    assert (kept.settings.warmup_steps, kept.settings.max_steps) == (20, 100)
    check(before, kept)
    assert with_kept_values(now, None) == now
    by_epochs = plan_of(schedule="constant", epochs=30).counted(1000)
    assert by_epochs.settings.warmup_steps == 50
    check(before, by_epochs)
    assert with_kept_values(by_epochs, saved).settings.warmup_steps == 20
    short = plan_of(schedule="constant", max_steps=10)
    assert "with a warm-up of 20 steps, but --max_steps is 10; give at least 20" in refusal(check, before, short)


def test_another_warm_up_that_was_given_is_rejected() -> None:
    before = plan_of(schedule="constant", max_steps=20)
    given = plan_of(schedule="constant", max_steps=100, warmup_steps=50)
    assert with_kept_values(given, before.resolved_settings()) == given
    message = refusal(check, before, given)
    assert message.endswith("trained with --warmup_steps 20, but now it is 50; remove the flag, or give 20")
    check(before, plan_of(schedule="constant", max_steps=100, warmup_steps=20))


@pytest.mark.parametrize("value", [None, "x", True, -1, 2.5])
def test_a_warm_up_that_is_no_number_is_not_kept(value: Any) -> None:
    now = plan_of(schedule="constant", max_steps=100)
    assert with_kept_values(now, {"warmup_steps": value}) == now


def test_a_rate_by_the_rule_is_that_of_the_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule of a later version may have other constants, and a longer run another rate."""
    before = plan_of(schedule="constant", learning_rate="auto", max_steps=100)
    saved, rate = before.resolved_settings(), before.settings.learning_rate
    monkeypatch.setitem(RULES, "tl6", RULES["tl6"]._replace(rate=7e-3))
    for steps in (400, 100):
        now = plan_of(schedule="constant", learning_rate="auto", max_steps=steps)
        assert now.settings.learning_rate != rate
        check(before, now)
        assert with_kept_values(now, saved).settings.learning_rate == rate
    for value in (None, "auto", True, 0.0, float("inf")):
        assert with_kept_values(now, {"learning_rate": value}) == now
    given = plan_of(schedule="constant", learning_rate=5e-4, max_steps=100)
    assert with_kept_values(given, {"learning_rate": rate}) == given
    message = refusal(check, before, given)
    assert message.endswith(f"trained with --learning_rate {rate}, but now it is 0.0005; resume with the same value")


def test_profiled_steps_that_are_over_are_rejected() -> None:
    """But not with --resume auto, where one command serves every start of a job."""
    before = plan_of(max_steps=100)

    def now(resume: str, profile: str = "3:5") -> RunPlan:
        return plan_of(max_steps=100, profile=profile, resume=resume)

    message = refusal(check, before, now("step_4"))
    assert message == (
        "--profile 3:5: the run continues after step 4, so steps 3 to 4 are not recorded; give steps from 5 to 100"
    )
    assert refusal(check, before, now("step_100"), step=100).endswith("steps 3 to 5 are not recorded; omit --profile")
    check(before, now("step_4", "5:7"))
    check(before, now("auto"))
    assert steps_over("3:5", 3) == "--profile 3:5: the run continues after step 3, so step 3 is not recorded"
    assert steps_over("3:5", 2) == steps_over(None, 9) == ""


def test_where_it_is_reported_to_may_differ() -> None:
    check(plan_of(), plan_of(report_to="none", profile="5:6", resume="auto"))
