"""Compute the learning rate of `--learning_rate auto` from a rule that was fitted on sweeps of small models.

The rule is a product of powers, relative to a reference run:

    rate = c (width / 576)^-w (rank / 8)^-r (alpha / rank)^-s (layers / 30)^-l linears^-t (steps / 96)^-p

c, w, r and s depend on the method (`RULES`); l, t and p do not. No model wider than 576 and no run of over 96 steps was
measured. For wider models w is at least `BEYOND`, and only longer runs have the factor of the steps. Both lower the
rate, because a rate that is too high does more harm than one that is too low. The data, the error of the rule and its
limits are in docs/sweeps.md; docs/study/fit_rates.py fits it.
"""

from typing import NamedTuple

from megatron_tiedlora.base.methods import find_method


class Rule(NamedTuple):
    """The constants of a method: the rate of the reference run, and the exponents of width, rank and alpha / rank."""

    rate: float
    width: float
    rank: float
    scale: float


RULES: dict[str, Rule] = {
    "lora": Rule(5.8e-3, 0.45, 0.5, 0.7),
    "vera": Rule(1.0e-1, 0.0, 0.0, 1.0),
    "tl1": Rule(1.3e-2, 0.5, 0.35, 1.0),
    "tl2": Rule(2.2e-2, 0.25, 0.1, 0.5),
    "tl3": Rule(2.0e-2, 0.25, 0.7, 1.0),
    "tl4": Rule(2.0e-2, 0.25, 0.7, 1.0),
    "tl5": Rule(1.1e-2, 0.25, 0.45, 0.7),
    "tl6": Rule(2.0e-2, 0.25, 0.15, 0.5),
}
LAYERS, LINEARS, STEPS = 0.25, 0.45, 0.25  # exponents that all methods share
BEYOND = 0.75  # least exponent of widths above WIDTH_0
WIDTH_0, RANK_0, LAYERS_0, STEPS_0 = 576, 8, 30, 96  # the reference run, with one adapted linear in each layer
SMALLEST, LARGEST = 1e-5, 3e-1  # limits of the result


def auto_rate(
    method: str, *, rank: int, scale: float, width: int, num_layers: int, num_linears: int, steps: int
) -> float:
    """Return the learning rate of `--learning_rate auto`, a number with two significant digits.

    Args:
        method: a name in `METHODS`.
        rank: r of A and B.
        scale: alpha / r.
        width: the hidden size of the base.
        num_layers: the number of adapted layers.
        num_linears: the number of adapted linears in each of these layers.
        steps: the optimizer steps of the run.

    Raises:
        UserError: the method is unknown.
    """
    own = RULES[find_method(method).name]
    of_width = max(own.width, BEYOND) if width > WIDTH_0 else own.width
    rate = own.rate * (width / WIDTH_0) ** -of_width * (rank / RANK_0) ** -own.rank * scale**-own.scale
    rate *= (num_layers / LAYERS_0) ** -LAYERS * num_linears**-LINEARS * max(1, steps / STEPS_0) ** -STEPS
    return float(f"{min(max(rate, SMALLEST), LARGEST):.1e}")
