"""The rule of `--learning_rate auto`: its table, how it depends on each argument, and its limits."""

from __future__ import annotations

from typing import Any

import pytest
from support.task_files import refusal

from megatron_tiedlora.adapters import learning_rates
from megatron_tiedlora.adapters.learning_rates import LARGEST, RULES, SMALLEST, auto_rate
from megatron_tiedlora.base.methods import METHODS

REFERENCE = {
    "rank": learning_rates.RANK_0,
    "scale": 1.0,
    "width": learning_rates.WIDTH_0,
    "num_layers": learning_rates.LAYERS_0,
    "num_linears": 1,
    "steps": learning_rates.STEPS_0,
}
SHARED = {"num_layers": learning_rates.LAYERS, "num_linears": learning_rates.LINEARS, "steps": learning_rates.STEPS}


def rate_of(method: str, **changes: Any) -> float:
    return auto_rate(method, **{**REFERENCE, **changes})


@pytest.mark.parametrize("method", METHODS)
def test_the_reference_run_has_the_rate_of_the_table(method: str) -> None:
    assert rate_of(method) == float(f"{RULES[method].rate:.1e}")


@pytest.mark.parametrize("name", REFERENCE)
@pytest.mark.parametrize("method", RULES)
def test_four_times_an_argument_changes_the_rate_by_its_exponent(method: str, name: str) -> None:
    """Two digits are given, so 5 % may be rounded away; and no exponent is below zero: larger is never faster."""
    exponent = SHARED[name] if name in SHARED else getattr(RULES[method], name)
    exponent = max(exponent, learning_rates.BEYOND) if name == "width" else exponent
    assert 0 <= exponent <= 1
    found = rate_of(method, **{name: 4 * REFERENCE[name]})
    assert found == pytest.approx(RULES[method].rate * 4**-exponent, rel=0.1)
    assert found < rate_of(method) if exponent > 0.1 else found <= rate_of(method)


@pytest.mark.parametrize("method", RULES)
def test_what_was_measured_has_no_lower_rate_than_the_method(method: str) -> None:
    """Widths have the exponent of the method, and short runs have the rate of the reference."""
    assert rate_of(method, steps=12) == rate_of(method)
    narrow = rate_of(method, width=learning_rates.WIDTH_0 // 9)
    assert narrow == pytest.approx(rate_of(method) * 9 ** RULES[method].width, rel=0.1)


def test_a_rate_has_two_digits_and_is_within_limits() -> None:
    assert rate_of("lora", width=4096) == float(f"{rate_of('lora', width=4096):.1e}")
    assert rate_of("vera", steps=1, num_layers=1, scale=0.01) == LARGEST
    assert rate_of("tl1", steps=10**6, width=16384, scale=100.0) == SMALLEST


@pytest.mark.parametrize("steps", [500, 3000])
@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize(("width", "layers"), [(4096, 32), (5120, 40)])
def test_lora_on_a_large_model_has_a_usual_rate(width: int, layers: int, scale: float, steps: int) -> None:
    """7B and 13B, all linears: users take 1e-4 to 5e-4."""
    shape = {"width": width, "num_layers": layers, "num_linears": 4, "steps": steps}
    assert 5e-5 <= rate_of("lora", rank=16, scale=scale, **shape) <= 5e-4


def test_an_unknown_method_is_named() -> None:
    assert "unknown method 'tl7' (did you mean" in refusal(rate_of, "tl7")
