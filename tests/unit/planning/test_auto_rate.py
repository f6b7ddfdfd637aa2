"""--learning_rate auto: a number once the run is planned, by its adapter, model and steps; and what is printed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.native_files import with_adapter
from support.run_helpers import write_adapters
from support.task_files import refusal
from support.tiny_models import write_tiny_model

from megatron_tiedlora.adapters.learning_rates import auto_rate
from megatron_tiedlora.checkpoint.native_adapter import save_adapter
from megatron_tiedlora.config.settings import make_settings
from megatron_tiedlora.planning.adapter_plans import plan_adapters
from megatron_tiedlora.planning.report import dry_run_report
from megatron_tiedlora.planning.run_plan import RunPlan, plan_run

SEVEN_B = {"width": 4096, "num_layers": 32, "num_linears": 1, "scale": 1.0, "steps": 2000}


def plan_of(model: str | Path = "llama2-7b", **changes: Any) -> RunPlan:
    settings = {"model": str(model), "dry_run": True, "plan_for": "cpu", "learning_rate": "auto", **changes}
    return plan_run(make_settings(settings), rank=0, world_size=1, weights=False)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"method": "lora"}, {}),
        ({"method": "tl6", "rank": 2}, {"rank": 2}),
        ({"method": "tl3", "alpha": 32}, {"scale": 4.0}),
        ({"method": "tl1", "layers": "8,9", "targets": "all"}, {"num_layers": 2, "num_linears": 4}),
        ({"method": "vera", "max_steps": 9, "model": "llama2-13b"}, {"steps": 9, "width": 5120, "num_layers": 40}),
    ],
    ids=str,
)
def test_the_rate_is_that_of_the_rule(changes: dict[str, Any], expected: dict[str, Any]) -> None:
    plan = plan_of(**changes)
    rate = auto_rate(changes["method"], **{"rank": 8, **SEVEN_B, **expected})
    assert plan.settings.learning_rate == rate == plan.auto_rate
    assert plan.resolved_settings()["learning_rate"] == rate and isinstance(rate, float)


def test_the_steps_of_epochs_count() -> None:
    few, many = (plan_of(train_file="x", epochs=epochs).counted(25600) for epochs in (1, 16))
    assert (few.settings.max_steps, many.settings.max_steps) == (100, 1600)
    for plan in (few, many):
        assert plan.settings.learning_rate == plan.auto_rate == plan_of(max_steps=plan.settings.max_steps).auto_rate
    assert few.auto_rate > many.auto_rate
    assert plan_of(train_file="x", epochs=1, learning_rate=1e-3).counted(25600).settings.learning_rate == 1e-3


def test_an_adapter_that_is_trained_further_decides(tmp_path: Path) -> None:
    """Its method, rank, alpha and layers are not among the settings that were given."""
    model = write_tiny_model(tmp_path / "model")
    _, native, _ = with_adapter(model, "vera", (2, 3), targets=("qkv", "down_proj"))
    save_adapter(tmp_path / "start", native)
    plan = plan_of(model, init_from=str(tmp_path / "start"), train_file="x")
    own, width = native.config, plan.source.shape.hidden_size
    expected = {"rank": own.rank, "scale": own.scale, "width": width, "num_layers": 2, "num_linears": 2, "steps": 2000}
    assert plan.settings.learning_rate == auto_rate("vera", **expected)


def test_each_entry_of_a_file_has_its_own_rate(tmp_path: Path) -> None:
    entries = {"a": {"learning_rate": "auto", "method": "lora"}, "b": {"method": "vera"}, "c": {"learning_rate": 0.5}}
    file = write_adapters(tmp_path / "adapters.yaml", entries)
    given = {"model": "llama2-7b", "adapters": str(file), "dry_run": True, "plan_for": "cpu"}
    for shared, rest in (({}, 1e-4), ({"learning_rate": "auto"}, plan_of(method="vera").auto_rate)):
        settings = make_settings({**given, **shared})
        plans = plan_adapters(settings, rank=0, world_size=1, weights=False)
        rates = {name: plan.settings.learning_rate for name, plan in plans.items()}
        assert rates == {"a": plan_of(method="lora").auto_rate, "b": rest, "c": 0.5}
        lines = dry_run_report(settings).text.splitlines()
        for name, plan in plans.items():
            assert any(line.split()[:1] == [name] and plan.rate_in_words in line for line in lines), name


def test_a_report_says_the_rate_and_what_the_rule_would_take() -> None:
    auto = plan_of()
    rate = f"{auto.auto_rate:g}"
    default = make_settings({"model": "llama2-7b", "dry_run": True, "plan_for": "cpu"})
    line = f"  learning rate 0.0001 by default (--learning_rate auto: {rate})"
    assert line in dry_run_report(default).text.splitlines()
    assert auto.rate_in_words == f"{rate} (auto)" and plan_of(learning_rate=1e-4).rate_in_words == "0.0001"


@pytest.mark.parametrize(
    ("value", "problem"),
    [("automatic", "a valid number"), ("aut", "a valid number"), (0, "greater than 0"), ("inf", "a finite number")],
)
def test_another_value_is_rejected_with_both_kinds_that_are_known(value: Any, problem: str) -> None:
    message = refusal(make_settings, {"learning_rate": value})
    assert message.startswith(f"--learning_rate {value}: input should be {problem}")
    assert "or input should be 'auto'" in message and ("did you mean auto?" in message) == (str(value)[0] == "a")
