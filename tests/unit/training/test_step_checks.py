"""Which reason a run whose gradients are all zero is given: a huge step before, or a tensor that was never trained."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from megatron_tiedlora.training.checks import RunFailed, StepChecks


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
    adapter = SimpleNamespace(part=SimpleNamespace(layers=(1,)))
    own._runner = SimpleNamespace(missing_gradients=[], adapter=adapter)
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
    with pytest.raises(RunFailed) as raised:
        checks(largest, of_values=of_values).before_step(2)
    assert str(raised.value).startswith(f"step 2: {said}")
