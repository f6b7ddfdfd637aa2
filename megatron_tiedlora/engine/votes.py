"""What the ranks tell each other in every step, beside gradients."""

from __future__ import annotations

from typing import NamedTuple


class StepVotes(NamedTuple):
    """What a step sums over all ranks before weights move, one fp64 number each."""

    loss: float  # summed over supervised tokens
    seconds: float  # of the forward and backward passes
    save_due: float  # whether rank 0 wants a checkpoint after this step
    failed: float  # whether rank 0 has a failure to raise
    missing_gradients: float  # ranks that miss the gradient of a tied tensor
    stopping: float  # ranks that should stop
    signals: float  # sum of their signal numbers
