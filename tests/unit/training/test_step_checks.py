"""Which reason a run whose gradients are all zero is given: a huge step before, or a tensor that was never trained."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from megatron_tiedlora.training.step import StepChecks, before_steps


def checks(largest: list[float], *, of_values: float) -> StepChecks:
    """Checks that have seen step 1, whose gradients by tensor were `largest`, before step 2 with none but zeros."""
    own: Any = object.__new__(StepChecks)
    guard = SimpleNamespace(
        missing=list,
        sizes=lambda: (0.0, of_values),
        largest=lambda: largest,
        labels=lambda: ["A", "B", "v of layer 1"],
        remove=lambda: None,
    )
    own._adapter = SimpleNamespace(part=SimpleNamespace(layers=(1,)))
    own._check_steps, own._steps, own._guarded_steps, own._guard = 0, 1, 2, guard
    return own


@pytest.mark.parametrize(
    ("largest", "of_values", "said"),
    [
        ([0.0, 0.0, 2.0], 100.0, "every gradient is exactly zero, as values of the adapter have grown to 100; this"),
        ([0.0, 0.0, 2.0], 0.0, "every gradient is exactly zero, as values of the adapter have grown; this step"),
        ([0.0, 0.0, 0.0], 100.0, "the gradient of A, B, v of layer 1 has been exactly zero since the run's start"),
    ],
)
def test_what_is_said_of_zeros(largest: list[float], of_values: float, said: str) -> None:
    both = {"a": (checks([1.0, 1.0, 1.0], of_values=1.0), 7), "b": (checks(largest, of_values=of_values), 2)}
    failed = before_steps(both, missing={}, ranks_missing={"a": 0.0, "b": 0.0})
    assert failed.keys() == {"b"} and str(failed["b"]).startswith(f"step 2: {said}")
    assert all(own._guard is None and own._steps == 2 for own, _ in both.values())


def test_a_missing_gradient_is_said_of_its_adapter_alone() -> None:
    """Even after the guarded steps, as the sums over ranks find it too."""
    both = {"a": (checks([1.0, 1.0, 1.0], of_values=1.0), 7), "b": (checks([1.0, 1.0, 1.0], of_values=1.0), 2)}
    for own, _ in both.values():
        own._guard = None
    failed = before_steps(both, missing={"b": ["v", "B"]}, ranks_missing={"a": 0.0, "b": 1.0})
    text = "step 2: no gradient reaches v, B from the stage with adapted layers 1; this step changed nothing"
    assert {name: str(failure) for name, failure in failed.items()} == {"b": text}
