"""The rule of `--learning_rate auto`: its table, how it depends on each argument, and its limits."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_tiedlora.adapters import learning_rates
from megatron_tiedlora.adapters.learning_rates import LARGEST, RULES, SMALLEST, auto_rate
from megatron_tiedlora.base.messages import UserError
from megatron_tiedlora.base.methods import METHODS

REFERENCE = {
    "rank": learning_rates.RANK_0,
    "scale": 1.0,
    "width": learning_rates.WIDTH_0,
    "num_layers": learning_rates.LAYERS_0,
    "num_linears": 1,
    "steps": learning_rates.STEPS_0,
}
# The exponent of each argument, for a method.
EXPONENTS: dict[str, Any] = {
    "rank": lambda rule: rule.rank,
    "scale": lambda rule: rule.scale,
    "width": lambda rule: rule.width,
    "num_layers": lambda rule: learning_rates.LAYERS,
    "num_linears": lambda rule: learning_rates.LINEARS,
    "steps": lambda rule: learning_rates.STEPS,
}


def rate_of(method: str, **changes: Any) -> float:
    return auto_rate(method, **{**REFERENCE, **changes})


def test_every_method_has_constants() -> None:
    assert list(RULES) == list(METHODS)


@pytest.mark.parametrize("method", RULES)
def test_the_reference_run_has_the_rate_of_the_table(method: str) -> None:
    assert rate_of(method) == float(f"{RULES[method].rate:.1e}")


@pytest.mark.parametrize("name", EXPONENTS)
@pytest.mark.parametrize("method", RULES)
def test_four_times_an_argument_changes_the_rate_by_its_exponent(method: str, name: str) -> None:
    """Two digits are given, so 5 % may be rounded away; and no exponent is below zero: larger is never faster."""
    exponent = EXPONENTS[name](RULES[method])
    assert 0 <= exponent <= 1
    found = rate_of(method, **{name: 4 * REFERENCE[name]})
    assert found == pytest.approx(RULES[method].rate * 4**-exponent, rel=0.1)
    assert found < rate_of(method) if exponent > 0.1 else found <= rate_of(method)


def test_a_rate_has_two_digits_and_is_within_limits() -> None:
    assert rate_of("lora", width=4096) == float(f"{rate_of('lora', width=4096):.1e}")
    assert rate_of("vera", steps=1, num_layers=1, scale=0.01) == LARGEST
    assert rate_of("tl1", steps=10**6, width=16384, scale=100.0) == SMALLEST


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize(("width", "layers"), [(4096, 32), (5120, 40)])
def test_a_long_run_of_lora_on_a_large_model_has_a_usual_rate(width: int, layers: int, scale: float) -> None:
    """7B and 13B, all linears, 500 to 3,000 steps: users take 1e-4 to 5e-4."""
    for steps in (500, 3000):
        rate = auto_rate("lora", rank=16, scale=scale, width=width, num_layers=layers, num_linears=4, steps=steps)
        assert 5e-5 <= rate <= 5e-4


def test_an_unknown_method_is_named() -> None:
    with pytest.raises(UserError, match=r"unknown method 'tl7' \(did you mean"):
        rate_of("tl7")
